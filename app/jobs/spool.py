"""The spool: what happened in an attempt, in records that a kill leaves whole. Knows no meaning."""

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app.numbers import name_non_finite

# A record: bytes after these two fields, their CRC-32; attempt, sequence, kind, payload.
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IQB")
_KINDS = (
    "start",
    "state",
    "metrics",
    "layers",
    "proof",
    "checkpoint",
    "checkpoint_deleted",
    "freeze",
    "inspection",
)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS, start=1)}
_MEASURES = ("grad_norm", "update_norm", "weight_norm")
MAX_RECORD_BYTES = 64 * 2**20


class Record(NamedTuple):
    """One thing that happened, in the shape in which the loop emitted it."""

    attempt: int
    sequence: int
    kind: str
    payload: dict[str, Any]


class BadRecord(ValueError):
    """A record that is whole, and yet nothing that a loop writes."""

    def __init__(self, sequence: int, kind: str, why: str) -> None:
        super().__init__(f"Record {sequence} ({kind}) of telemetry.spool: {why}.")


class SpoolWriter:
    """Appends records to a spool: one write each, so that a kill leaves at most a torn last one."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._attempt = attempt
        self._end, last = _find_end(path)
        self._sequence = last + 1
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._descriptor, self._end)

    def append(self, kind: str, payload: Mapping[str, Any]) -> None:
        """Record what happened.

        Raises:
            OSError: it could not be written (a full disk); the spool is as before.
        """
        number = _NUMBERS[kind]
        packed = _pack_layers(payload) if kind == "layers" else _pack_json(payload)
        body = _HEADER.pack(self._attempt, self._sequence, number) + packed
        assert len(body) <= MAX_RECORD_BYTES, f"a record of {len(body)} bytes"
        record = _FRAME.pack(len(body), zlib.crc32(body)) + body
        written = os.write(self._descriptor, record)
        if written < len(record):
            os.ftruncate(self._descriptor, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "telemetry.spool")
        self._end += written
        self._sequence += 1

    def close(self) -> None:
        """Bring everything to the disk and let go."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def read_spool(
    path: Path,
    offset: int = 0,
    limit_bytes: int = 4 * 2**20,
    check: Callable[[Record], None] | None = None,
) -> tuple[list[Record], int]:
    """Read the whole records from ``offset`` on, about ``limit_bytes`` of them.

    Args:
        check: raises BadRecord for one that is not to be believed.

    Returns:
        The records, and the offset behind them. It stops before the first record that is torn (its
        writer is in the middle of it, or was killed there) or corrupt: the offset stays in front.

    Raises:
        BadRecord: the one at ``offset`` is whole, and nothing that a loop writes. Where there are
            good ones before it they come first, and it is raised by the next call.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit_bytes)
            if len(data) >= _FRAME.size:
                missing = _FRAME.size + _FRAME.unpack_from(data)[0] - len(data)
                if 0 < missing <= MAX_RECORD_BYTES:  # one record above the limit still comes whole
                    data += file.read(missing)
    except FileNotFoundError:
        return [], offset
    records: list[Record] = []
    position = 0
    try:
        while found := _unpack_record(data, position):
            if check is not None:
                check(found[0])
            records.append(found[0])
            position = found[1]
    except BadRecord:
        if not records:
            raise
    return records, offset + position


def _unpack_record(data: bytes, start: int) -> tuple[Record, int] | None:
    body_start = start + _FRAME.size
    if body_start > len(data):
        return None
    length, checksum = _FRAME.unpack_from(data, start)
    body = memoryview(data)[body_start : body_start + length]
    if len(body) < max(length, _HEADER.size) or zlib.crc32(body) != checksum:
        return None
    attempt, sequence, number = _HEADER.unpack_from(body)
    if not 0 < number <= len(_KINDS):
        raise BadRecord(sequence, str(number), "there is no such kind")
    kind = _KINDS[number - 1]
    payload = body[_HEADER.size :]
    try:
        decoded = _unpack_layers(payload) if kind == "layers" else _unpack_json(kind, payload)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise BadRecord(sequence, kind, f"it cannot be read: {error!r}") from error
    return Record(attempt, sequence, kind, decoded), body_start + length


def _find_end(path: Path) -> tuple[int, int]:
    """The offset behind the last whole record, and that record's sequence number (0: none)."""
    offset = sequence = 0
    while True:
        records, offset = read_spool(path, offset)
        if not records:
            return offset, sequence
        sequence = records[-1].sequence


def _pack_json(payload: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(payload, allow_nan=False).encode()
    except ValueError:  # a loss that exploded; rare, so that every other record pays nothing for it
        return json.dumps(name_non_finite(payload), allow_nan=False).encode()


def _unpack_json(kind: str, packed: memoryview) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(bytes(packed))
    if not isinstance(payload, dict):
        raise TypeError("no object")
    if kind == "metrics":
        values = payload["values"]
        payload["values"] = {
            name: float(value) if isinstance(value, str) else value
            for name, value in values.items()
        }
    return payload


def _pack_layers(payload: Mapping[str, Any]) -> bytes:
    values = [value for measure in _MEASURES for value in payload[measure]]
    count = len(payload["grad_norm"])
    assert len(values) == 3 * count, "the three measures cover the same layers"
    present = bytes([value is not None for value in values])
    filled = values if all(present) else [0.0 if value is None else value for value in values]
    return struct.pack(f"<QI{3 * count}d", payload["step"], count, *filled) + present


def _unpack_layers(packed: memoryview) -> dict[str, Any]:
    step, count = struct.unpack_from("<QI", packed)
    values: list[float | None] = list(struct.unpack_from(f"<{3 * count}d", packed, 12))
    present = bytes(packed[12 + 24 * count :])
    if len(present) != 3 * count:
        raise ValueError("a mark for each value is missing")
    if not all(present):
        values = [value if there else None for value, there in zip(values, present, strict=True)]
    columns = (values[i * count : (i + 1) * count] for i in range(3))
    return {"step": step, **dict(zip(_MEASURES, columns, strict=True))}

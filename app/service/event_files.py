"""TensorBoard event files, written by hand: records of protobuf events. It knows no job.

A record is its length, that length's checksum, the event, the event's checksum. The format is small
and has not changed in ten years; tensorboard itself would bring grpc and a hundred megabytes. Read
back by tensorboard's own reader in the tests, where that is installed.
"""

import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

# What takes long to import is imported where it is used: the server seldom writes such a file.
if TYPE_CHECKING:
    from numpy import ndarray

_POLYNOMIAL = 0x82F63B78  # CRC-32C, its bits reversed
_MASK = 0xA282EAD8


def begin_events(wall_time: float) -> bytes:
    """What every event file begins with."""
    version = b"brain.Event:2"
    event = b"\x09" + struct.pack("<d", wall_time) + b"\x1a" + _sized(version)
    return b"".join(_frame([event]))


def pack_scalars(
    tag: str, steps: Sequence[int], wall_times: Sequence[float], values: Sequence[float]
) -> bytes:
    """One event for each value, as TensorBoard's summary writers make them.

    Args:
        values: stored as float32, which is all that TensorBoard keeps.
    """
    head = b"\x0a" + _sized(tag.encode()) + b"\x15"
    events = []
    for step, wall_time, value in zip(steps, wall_times, values, strict=True):
        summary = b"\x0a" + _sized(head + _pack_float(value))
        time = struct.pack("<d", wall_time)
        events.append(b"\x09" + time + b"\x10" + _varint(step) + b"\x2a" + _sized(summary))
    return b"".join(_frame(events))


def _pack_float(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # beyond float32
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(number: int) -> bytes:
    packed = bytearray()
    while number > 0x7F:
        packed.append(number & 0x7F | 0x80)
        number >>= 7
    packed.append(number)
    return bytes(packed)


def _frame(events: Sequence[bytes]) -> list[bytes]:
    lengths = [struct.pack("<Q", len(event)) for event in events]
    sums = zip(lengths, checksum(lengths), events, checksum(events), strict=True)
    return [
        length + struct.pack("<I", _mask(first)) + event + struct.pack("<I", _mask(second))
        for length, first, event, second in sums
    ]


def _mask(crc: int) -> int:
    """Checksums are disguised, so that records within records do not look like records."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def checksum(texts: Sequence[bytes]) -> list[int]:
    """CRC-32C of each text of at least four bytes, those of one length at a time.

    A CRC is the exclusive or of what each byte contributes by its distance from the end, so that
    many texts are summed by two array operations instead of byte by byte.
    """
    import numpy

    by_length: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        by_length.setdefault(len(text), []).append(index)
    sums = [0] * len(texts)
    for length, indices in by_length.items():
        joined = b"".join(texts[index] for index in indices)
        rows = numpy.frombuffer(joined, numpy.uint8).reshape(-1, length).copy()
        rows[:, :4] ^= 0xFF  # as a CRC that begins with all bits set
        parts = _contributions(length)[numpy.arange(length - 1, -1, -1), rows]
        crcs = numpy.bitwise_xor.reduce(parts, axis=1) ^ 0xFFFFFFFF
        for index, crc in zip(indices, crcs.tolist(), strict=True):
            sums[index] = crc
    return sums


@functools.lru_cache(maxsize=64)
def _contributions(length: int) -> "ndarray":
    """For each distance from the end, what each value of the byte there contributes."""
    import numpy

    first = numpy.arange(256, dtype=numpy.uint32)
    for _ in range(8):
        first = numpy.where(first & 1, first >> 1 ^ numpy.uint32(_POLYNOMIAL), first >> 1)
    table = [first]
    for _ in range(length - 1):
        table.append((table[-1] >> 8) ^ first[table[-1] & 0xFF])
    return numpy.array(table)

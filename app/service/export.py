"""Export: a job's samples as CSV, JSON, Parquet or TensorBoard events, piece by piece."""

import csv
import io
import json
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from app.service.documents import Document
from app.service.event_files import begin_events, pack_scalars
from app.store import samples
from app.store.charts import mark
from app.store.db import Database

COLUMNS = ("step", "layer", "name", "value")
ROWS_A_GROUP = 2**17


@dataclass(frozen=True)
class Format:
    """How samples become a file; `write` takes the database and the job's document."""

    label: str
    filename: str
    media_type: str
    write: Callable[[Database, Document], Iterator[bytes]]


def write_csv(db: Database, job: Document) -> Iterator[bytes]:
    yield (",".join(COLUMNS) + "\r\n").encode()
    for rows in _pieces(db, job):
        text = io.StringIO()
        csv.writer(text).writerows((s, _quote(layer), _quote(n), v) for s, layer, n, v in rows)
        yield text.getvalue().encode()


def write_json(db: Database, job: Document) -> Iterator[bytes]:
    yield b'{"job": ' + json.dumps(job).encode() + b', "samples": ['
    separator = "\n"
    for rows in _pieces(db, job):
        lines = (json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows)
        yield (separator + ",\n".join(lines)).encode()
        separator = ",\n"
    yield b"\n]}\n"


def _pieces(db: Database, job: Document) -> Iterator[list[tuple[int, str, str, Any]]]:
    """Rows as `COLUMNS`; the layer of a metric is ""."""
    for column in samples.iterate_columns(db.read, job["id"]):
        layer, name = column.layer or "", column.name
        yield [
            (step, layer, name, value)
            for step, value in zip(column.steps, mark(column.values), strict=True)
        ]


def pack_rows(rows: Sequence[Sequence[Any]]) -> bytes:
    """A matrix of marked values as little-endian float32: None as NaN, the mark NaN as -1."""
    packed = array("f")
    for row in rows:
        try:
            packed += array("f", row)
        except TypeError:  # some are marked
            packed.extend(_PACKED.get(value, value) for value in row)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


_PACKED = {None: math.nan, "NaN": -1.0, "Infinity": math.inf, "-Infinity": -math.inf}


def _quote(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_parquet(db: Database, job: Document) -> Iterator[bytes]:
    """Columns as in CSV; the layer of a metric is null, and numbers are numbers, NaN too."""
    # Half a second and 35 MB, so only where somebody wants it.
    import pyarrow
    from pyarrow import parquet

    types = (pyarrow.int64(), pyarrow.string(), pyarrow.string(), pyarrow.float64())
    schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
    sink = io.BytesIO()
    with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        rows: list[list[Any]] = [[] for _ in COLUMNS]
        for column in samples.iterate_columns(db.read, job["id"]):
            count = len(column.steps)
            rows[0] += column.steps
            rows[1] += [column.layer] * count
            rows[2] += [column.name] * count
            rows[3] += _numbers(column.values)
            if len(rows[0]) >= ROWS_A_GROUP:
                writer.write_table(pyarrow.table(rows, schema=schema))
                rows = [[] for _ in COLUMNS]
                yield _take(sink)
        writer.write_table(pyarrow.table(rows, schema=schema))
    yield _take(sink)


def _take(sink: io.BytesIO) -> bytes:
    """What was written since the last time. The writer counts the bytes itself."""
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def _numbers(values: list[Any]) -> list[float | None]:
    return [math.nan if value == "NaN" else value for value in values]


def write_events(db: Database, job: Document) -> Iterator[bytes]:
    """A TensorBoard event file: ``loss``, ``grad_norm/LAYER``, …; what is NULL is left out.

    Steps are not timed one by one: their wall times are spread evenly over the job's.
    """
    start = _seconds(job["started_at"] or job["created_at"])
    end = _seconds(job["ended_at"]) if job["ended_at"] else datetime.now(UTC).timestamp()
    step_s = max(0.0, end - start) / max(1, job["step"])
    yield begin_events(start)
    for column in samples.iterate_columns(db.read, job["id"]):
        tag = column.name if column.layer is None else f"{column.name}/{column.layer}"
        numbers = zip(column.steps, _numbers(column.values), strict=True)
        found = [(step, value) for step, value in numbers if value is not None]
        steps, values = [step for step, _ in found], [value for _, value in found]
        yield pack_scalars(tag, steps, [start + step * step_s for step in steps], values)


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


FORMATS: Mapping[str, Format] = {
    "csv": Format("CSV", "job-{id}.csv", "text/csv", write_csv),
    "parquet": Format(
        "Parquet", "job-{id}.parquet", "application/vnd.apache.parquet", write_parquet
    ),
    "json": Format("JSON", "job-{id}.json", "application/json", write_json),
    "tensorboard": Format(
        "TensorBoard",
        "events.out.tfevents.frostline-job-{id}",
        "application/octet-stream",
        write_events,
    ),
}

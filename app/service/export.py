"""Export: a job's samples, one a row, as CSV or JSON in pieces; never a whole job in memory."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from app.service.documents import Document
from app.store import samples
from app.store.charts import mark
from app.store.db import Database

COLUMNS = ("step", "layer", "name", "value")


def export_csv(db: Database, job_id: int) -> Iterator[bytes]:
    yield (",".join(COLUMNS) + "\r\n").encode()
    for rows in _pieces(db, job_id):
        text = io.StringIO()
        csv.writer(text).writerows((s, _quote(layer), _quote(n), v) for s, layer, n, v in rows)
        yield text.getvalue().encode()


def export_json(db: Database, job_id: int, document: Document) -> Iterator[bytes]:
    yield b'{"job": ' + json.dumps(document).encode() + b', "samples": ['
    separator = "\n"
    for rows in _pieces(db, job_id):
        lines = (json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows)
        yield (separator + ",\n".join(lines)).encode()
        separator = ",\n"
    yield b"\n]}\n"


def _pieces(db: Database, job_id: int) -> Iterator[list[tuple[int, str, str, Any]]]:
    """Rows as `COLUMNS`; the layer of a metric is ""."""
    for column in samples.iterate_columns(db.read, job_id):
        layer, name = column.layer or "", column.name
        yield [
            (step, layer, name, value)
            for step, value in zip(column.steps, mark(column.values), strict=True)
        ]


def _quote(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

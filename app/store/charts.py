"""Charts: series and matrices of what was recorded, at the resolution asked for, spikes kept.

What leaves here for JSON has "NaN", "Infinity" and "-Infinity" in the place of numbers that JSON
lacks.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from sqlalchemy import Connection
from sqlmodel import Session

from app.store.rollups import FIRST_WIDTH, RATIO, Piece, cover, widest

# A measure in the rows, and its lowest and highest in the roll-ups.
STATS: Mapping[str, Mapping[str, str]] = {
    "grad_norm": {"last": "grad_norm", "min": "grad_low", "max": "grad_high"},
    "update_norm": {"last": "update_norm", "min": "update_low", "max": "update_high"},
    "weight_norm": {"last": "weight_norm", "min": "weight_low", "max": "weight_high"},
    "update_ratio": {"last": RATIO, "min": "ratio_low", "max": "ratio_high"},
}
REDUCTIONS = ("max", "min", "last")
MAX_CELLS = 1_000_000


def read_series(
    session: Session,
    job_id: int,
    name: str | None = None,
    points: int | None = None,
    first: int | None = None,
    last: int | None = None,
) -> dict[str, dict[str, list[Any]]]:
    """Every metric (or one) over the steps `first` to `last`, in at most `points` buckets.

    Returns:
        name → ``steps``, ``min``, ``max``, ``values``; a bucket's value and step are its last.
    """
    connection = session.connection()
    found = connection.exec_driver_sql(
        "SELECT id, name FROM series WHERE job_id = ? AND coalesce(name = ?, TRUE) ORDER BY id",
        (job_id, name),
    ).all()
    series = {}
    for series_id, one in found:
        owned = f"metric WHERE series_id = {series_id:d}"
        span = _find_span(connection, owned, points, first, last)
        if span is not None:
            series[one] = _read_one_series(connection, owned, span, points)
    return series


def _read_one_series(
    connection: Connection, owned: str, span: "_Span", points: int | None
) -> dict[str, list[Any]]:
    if points is None or span.count <= points:
        rows = connection.exec_driver_sql(
            f"SELECT step, value FROM {owned} AND {span.where} ORDER BY step"
        ).all()
        values = mark([value for _, value in rows])
        return {"steps": [s for s, _ in rows], "min": values, "max": values, "values": values}
    pieces = span.pieces(
        points,
        FIRST_WIDTH,
        rows=f"step AS last_step, value AS low, value AS high FROM {owned}",
        blocks=f"last_step, low, high FROM {owned.replace('metric', 'metric_rollup', 1)}",
    )
    columns = connection.exec_driver_sql(
        f"""SELECT last, low, high, (SELECT value FROM {owned} AND step = last) FROM (
            SELECT max(last_step) AS last, min(low) AS low, max(high) AS high
            FROM ({pieces}) GROUP BY bucket ORDER BY bucket)"""
    ).all()
    steps, lows, highs, values = (list(column) for column in zip(*columns, strict=True))
    return {"steps": steps, "min": mark(lows), "max": mark(highs), "values": mark(values)}


def read_matrix(
    session: Session,
    job_id: int,
    stat: str,
    positions: Sequence[int],
    points: int | None = None,
    first: int | None = None,
    last: int | None = None,
    reduce: str = "max",
) -> tuple[list[int], list[list[Any]]]:
    """One measure of some layers over the steps, in at most `points` buckets.

    Args:
        positions: of the layers, ascending.
        reduce: what stands for a bucket: its ``max``, ``min`` or ``last``.

    Returns:
        The last step of every bucket, and a row a layer; None where there is no value.
    """
    if not positions:
        return [], []
    connection = session.connection()
    points = min(points or MAX_CELLS, max(1, MAX_CELLS // len(positions)))
    # Every record has all layers, so one layer tells the steps.
    one = f"layer_stat WHERE job_id = {job_id:d} AND position = {positions[0]:d}"
    span = _find_span(connection, one, points, first, last)
    if span is None:
        return [], [[] for _ in positions]
    pieces, buckets, sizes = _find_buckets(connection, job_id, positions[0], span, points)
    of_rows, of_blocks = STATS[stat]["last"], STATS[stat][reduce]
    if reduce == "last" and span.count > points:
        sizes = [1] * len(buckets)
        parts = [_read_steps(connection, job_id, positions, buckets, of_rows)]
    else:
        parts = [_read(connection, job_id, positions, one, of_rows, of_blocks) for one in pieces]
    counts = [len(found) // len(positions) for found in parts]
    if sum(counts) != sum(sizes):
        raise ValueError(f"A record of job {job_id} lacks some of its layers.")
    bounds = list(pairwise(accumulate(sizes, initial=0)))
    rows = []
    for i in range(len(positions)):
        own = zip(parts, counts, strict=True)
        row = [value for found, n in own for (value,) in found[i * n : (i + 1) * n]]
        rows.append(mark(_reduce(row, bounds, reduce)))
    return buckets, rows


def _find_buckets(
    connection: Connection, job_id: int, position: int, span: "_Span", points: int
) -> tuple[list[Piece], list[int], list[int]]:
    """What to read, the last step of each bucket, and of how many rows and blocks it is made."""
    is_full = span.count <= points
    pieces = [Piece(0, span.first, span.last + 1)]
    if not is_full:
        pieces = list(span.cover(points, _narrowest(connection, job_id)))
    ends: dict[int, int] = {}
    sizes: Counter[int] = Counter()
    for piece in pieces:
        of_blocks = f"block * {piece.width:d}, last_step"
        for begin, end in _read(connection, job_id, [position], piece, "step, step", of_blocks):
            bucket = begin if is_full else span.bucket(begin, points)
            ends[bucket] = end
            sizes[bucket] += 1
    return pieces, list(ends.values()), list(sizes.values())


def _read(
    connection: Connection,
    job_id: int,
    positions: Sequence[int],
    piece: Piece,
    of_rows: str,
    of_blocks: str,
) -> list[Any]:
    """Columns of the rows or of the blocks of a piece, layer by layer in the order of steps.

    The order says which is whose: fetched beside each value, layer and step took twice the time.
    """
    table, key, columns = "layer_stat", "step", of_rows
    width = ""
    if piece.width:
        table, key, columns = "layer_rollup", "block", of_blocks
        width = f" AND width = {piece.width:d}"
    query = f"""SELECT {columns} FROM {table}
        WHERE job_id = {job_id:d}{width} AND position IN (SELECT value FROM json_each(?))
        AND {key} >= {piece.first:d} AND {key} < {piece.end:d} ORDER BY position, {key}"""
    # By the driver's own cursor: of a hundred thousand rows SQLAlchemy would look at each.
    cursor = connection.exec_driver_sql(query, (json.dumps([*positions]),)).cursor
    return list(cursor.fetchall())


def _read_steps(
    connection: Connection, job_id: int, positions: Sequence[int], steps: Sequence[int], column: str
) -> list[Any]:
    """A column of the rows of some steps, layer by layer in their order."""
    query = f"""SELECT {column} FROM layer_stat WHERE job_id = {job_id:d}
        AND position IN (SELECT value FROM json_each(?))
        AND step IN (SELECT value FROM json_each(?)) ORDER BY position, step"""
    given = json.dumps([*positions]), json.dumps([*steps])
    return list(connection.exec_driver_sql(query, given).cursor.fetchall())


def _reduce(row: list[Any], bounds: Sequence[tuple[int, int]], reduce: str) -> list[Any]:
    """What stands for each bucket of one layer's row."""
    if len(bounds) == len(row):
        return row
    pick = min if reduce == "min" else max
    try:
        return [pick(row[begin:end]) for begin, end in bounds]
    except TypeError:  # None, which counts for nothing, or NaN, which is greater than every number
        marked = [[(type(v) is str, v) for v in row[b:e] if v is not None] for b, e in bounds]
        return [pick(bucket)[1] if bucket else None for bucket in marked]


def _narrowest(connection: Connection, job_id: int) -> int:
    """The width of the job's narrowest roll-ups; one that no chart uses where it has none."""
    query = f"SELECT min(width) FROM layer_rollup WHERE job_id = {job_id:d}"
    return connection.exec_driver_sql(query).scalar_one() or 2**62


@dataclass(frozen=True)
class _Span:
    """Recorded steps in the range asked for.

    Attributes:
        first, last: the first and the last of them.
        oldest, newest: the first and the last that are recorded at all.
        count: how many there are, up to one more than can be shown singly.
    """

    first: int
    last: int
    oldest: int
    newest: int
    count: int

    @property
    def where(self) -> str:
        return f"step >= {self.first:d} AND step <= {self.last:d}"

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def bucket(self, step: int, points: int) -> int:
        """Buckets are `points` ranges of equal length; a block lies in that which it begins in."""
        return max(0, step - self.first) * points // self.size

    def cover(self, points: int, base: int) -> Iterator[Piece]:
        """The pieces to read: roll-ups where they are no wider than a bucket."""
        # Nothing is before the oldest step, so a block that begins there has no more than is asked.
        first = 0 if self.first == self.oldest else self.first
        return cover(first, self.last + 1, widest(self.size / points, base), base, self.newest)

    def pieces(self, points: int, base: int, *, rows: str, blocks: str) -> str:
        """SQL that reads the span from roll-ups where it can, each row with its `bucket`.

        Args:
            rows, blocks: the rest of a SELECT from the rows and from the roll-ups, with a WHERE.
        """
        bucket = f"SELECT max(0, {{}} - {self.first:d}) * {points:d} / {self.size:d} AS bucket,"
        selects = [
            f"{bucket.format('step')} {rows} AND step >= {piece.first:d} AND step < {piece.end:d}"
            if not piece.width
            else f"{bucket.format(f'block * {piece.width:d}')} {blocks} AND width = {piece.width:d}"
            f" AND block >= {piece.first:d} AND block < {piece.end:d}"
            for piece in self.cover(points, base)
        ]
        return " UNION ALL ".join(selects)


def _find_span(
    connection: Connection, owned: str, points: int | None, first: int | None, last: int | None
) -> _Span | None:
    """The span of the rows of `owned` (a table and its WHERE) from `first` to `last`, if any."""
    low, high = 0 if first is None else first, 2**62 if last is None else last
    limit = 0 if points is None else points + 1
    found = connection.exec_driver_sql(
        f"""SELECT (SELECT min(step) FROM {owned} AND step >= :low),
            (SELECT max(step) FROM {owned} AND step <= :high),
            (SELECT min(step) FROM {owned}),
            (SELECT max(step) FROM {owned}),
            (SELECT count(*) FROM (SELECT 1 FROM {owned} AND step >= :low AND step <= :high
                                   LIMIT :limit))""",
        {"low": low, "high": high, "limit": limit},
    ).one()
    if found[0] is None or found[1] is None or found[0] > found[1]:
        return None
    return _Span(*found)


def mark(values: list[Any]) -> list[Any]:
    """The values as JSON can hold them: a number that is not finite becomes its name."""
    return [mark_one(value) for value in values]


def mark_one(value: Any) -> Any:
    if type(value) is float and not math.isfinite(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value

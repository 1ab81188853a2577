"""Charts: series and matrices of what was recorded, at the resolution asked for, spikes kept.

What leaves here for JSON has "NaN", "Infinity" and "-Infinity" in the place of numbers that JSON
lacks.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlmodel import Session

from app.store.rollups import FIRST_WIDTH, RATIO, cover, widest

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
        positions: of the layers, in the order in which their rows are wanted.
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
    is_full = span.count <= points
    base = _narrowest(connection, job_id)
    buckets = {
        bucket: (index, step)
        for index, (bucket, step) in enumerate(
            connection.exec_driver_sql(
                f"SELECT step, step FROM {one} AND {span.where} ORDER BY step"
                if is_full
                else _grouped(span, points, base, one, ("step", "last_step"), "max", "bucket")
            )
        )
    }
    steps = [step for _, step in buckets.values()]
    listed = ", ".join(str(int(position)) for position in positions)
    some = f"layer_stat WHERE job_id = {job_id:d} AND position IN ({listed})"
    value = STATS[stat]["last"]
    given: tuple[str, ...] = ()
    if is_full:
        query = f"SELECT position, step, {value} FROM {some} AND {span.where}"
    elif reduce == "last":
        query = (
            f"SELECT position, step, {value} FROM {some}"
            " AND step IN (SELECT value FROM json_each(?))"
        )
        given, buckets = (json.dumps(steps),), {step: (i, step) for i, step in enumerate(steps)}
    else:
        columns = value, STATS[stat][reduce]
        query = _grouped(span, points, base, some, columns, reduce, "position, bucket")
    rows = {position: [None] * len(steps) for position in positions}
    places = {bucket: index for bucket, (index, _) in buckets.items()}
    # By the driver's own cursor: of a hundred thousand rows SQLAlchemy would look at each.
    for position, bucket, found in connection.exec_driver_sql(query, given).cursor.fetchall():
        rows[position][places[bucket]] = found
    return steps, [mark(rows[position]) for position in positions]


def _narrowest(connection: Connection, job_id: int) -> int:
    """The width of the job's narrowest roll-ups; one that no chart uses where it has none."""
    query = f"SELECT min(width) FROM layer_rollup WHERE job_id = {job_id:d}"
    return connection.exec_driver_sql(query).scalar_one() or 2**62


def _grouped(
    span: "_Span",
    points: int,
    base: int,
    owned: str,
    columns: tuple[str, str],
    reduce: str,
    keys: str,
) -> str:
    """SQL: `keys`, and a column (of the rows, of the roll-ups) reduced, in their order."""
    rolled_up = owned.replace("layer_stat", "layer_rollup", 1)
    pieces = span.pieces(
        points,
        base,
        rows=f"position, {columns[0]} AS value FROM {owned}",
        blocks=f"position, {columns[1]} AS value FROM {rolled_up}",
    )
    return f"SELECT {keys}, {reduce}(value) FROM ({pieces}) GROUP BY {keys} ORDER BY {keys}"


@dataclass(frozen=True)
class _Span:
    """Recorded steps in the range asked for.

    Attributes:
        first, last: the first and the last of them.
        newest: the last that is recorded at all.
        count: how many there are, up to one more than can be shown singly.
    """

    first: int
    last: int
    newest: int
    count: int

    @property
    def where(self) -> str:
        return f"step >= {self.first:d} AND step <= {self.last:d}"

    def pieces(self, points: int, base: int, *, rows: str, blocks: str) -> str:
        """SQL that reads the span from roll-ups where it can, each row with its `bucket`.

        Buckets are `points` ranges of equal length; a block lies in the bucket that it begins in.

        Args:
            rows, blocks: the rest of a SELECT from the rows and from the roll-ups, with a WHERE.
        """
        size = self.last - self.first + 1
        bucket = f"SELECT ({{}} - {self.first:d}) * {points:d} / {size:d} AS bucket,"
        selects = [
            f"{bucket.format('step')} {rows} AND step >= {piece.first:d} AND step < {piece.end:d}"
            if not piece.width
            else f"{bucket.format(f'block * {piece.width:d}')} {blocks} AND width = {piece.width:d}"
            f" AND block >= {piece.first:d} AND block < {piece.end:d}"
            for piece in cover(
                self.first, self.last + 1, widest(size / points, base), base, self.newest
            )
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

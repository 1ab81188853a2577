"""Roll-ups: lowest, highest and number of non-finite values in blocks of steps, made from rows.

A chart over raw rows takes seconds, and skipping rows loses the one step in which a gradient
exploded. A block of `width` steps begins at a multiple of its width; widths grow by FACTOR from
FIRST_WIDTH × `stats_every`. A block is rolled up once a step behind it is stored, because an
evaluation is recorded after the training metrics of its step; what is not yet rolled up is read
from the rows. So nothing here ever changes but by a resume, which takes back whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, CursorResult

FIRST_WIDTH = 16
FACTOR = 4

# As SQL compares, the text NaN is greater than every number.
RATIO = """CASE
    WHEN update_norm IS NULL OR weight_norm IS NULL OR weight_norm = 0 THEN NULL
    WHEN typeof(update_norm) = 'text' OR typeof(weight_norm) = 'text' THEN 'NaN'
    ELSE coalesce(update_norm / weight_norm, 'NaN') END"""
MEASURES = ("grad", "update", "weight")


@dataclass(frozen=True)
class Piece:
    """Blocks `first` to `end` (excluded) of one width; of width 0, the rows of these steps."""

    width: int
    first: int
    end: int


def cover(first: int, end: int, width: int, base: int, complete: int) -> Iterator[Piece]:
    """The pieces that the steps `first` to `end` (excluded) consist of, from left to right.

    Args:
        width: of the widest blocks to use; `base` or `base` times a power of FACTOR, or less for
            none.
        base: the smallest width.
        complete: the last recorded step: blocks that end before it are rolled up.
    """
    if first >= end:
        return
    if width < base:
        yield Piece(0, first, end)
        return
    low, high = -(-first // width), min(end, complete) // width
    if low >= high:
        yield from cover(first, end, width // FACTOR, base, complete)
        return
    yield from cover(first, low * width, width // FACTOR, base, complete)
    yield Piece(width, low, high)
    yield from cover(high * width, end, width // FACTOR, base, complete)


def widest(span: float, base: int) -> int:
    """The widest block of at most `span` steps, 0 where even the smallest is wider."""
    width = 0
    while (wider := width * FACTOR or base) <= span:
        width = wider
    return width


def _changed(before: int, last: int, base: int) -> Iterator[tuple[int, int, int]]:
    """(width, first block, end) of what completes when the last step goes on from `before`."""
    width = base
    while last // width:
        if before // width < last // width:
            yield width, before // width, last // width
        width *= FACTOR


def extend_layers(
    connection: Connection, job_id: int, before: int, last: int, stats_every: int
) -> None:
    """Roll up the blocks that the rows behind step `before`, up to `last`, complete.

    Args:
        before: the last step that was recorded before them, 0 for none.
    """
    base = FIRST_WIDTH * stats_every
    for width, first, end in _changed(before, last, base):
        given = {"job": job_id, "width": width, "first": first, "end": end, "base": base}
        if width == base:
            _execute(connection, _LAYERS_FROM_ROWS, given)
            _execute(connection, _COUNT_BAD, given)
        else:
            _execute(connection, _LAYERS_FROM_ROLLUPS, given)


def extend_metrics(connection: Connection, job_id: int, before: int, last: int) -> None:
    """The same for the job's metrics."""
    for width, first, end in _changed(before, last, FIRST_WIDTH):
        given = {"job": job_id, "width": width, "first": first, "end": end}
        query = _METRICS_FROM_ROWS if width == FIRST_WIDTH else _METRICS_FROM_ROLLUPS
        _execute(connection, query, given)


def take_back(connection: Connection, job_id: int, step: int) -> None:
    """Drop the blocks that no longer lie wholly before the last recorded step, now `step`."""
    given = {"job": job_id, "step": step}
    for table, key, owners in (
        ("layer_rollup", "job_id = :job AND position", "SELECT position FROM layer"),
        ("metric_rollup", "series_id", "SELECT id FROM series"),
    ):
        owned = f"{key} IN ({owners} WHERE job_id = :job)"
        found = _execute(connection, f"SELECT max(width) FROM {table} WHERE {owned}", given)
        width = found.scalar_one() or 0
        while width >= FIRST_WIDTH:
            blocks = f"width = {width:d} AND block >= :step / width"
            _execute(connection, f"DELETE FROM {table} WHERE {owned} AND {blocks}", given)
            width //= FACTOR


def rebuild(connection: Connection) -> None:
    """Make the roll-ups of every job anew from its rows."""
    for table in ("layer_rollup", "metric_rollup"):
        _execute(connection, f"DELETE FROM {table}", {})
    query = """SELECT id, coalesce(json_extract(spec, '$.training.stats_every'), 1),
        (SELECT max(step) FROM layer_stat WHERE job_id = job.id AND position = 0),
        (SELECT max(step) FROM metrics WHERE job_id = job.id) FROM job"""
    for row in _execute(connection, query, {}).all():
        job_id, stats_every, last_stat, last_metric = tuple(row)
        extend_layers(connection, job_id, 0, last_stat or 0, stats_every)
        extend_metrics(connection, job_id, 0, last_metric or 0)


def _execute(connection: Connection, query: str, given: dict[str, int]) -> CursorResult[Any]:
    return connection.exec_driver_sql(query, given)


def _names(pattern: str) -> str:
    return ", ".join(pattern.format(measure) for measure in MEASURES)


_KEY = "job_id, width, position, block, last_step"
_LOW_HIGH = "{0}_low, {0}_high"
_LAYERS_FROM_ROWS = f"""
    INSERT OR REPLACE INTO layer_rollup
        ({_KEY}, {_names(_LOW_HIGH)}, ratio_low, ratio_high, {_names("{0}_bad")})
    SELECT s.job_id, :width, s.position, s.step / :width, max(s.step),
        {_names("min({0}_norm), max({0}_norm)")},
        min(update_norm / weight_norm), max(update_norm / weight_norm), 0, 0, 0
    FROM layer AS l CROSS JOIN layer_stat AS s ON s.job_id = l.job_id AND s.position = l.position
        AND s.step >= :first * :width AND s.step < :end * :width
    WHERE l.job_id = :job GROUP BY s.position, s.step / :width"""
# The few blocks with a number that is not finite are looked at again, with all due care.
_IS_BAD = "({0} = 'NaN' OR {0} = 9e999 OR {0} = -9e999)"
_COUNT_BAD = f"""
    UPDATE layer_rollup AS r SET ({_names("{0}_bad")}, ratio_low, ratio_high) = (
        SELECT {_names(f"coalesce(sum({_IS_BAD.format('{0}_norm')}), 0)")},
            min({RATIO}), max({RATIO})
        FROM layer_stat AS s WHERE s.job_id = r.job_id AND s.position = r.position
            AND s.step >= r.block * r.width AND s.step < (r.block + 1) * r.width)
    WHERE job_id = :job AND width = :width AND block >= :first AND block < :end
        AND position IN (SELECT position FROM layer WHERE job_id = :job)
        AND ({" OR ".join(_IS_BAD.format(f"{m}_{e}") for m in MEASURES for e in ("low", "high"))})
"""
_LAYERS_FROM_ROLLUPS = f"""
    INSERT OR REPLACE INTO layer_rollup
        ({_KEY}, {_names(_LOW_HIGH)}, ratio_low, ratio_high, {_names("{0}_bad")})
    SELECT r.job_id, :width, r.position, r.block / {FACTOR}, max(last_step),
        {_names("min({0}_low), max({0}_high)")}, min(ratio_low), max(ratio_high),
        {_names("sum({0}_bad)")}
    FROM layer AS l CROSS JOIN layer_rollup AS r ON r.job_id = l.job_id
        AND r.width = :width / {FACTOR} AND r.position = l.position
        AND r.block >= :first * {FACTOR} AND r.block < :end * {FACTOR}
    WHERE l.job_id = :job GROUP BY r.position, r.block / {FACTOR}"""
_METRICS_FROM_ROWS = f"""
    INSERT OR REPLACE INTO metric_rollup (series_id, width, block, last_step, low, high, bad)
    SELECT m.series_id, :width, m.step / :width, max(m.step), min(m.value), max(m.value),
        coalesce(sum({_IS_BAD.format("m.value")}), 0)
    FROM series AS s CROSS JOIN metric AS m ON m.series_id = s.id
        AND m.step >= :first * :width AND m.step < :end * :width
    WHERE s.job_id = :job GROUP BY m.series_id, m.step / :width"""
_METRICS_FROM_ROLLUPS = f"""
    INSERT OR REPLACE INTO metric_rollup (series_id, width, block, last_step, low, high, bad)
    SELECT r.series_id, :width, r.block / {FACTOR}, max(last_step), min(low), max(high), sum(bad)
    FROM series AS s CROSS JOIN metric_rollup AS r ON r.series_id = s.id
        AND r.width = :width / {FACTOR}
        AND r.block >= :first * {FACTOR} AND r.block < :end * {FACTOR}
    WHERE s.job_id = :job GROUP BY r.series_id, r.block / {FACTOR}"""

"""The table of a sweep: its columns, the words of its cells, the best of each marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.service import Service
from app.web.job_views import JobView, Shell, SweepColumn, SweepLine, SweepView
from app.web.pages.compare import LOWER_IS_BETTER, best_marks, curves_of
from app.web.render import (
    NOTHING,
    format_bytes,
    format_duration,
    format_number,
    format_percent,
)

Document = dict[str, Any]


def build_view(
    service: Service, sweep: Document, page: Shell, root: str, message: str = ""
) -> SweepView:
    """The table of a sweep, its best values marked, and what its curves are told."""
    table: Sequence[Document] = sweep["table"]
    jobs = [JobView(service.get_job(row["job_id"])) for row in table]
    columns, values, texts, bests = [], [], [], []
    for column, read, words, lower in _columns(table):
        found = [read(row) for row in table]
        columns.append(column)
        values.append(found)
        texts.append([words(row, value) for row, value in zip(table, found, strict=True)])
        marks = best_marks(found, lower=lower) if lower is not None else [False] * len(found)
        bests.append(marks)
    lines = [
        SweepLine(
            name=row["set"],
            job=job,
            cells=[text[index] for text in texts],
            best=[best[index] for best in bests],
        )
        for index, (row, job) in enumerate(zip(table, jobs, strict=True))
    ]
    named = [
        JobView({**job.document, "name": row["set"]}) for job, row in zip(jobs, table, strict=True)
    ]
    return SweepView(page, sweep, columns, lines, curves_of(named, root), message)


def _columns(table: Sequence[Document]) -> list[tuple[SweepColumn, Any, Any, bool | None]]:
    """(column, value of a row, its words, whether the lower is better; None marks none)."""

    def number(_: Document, value: Any) -> str:
        return format_number(value)

    columns: list[tuple[SweepColumn, Any, Any, bool | None]] = [
        (
            SweepColumn("trained", "trained", "freeze set", "share of the tensors that train"),
            lambda row: row["trainable_count"],
            lambda row, value: format_percent(value / max(1, value + row["frozen_count"])),
            None,
        ),
        (
            SweepColumn("work", "work", "freeze set", "FLOPs a step against training everything"),
            lambda row: row["step_flops_share"],
            lambda _, value: format_percent(value),
            None,
        ),
    ]
    for name in shown_metrics(table):
        _, set_name, measured = name.split("/", 2)
        lower = any(word in measured for word in LOWER_IS_BETTER)
        group = f"{measured}, {'held out' if set_name == 'eval' else set_name}"
        before = SweepColumn(f"{name}.before", "before", group, "before the first step")
        after = SweepColumn(f"{name}.after", "after", group, "at its newest evaluation")
        columns.append((before, _metric(name, "before"), number, None))
        columns.append((after, _metric(name, "after"), _with_change(name), lower))
    columns += [
        (
            SweepColumn("step", "measured", "time a step"),
            lambda row: row["step_ms"],
            lambda _, value: format_duration(value / 1000) if value else NOTHING,
            True,
        ),
        (
            SweepColumn("step.predicted", "predicted", "time a step"),
            lambda row: row["predicted"]["predicted_step_ms"],
            lambda _, value: format_duration(value / 1000) if value else NOTHING,
            None,
        ),
        (
            SweepColumn("memory", "measured", "peak memory"),
            lambda row: row["peak_bytes"],
            lambda _, value: format_bytes(value),
            True,
        ),
        (
            SweepColumn("memory.predicted", "predicted", "peak memory"),
            lambda row: row["predicted"]["peak_bytes"],
            lambda _, value: format_bytes(value),
            None,
        ),
    ]
    return columns


def shown_metrics(table: Sequence[Document]) -> list[str]:
    """For each evaluation set what it is judged by: its metrics, else its loss."""
    names = list(dict.fromkeys(name for row in table for name in row["metrics"]))
    sets = list(dict.fromkeys(name.split("/", 2)[1] for name in names))
    shown = []
    for set_name in sets:
        own = [name for name in names if name.startswith(f"eval/{set_name}/")]
        shown += [name for name in own if not name.endswith("/loss")] or own
    return shown


def _metric(name: str, when: str) -> Any:
    def read(row: Document) -> Any:
        return (row["metrics"].get(name) or {}).get(when)

    return read


def _with_change(name: str) -> Any:
    """The value after, with what was gained or lost since before training."""

    def words(row: Mapping[str, Any], value: Any) -> str:
        before = (row["metrics"].get(name) or {}).get("before")
        if not isinstance(value, int | float) or not isinstance(before, int | float):
            return format_number(value)
        change = f"{value - before:+.3g}" if value != before else "±0"
        return f"{format_number(value)} ({change})"

    return words

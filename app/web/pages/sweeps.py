"""A sweep's page: one table that fills as its jobs end, with the curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Form, Request, Response

from app.freezing.errors import InvalidDocument
from app.service import Conflict, Service
from app.web.guard import signed_in
from app.web.job_views import JobView, SweepColumn, SweepLine, SweepView
from app.web.pages import models, workbench
from app.web.pages.compare import best_marks, curves_of
from app.web.pages.jobs import service_of
from app.web.render import (
    NOTHING,
    format_bytes,
    format_duration,
    format_number,
    format_percent,
    redirect,
    render_block,
    render_page,
    root_path,
    shell,
)

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
LOWER_IS_BETTER = ("loss", "perplexity", "error")


@router.get("/sweeps/{sweep_id}")
def show_sweep(request: Request, sweep_id: int) -> Response:
    return render_page(request, "sweep.html", _view(request, sweep_id))


@router.get("/sweeps/{sweep_id}/table")
def show_table(request: Request, sweep_id: int) -> Response:
    """The table alone, asked for again as the jobs go on."""
    return render_block(request, "sweep.html", "sweep_table", _view(request, sweep_id))


@router.post("/sweeps/{sweep_id}/stop")
def stop_sweep(request: Request, sweep_id: int) -> Response:
    service_of(request).stop_sweep(sweep_id)
    return redirect(request, f"/sweeps/{sweep_id}")


@router.post("/sweeps/{sweep_id}/delete")
def delete_sweep(request: Request, sweep_id: int) -> Response:
    try:
        service_of(request).delete_sweep(sweep_id)
    except Conflict as error:
        return render_page(request, "sweep.html", _view(request, sweep_id, str(error)), 409)
    return redirect(request, "/compare")


@router.post("/models/{model_id}/sweeps")
def start_sweep(
    request: Request,
    model_id: int,
    items: list[tuple[str, str]] = Depends(models.form_items),
    name: str = Form("", alias="sweep.name"),
    count: str = Form("", alias="sweep.count"),
) -> Response:
    """Start the sets that are ticked on the workbench, with everything else as it stands there."""
    service = service_of(request)
    choice = models.read_choice(request, items)
    blocks = int(count) if count.strip().isdecimal() and len(count) < 6 else None
    job = workbench.job_request(choice, model_id, "train")
    sets = [_read_set(value, blocks, job["config"]) for key, value in items if key == "sweep.set"]
    request_body = {
        "model_id": model_id,
        "name": name.strip() or job["name"],
        "dataset": job["dataset"],
        "training": job["training"],
        "sets": sets,
    }
    try:
        if not sets:
            raise InvalidDocument([("sweep", "Tick at least one freeze set to try.")])
        sweep = service.launch_sweep(request_body)
    except InvalidDocument as error:
        return models.show_faults(request, model_id, choice, error)
    return redirect(request, f"/sweeps/{sweep['id']}")


def _read_set(value: str, count: int | None, chosen: Document) -> Document:
    """``choice``, ``config:ID`` or ``preset:NAME`` as the interface takes it."""
    kind, _, rest = value.partition(":")
    if kind == "choice":
        return {"name": chosen.get("name") or "as ticked now", "config": chosen}
    if kind == "config":
        return {"config": int(rest) if rest.isdecimal() else rest}
    counted = rest in ("last-blocks", "first-blocks", "one-block") and count is not None
    return {"preset": rest, **({"count": count} if counted else {})}


# -------------------------------------------------------------------------------------------- view


def _view(request: Request, sweep_id: int, message: str = "") -> SweepView:
    service = service_of(request)
    sweep = service.get_sweep(sweep_id)
    title = sweep["name"] or f"Sweep {sweep_id}"
    return build_view(service, sweep, shell(request, title, "compare"), root_path(request), message)


def build_view(service: Service, sweep: Document, page: Any, root: str, message: str) -> SweepView:
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
        return f"{format_number(value)} ({value - before:+.3g})"

    return words

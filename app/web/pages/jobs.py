"""The jobs' pages: the list, one job with its charts and proof, and jobs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, Request, Response

from app.freezing.config import parse_rules
from app.freezing.errors import InvalidDocument
from app.service import Conflict, Service
from app.web.guard import signed_in
from app.web.pages.entries import config_items, text_of_rule
from app.web.pages.training_form import training_address
from app.web.pages.workbench import POLICIES
from app.web.render import format_duration, redirect, render_block, render_page, shell
from app.web.views import CompareRow, CompareView, JobPageView, JobsView, JobView

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
LOG_TAIL = 16_000
SPARK_POINTS = 40
COMPARED_JOBS = 6
LOWER_IS_BETTER = ("loss", "perplexity", "error", "step time")


def service_of(request: Request) -> Service:
    return request.app.state.service


def view_jobs(service: Service, limit: int = 100) -> list[JobView]:
    """Jobs with what a list shows of each: the loss as a sparkline."""
    return [_view_job(service, job) for job in service.list_jobs(limit=limit)]


def _view_job(service: Service, job: Document) -> JobView:
    loss = service.read_metrics(job["id"], name="loss", points=SPARK_POINTS).get("loss", {})
    return JobView(job, sparkline(loss.get("values", ())))


def sparkline(values: Iterable[Any]) -> str:
    """SVG points of a series in a box of 80 × 20; what is not a finite number is left out."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(numbers) < 2:
        return ""
    low, high = min(numbers), max(numbers)
    width, height = 80 / (len(numbers) - 1), 18 / ((high - low) or 1)
    return " ".join(f"{i * width:.1f},{1 + (high - v) * height:.1f}" for i, v in enumerate(numbers))


@router.get("/jobs")
def show_jobs(request: Request) -> Response:
    return render_page(request, "jobs.html", _jobs_view(request))


@router.get("/jobs/list")
def show_job_list(request: Request) -> Response:
    return render_block(request, "jobs.html", "job_list", _jobs_view(request))


def _jobs_view(request: Request) -> JobsView:
    service = service_of(request)
    return JobsView(
        shell(request, "Jobs", "jobs"), view_jobs(service), bool(service.list_models(1))
    )


# --------------------------------------------------------------------------------------- one job


@router.get("/jobs/{job_id}")
def show_job(request: Request, job_id: int) -> Response:
    return render_page(request, "job.html", _job_view(request, job_id))


@router.get("/jobs/{job_id}/status")
def show_status(request: Request, job_id: int) -> Response:
    """The header alone: asked for twice a second while a job runs, so it reads one row only."""
    return render_block(request, "job.html", "status", _status_view(request, job_id))


@router.get("/jobs/{job_id}/side")
def show_side(request: Request, job_id: int) -> Response:
    """Proof and checkpoints, asked for again when either changed."""
    return render_block(request, "job.html", "side", _job_view(request, job_id))


@router.get("/jobs/{job_id}/log")
def show_log(request: Request, job_id: int) -> Response:
    return render_block(request, "job.html", "log", _job_view(request, job_id))


def _status_view(request: Request, job_id: int, message: str = "") -> JobPageView:
    document = service_of(request).get_job(job_id)
    job = JobView(document)
    config = dict(document["config"])
    rules = config_items(config)
    policies = [(key, config[key]) for key in POLICIES]
    address = urlencode([*rules, *policies, *training_address(document)])
    return JobPageView(
        shell=shell(request, job.name, "jobs"),
        job=job,
        config=config,
        options=sorted(document["training"].items()),
        rerun_address=f"/models/{document['model_id']}?{address}",
        message=message,
    )


def _job_view(request: Request, job_id: int, message: str = "") -> JobPageView:
    service = service_of(request)
    log = service.read_log(job_id)
    return replace(
        _status_view(request, job_id, message),
        proof=service.read_proof(job_id),
        checkpoints=service.list_checkpoints(job_id),
        log=log[-LOG_TAIL:],
        log_is_cut=len(log) > LOG_TAIL,
    )


def _do(request: Request, job_id: int, verb: Callable[[], object]) -> Response:
    """One verb, then the job's page; what is impossible now is said there instead."""
    try:
        verb()
    except (Conflict, InvalidDocument) as error:
        view = _job_view(request, job_id, str(error))
        return render_page(request, "job.html", view, 409 if isinstance(error, Conflict) else 422)
    return redirect(request, f"/jobs/{job_id}")


@router.post("/jobs/{job_id}/stop")
def stop_job(request: Request, job_id: int) -> Response:
    return _do(request, job_id, lambda: service_of(request).stop_job(job_id))


@router.post("/jobs/{job_id}/pause")
def pause_job(request: Request, job_id: int, mode: str = Form("hold")) -> Response:
    return _do(request, job_id, lambda: service_of(request).pause_job(job_id, mode))


@router.post("/jobs/{job_id}/resume")
def resume_job(
    request: Request, job_id: int, epochs: str = Form(""), max_steps: str = Form("")
) -> Response:
    """Go on; with `epochs` or `max_steps`, to a new end, which a job that is through needs."""
    ends = {"epochs": epochs.strip(), "max_steps": max_steps.strip()}
    training = {key: int(v) if v.isdecimal() else v for key, v in ends.items() if v}
    changes = {"training": training} if training else None
    return _do(request, job_id, lambda: service_of(request).resume_job(job_id, changes))


@router.post("/jobs/{job_id}/edit")
def edit_job(
    request: Request, job_id: int, name: str = Form(""), notes: str = Form("")
) -> Response:
    changes = {"name": name, "notes": notes}
    return _do(request, job_id, lambda: service_of(request).edit_job(job_id, changes))


@router.post("/jobs/{job_id}/delete")
def delete_job(request: Request, job_id: int) -> Response:
    try:
        service_of(request).delete_job(job_id)
    except Conflict as error:
        return render_page(request, "job.html", _job_view(request, job_id, str(error)), 409)
    return redirect(request, "/jobs")


@router.post("/jobs/{job_id}/checkpoints/{step}/delete")
def delete_checkpoint(request: Request, job_id: int, step: int) -> Response:
    return _do(request, job_id, lambda: service_of(request).delete_checkpoint(job_id, step))


# --------------------------------------------------------------------------------------- compare


@router.get("/compare")
def show_compare(request: Request) -> Response:
    """Jobs side by side; ``jobs`` is a list of ids, or repeated as the list's form sends it."""
    service = service_of(request)
    parts = ",".join(request.query_params.getlist("jobs")).split(",")
    ids = list(dict.fromkeys(int(p) for p in parts if p.isascii() and p.isdigit() and len(p) < 19))
    view = CompareView(shell(request, "Compare", "compare"), (), choices=view_jobs(service))
    if len(ids) < 2:
        return render_page(request, "compare.html", view)
    compared = [_view_job(service, service.get_job(job_id)) for job_id in ids[:COMPARED_JOBS]]
    message = f"Only the first {COMPARED_JOBS} are shown." if len(ids) > COMPARED_JOBS else ""
    metrics = [service.read_metrics(job.id, points=2) for job in compared]
    view = CompareView(
        view.shell, compared, _setting_rows(compared), _result_rows(compared, metrics), (), message
    )
    return render_page(request, "compare.html", view)


def _setting_rows(jobs: Sequence[JobView]) -> list[CompareRow]:
    """What the jobs were told, only where they differ, after what they always show."""

    def row(label: str, values: Iterable[Any]) -> CompareRow:
        return CompareRow(label, list(values))

    configs = [job.document.get("config") or {} for job in jobs]
    rules = [
        "; ".join(f"{r.action} {text_of_rule(r)}" for r in parse_rules(config.get("rules", [])))
        for config in configs
    ]
    always = [
        row("model", (job.model_uri for job in jobs)),
        row("dataset", (job.dataset_uri for job in jobs)),
        row("rules", (text or "none" for text in rules)),
        row("mechanism", (config.get("mechanism") for config in configs)),
        row(
            "norm statistics",
            (config.get("norm_statistics") for config in configs),
        ),
    ]
    names = sorted({name for job in jobs for name in job.document.get("training") or {}})
    options = [row(n, ((j.document.get("training") or {}).get(n) for j in jobs)) for n in names]
    return always + [option for option in options if option.differs]


def _result_rows(jobs: Sequence[JobView], metrics: Sequence[Mapping[str, Any]]) -> list[CompareRow]:
    rows = [
        CompareRow("state", [job.state for job in jobs]),
        CompareRow("steps", [job.document.get("step") for job in jobs]),
        _best_row("step time", [_seconds(job.document.get("step_ms")) for job in jobs]),
        CompareRow("proof", [job.document.get("proof") for job in jobs]),
    ]
    for name in sorted({name for series in metrics for name in series}):
        if name not in ("lr", "grad_norm_total"):
            ends = [(series.get(name) or {}).get("values") or [None] for series in metrics]
            rows.append(_best_row(_metric_words(name), [end[-1] for end in ends]))
    return rows


def _metric_words(name: str) -> str:
    """``eval/new/accuracy`` → "accuracy, new", in the words of the charts."""
    *_, measured = parts = name.split("/")
    if len(parts) < 3:
        return f"{measured}, training" if name == "loss" else name
    return f"{measured}, {'held out' if parts[1] == 'eval' else parts[1]}"


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _best_row(label: str, values: list[Any]) -> CompareRow:
    numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    lower = any(word in label for word in LOWER_IS_BETTER)
    best = (min if lower else max)(numbers, default=None)
    marks = [len(set(numbers)) > 1 and value == best for value in values]
    shown = [format_duration(v) for v in values] if label == "step time" else values
    return CompareRow(label, shown, marks)

"""One job's page: what it does, its proof and checkpoints, its tree with live boxes, its verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, Query, Request, Response

from app.freezing.errors import InvalidDocument
from app.service import Conflict, Service
from app.service.export import FORMATS
from app.web.guard import signed_in
from app.web.insights import tell_insight
from app.web.job_views import Figure, JobPageView, JobView, LiveTreeView
from app.web.pages import tree
from app.web.pages.entries import config_items
from app.web.pages.jobs import service_of
from app.web.pages.training_form import training_address
from app.web.pages.workbench import POLICIES
from app.web.render import (
    NOTHING,
    format_bytes,
    format_duration,
    format_percent,
    format_si,
    redirect,
    render_block,
    render_page,
    shell,
)
from app.web.shared import answer_together

router = APIRouter(prefix="/jobs", dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
LOG_TAIL = 16_000


@router.get("/{job_id}")
def show_job(request: Request, job_id: int, open: str = Query("", max_length=20_000)) -> Response:  # noqa: A002
    view = replace(_whole_view(request, job_id), tree=_tree_view(service_of(request), job_id, open))
    return render_page(request, "job.html", view)


@router.get("/{job_id}/status")
async def show_status(request: Request, job_id: int) -> Response:
    """The header alone: asked for twice a second while a job runs, so it reads one row only."""

    def make() -> Response:
        return render_block(request, "job.html", "status", _status_view(request, job_id))

    return await answer_together(request, make)


@router.get("/{job_id}/side")
def show_side(request: Request, job_id: int) -> Response:
    """Proof, figures and checkpoints, asked for again when one of them changed."""
    return render_block(request, "job.html", "side", _side_view(request, job_id))


@router.get("/{job_id}/log")
def show_log(request: Request, job_id: int) -> Response:
    view = _with_log(_status_view(request, job_id), service_of(request))
    return render_block(request, "job.html", "log", view)


@router.get("/{job_id}/tree")
def show_tree(request: Request, job_id: int, open: str = Query("", max_length=20_000)) -> Response:  # noqa: A002
    """The tree with live boxes; `open` lists the open modules."""
    view = replace(
        _status_view(request, job_id), tree=_tree_view(service_of(request), job_id, open)
    )
    return render_block(request, "job.html", "live_tree", view)


@router.get("/{job_id}/insights")
def show_insights(request: Request, job_id: int) -> Response:
    """What the layers' measures say so far; asked for once the page is there, and as it goes on."""
    found = service_of(request).read_insights(job_id)
    view = _status_view(request, job_id)
    document = dict(view.job.document)
    told = [tell_insight(one, partial(rerun_address, document)) for one in found["findings"]]
    view = replace(view, insights=told, insight_steps=found["steps"] or ())
    return render_block(request, "job.html", "insights", view)


def _status_view(request: Request, job_id: int, message: str = "") -> JobPageView:
    document = service_of(request).get_job(job_id)
    job = JobView(document)
    config = dict(document["config"])
    return JobPageView(
        shell=shell(request, job.name, "jobs"),
        job=job,
        config=config,
        options=sorted(document["training"].items()),
        rerun_address=rerun_address(document),
        message=message,
    )


def rerun_address(document: Document, freeze: Iterable[str] = ()) -> str:
    """The workbench with everything filled in as this job was started; `freeze` are layers more."""
    config = document["config"]
    rules = [*config_items(config), *(("rule", f"freeze:{path or '**'}") for path in freeze)]
    policies = [(key, config[key]) for key in POLICIES]
    base = [("config", str(document["config_id"]))] * bool(document.get("config_id"))
    name = [("train.name", document["name"])] * bool(document["name"])
    items = [*base, *(rules or [("rule", "")]), *policies, *training_address(document), *name]
    return f"/models/{document['model_id']}?{urlencode(items)}"


def _whole_view(request: Request, job_id: int, message: str = "") -> JobPageView:
    return _with_log(_side_view(request, job_id, message), service_of(request))


def _with_log(view: JobPageView, service: Service) -> JobPageView:
    log = service.read_log(view.job.id)
    return replace(view, log=log[-LOG_TAIL:], log_is_cut=len(log) > LOG_TAIL)


def _side_view(request: Request, job_id: int, message: str = "") -> JobPageView:
    service = service_of(request)
    view = _status_view(request, job_id, message)
    attempts = service.list_attempts(job_id)
    return replace(
        view,
        proof=service.read_proof(job_id),
        checkpoints=service.list_checkpoints(job_id)[::-1],
        resumed=attempts[-1]["resumed"] if attempts else None,
        formats={name: chosen.label for name, chosen in FORMATS.items()},
        figures=figures_of(service, dict(view.job.document)),
        layer_count=service.count_layers(job_id),
    )


# ------------------------------------------------------------------------------- what was foretold


def figures_of(service: Service, document: Document) -> list[Figure]:
    """What the plan says of a job beside what the job measured; empty where there is no plan.

    Of what is frozen now, as the newest step times are; a peak is that of now or of the beginning.
    """
    has_changed = bool(document["config"].get("schedule"))
    plan = service.plan_job(document["id"], now=True)
    began = service.plan_job(document["id"]) if has_changed else plan
    if began is None or plan is None or document["kind"] != "train":
        return []
    cost, full = plan["cost"], plan["cost"].get("full") or {}
    peaks = [cost.get("peak_bytes"), began["cost"].get("peak_bytes")]
    peak = None if None in peaks else max(peaks)
    step_s = document["step_ms"] / 1000 if document.get("step_ms") else None
    predicted_ms = cost.get("predicted_step_ms")
    # Every micro-batch of an accumulated step costs what the plan counts.
    flops = (cost.get("step_flops") or 0) * (document["training"].get("grad_accumulation") or 1)
    rate = flops / step_s if flops and step_s else None
    whole = full.get("step_flops")
    return [
        Figure(
            "step time",
            format_duration(predicted_ms / 1000) if predicted_ms else NOTHING,
            format_duration(step_s),
        ),
        Figure(
            "peak memory",
            format_bytes(peak),
            format_bytes(JobView(document).memory_bytes),
            "predicted is that of what is frozen now, or was at the start if that is more; "
            "measured is what torch allocated on a GPU, on a CPU what the whole process took",
        ),
        Figure(
            "work a step",
            format_si(flops or None, "FLOP"),
            NOTHING,
            f"{format_percent(cost['step_flops'] / whole)} of training everything" if whole else "",
        ),
        Figure("work a second", NOTHING, format_si(rate, "FLOP/s")),
    ]


# --------------------------------------------------------------------------------------- live boxes


def _tree_view(service: Service, job_id: int, open_: str) -> LiveTreeView | None:
    document = service.get_job(job_id)
    plan = service.plan_job(job_id, now=True)
    if plan is None:
        return None  # the model's inspection is gone; the job's records are not
    graph, timeline = service.read_graph(document["model_id"]), service.read_freeze(job_id)
    # An address with nothing open says "none".
    chosen = {int(part) for part in open_.split(",") if part.isdecimal() and len(part) < 8}
    opened = frozenset(chosen) if open_ else tree.first_open(graph)
    rows = tree.list_rows(graph, tree.read_states(graph, plan), opened)
    waiting = [_words(rule) for rules in timeline["waiting"] for rule in rules]
    changes = [{**change, "words": _words(change)} for change in timeline["changes"]]
    return LiveTreeView(JobView(document), rows, sorted(opened), waiting, changes)


def _words(rule: Document) -> str:
    type_ = f"type={rule['type']}" if rule.get("type") else ""
    return " ".join(filter(None, (rule["action"], type_, rule.get("match"))))


@router.post("/{job_id}/freeze")
def change_freeze(
    request: Request,
    job_id: int,
    tick: list[str] = Form(max_length=200),
    optimizer_state: str = Form("fresh"),
    open: str = Form("", max_length=20_000),  # noqa: A002
) -> Response:
    """A tick while the job runs, or several: each is ``freeze:PATH`` or ``unfreeze:PATH``."""
    parts = (one.partition(":") for one in tick)
    rules = [{"action": action, "match": path or "**"} for action, _, path in parts]
    change = {"rules": rules, "optimizer_state": optimizer_state}
    query = f"?{urlencode({'open': open})}" * bool(open)
    return _do(request, job_id, lambda: service_of(request).change_freeze(job_id, change), query)


# -------------------------------------------------------------------------------------------- verbs


def _do(request: Request, job_id: int, verb: Callable[[], object], query: str = "") -> Response:
    """One verb, then the job's page; what is impossible now is said there instead."""
    try:
        verb()
    except (Conflict, InvalidDocument) as error:
        return _say(request, job_id, error)
    return redirect(request, f"/jobs/{job_id}{query}")


def _say(request: Request, job_id: int, error: Conflict | InvalidDocument) -> Response:
    view = replace(
        _whole_view(request, job_id, str(error)), tree=_tree_view(service_of(request), job_id, "")
    )
    return render_page(request, "job.html", view, 409 if isinstance(error, Conflict) else 422)


@router.post("/{job_id}/stop")
def stop_job(request: Request, job_id: int) -> Response:
    return _do(request, job_id, lambda: service_of(request).stop_job(job_id))


@router.post("/{job_id}/pause")
def pause_job(request: Request, job_id: int, mode: str = Form("hold")) -> Response:
    return _do(request, job_id, lambda: service_of(request).pause_job(job_id, mode))


@router.post("/{job_id}/resume")
def resume_job(
    request: Request, job_id: int, epochs: str = Form(""), max_steps: str = Form("")
) -> Response:
    """Go on; with `epochs` or `max_steps`, to a new end, which a job that is through needs."""
    ends = {"epochs": epochs.strip(), "max_steps": max_steps.strip()}
    training = {key: int(v) if v.isdecimal() else v for key, v in ends.items() if v}
    changes = {"training": training} if training else None
    return _do(request, job_id, lambda: service_of(request).resume_job(job_id, changes))


@router.post("/{job_id}/edit")
def edit_job(
    request: Request, job_id: int, name: str = Form(""), notes: str = Form("")
) -> Response:
    changes = {"name": name, "notes": notes}
    return _do(request, job_id, lambda: service_of(request).edit_job(job_id, changes))


@router.post("/{job_id}/delete")
def delete_job(request: Request, job_id: int) -> Response:
    try:
        service_of(request).delete_job(job_id)
    except Conflict as error:
        return _say(request, job_id, error)
    return redirect(request, "/jobs")


@router.post("/{job_id}/checkpoints/{step}/delete")
def delete_checkpoint(request: Request, job_id: int, step: int) -> Response:
    return _do(request, job_id, lambda: service_of(request).delete_checkpoint(job_id, step))

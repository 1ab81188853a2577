"""The list of jobs: filtered, row by row current, each with what can be done about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Depends, Query, Request, Response

from app.service import Service
from app.web.guard import signed_in
from app.web.job_views import JobRowView, JobsView, JobView
from app.web.render import render_block, render_page, shell

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
SPARK_POINTS = 40
LISTED = 100
SEARCHED = 1000


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def view_jobs(service: Service, limit: int = LISTED) -> list[JobView]:
    """Jobs with what a list shows of each: the loss as a sparkline."""
    return [view_job(service, job) for job in service.list_jobs(limit=limit)]


def view_job(service: Service, job: Document) -> JobView:
    """One job with its sparkline."""
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
def show_jobs(
    request: Request,
    q: str = Query("", max_length=200),
    state: str = Query("", max_length=20),
    before: int | None = Query(None, ge=1, lt=2**63),
) -> Response:
    return render_page(request, "jobs.html", _view(request, q, state, before))


@router.get("/jobs/list")
def show_job_list(
    request: Request,
    q: str = Query("", max_length=200),
    state: str = Query("", max_length=20),
    before: int | None = Query(None, ge=1, lt=2**63),
) -> Response:
    return render_block(request, "jobs.html", "job_list", _view(request, q, state, before))


@router.get("/jobs/{job_id}/row")
def show_row(request: Request, job_id: int) -> Response:
    """One row of the list, asked for again when its job moves."""
    service = service_of(request)
    row = JobRowView(view_job(service, service.get_job(job_id)))
    return render_page(request, "_job_row.html", row)


def _view(request: Request, search: str, state: str, before: int | None) -> JobsView:
    service = service_of(request)
    documents = service.list_jobs(limit=SEARCHED, before=before)
    found = [job for job in documents if _matches(job, search)]
    counts = Counter(job["state"] for job in found)
    if state:
        found = [job for job in found if job["state"] == state]
    shown = found[:LISTED]
    is_cut = len(found) > LISTED or len(documents) == SEARCHED
    return JobsView(
        shell=shell(request, "Jobs", "jobs"),
        jobs=[view_job(service, job) for job in shown],
        has_models=bool(service.list_models(1)),
        search=search,
        state=state,
        states=sorted(counts.items()),
        older=shown[-1]["id"] if is_cut and shown else None,
        total=len(documents),
    )


def _matches(job: Document, search: str) -> bool:
    """Whether every word is in the name, notes, model or dataset, or is the job's number."""
    texts = (job["name"], job["notes"], job["model"]["uri"], job["dataset"]["uri"], f"#{job['id']}")
    text = " ".join(map(str, texts)).casefold()
    return all(word in text for word in search.casefold().split())

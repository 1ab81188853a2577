"""A sweep's page: one table that fills as its jobs end, with the curves over each other."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Form, Request, Response

from app.freezing.errors import InvalidDocument
from app.service import Conflict
from app.web.guard import signed_in
from app.web.job_views import SweepView
from app.web.pages import models, workbench
from app.web.pages.jobs import service_of
from app.web.render import redirect, render_block, render_page, root_path, shell
from app.web.sweep_table import build_view

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]


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

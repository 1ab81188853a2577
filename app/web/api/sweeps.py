"""Sweeps: start, list, read the table, stop, delete."""

from fastapi import APIRouter, Depends, Response

from app.web.api.body import Answer, Body, Id, Limit, OptionalId, Verbs, takes
from app.web.guard import signed_in

router = APIRouter(prefix="/sweeps", tags=["sweeps"], dependencies=[Depends(signed_in)])


@router.post(
    "",
    status_code=201,
    openapi_extra=takes(model_id=1, sets=[{"preset": "head-only"}], dataset={"uri": "demo:digits"}),
)
def launch_sweep(service: Verbs, body: Body) -> Answer:
    """Queue one job for each freeze set, alike in all else."""
    return Answer(service.launch_sweep(body), 201)


@router.get("")
def list_sweeps(service: Verbs, limit: Limit = 100, before: OptionalId = None) -> Answer:
    """The sweeps, newest first."""
    return Answer(service.list_sweeps(limit, before))


@router.get("/{sweep_id}")
def get_sweep(service: Verbs, sweep_id: Id) -> Answer:
    """One sweep with its table, filled as its jobs go on."""
    return Answer(service.get_sweep(sweep_id))


@router.post("/{sweep_id}/stop", status_code=202)
def stop_sweep(service: Verbs, sweep_id: Id) -> Answer:
    """Stop every job that has not ended."""
    return Answer(service.stop_sweep(sweep_id), 202)


@router.delete("/{sweep_id}", status_code=204)
def delete_sweep(service: Verbs, sweep_id: Id) -> Response:
    """Delete an ended sweep and all its jobs with what lies on disk."""
    service.delete_sweep(sweep_id)
    return Response(status_code=204)

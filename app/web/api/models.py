"""Models: add, list, read, plan, delete."""

from time import monotonic
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.service import Service
from app.web.api.body import Answer, Body, Document, Id, Limit, OptionalId, Verbs, takes
from app.web.guard import changes_nothing, signed_in
from app.web.stream import LOOK_S, is_closing

router = APIRouter(prefix="/models", tags=["models"], dependencies=[Depends(signed_in)])

# So long a plan waits for a trace of what it assumes.
PATIENCE_S = 20.0
RULES = [{"action": "freeze", "match": "layer1.**"}]


@router.post("", status_code=202, openapi_extra=takes(uri="demo:digits"))
def add_model(service: Verbs, body: Body) -> Answer:
    """Add a model; a worker inspects it, and its `state` says when it is ready."""
    return Answer(service.add_model(body), 202)


@router.get("")
def list_models(service: Verbs, limit: Limit = 100, before: OptionalId = None) -> Answer:
    """The models, newest first."""
    return Answer(service.list_models(limit, before))


@router.get("/{model_id}")
def get_model(service: Verbs, model_id: Id) -> Answer:
    """One model: its state and its counts."""
    return Answer(service.get_model(model_id))


@router.delete("/{model_id}", status_code=204)
def delete_model(service: Verbs, model_id: Id) -> Response:
    """Delete a model that no job uses."""
    service.delete_model(model_id)
    return Response(status_code=204)


@router.get("/{model_id}/tree")
def read_tree(service: Verbs, model_id: Id) -> Answer:
    """Every module with its parameters and buffers, in model order."""
    return Answer(service.read_tree(model_id))


@router.post(
    "/{model_id}/plan",
    openapi_extra=takes(rules=RULES),
    dependencies=[Depends(changes_nothing)],
)
async def make_plan(request: Request, service: Verbs, model_id: Id, body: Body) -> Answer:
    """What a freeze config does to this model: states, flow, cost, warnings.

    A `sequence_length`, `image_size` or `precision` in `assume` that the model was not traced at
    yet is waited for, 20 seconds at most; the finding `not_assumed` says why the figures are not of
    it.
    """
    await _wait_for_trace(request.app, service, model_id, body)
    return Answer(await run_in_threadpool(service.make_plan, model_id, body))


async def _wait_for_trace(app: FastAPI, service: Service, model_id: int, body: Document) -> None:
    """Until nothing is being traced for a plan, or patience ends; it holds no thread meanwhile."""
    end = monotonic() + PATIENCE_S
    while not is_closing(app):
        seen = service.version  # before the question: what comes in between is not missed
        left = end - monotonic()
        if not await run_in_threadpool(service.is_tracing, model_id, body) or left <= 0:
            return
        await service.wait_for_change(seen, min(LOOK_S, left))


@router.post(
    "/{model_id}/compare-mechanisms",
    status_code=202,
    openapi_extra=takes(rules=RULES, training={"optimizer": "adamw"}),
)
def compare_mechanisms(service: Verbs, model_id: Id, body: Body) -> Answer:
    """Have a worker train a few steps under each of the four mechanisms.

    The body is a freeze config, optionally with `dataset` and `training`. The task's `result` tells
    gradients, bytes, step time, what moved that must not, whether what is trained came out the same
    with and without momentum, weight decay and clipping, and what happens afterwards.
    """
    return Answer(service.compare_mechanisms(model_id, body), 202)


@router.post("/{model_id}/calibrate", status_code=202)
def calibrate(service: Verbs, model_id: Id) -> Answer:
    """Have a worker time the model's operations; plans then predict the time of a step."""
    return Answer(service.calibrate(model_id), 202)


@router.post("/{model_id}/configs/import", status_code=201, openapi_extra=takes(rules=RULES))
def import_config(
    service: Verbs,
    model_id: Id,
    body: Body,
    accept: Annotated[Literal["rules", "names"] | None, Query()] = None,
) -> Answer:
    """Save a downloaded freeze config for this model.

    Where its names differ from what its rules give here, the answer is a 409 that lists them;
    sent again with `accept`, the rules or the names decide.
    """
    return Answer(service.import_config(model_id, body, accept), 201)

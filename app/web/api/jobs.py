"""Jobs: launch, list, steer, read what they recorded, delete."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from app.freezing.errors import InvalidDocument
from app.service.export import FORMATS, pack_rows
from app.web.api.body import (
    MAX_INTEGER,
    Answer,
    Body,
    Id,
    Limit,
    OptionalBody,
    OptionalId,
    StepId,
    Verbs,
    gives,
    takes,
)
from app.web.api.configs import attachment
from app.web.api.models import RULES
from app.web.errors import to_json
from app.web.guard import signed_in
from app.web.shared import answer_together

router = APIRouter(prefix="/jobs", tags=["jobs"], dependencies=[Depends(signed_in)])

Points = Annotated[int | None, Query(ge=1, le=1_000_000)]
From = Annotated[int | None, Query(alias="from", ge=0, le=MAX_INTEGER)]
To = Annotated[int | None, Query(ge=0, le=MAX_INTEGER)]
After = Annotated[int, Query(ge=0, le=MAX_INTEGER)]
Format = Annotated[str, Query(alias="format", max_length=20)]
# How long a live change waits for its step to become known: steps may take minutes.
EDIT_S = 5.0
Stat = Literal["grad_norm", "update_norm", "weight_norm", "update_ratio"]


@router.post(
    "",
    status_code=201,
    openapi_extra=takes(model_id=1, config={"rules": RULES}, dataset={"uri": "demo:digits"}),
)
def launch_job(service: Verbs, body: Body) -> Answer:
    """Queue a training run or an evaluation."""
    return Answer(service.launch_job(body), 201)


@router.get("")
def list_jobs(service: Verbs, limit: Limit = 100, before: OptionalId = None) -> Answer:
    """The jobs, newest first."""
    return Answer(service.list_jobs(limit, before))


@router.get("/{job_id}")
def get_job(service: Verbs, job_id: Id) -> Answer:
    """One job: state, progress, specs."""
    return Answer(service.get_job(job_id))


@router.patch("/{job_id}", openapi_extra=takes(name="baseline", notes="", priority=0))
def edit_job(service: Verbs, job_id: Id, body: Body) -> Answer:
    """Change a job's name, notes, priority, or how often it restarts by itself."""
    return Answer(service.edit_job(job_id, body))


@router.get("/{job_id}/attempts")
def list_attempts(service: Verbs, job_id: Id) -> Answer:
    """Every start of the job: when, where, from which step, how it ended."""
    return Answer(service.list_attempts(job_id))


@router.delete("/{job_id}", status_code=204)
def delete_job(service: Verbs, job_id: Id) -> Response:
    """Delete an ended job with all that lies on disk."""
    service.delete_job(job_id)
    return Response(status_code=204)


# ---------------------------------------------------------------------------------------- steering


@router.post("/{job_id}/stop", status_code=202)
def stop_job(service: Verbs, job_id: Id) -> Answer:
    """Stop after the current step, with a checkpoint."""
    return Answer(service.stop_job(job_id), 202)


@router.post("/{job_id}/pause", status_code=202, openapi_extra=takes(mode="hold"))
def pause_job(service: Verbs, job_id: Id, body: OptionalBody) -> Answer:
    """Pause: `hold` keeps the model loaded, `release` frees the device."""
    unknown = sorted(body.keys() - {"mode"})
    mode = body.get("mode", "hold")
    if unknown:
        raise InvalidDocument([(unknown[0], "A pause takes 'mode' alone.")])
    return Answer(service.pause_job(job_id, mode), 202)


@router.post("/{job_id}/resume", status_code=202, openapi_extra=takes())
def resume_job(service: Verbs, job_id: Id, body: OptionalBody) -> Answer:
    """Go on from a pause or from the newest checkpoint."""
    return Answer(service.resume_job(job_id, body), 202)


@router.patch("/{job_id}/freeze", status_code=202, openapi_extra=takes(rules=RULES))
async def change_freeze(service: Verbs, job_id: Id, body: Body) -> Answer:
    """Change what is frozen in a running job, from its next step on.

    `step` is the first step that it holds for, or null where the job takes long to get there.
    """
    edit = await run_in_threadpool(service.change_freeze, job_id, body)
    clock = asyncio.get_running_loop().time
    until = clock() + EDIT_S
    while edit["step"] is None and (left := until - clock()) > 0:
        seen = service.version
        edit = await run_in_threadpool(service.find_edit, job_id, edit["attempt"], edit["seq"])
        if edit["step"] is None:
            await service.wait_for_change(seen, left)
    return Answer(edit, 202)


@router.get("/{job_id}/freeze")
def read_freeze(service: Verbs, job_id: Id) -> Answer:
    """What is frozen now, and at which steps that changed."""
    return Answer(service.read_freeze(job_id))


# --------------------------------------------------------------------------------- what it recorded


@router.get("/{job_id}/metrics")
async def read_metrics(
    request: Request,
    service: Verbs,
    job_id: Id,
    name: str | None = None,
    points: Points = None,
    from_: From = None,
    to: To = None,
) -> Response:
    """The job's series, all or one, in at most `points` buckets."""
    return await answer_together(
        request, lambda: Answer(service.read_metrics(job_id, name, points, from_, to))
    )


@router.get("/{job_id}/layers", responses=gives("application/json", "application/octet-stream"))
async def read_layers(
    request: Request,
    service: Verbs,
    job_id: Id,
    stat: Stat = "grad_norm",
    points: Points = None,
    from_: From = None,
    to: To = None,
    match: str | None = None,
    reduce: Literal["max", "min", "last"] = "max",
    as_: Annotated[Literal["json", "float32"], Query(alias="as")] = "json",
) -> Response:
    """One statistic of every layer, a row a layer, in at most `points` buckets of steps.

    As float32: one line of JSON without the values, then the rows of the matrix as little-endian
    numbers; NaN where there is no value, and -1 where it was not a number.
    """

    def make() -> Response:
        found = service.read_layers(job_id, stat, points, from_, to, match, reduce)
        if as_ == "json":
            return Answer(found)
        rows = found.pop("values")
        head = to_json(found).encode() + b"\n"
        return Response(head + pack_rows(rows), media_type="application/octet-stream")

    return await answer_together(request, make)


@router.get("/{job_id}/proof")
def read_proof(service: Verbs, job_id: Id) -> Answer:
    """Whether every frozen tensor is bit-identical, and which trained ones moved."""
    return Answer(service.read_proof(job_id))


@router.get("/{job_id}/config")
def read_job_config(service: Verbs, job_id: Id) -> Answer:
    """The freeze config as trained."""
    return Answer(service.read_job_config(job_id))


@router.get("/{job_id}/insights")
def read_insights(service: Verbs, job_id: Id) -> Answer:
    """What the layer statistics say about the layers, as findings with their evidence."""
    return Answer(service.read_insights(job_id))


@router.get("/{job_id}/log", responses=gives("text/plain"))
def read_log(service: Verbs, job_id: Id, after: After = 0) -> Response:
    """What the job printed, from a byte on."""
    return PlainTextResponse(service.read_log(job_id, after))


@router.get("/{job_id}/export", responses=gives(*(f.media_type for f in FORMATS.values())))
def export_job(service: Verbs, job_id: Id, format_: Format = "csv") -> Response:
    """Metrics and layer statistics as a file."""
    filename, media_type, content = service.export_job(job_id, format_)
    return StreamingResponse(content, media_type=media_type, headers=attachment(filename))


# -------------------------------------------------------------------------------------- checkpoints


@router.get("/{job_id}/checkpoints")
def list_checkpoints(service: Verbs, job_id: Id) -> Answer:
    """The complete checkpoints."""
    return Answer(service.list_checkpoints(job_id))


@router.get(
    "/{job_id}/checkpoints/{step}/model.safetensors",
    responses=gives("application/octet-stream"),
)
def download_checkpoint(service: Verbs, job_id: Id, step: StepId) -> Response:
    """The weights of one checkpoint."""
    path = service.checkpoint_file(job_id, step)
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=f"job-{job_id}-step-{step}.safetensors",
    )


@router.delete("/{job_id}/checkpoints/{step}", status_code=204)
def delete_checkpoint(service: Verbs, job_id: Id, step: StepId) -> Response:
    """Delete one checkpoint from disk."""
    service.delete_checkpoint(job_id, step)
    return Response(status_code=204)

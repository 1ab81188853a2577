"""The JSON interface: every route below ``/api``, one file a noun."""

from fastapi import APIRouter

from app.web import stream
from app.web.api import configs, datasets, docs, health, jobs, models, reports, sweeps, tasks

router = APIRouter(
    prefix="/api",
    responses={
        "4XX": {
            "description": "A refusal, in words (RFC 9457).",
            "content": {"application/problem+json": {"schema": {"type": "object"}}},
        }
    },
)
for part in (health, models, configs, datasets, jobs, sweeps, reports, tasks, docs, stream):
    router.include_router(part.router)

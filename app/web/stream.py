"""Server-Sent Events of one job or of all: what is new since an id. It knows no browser state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from time import monotonic
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.service import NotFound, Service
from app.web.api.body import Id, Verbs
from app.web.errors import to_json
from app.web.guard import signed_in
from app.web.shared import Shared

# What happens within this time arrives as one batch: a job of 1,000 steps a second does not make
# 1,000 reads a second for each page that is open.
PACE_S = 0.2
# So many streams more, and each gets its portions one beat later.
CROWD = 40
# How soon an idle stream notices that the server is closing.
LOOK_S = 1.0
# What stands between ends a connection that is silent for long; a comment keeps it.
SILENCE_S = 15.0

router = APIRouter(tags=["events"], dependencies=[Depends(signed_in)])


async def find_start(
    cursor: Annotated[str | None, Query(max_length=500)] = None,
    last_event_id: Annotated[str | None, Header(max_length=500)] = None,
) -> str | None:
    """Where a stream goes on: the browser's last id, else `?cursor=` (`now` skips the past)."""
    return last_event_id or cursor


def has_room(request: Request) -> None:
    """Declares a stream; refused in words where too many are open."""
    request.app.state.open_streams.check()


def find_job(service: Verbs, job_id: Id) -> int:
    """An unknown job is a 404, which a stream that has begun could not say any more."""
    service.get_job(job_id)
    return job_id


Start = Annotated[str | None, Depends(find_start)]


class EventStream(StreamingResponse):
    """A stream that is counted while it is open.

    Not FastAPI's EventSourceResponse, whose sender raises in the server where a client leaves while
    something is being sent.
    """

    media_type = "text/event-stream"

    def __init__(self, app: FastAPI, events: AsyncIterator[bytes]) -> None:
        # No proxy shall keep back what it is to pass on.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._open_streams = app.state.open_streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._open_streams.one_more():
            await super().__call__(scope, receive, send)


@router.get(
    "/events", response_class=EventStream, status_code=200, dependencies=[Depends(has_room)]
)
async def follow_all(request: Request, service: Verbs, start: Start) -> EventStream:
    """`state` events of all jobs."""
    return await open_stream(request.app, service, None, start)


@router.get(
    "/jobs/{job_id}/events",
    response_class=EventStream,
    status_code=200,
    dependencies=[Depends(has_room)],
)
async def follow_job(
    request: Request, service: Verbs, job_id: Annotated[int, Depends(find_job)], start: Start
) -> EventStream:
    """`state`, `metrics`, `layers`, `proof` and `log` events of one job, then `end`."""
    return await open_stream(request.app, service, job_id, start)


async def open_stream(
    app: FastAPI, service: Service, job_id: int | None, cursor: str | None
) -> EventStream:
    """A stream from the cursor on; "now" is the moment at which it was asked for.

    Whoever has the first bytes of the answer may look at a job and wait for what comes next.
    """
    if cursor == "now":
        _, cursor, _ = await run_in_threadpool(service.news, job_id, cursor)
    return EventStream(app, follow(app, service, job_id, cursor))


async def follow(
    app: FastAPI, service: Service, job_id: int | None, cursor: str | None
) -> AsyncIterator[bytes]:
    """News until the job has ended or the server closes, each event with the id behind it."""
    shared: Shared = app.state.shared
    spoke = monotonic()
    while not is_closing(app):
        seen = service.version  # before the news: what comes in between is not missed
        key, read = (seen, job_id, cursor), partial(_read, service, job_id, cursor)
        try:
            news, cursor, finished = await shared.get(key, read)
        except NotFound:  # deleted meanwhile: there will be no more
            news, finished = b"", True
        if news:
            yield news
            spoke = monotonic()
        if finished:
            yield format_sse_event(event="end", data_str="{}", id=cursor)
            return
        if not news:  # else it was a portion: there may be more already
            while not is_closing(app) and await service.wait_for_change(seen, LOOK_S) == seen:
                if monotonic() - spoke > SILENCE_S:
                    yield KEEPALIVE_COMMENT
                    spoke = monotonic()
        # Up to a common beat, so that streams of one job come to stand side by side.
        pace = PACE_S * (1 + app.state.open_streams.count // CROWD)
        await asyncio.sleep(pace - asyncio.get_running_loop().time() % pace)


def _read(service: Service, job_id: int | None, cursor: str | None) -> tuple[bytes, str, bool]:
    """Events as they are sent, the cursor behind them, whether the job ended and all is told."""
    news, behind, finished = service.news(job_id, cursor)
    told = [format_sse_event(event=e, data_str=to_json(data), id=after) for e, data, after in news]
    return b"".join(told), behind, finished


def close_streams(app: FastAPI) -> None:
    """Let every stream end by itself, so that the server can."""
    app.state.closing = True


def is_closing(app: FastAPI) -> bool:
    return getattr(app.state, "closing", False)

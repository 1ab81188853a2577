"""What many ask for at once is made once. It knows no document."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from copy import copy
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

T = TypeVar("T")

# How long what was made is kept for those who ask a moment later.
KEPT_S = 0.5


class Shared:
    """What was made for somebody a moment ago, or is being made, by its key."""

    def __init__(self) -> None:
        self._made: dict[Hashable, asyncio.Task[Any]] = {}

    async def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, in a thread; raises what it raises.

        Args:
            key: holds all that decides what is made, the version of the store among it.
        """
        if key not in self._made:
            task = asyncio.create_task(run_in_threadpool(make))
            self._made[key] = task
            loop = asyncio.get_running_loop()
            task.add_done_callback(lambda _: loop.call_later(KEPT_S, self._made.pop, key, None))
        # Shielded: who goes away takes it from nobody else.
        result: T = await asyncio.shield(self._made[key])
        return result


async def answer_together(request: Request, make: Callable[[], Response]) -> Response:
    """The response that `make` gives, made once for all who ask for the address meanwhile.

    It is as new as the store. For responses that are the same whoever asks, to a route that has let
    each of them in.
    """
    state, scope = request.app.state, request.scope
    address = scope.get("root_path", ""), scope["path"], scope["query_string"]
    response = copy(await state.shared.get((state.service.version, *address), make))
    response.raw_headers = list(response.raw_headers)  # each is sent with headers of its own
    return response

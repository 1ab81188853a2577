"""A dashboard in this process on a free port, and a client that is let in. It knows no test."""

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx2

from app.client import LOOPBACK
from app.serving import Dashboard, listen
from app.settings import Settings

TOKEN = "a-token-for-tests"


@contextlib.contextmanager
def serve(**settings: Any) -> Iterator[httpx2.Client]:
    """A client of a dashboard that serves as long as the `with` block lasts."""
    listener = listen(LOOPBACK, 0)
    port = listener.getsockname()[1]
    with (
        Dashboard(Settings(token=TOKEN, port=port, **settings), listener).in_background(),
        httpx2.Client(
            base_url=f"http://{LOOPBACK}:{port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
            trust_env=False,
        ) as client,
    ):
        yield client

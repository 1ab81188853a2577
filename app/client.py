"""Speaks to the server of a data folder as any script would; it knows the contract alone."""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2

from app.settings import Settings, read_token

LOOPBACK = "127.0.0.1"


class Failure(Exception):
    """A verb that did not work; str() is the line for standard error."""


@contextlib.contextmanager
def server_for(settings: Settings) -> Iterator["Server"]:
    """Whoever owns the data folder; where nobody does, a server of our own until we are done."""
    from app.store.lock import read_holder

    with contextlib.ExitStack() as stack:
        server = None
        while server is None:
            holder = read_holder(settings.data_dir)
            if holder is None:
                server = _start_own(settings, stack)
            elif holder.address is not None:
                server = Server(holder.address, read_token(settings), own=False)
            else:
                time.sleep(0.01)  # it has just taken the lock and writes its address
        stack.enter_context(server.http)
        yield server


def _start_own(settings: Settings, stack: contextlib.ExitStack) -> "Server | None":
    """None where another process was quicker to take the folder."""
    # Imported here: most calls find a server, and need none of what one is made of.
    from app.serving import Dashboard, listen
    from app.store.lock import DataFolderHeld

    listener = listen(LOOPBACK, 0)
    port = listener.getsockname()[1]
    own = settings.model_copy(update={"host": LOOPBACK, "port": port, "root_path": ""})
    try:
        stack.enter_context(Dashboard(own, listener).in_background())
    except DataFolderHeld:
        return None
    return Server(f"http://{LOOPBACK}:{port}", read_token(settings), own=True)


class Server:
    """A running server, spoken to as any script would.

    Attributes:
        own: it is ours and ends with this command, so what it is asked to do must be waited for.
    """

    def __init__(self, address: str, token: str, own: bool) -> None:
        self.address, self.own = address, own
        self.http = httpx2.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {token}"},
            timeout=60.0,
            trust_env=False,  # a proxy of the environment knows nothing of this machine's loopback
        )

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """One request; its answer's document.

        Raises:
            Failure: with the server's own sentence when it refuses, or when it does not answer.
        """
        with self._failures_in_words():
            answer = self.http.request(method, path, json=body, params=query)
            _check_answer(answer)
            return answer.json() if answer.content else None

    @contextlib.contextmanager
    def stream(self, path: str, **query: Any) -> Iterator[httpx2.Response]:
        with self._failures_in_words(), self.http.stream("GET", path, params=query) as answer:
            if not answer.is_success:
                answer.read()
            _check_answer(answer)
            yield answer

    @contextlib.contextmanager
    def _failures_in_words(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise Failure(f"The server at {self.address} does not answer: {error}.") from error


def _check_answer(answer: httpx2.Response) -> None:
    if answer.is_success:
        return
    try:
        problem = answer.json()
        words = problem["detail"]
    except (ValueError, KeyError, TypeError):
        raise Failure(f"The server answered {answer.status_code}.") from None
    names = [name for side in problem.get("differing", {}).values() for name in side]
    raise Failure(f"{words} {' '.join(names)}" if names else words)


def read_events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The events of a stream; a heartbeat is one without a name."""
    event, data = "", ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            event = value
        elif field == "data":
            data += value
        elif not line:
            yield event, json.loads(data) if data else None
            event, data = "", ""

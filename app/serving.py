"""Runs the web server on a socket that already listens: in front, or behind a command."""

import asyncio
import contextlib
import gc
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.concurrency import run_in_threadpool

from app.main import create_app
from app.service import Service
from app.settings import Settings
from app.web.stream import close_streams

Hook = Callable[[Service], None]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in it until the server is ready.

    Raises:
        OSError: str() says which address, and what to do.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sees to it only on sockets made for TCP by name, which these are not: without it
        # the second packet of an answer waits 40 ms for word of the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Choose another "
            "address with --host or --port."
        ) from error


class Dashboard:
    """The application on one socket.

    Args:
        settings: with the host and port that the listener really has.
        announce: called once it answers.
        before_end: called when it was told to end and still answers.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        announce: Hook | None = None,
        before_end: Hook | None = None,
    ) -> None:
        self.listener = listener
        self.app = create_app(settings)
        self.server = _Server(
            uvicorn.Config(
                self.app,
                lifespan="off",  # entered in `_serve`: what fails there is raised, not logged
                access_log=False,  # a login link stands in its address
                log_level="warning",
                server_header=False,
                proxy_headers=settings.behind_proxy,
                forwarded_allow_ips="*" if settings.behind_proxy else None,
                root_path=settings.root_path,
                timeout_graceful_shutdown=3,
            )
        )
        self.server.announce, self.server.before_end = announce, before_end

    def run(self) -> None:
        """Serve until a signal comes (in the main thread) or the server is told to leave."""
        with self.listener:
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        async with self.app.router.lifespan_context(self.app):
            await self.server.serve([self.listener])

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Serve from a thread for the length of a `with` block.

        Raises:
            Exception: whatever kept it from starting.
        """
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.run()
            except Exception as error:
                failures.append(error)
            finally:
                self.server.answers.set()

        thread = threading.Thread(target=run, name="dashboard")
        thread.start()
        try:
            self.server.answers.wait()
            if failures:
                raise failures[0]
            yield
        finally:
            self.server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """uvicorn, with a word when it answers and another before it ends."""

    announce: Hook | None = None
    before_end: Hook | None = None

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answers = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What was imported stays, and need not be looked through whenever memory is tidied: each
        # time that would stop every request for 80 ms.
        gc.freeze()
        await self._call(self.announce)
        self.answers.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._call(self.before_end)
        close_streams(self.config.app)  # type: ignore[arg-type]
        await super().shutdown(sockets)

    async def _call(self, hook: Hook | None) -> None:
        if hook is not None:
            await run_in_threadpool(hook, self.config.app.state.service)  # type: ignore[union-attr]

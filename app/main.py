"""create_app(settings): the only file that knows every room."""

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from app import __version__
from app.jobs.keeper import Keeper
from app.jobs.rebuild import open_database
from app.jobs.runner import Runner
from app.service import Service
from app.settings import Settings, read_token
from app.store.lock import DataFolderHeld, Holder, hold_data_folder, read_holder
from app.web import api, errors, guard
from app.web.audit import AuditLog
from app.web.limits import FailedLogins, OpenStreams
from app.web.pages import (
    compare,
    configs,
    imports,
    job,
    jobs,
    login,
    models,
    patterns,
    preview,
    sweeps,
    system,
    trials,
)
from app.web.shared import Shared

__all__ = ["DataFolderHeld", "Holder", "create_app", "read_holder"]

STATIC = Path(__file__).parent.parent / "static"
FIRST_MODEL = {"uri": "demo:digits"}


def create_app(settings: Settings) -> FastAPI:
    """The whole application; it takes hold of its data folder when it starts, not before.

    On start it raises DataFolderHeld where another process owns the folder, and
    DatabaseFromTheFuture where a newer version wrote it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Without the root path, which only a proxy in front puts before ours.
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{settings.port}"
        with hold_data_folder(settings.data_dir, address):
            db, is_new = open_database(settings)
            runner = Runner(settings, db, lambda: Keeper.connect(settings.data_dir))
            app.state.service = Service(settings, db, runner)
            app.state.token = read_token(settings)
            app.state.audit = AuditLog(settings.data_dir / "audit.log")
            app.state.failed_logins, app.state.open_streams = FailedLogins(), OpenStreams()
            app.state.shared = Shared()
            if is_new:
                app.state.service.add_model(FIRST_MODEL)
            stop = threading.Event()
            thread = threading.Thread(target=runner.run, args=(stop, time.monotonic), name="runner")
            thread.start()
            try:
                yield
            finally:
                stop.set()
                runner.wake()
                thread.join()
                app.state.audit.close()
                db.close()

    # The docs are our own page: FastAPI's would load scripts from another host.
    app = FastAPI(
        title="Frostline",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # the root path comes with each request, from the web server
    )
    app.state.settings = settings
    errors.install(app)
    app.include_router(api.router)
    for page in (
        login, models, preview, trials, imports, configs,
        jobs, job, compare, sweeps, system, patterns,
    ):  # fmt: skip
        app.include_router(page.router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    guard.check_declared(app)
    app.add_middleware(guard.Guard, settings=settings)
    return app

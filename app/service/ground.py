"""What every verb stands on: the settings, the database, and whoever runs the jobs."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sqlmodel import Session

from app.service.documents import Conflict, Document, find_row
from app.settings import Settings
from app.store import catalog, files
from app.store.db import Database
from app.store.tables import Model, Task

LIVE_TASKS = ("queued", "running")
# As many of a kind wait at most: some take ten seconds of every core.
MOST_TASKS = 20


class RunnerStatus(Protocol):
    """What the service may ask of whoever runs the jobs."""

    def devices(self) -> list[Document]: ...
    def kernels(self) -> str: ...
    def slots(self) -> dict[str, dict[str, int]]: ...
    def measure_devices(self) -> dict[str, Document]: ...
    def keeper(self) -> Document: ...
    def usage(self) -> dict[int, dict[str, int | None]]: ...
    def troubles(self) -> dict[str, str]: ...
    def wake(self) -> None: ...


class Ground:
    """The verbs' common ground."""

    def __init__(self, settings: Settings, db: Database, runner_status: RunnerStatus) -> None:
        self._settings = settings
        self._db = db
        self._runner = runner_status

    def _write_and_wake(self, change: Callable[[Session], Document]) -> Document:
        document = self._db.write(change)
        self._runner.wake()
        return document

    def _add_task(self, model_id: int, spec: Document, kept: int) -> Document:
        """Queue a task on a model; one that is just the same and has not ended is answered instead.

        Args:
            kept: how many ended ones of its kind stay.

        Raises:
            Conflict: too many of its kind wait.
        """
        kind = spec["kind"]

        def add(session: Session) -> tuple[Document, list[int]]:
            model = find_row(session, Model, model_id)
            told = json.loads(json.dumps({**spec, "model": model.spec}))
            live = [t for t in catalog.tasks_in(session, *LIVE_TASKS) if t.kind == kind]
            task = next((t for t in live if (t.model_id, t.spec) == (model_id, told)), None)
            if task is None and len(live) >= MOST_TASKS:
                raise Conflict(
                    f"{len(live)} tasks of this kind wait already; wait for some, or stop them."
                )
            if task is None:
                task = Task(kind=kind, model_id=model_id, spec=told)
                session.add(task)
                session.flush()
            document = {"id": task.id, "kind": kind, "model_id": model_id, "state": task.state}
            return document, catalog.drop_tasks(session, kind, kept)

        document, dropped = self._db.write(add)
        for old in dropped:
            files.remove_folder(files.task_folder(self._settings.data_dir, old))
        self._runner.wake()
        return document

    def _folder(self, job_id: int) -> Path:
        return files.job_folder(self._settings.data_dir, job_id)

    def _last_words(self, task_id: int) -> str | None:
        """The last line that a task's worker printed: how far a download is, for example."""
        folder = files.task_folder(self._settings.data_dir, task_id)
        tail = files.read_logs(folder, max(0, files.log_size(folder) - 2_000))
        lines = tail.decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), None)

    def _dirs(self) -> dict[str, tuple[Path, ...]]:
        return {"code_dirs": self._settings.code_dirs, "file_dirs": self._settings.file_dirs}

    def _surroundings(self) -> Document:
        """What a worker is told beside the spec; threads are fixed with it, for equal results."""
        threads = max(1, _usable_cores() // self._settings.cpu_slots)
        dirs = {name: [str(path) for path in paths] for name, paths in self._dirs().items()}
        return {**dirs, "threads": threads}


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

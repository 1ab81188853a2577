"""What every verb stands on: the settings, the database, and whoever runs the jobs."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sqlmodel import Session

from app.service.documents import (
    Document,
)
from app.settings import Settings
from app.store import files
from app.store.db import Database


class RunnerStatus(Protocol):
    """What the service may ask of whoever runs the jobs."""

    def devices(self) -> list[Document]: ...
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

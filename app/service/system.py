"""Verbs on the machine and the door: tasks, health, the report, logins."""

import importlib.metadata
import platform
import secrets
import shutil
from datetime import UTC, datetime, timedelta

import psutil
from sqlmodel import Session

from app import __version__
from app.jobs import folder as job_folder
from app.service.documents import (
    Document,
    digest,
    error_document,
    find_row,
    iso,
    members,
)
from app.service.ground import Ground
from app.store import catalog, files, jobs
from app.store.tables import Task

LINK_MINUTES = 15
SESSION_DAYS = 30


class System(Ground):
    """Verbs on the machine and the door."""

    def get_task(self, task_id: int) -> Document:
        """A task's state, and what it found out: `result`, None until then.

        What an inspection finds is the model's tree; a preview that failed still tells what it saw.
        """
        with self._db.read() as session:
            task = find_row(session, Task, task_id)
        has_ended = task.kind != "inspect" and task.ended_at is not None
        folder = files.task_folder(self._settings.data_dir, task_id) / "attempts" / "1"
        found = job_folder.read_document(folder / job_folder.FOUND) if has_ended else None
        return {
            "id": task.id,
            "kind": task.kind,
            "model_id": task.model_id,
            "state": task.state,
            "error": error_document(task),
            "progress": None if task.ended_at else self._last_words(task_id),
            "result": found and members(found, drop=("format",)),
            "created_at": task.created_at,
            "started_at": task.started_at,
            "ended_at": task.ended_at,
        }

    def stop_task(self, task_id: int) -> Document:
        """End a task; one that has ended stays as it is."""

        def stop(session: Session) -> None:
            task = find_row(session, Task, task_id)
            if task.state == "queued":
                catalog.end_task(session, task, "stopped")
            elif task.state == "running":
                task.state = "stopping"
                session.add(task)

        self._db.write(stop)
        self._runner.wake()
        return self.get_task(task_id)

    def health(self) -> Document:
        """`workers` is how many jobs can run at once; 0 while no worker can be started."""
        slots = self._runner.slots()
        total = slots["cpu"]["total"] + slots["cuda"]["total"]
        is_ready = self._runner.keeper()["ready"]
        return {"status": "ok", "version": __version__, "workers": total if is_ready else 0}

    def system_report(self) -> Document:
        with self._db.read() as session:
            counts = jobs.count_by_state(session)
        disk, memory = shutil.disk_usage(self._settings.data_dir), psutil.virtual_memory()
        python = self._settings.worker_python
        return {
            "version": __version__,
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "data_dir": str(self._settings.data_dir),
            "database_bytes": self._db.path.stat().st_size,
            "devices": self._runner.devices(),
            "slots": self._runner.slots(),
            "keeper": self._runner.keeper(),
            "disk": {"free": disk.free, "total": disk.total},
            "memory": {
                "server": psutil.Process().memory_info().rss,
                "available": memory.available,
                "total": memory.total,
            },
            "jobs": counts,
            "code_dirs": [str(path) for path in self._settings.code_dirs],
            "file_dirs": [str(path) for path in self._settings.file_dirs],
            "worker_python": None if python is None else str(python),
        }

    def make_link(self) -> str:
        """A new one-time login secret; only its digest is kept."""
        return self._make_login("link", timedelta(minutes=LINK_MINUTES))

    def use_link(self, link: str) -> str | None:
        """Spend a link for a session's secret; None where it is unknown, spent or too old."""
        if not self._db.write(lambda s: catalog.spend_login(s, digest(link), "link")):
            return None
        return self._make_login("session", timedelta(days=SESSION_DAYS))

    def check_session(self, session: str) -> bool:
        with self._db.read() as reader:
            return catalog.has_login(reader, digest(session), "session")

    def end_session(self, session: str) -> None:
        self._db.write(lambda s: catalog.spend_login(s, digest(session), "session"))

    def _make_login(self, kind: str, lifetime: timedelta) -> str:
        secret = secrets.token_urlsafe(32)
        expires_at = iso(datetime.now(UTC) + lifetime)
        self._db.write(lambda s: catalog.add_login(s, digest(secret), kind, expires_at))
        return secret

"""Verbs on tasks and on the door: what workers find out beside the jobs, and logins."""

import secrets
from datetime import UTC, datetime, timedelta

from sqlmodel import Session

from app.jobs import folder as job_folder
from app.service.documents import (
    Document,
    digest,
    error_document,
    find_row,
    iso,
    members,
)
from app.service.machine import Machine
from app.store import catalog, files
from app.store.tables import Task

LINK_MINUTES = 15
SESSION_DAYS = 30


class System(Machine):
    """Verbs on tasks and on the door."""

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
            catalog.stop_task(session, find_row(session, Task, task_id))

        self._db.write(stop)
        self._runner.wake()
        return self.get_task(task_id)

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

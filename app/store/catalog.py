"""The catalogue: models, saved freeze configs, tasks and logins."""

from collections.abc import Sequence
from typing import TypeVar

from sqlalchemy import update
from sqlmodel import Session, col, delete, select

from app.store.tables import FreezeConfigRow, Job, Login, Model, Sweep, Task, utc_now

Row = TypeVar("Row", Model, FreezeConfigRow, Sweep)


def list_newest(
    session: Session, table: type[Row], limit: int, before: int | None = None
) -> Sequence[Row]:
    """Rows of a table, newest first; with `before`, those with a smaller id."""
    query = select(table).order_by(col(table.id).desc()).limit(limit)
    return session.exec(query if before is None else query.where(col(table.id) < before)).all()


def list_configs(
    session: Session, model_id: int, limit: int, before: int | None = None
) -> Sequence[FreezeConfigRow]:
    """A model's saved configs, newest first."""
    query = select(FreezeConfigRow).where(FreezeConfigRow.model_id == model_id)
    if before is not None:
        query = query.where(col(FreezeConfigRow.id) < before)
    return session.exec(query.order_by(col(FreezeConfigRow.id).desc()).limit(limit)).all()


def task_of_model(session: Session, model_id: int) -> Task | None:
    """The inspection of a model."""
    query = select(Task).where(Task.model_id == model_id, Task.kind == "inspect")
    query = query.order_by(col(Task.id).desc())
    return session.exec(query).first()


def tasks_of_model(session: Session, model_id: int, kind: str | None = None) -> Sequence[Task]:
    """A model's tasks, of one kind or of all, newest first."""
    query = select(Task).where(Task.model_id == model_id)
    if kind is not None:
        query = query.where(Task.kind == kind)
    return session.exec(query.order_by(col(Task.id).desc())).all()


def tasks_in(session: Session, *states: str) -> Sequence[Task]:
    """Tasks in these states, oldest first."""
    query = select(Task).where(col(Task.state).in_(states))
    return session.exec(query.order_by(col(Task.id))).all()


def move_task(session: Session, task_id: int | None, before: str, after: str) -> bool:
    """Make one transition if the task is still in the state `before`; whether it was made."""
    started_at = utc_now() if after == "running" else None
    statement = (
        update(Task)
        .where(col(Task.id) == task_id, col(Task.state) == before)
        .values(state=after, started_at=started_at)
        .execution_options(synchronize_session=False)
    )
    return session.connection().execute(statement).rowcount == 1


def stop_task(session: Session, task: Task) -> None:
    """Ask a task to end: one that waits ends at once, one that has ended stays as it is."""
    if task.state == "queued":
        end_task(session, task, "stopped")
    elif task.state == "running":
        task.state = "stopping"
        session.add(task)


def end_task(
    session: Session, task: Task, state: str, reason: str | None = None, message: str | None = None
) -> None:
    """Record how a task ended; a failed inspection is its model's failure too."""
    task.state, task.error_reason, task.error_message = state, reason, message
    task.ended_at, task.pid = utc_now(), None
    session.add(task)
    model = session.get(Model, task.model_id) if task.model_id is not None else None
    if model is not None and state != "succeeded" and task.kind == "inspect":
        model.state, model.error_reason, model.error_message = "failed", reason, message
        session.add(model)
    session.flush()


def drop_tasks(session: Session, kind: str, keep: int) -> list[int]:
    """Remove the rows of ended tasks of a kind but for the newest; the ids of those removed."""
    query = select(Task).where(Task.kind == kind, col(Task.ended_at).is_not(None))
    old = session.exec(query.order_by(col(Task.id).desc()).offset(keep)).all()
    for task in old:
        session.delete(task)
    return [task.id for task in old if task.id is not None]


def jobs_of_model(session: Session, model_id: int) -> list[int]:
    """The ids of the jobs that use a model, oldest first."""
    query = select(Job.id).where(Job.model_id == model_id).order_by(col(Job.id))
    return [job_id for job_id in session.exec(query) if job_id is not None]


def delete_model(session: Session, model: Model) -> None:
    """Remove a model and its saved configs."""
    session.exec(delete(FreezeConfigRow).where(col(FreezeConfigRow.model_id) == model.id))
    session.delete(model)
    session.flush()


def add_login(session: Session, digest: str, kind: str, expires_at: str) -> None:
    """Keep the digest of a link or a session; forget those that have expired."""
    session.exec(delete(Login).where(col(Login.expires_at) < utc_now()))
    session.add(Login(digest=digest, kind=kind, expires_at=expires_at))


def has_login(session: Session, digest: str, kind: str) -> bool:
    login = session.get(Login, digest)
    return login is not None and login.kind == kind and login.expires_at >= utc_now()


def spend_login(session: Session, digest: str, kind: str) -> bool:
    """Remove a link or a session; whether it was good until now."""
    was_good = has_login(session, digest, kind)
    if was_good:
        session.delete(session.get_one(Login, digest))
    return was_good

"""Jobs: their rows, every transition they may make, and the one statement that makes it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import case, func, text, update
from sqlalchemy.orm import defer
from sqlmodel import Session, col, delete, select

from app.store.tables import Attempt, Job, Layer, Proof, Series, Sweep, utc_now

TRANSITIONS: Mapping[str, frozenset[str]] = {
    "queued": frozenset({"starting", "stopped"}),
    "starting": frozenset({"running", "stopping", "failed", "interrupted"}),
    "running": frozenset({"paused", "stopping", "succeeded", "failed", "interrupted"}),
    "paused": frozenset({"running", "queued", "stopping", "failed", "interrupted"}),
    "stopping": frozenset({"stopped", "succeeded", "failed", "interrupted"}),
    "stopped": frozenset({"queued"}),
    "failed": frozenset({"queued"}),
    "interrupted": frozenset({"queued"}),
    "succeeded": frozenset({"queued"}),
}
# The config lists every name of the model: lists and streams of jobs leave it where it is.
_WITHOUT_CONFIG = defer(Job.config)  # type: ignore[arg-type]
RESTARTS = 3  # how often a job is queued again by itself before somebody must ask
ENDED = frozenset({"stopped", "failed", "interrupted", "succeeded"})


def next_version(session: Session) -> int:
    """A number larger than any job's version so far, also of jobs deleted since."""
    statement = text("UPDATE revision SET value = value + 1 RETURNING value")
    return int(session.connection().execute(statement).scalar_one())


def last_version(session: Session) -> int:
    return int(session.connection().execute(text("SELECT value FROM revision")).scalar_one())


def add_job(session: Session, **fields: Any) -> Job:
    version = next_version(session)
    job = Job(version=version, place=version, **fields)
    session.add(job)
    session.flush()
    return job


def update_job(session: Session, job: Job, **changes: Any) -> None:
    """Change columns other than the state, as one more version of the row."""
    assert "state" not in changes, "a state changes through move_job"
    for name, value in changes.items():
        setattr(job, name, value)
    job.version = next_version(session)
    session.flush()


def move_job(session: Session, job: Job, state: str, **changes: Any) -> bool:
    """Make one transition if the row is still as `job` has it; whether it was made."""
    sources = [source for source, targets in TRANSITIONS.items() if state in targets]
    if state in ENDED:
        changes.setdefault("ended_at", utc_now())
    changes.setdefault("waiting_for", None)
    statement = (
        update(Job)
        .where(col(Job.id) == job.id, col(Job.version) == job.version, col(Job.state).in_(sources))
        .values(state=state, version=next_version(session), **changes)
        .execution_options(synchronize_session=False)
    )
    moved = session.connection().execute(statement).rowcount == 1
    session.refresh(job)
    return moved


def list_jobs(session: Session, limit: int, before: int | None = None) -> Sequence[Job]:
    query = select(Job).options(_WITHOUT_CONFIG).order_by(col(Job.id).desc()).limit(limit)
    return session.exec(query if before is None else query.where(col(Job.id) < before)).all()


def jobs_of_sweep(session: Session, sweep_id: int) -> Sequence[Job]:
    """A sweep's jobs, in the order in which they were asked for."""
    query = select(Job).options(_WITHOUT_CONFIG).where(Job.sweep_id == sweep_id)
    return session.exec(query.order_by(col(Job.id))).all()


def jobs_changed_since(session: Session, version: int, limit: int = 100) -> Sequence[Job]:
    query = select(Job).options(_WITHOUT_CONFIG).where(Job.version > version)
    return session.exec(query.order_by(col(Job.version)).limit(limit)).all()


def queued_jobs(session: Session) -> Sequence[Job]:
    """Jobs that wait, in the order in which they are to start."""
    query = select(Job).where(Job.state == "queued")
    return session.exec(query.order_by(col(Job.priority).desc(), col(Job.place))).all()


def restarting_jobs(session: Session) -> Sequence[Job]:
    """Jobs that were cut short and are to be queued again without anybody asking."""
    query = select(Job).options(_WITHOUT_CONFIG).where(col(Job.is_restarting))
    return session.exec(query.order_by(col(Job.priority).desc(), col(Job.place))).all()


def live_attempts(session: Session) -> Sequence[tuple[Job, Attempt]]:
    """Attempts that have not ended, each with its job."""
    query = select(Job, Attempt).options(_WITHOUT_CONFIG)
    query = query.join(Attempt, col(Attempt.job_id) == Job.id)
    return session.exec(query.where(col(Attempt.ended_at).is_(None))).all()


def list_attempts(session: Session, job_id: int) -> Sequence[Attempt]:
    """A job's attempts, oldest first."""
    query = select(Attempt).where(Attempt.job_id == job_id).order_by(col(Attempt.number))
    return session.exec(query).all()


def living_attempt(session: Session, job: Job) -> Attempt | None:
    attempt = session.get(Attempt, (job.id, job.attempt))
    return attempt if attempt is not None and attempt.ended_at is None else None


def attempts_of(session: Session, job_id: int) -> Sequence[Attempt]:
    """Every attempt of a job, the first one first."""
    query = select(Attempt).where(Attempt.job_id == job_id).order_by(col(Attempt.number))
    return session.exec(query).all()


def newest_attempts(session: Session, job_ids: Sequence[int]) -> dict[int, Attempt]:
    """Job → its newest attempt, ended or not; those that never started have none."""
    query = select(Attempt).join(Job, col(Job.id) == Attempt.job_id)
    query = query.where(col(Attempt.job_id).in_(job_ids), Attempt.number == Job.attempt)
    return {attempt.job_id: attempt for attempt in session.exec(query)}


def newest_peaks(session: Session, job_ids: Sequence[int]) -> dict[int, int]:
    """Job → the most memory that its newest attempt took so far, for those where that is known.

    On a GPU that is what torch allocated, as the newest proof tells, and until there is one what
    the driver says of the whole process; on a CPU what the process took.
    """
    proved = func.json_extract(Proof.document, "$.peak_bytes")
    is_of_attempt = func.json_extract(Proof.document, "$.step") > func.coalesce(
        Attempt.resume_step, -1
    )
    peak = case(
        (col(Attempt.device) == "cpu", Attempt.peak_bytes),
        (is_of_attempt, proved),
        else_=Attempt.peak_device_bytes,
    )
    query = select(Attempt.job_id, peak).join(Job, col(Job.id) == Attempt.job_id)
    query = query.outerjoin(Proof, col(Proof.job_id) == Attempt.job_id)
    query = query.where(col(Attempt.job_id).in_(job_ids), Attempt.number == Job.attempt)
    return {job_id: found for job_id, found in session.exec(query) if found is not None}


def queue_positions(session: Session) -> dict[int, int]:
    """Job → its place in the queue, from 1 on."""
    query = select(Job.id).where(Job.state == "queued")
    ids = session.exec(query.order_by(col(Job.priority).desc(), col(Job.place))).all()
    return {job_id: position for position, job_id in enumerate(ids, 1) if job_id is not None}


def resume_step(session: Session, job: Job) -> int:
    """The checkpoint that the newest attempt went on from; -1 for a fresh start."""
    attempt = session.get(Attempt, (job.id, job.attempt))
    return -1 if attempt is None or attempt.resume_step is None else attempt.resume_step


def count_by_state(session: Session) -> dict[str, int]:
    rows = session.connection().execute(text("SELECT state, count(*) FROM job GROUP BY state"))
    return dict(rows.all())


def start_attempt(
    session: Session, job: Job, device: str, resume_step: int | None
) -> Attempt | None:
    """Claim a queued job; None where somebody was quicker."""
    number = job.attempt + 1
    if not move_job(session, job, "starting", attempt=number, wish="running", ended_at=None):
        return None
    assert job.id is not None
    attempt = Attempt(job_id=job.id, number=number, device=device, resume_step=resume_step)
    session.add(attempt)
    session.flush()
    return attempt


def wish_for(session: Session, job: Job, wish: str) -> None:
    """Note what the user wants of the living attempt; each wish has a number of its own."""
    update_job(session, job, wish=wish, wish_seq=job.wish_seq + 1)


def queue_job(session: Session, job: Job, **changes: Any) -> bool:
    """Let a job wait for its next attempt, behind those of its priority that wait already.

    Who asks for it, asks for as many restarts again as a new job has; a restart is one less.
    """
    changes.setdefault("restarts_left", RESTARTS)
    return move_job(
        session, job, "queued", queued_at=utc_now(), place=last_version(session) + 1,
        wish="running", ended_at=None, error_reason=None, error_message=None,
        is_restarting=False, **changes,
    )  # fmt: skip


def restart_job(session: Session, job: Job) -> bool:
    """Queue a job again that was cut short; whether it was still to be."""
    return job.is_restarting and queue_job(session, job, restarts_left=job.restarts_left - 1)


def end_attempt(
    session: Session,
    job: Job,
    attempt: Attempt,
    outcome: str,
    *,
    reason: str | None = None,
    message: str | None = None,
    is_worth_a_restart: bool = False,
) -> None:
    """Record how an attempt ended and bring its job to the state that follows from it.

    Args:
        outcome: ``succeeded``, ``stopped``, ``released``, ``failed`` or ``interrupted``.
        reason, message: what to show as the job's error.
        is_worth_a_restart: the same job may get further when it is started again.
    """
    attempt.ended_at, attempt.outcome = utc_now(), outcome
    attempt.reason, attempt.message = reason, message
    session.add(attempt)
    session.flush()
    state = "paused" if outcome == "released" else outcome
    if job.state == "stopping" and state == "paused":
        state = "stopped"  # a stop that came while the release was under way
    if state != job.state:
        is_restarting = is_worth_a_restart and job.restarts_left > 0
        error = {"error_reason": reason, "error_message": message}
        _come_to(session, job, state, is_restarting=is_restarting, **error)
    if state == "paused" and job.wish == "running":
        queue_job(session, job)  # it was resumed while the release was under way


def _come_to(session: Session, job: Job, state: str, **changes: Any) -> None:
    if state not in TRANSITIONS[job.state]:
        # Its last records say so only now: it ran, or it was stopped from outside.
        move_job(session, job, "stopping" if state == "stopped" else "running")
    moved = move_job(session, job, state, **changes)
    assert moved, f"no way from {job.state} to {state}"


def delete_job(session: Session, job: Job) -> None:
    """Remove a job from every list and view; `delete_leftovers` then removes what it recorded."""
    for table in (Layer, Series, Proof, Attempt):
        session.exec(delete(table).where(col(table.job_id) == job.id))
    session.delete(job)
    session.flush()
    if job.sweep_id is not None and not jobs_of_sweep(session, job.sweep_id):
        session.exec(delete(Sweep).where(col(Sweep.id) == job.sweep_id))


def expire_stats(session: Session, days: float) -> None:
    """Take the layer statistics from jobs that ended so many days ago; their curves stay.

    `delete_leftovers` then removes the rows.
    """
    before = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="milliseconds")
    session.connection().exec_driver_sql(
        "DELETE FROM layer WHERE job_id IN (SELECT id FROM job WHERE ended_at < ?)",
        (before.replace("+00:00", "Z"),),
    )


def delete_leftovers(session: Session, limit: int = 100_000) -> bool:
    """Remove up to so many rows of jobs that are gone, and give their space back.

    A job of millions of rows is removed in portions, so that others are written in between; what a
    crash leaves is found by the next call.

    Returns:
        Whether there may be more.
    """
    connection = session.connection()
    for table, key, columns, owner in _RECORDED:
        # One look-up a job: the next larger key, again and again.
        found = connection.exec_driver_sql(
            f"""WITH RECURSIVE owned(id) AS (SELECT min({key}) FROM {table} UNION ALL
                SELECT (SELECT min({key}) FROM {table} WHERE {key} > id) FROM owned
                WHERE id IS NOT NULL)
                SELECT min(id) FROM owned
                WHERE NOT EXISTS (SELECT 1 FROM {owner} = owned.id)"""  # noqa: S608
        ).scalar_one()
        if found is not None:
            connection.exec_driver_sql(
                f"DELETE FROM {table} WHERE ({columns}) IN"  # noqa: S608
                f" (SELECT {columns} FROM {table} WHERE {key} = ? LIMIT ?)",
                (found, limit),
            )
            give_space_back(session)
            return True
    give_space_back(session)
    return False


_RECORDED = (
    ("layer_stat", "job_id", "job_id, position, step", "layer WHERE job_id"),
    ("layer_rollup", "job_id", "job_id, width, position, block", "layer WHERE job_id"),
    ("metric", "series_id", "series_id, step", "series WHERE id"),
    ("metric_rollup", "series_id", "series_id, width, block", "series WHERE id"),
)


def give_space_back(session: Session) -> None:
    """Return the free pages of the file to the file system."""
    connection = session.connection().connection.driver_connection
    assert connection is not None
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    for _ in range(free):
        # Python's sqlite3 takes one step of a statement without columns, which is one page here.
        connection.execute("PRAGMA incremental_vacuum")

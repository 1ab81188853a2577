"""Jobs in the store: every transition, one winner a race, and versions that only grow."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlmodel import Session

from app.store import jobs
from app.store.db import Database
from app.store.tables import Attempt, Job, Model, Proof

CONTRACT = {
    "queued": {"starting", "stopped"},
    "starting": {"running", "stopping", "failed", "interrupted"},
    "running": {"paused", "stopping", "succeeded", "failed", "interrupted"},
    "paused": {"running", "queued", "stopping", "failed", "interrupted"},
    "stopping": {"stopped", "succeeded", "failed", "interrupted"},
    "stopped": {"queued"},
    "failed": {"queued"},
    "interrupted": {"queued"},
    "succeeded": {"queued"},
}
FIELDS = {"kind": "train", "model_id": 1, "spec": {}, "config": {}}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "frostline.db")
    database.write(lambda s: s.add(Model(spec={})))
    yield database
    database.close()


def add_job(db: Database, **fields: object) -> Job:
    return db.write(lambda s: jobs.add_job(s, **FIELDS, **fields))


def test_a_job_moves_as_the_contract_says_and_not_otherwise(db: Database) -> None:
    def move(session: Session, before: str, after: str) -> bool:
        job = jobs.add_job(session, state=before, **FIELDS)
        moved = jobs.move_job(session, job, after)
        assert job.state == (after if moved else before)
        return moved

    for before in CONTRACT:
        for after in CONTRACT:
            moved = db.write(partial(move, before=before, after=after))
            assert moved == (after in CONTRACT[before]), (before, after)


def test_a_job_that_changed_since_it_was_read_is_not_moved(db: Database) -> None:
    job = add_job(db)

    def move_stale(session: Session) -> bool:
        stale = session.get_one(Job, job.id)
        session.execute(text("UPDATE job SET version = version + 1"))
        return jobs.move_job(session, stale, "starting")

    assert not db.write(move_stale)


def test_fifty_claims_make_one_attempt(db: Database) -> None:
    job = add_job(db)
    claims = [
        db.write(lambda s: jobs.start_attempt(s, s.get_one(Job, job.id), "cpu", None))
        for _ in range(50)
    ]
    assert [claim is not None for claim in claims] == [True] + [False] * 49


def test_versions_grow_over_all_jobs_and_past_deleted_ones(db: Database) -> None:
    first, second = add_job(db), add_job(db)
    assert second.version > first.version
    db.write(lambda s: jobs.delete_job(s, s.get_one(Job, second.id)))
    third = add_job(db)
    assert third.version > second.version
    assert third.id is not None
    assert second.id is not None
    assert third.id > second.id


def test_changed_jobs_come_in_the_order_of_their_changes(db: Database) -> None:
    first, second = add_job(db), add_job(db)
    db.write(lambda s: jobs.update_job(s, s.get_one(Job, first.id), step=1))
    with db.read() as session:
        assert [job.id for job in jobs.jobs_changed_since(session, 0)] == [second.id, first.id]


@pytest.mark.parametrize(
    ("state", "outcome", "after"),
    [
        ("running", "succeeded", "succeeded"),
        ("starting", "succeeded", "succeeded"),
        ("paused", "succeeded", "succeeded"),
        ("running", "stopped", "stopped"),
        ("starting", "stopped", "stopped"),
        ("stopping", "stopped", "stopped"),
        ("stopping", "succeeded", "succeeded"),
        ("stopping", "released", "stopped"),
        ("running", "released", "paused"),
        ("paused", "released", "paused"),
        ("starting", "failed", "failed"),
        ("paused", "interrupted", "interrupted"),
    ],
)
def test_an_ended_attempt_brings_its_job_to_the_state_that_follows(
    db: Database, state: str, outcome: str, after: str
) -> None:
    job = add_job(db)

    def end(session: Session) -> str:
        row = session.get_one(Job, job.id)
        attempt = jobs.start_attempt(session, row, "cpu", None)
        assert attempt is not None
        path = {"starting": (), "running": ("running",), "paused": ("running", "paused")}
        for step in path.get(state, (state,)):
            assert jobs.move_job(session, row, step)
        if outcome == "released":
            jobs.wish_for(session, row, "release")
        jobs.end_attempt(session, row, attempt, outcome)
        return row.state

    assert db.write(end) == after
    with db.read() as session:
        ended = session.get_one(Attempt, (job.id, 1))
        assert ended.ended_at is not None
        assert ended.outcome == outcome
        row = session.get_one(Job, job.id)
        assert (row.ended_at is not None) == (after in jobs.ENDED)


@pytest.mark.parametrize(
    ("device", "proved_at", "peak"),
    [
        ("cpu", 9, 100),  # what the process took
        ("cuda:0", 9, 20),  # what torch allocated
        ("cuda:0", 5, 300),  # a proof of the attempt before: what the driver says
        ("cuda:0", None, 300),
    ],
)
def test_a_peak_is_what_torch_allocated_where_that_is_known(
    db: Database, device: str, proved_at: int | None, peak: int
) -> None:
    job = add_job(db, state="running", attempt=2)
    assert job.id is not None
    known = {"peak_bytes": 100, "peak_device_bytes": 300, "resume_step": 5, "device": device}

    def fill(session: Session) -> dict[int, int]:
        session.add(Attempt(job_id=job.id, number=2, **known))
        if proved_at is not None:
            document = {"step": proved_at, "peak_bytes": 20}
            session.add(Proof(job_id=job.id, document=document))
        session.flush()
        return jobs.newest_peaks(session, [job.id or 0, 99])

    assert db.write(fill) == {job.id: peak}

"""A database that the first release wrote: brought here, it tells the same, and grows on."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlmodel import Session

from app.jobs.spool import Record
from app.store import charts, jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job

VIEWS = ("layer_stats", "metrics")


def read_views(path: Path) -> list[list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        return [sorted(connection.execute(f"SELECT * FROM {v}"), key=str) for v in VIEWS]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "frostline.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(Path(__file__).with_name("v0001.sql").read_text("utf-8"))
    return path


@pytest.fixture
def db(old: Path) -> Iterator[Database]:
    database = Database(old)
    yield database
    database.close()


def test_the_views_tell_the_same_after_the_migration(old: Path) -> None:
    before = read_views(old)
    assert [len(rows) for rows in before] == [120, 130]
    Database(old).close()
    assert read_views(old) == before
    assert read_views(old.with_name("frostline.db.v0001_first")) == before


def test_charts_of_an_old_job_come_from_roll_ups_built_by_the_migration(db: Database) -> None:
    with db.read() as session:
        whole = charts.read_series(session, 1)
        two = charts.read_series(session, 1, "loss", points=2)["loss"]
        steps, values = charts.read_matrix(session, 1, "grad_norm", [0, 1, 2], points=2)
        rolled = session.connection().exec_driver_sql("SELECT count(*) FROM layer_rollup")
        assert rolled.scalar_one() == 2 * 3
    assert list(whole) == ["eval/eval/loss", "eval/eval/accuracy", "loss", "lr", "grad_norm_total"]
    assert whole["eval/eval/loss"]["steps"] == [0, 10, 20, 30, 40]
    assert max(two["max"]) == max(whole["loss"]["values"])
    assert len(two["steps"]) == len(steps) == 2
    assert values[1] == [None, None]


def test_an_old_job_goes_on_where_it_was(db: Database) -> None:
    def resume(session: Session) -> None:
        job = session.get_one(Job, 1)
        jobs.queue_job(session, job)
        assert jobs.start_attempt(session, job, "cpu", 30) is not None
        attempt = session.get_one(Attempt, (1, job.attempt))
        start = {"layers": ["layer1", "layer2", "layer3"], "step": 30, "total_steps": 60}
        values = {"step": 31, "epoch": 1.0, "values": {"loss": 5.0}, "step_ms": 1.0}
        records = [Record(2, 1, "start", start), Record(2, 2, "metrics", values)]
        samples.ingest(session, job, attempt, records, 0)

    with db.read() as session:
        last = samples.last_metric(session, 1)
    db.write(resume)
    with db.read() as session:
        loss = charts.read_series(session, 1, "loss")["loss"]
        news, _ = samples.read_metrics_since(session, 1, last)
    assert (loss["steps"][-2:], loss["values"][-1]) == ([30, 31], 5.0)
    assert news["loss"]["steps"] == [31]  # its id is larger than any that was given before

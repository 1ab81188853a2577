"""Samples: stored exactly once, marked where not finite, bucketed without losing a spike."""

import bisect
import math
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session

from app.jobs.spool import Record
from app.store import charts, jobs, rollups, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model, Proof

LAYERS = ["stem", "body.0", "head"]
NAN = float("nan")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "frostline.db")

    def add(session: Session) -> None:
        session.add(Model(spec={}))
        session.flush()
        job = jobs.add_job(session, kind="train", model_id=1, spec={}, config={})
        jobs.start_attempt(session, job, "cpu", None)

    database.write(add)
    yield database
    database.close()


def ingest(db: Database, records: Sequence[Record], offset: int = 0, attempt: int = 1) -> None:
    def store(session: Session) -> None:
        rows = session.get_one(Job, 1), session.get_one(Attempt, (1, attempt))
        samples.ingest(session, *rows, records, offset)

    db.write(store)


def start(sequence: int = 1, step: int = 0, attempt: int = 1) -> Record:
    payload = {
        "layers": LAYERS,
        "step": step,
        "total_steps": 100,
        "device": "cpu",
        "device_name": "CPU",
        "device_bytes": None,
        "train_size": 10,
        "warnings": ["careful"],
    }
    return Record(attempt, sequence, "start", payload)


def metrics(sequence: int, step: int, attempt: int = 1, **values: float) -> Record:
    payload = {"step": step, "epoch": step / 10, "values": values, "step_ms": 2.0}
    return Record(attempt, sequence, "metrics", payload)


def layers(sequence: int, step: int, *columns: list[float | None], attempt: int = 1) -> Record:
    names = ("grad_norm", "update_norm", "weight_norm")
    payload = {"step": step, **dict(zip(names, columns, strict=True))}
    return Record(attempt, sequence, "layers", payload)


def read_series(db: Database, *args: Any, **given: Any) -> dict[str, Any]:
    with db.read() as session:
        return charts.read_series(session, 1, *args, **given)


def read_matrix(db: Database, stat: str = "grad_norm", **given: Any) -> tuple[list[int], list[Any]]:
    with db.read() as session:
        return charts.read_matrix(session, 1, stat, range(len(LAYERS)), **given)


def test_what_is_ingested_twice_is_there_once(db: Database) -> None:
    records = [start(), metrics(2, 1, loss=3.0), metrics(3, 2, loss=2.0)]
    ingest(db, records, offset=70)
    ingest(db, records, offset=70)
    assert read_series(db)["loss"]["steps"] == [1, 2]
    with db.read() as session:
        attempt, job = session.get_one(Attempt, (1, 1)), session.get_one(Job, 1)
    assert (attempt.spool_offset, attempt.sequence) == (70, 3)
    assert (job.step, job.epoch, job.total_steps, job.step_ms) == (2, 0.2, 100, 2.0)
    assert (job.train_size, job.device_name, job.warnings) == (10, "CPU", ["careful"])


def test_an_ingest_that_fails_moves_no_position(db: Database) -> None:
    ingest(db, [start()], offset=10)
    with pytest.raises(KeyError):
        ingest(db, [metrics(2, 1, loss=1.0), Record(1, 3, "metrics", {})], offset=20)
    assert read_series(db) == {}
    with db.read() as session:
        assert session.get_one(Attempt, (1, 1)).spool_offset == 10


def test_numbers_that_are_not_finite_are_marked_and_none_stays_null(db: Database) -> None:
    first = [1.0, NAN, None], [math.inf, 0.0, 1.0], [-math.inf, 2.0, 0.0]
    ingest(db, [start(), metrics(2, 1, loss=NAN, lr=math.inf), layers(3, 1, *first)])
    assert read_series(db)["loss"]["values"] == ["NaN"]
    assert read_series(db)["lr"]["max"] == ["Infinity"]
    assert read_matrix(db)[1] == [[1.0], ["NaN"], [None]]
    assert read_matrix(db, "update_norm")[1] == [["Infinity"], [0.0], [1.0]]
    assert read_matrix(db, "weight_norm")[1] == [["-Infinity"], [2.0], [0.0]]
    assert read_matrix(db, "update_ratio")[1] == [["NaN"], [0.0], [None]]


def test_the_two_views_are_readable_by_plain_sqlite(db: Database) -> None:
    row = [1.0, 2.0, None], [0.1, 0.2, 0.0], [5.0, 6.0, 7.0]
    ingest(db, [start(), metrics(2, 1, loss=3.0), layers(3, 1, *row)])
    with closing(sqlite3.connect(db.path)) as connection:
        stats = connection.execute("SELECT * FROM layer_stats ORDER BY weight_norm").fetchall()
        columns = [
            [name for _, name, *_ in connection.execute(f"PRAGMA table_info({view})")]
            for view in ("layer_stats", "metrics")
        ]
        values = connection.execute("SELECT * FROM metrics").fetchall()
    assert columns == [
        ["job_id", "step", "layer", "grad_norm", "update_norm", "weight_norm"],
        ["job_id", "step", "name", "value"],
    ]
    assert stats == [
        (1, 1, "stem", 1.0, 0.1, 5.0),
        (1, 1, "body.0", 2.0, 0.2, 6.0),
        (1, 1, "head", None, 0.0, 7.0),
    ]
    assert values == [(1, 1, "loss", 3.0)]


def test_an_attempt_that_resumes_supersedes_what_came_after_its_checkpoint(db: Database) -> None:
    old = [metrics(step + 1, step, loss=float(step)) for step in range(1, 6)]
    stats = [layers(step + 6, step, *[[float(step)] * 3 for _ in range(3)]) for step in range(1, 6)]
    ingest(db, [start(), *old, *stats])

    def resume(session: Session) -> None:
        job = session.get_one(Job, 1)
        jobs.end_attempt(session, job, session.get_one(Attempt, (1, 1)), "interrupted")
        jobs.queue_job(session, job)
        assert jobs.start_attempt(session, job, "cpu", 3) is not None

    db.write(resume)
    assert read_series(db)["loss"]["steps"] == [1, 2, 3, 4, 5]  # until the new one speaks
    again = [start(1, step=3, attempt=2), metrics(2, 4, loss=40.0, attempt=2)]
    ingest(db, again, attempt=2)
    assert read_series(db)["loss"] == {
        "steps": [1, 2, 3, 4],
        "min": [1.0, 2.0, 3.0, 40.0],
        "max": [1.0, 2.0, 3.0, 40.0],
        "values": [1.0, 2.0, 3.0, 40.0],
    }
    assert read_matrix(db)[0] == [1, 2, 3]


def test_states_move_the_job_and_a_stop_is_not_undone(db: Database) -> None:
    ingest(db, [start(), Record(1, 2, "state", {"state": "running", "seq": 0})])
    with db.read() as session:
        job = session.get_one(Job, 1)
    assert job.state == "running"
    assert job.started_at is not None
    db.write(lambda s: jobs.move_job(s, s.get_one(Job, 1), "stopping"))
    ingest(db, [Record(1, 3, "state", {"state": "paused", "seq": 1})])
    with db.read() as session:
        assert session.get_one(Job, 1).state == "stopping"


def test_the_newest_proof_counts(db: Database) -> None:
    for sequence, verdict in ((1, "holds"), (2, "broken")):
        ingest(db, [Record(1, sequence, "proof", {"verdict": verdict, "step": sequence})])
    with db.read() as session:
        assert session.get_one(Proof, 1).document == {"verdict": "broken", "step": 2}
        assert session.get_one(Job, 1).verdict == "broken"


def split(steps: list[int], ends: list[int]) -> list[list[int]]:
    """The second implementation: indices of the steps behind each bucket's end up to the next."""
    assert ends == sorted(set(ends))
    assert ends[-1] == steps[-1]
    buckets: list[list[int]] = [[] for _ in ends]
    for index, step in enumerate(steps):
        buckets[bisect.bisect_left(ends, step)].append(index)
    assert [steps[bucket[-1]] for bucket in buckets] == ends
    return buckets


def assert_charts_are_naive(
    db: Database, steps: list[int], loss: list[float], grads: list[list[Any]], **given: Any
) -> None:
    """Whatever the buckets are, each tells the truth of its steps, and there are as many as may."""
    points = given["points"]
    chosen = [
        i for i, step in enumerate(steps)
        if given.get("first", 0) <= step <= given.get("last", 10**9)
    ]  # fmt: skip
    steps, loss, grads = ([column[i] for i in chosen] for column in (steps, loss, grads))
    series = read_series(db, **given)["loss"]
    buckets = split(steps, series["steps"])
    assert min(points, len(steps)) / 2 <= len(buckets) <= points
    assert series == {
        "steps": series["steps"],
        "min": [min(loss[i] for i in bucket) for bucket in buckets],
        "max": [max(loss[i] for i in bucket) for bucket in buckets],
        "values": [loss[bucket[-1]] for bucket in buckets],
    }
    for reduce in charts.REDUCTIONS:
        ends, matrix = read_matrix(db, reduce=reduce, **given)
        assert len(ends) <= points
        for layer, row in enumerate(matrix):
            expected: list[Any] = []
            for bucket in split(steps, ends):
                values = [v for i in bucket if (v := grads[i][layer]) is not None]
                pick = {"max": max, "min": min}.get(reduce)
                last = grads[bucket[-1]][layer]
                expected.append(last if pick is None else pick(values, default=None))
            assert row == expected


@pytest.mark.parametrize("portion", [1, 7, 1000])
def test_charts_equal_a_naive_second_implementation(db: Database, portion: int) -> None:
    rng = random.Random(portion)
    steps = sorted(rng.sample(range(1, 1500), 700))
    loss = [rng.random() for _ in steps]
    grads = [[rng.choice([None, rng.random()]) for _ in LAYERS] for _ in steps]
    records = [start()]
    for index, step in enumerate(steps):
        records.append(metrics(len(records) + 1, step, loss=loss[index]))
        records.append(layers(len(records) + 1, step, grads[index], grads[index], grads[index]))
    for begin in range(0, len(records), 2 * portion):
        ingest(db, records[begin : begin + 2 * portion])
    for points in (1, 2, 7, 50, 119, 700, 5000):
        assert_charts_are_naive(db, steps, loss, grads, points=points)
        first, last = sorted(rng.sample(steps, 2))
        assert_charts_are_naive(db, steps, loss, grads, points=points, first=first, last=last)
    assert_rollups_are_whole(db)


def assert_rollups_are_whole(db: Database) -> None:
    """What grew portion by portion is what is built anew from the rows."""
    tables = ("layer_rollup", "metric_rollup")

    def read(session: Session) -> list[Any]:
        connection = session.connection()
        return [connection.exec_driver_sql(f"SELECT * FROM {t}").all() for t in tables]

    grown = db.write(read)
    assert grown[0]
    db.write(lambda session: rollups.rebuild(session.connection()))
    assert db.write(read) == grown


def test_a_resume_takes_back_what_it_supersedes_at_every_zoom(db: Database) -> None:
    def record(steps: range, first: int, attempt: int, value: float) -> list[Record]:
        return [
            one
            for i, step in enumerate(steps)
            for one in (
                metrics(first + 2 * i, step, attempt=attempt, loss=value),
                layers(first + 2 * i + 1, step, *[[value] * 3] * 3, attempt=attempt),
            )
        ]

    ingest(db, [start(), *record(range(1, 2001), 2, 1, 9.0)])

    def resume(session: Session) -> None:
        job = session.get_one(Job, 1)
        jobs.end_attempt(session, job, session.get_one(Attempt, (1, 1)), "interrupted")
        jobs.queue_job(session, job)
        assert jobs.start_attempt(session, job, "cpu", 777) is not None

    db.write(resume)
    ingest(db, [start(1, step=777, attempt=2)], attempt=2)
    assert read_series(db, points=10)["loss"]["steps"][-1] == 777
    assert read_matrix(db, points=10)[0][-1] == 777
    ingest(db, record(range(778, 1500), 2, 2, 1.0), attempt=2)
    steps = list(range(1, 1500))
    values = [9.0 if step <= 777 else 1.0 for step in steps]
    for points in (1, 5, 20, 90, 1000):
        assert_charts_are_naive(db, steps, values, [[v] * 3 for v in values], points=points)
    assert_rollups_are_whole(db)


def test_sparse_statistics_are_rolled_up_by_their_own_distance(db: Database) -> None:
    def space_out(session: Session) -> None:
        session.get_one(Job, 1).spec = {"training": {"stats_every": 10}}

    db.write(space_out)
    steps = list(range(10, 20_000, 10))
    values = [float(step % 997) for step in steps]
    records = [start()]
    for step, value in zip(steps, values, strict=True):
        records.append(metrics(len(records) + 1, step, loss=value))
        records.append(layers(len(records) + 1, step, *[[value] * 3] * 3))
    ingest(db, records)
    for points in (1, 10, 100, 1000):
        assert_charts_are_naive(db, steps, values, [[v] * 3 for v in values], points=points)
    assert_rollups_are_whole(db)
    with db.read() as session:
        query = "SELECT count(*) FROM layer_rollup"
        count = session.connection().exec_driver_sql(query).scalar_one()
    assert count < len(steps) * 3 / 11


def test_a_spike_of_one_step_shows_at_every_zoom(db: Database) -> None:
    values = [1.0] * 1000
    values[617] = 1e9
    values[900] = NAN
    records = [start()] + [
        layers(step + 2, step, [value] * 3, [value] * 3, [1.0] * 3)
        for step, value in enumerate(values)
    ]
    ingest(db, records)
    assert_rollups_are_whole(db)
    for points in (1, 3, 10, 100, 999):
        row = read_matrix(db, points=points)[1][0]
        assert "NaN" in row
        assert points == 1 or 1e9 in row
        assert "NaN" in read_matrix(db, "update_ratio", points=points)[1][0]


def test_a_matrix_with_a_hole_is_refused_rather_than_shown_askew(db: Database) -> None:
    ingest(db, [start(), *(layers(step + 2, step, *[[1.0] * 3] * 3) for step in range(1, 4))])
    hole = "DELETE FROM layer_stat WHERE position = 1 AND step = 2"
    db.write(lambda session: session.connection().exec_driver_sql(hole))
    with pytest.raises(ValueError, match="job 1 lacks some of its layers"):
        read_matrix(db)


def test_a_part_is_read_by_its_first_and_last_step(db: Database) -> None:
    ingest(db, [start(), *(metrics(step + 1, step, loss=1.0) for step in range(1, 10))])
    assert read_series(db, first=3, last=5)["loss"]["steps"] == [3, 4, 5]
    assert read_series(db, first=100) == {}
    assert read_series(db, "no such metric") == {}


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_every_sample_is_iterated_once(db: Database, limit: int) -> None:
    columns = [None] * 3, [0.0] * 3, [1.0] * 3
    ingest(db, [start(), metrics(2, 1, loss=NAN), *(layers(2 + s, s, *columns) for s in (1, 2, 3))])
    found = list(samples.iterate_columns(db.read, 1, limit))
    assert found[0] == samples.Column(None, "loss", [1], ["NaN"])
    rows = [(c.layer, c.name, *row) for c in found for row in zip(c.steps, c.values, strict=True)]
    assert len(rows) == len(set(rows)) == 1 + 3 * 3 * len(LAYERS)
    assert ("head", "grad_norm", 3, None) in rows


def test_a_deleted_job_gives_its_space_back(db: Database) -> None:
    column = [1.0] * 3
    ingest(db, [start(), *(layers(s + 1, s, column, column, column) for s in range(1, 20_000))])
    db.write(lambda s: jobs.delete_job(s, s.get_one(Job, 1)))
    with db.read() as session:
        for view in ("layer_stats", "metrics"):
            query = f"SELECT count(*) FROM {view}"
            assert session.connection().exec_driver_sql(query).scalar_one() == 0
    portions = 1
    while db.write(lambda s: jobs.delete_leftovers(s, limit=10_000)):
        portions += 1
    assert portions > 6
    with db.read() as session:
        for table in ("layer_stat", "layer_rollup", "metric", "metric_rollup"):
            query = f"SELECT count(*) FROM {table}"
            assert session.connection().exec_driver_sql(query).scalar_one() == 0
        pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
    assert pages * 4096 < 200_000


def test_statistics_of_jobs_that_ended_long_ago_expire_and_their_curves_stay(db: Database) -> None:
    column = [1.0] * 3
    ingest(db, [start(), metrics(2, 1, loss=3.0), layers(3, 1, column, column, column)])

    def end(session: Session) -> None:
        job = session.get_one(Job, 1)
        jobs.end_attempt(session, job, session.get_one(Attempt, (1, 1)), "failed")

    def count(session: Session) -> int:
        query = "SELECT count(*) FROM layer_stat"
        return int(session.connection().exec_driver_sql(query).scalar_one())

    def tidy(days: float) -> int:
        db.write(lambda session: jobs.expire_stats(session, days))
        while db.write(jobs.delete_leftovers):
            pass
        return db.write(count)

    assert tidy(days=0) == 3  # it still runs
    db.write(end)
    assert tidy(days=1) == 3
    assert tidy(days=-1) == 0
    assert read_series(db)["loss"]["values"] == [3.0]

"""A job's life as a state machine: whatever happens in whatever order, its table holds."""

import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import text
from sqlmodel import Session

from app.jobs import folder as job_folder
from app.jobs.spool import SpoolWriter
from app.service import Conflict
from app.store import jobs
from tests.worker.history import History
from tests.worker.silly_house import House, loss

STOPPABLE = {"queued", "starting", "running", "paused", "stopping", "stopped"}


def watch_transitions(session: Session) -> None:
    """Have the database itself note every change of a state."""
    for statement in (
        'CREATE TABLE "transition" (before TEXT, after TEXT)',
        """CREATE TRIGGER note_transition AFTER UPDATE OF state ON job WHEN old.state != new.state
           BEGIN INSERT INTO "transition" VALUES (old.state, new.state); END""",
    ):
        session.connection().execute(text(statement))


class Life(RuleBasedStateMachine):
    """Users wish, workers live and die, servers come and go, ticks pass."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.data_dir = Path(self.place.name)
        self.house = self.open()
        self.house.add_model()
        self.history = History(self.data_dir)
        self.workers: dict[tuple[int, int], tuple[SpoolWriter, int]] = {}
        self.house.db.write(watch_transitions)
        self.house.tick()
        self.house.launch()

    def open(self) -> House:
        return House(self.data_dir, cpu_slots=2, min_free_bytes=0, restart_seconds=2)

    def teardown(self) -> None:
        self.house.db.close()
        for number in [lock for _, lock in self.workers.values()]:
            job_folder._held.remove(number)
            os.close(number)
        self.place.cleanup()

    # ------------------------------------------------------------------------------- users

    @precondition(lambda self: len(self.house.service.list_jobs()) < 3)
    @rule()
    def launch(self) -> None:
        self.house.launch()

    @rule(job=st.integers(1, 3), verb=st.sampled_from(["stop", "hold", "release", "resume"]))
    def wish(self, job: int, verb: str) -> None:
        before = {one["id"]: one for one in self.house.service.list_jobs()}.get(job)
        if before is None:
            return
        service = self.house.service
        verbs = {
            "stop": lambda: service.stop_job(job),
            "hold": lambda: service.pause_job(job, "hold"),
            "release": lambda: service.pause_job(job, "release"),
            "resume": lambda: service.resume_job(job),
        }
        try:
            once = verbs[verb]()
        except Conflict:
            assert verb != "stop" or before["state"] not in STOPPABLE
        else:
            assert verb != "stop" or before["state"] in STOPPABLE
            assert verbs[verb]()["state"] == once["state"], "twice is the same as once"

    # ------------------------------------------------------------------------------- workers

    def started(self) -> list[tuple[int, int]]:
        """Attempts that a worker may take, or has."""
        with self.house.db.read() as session:
            live = jobs.live_attempts(session)
        return [
            (attempt.job_id, attempt.number)
            for _, attempt in live
            if self.house.directory(attempt.job_id, attempt.number).is_dir()
        ]

    @rule(which=st.integers(0, 5))
    def begin(self, which: int) -> None:
        free = [key for key in self.started() if key not in self.workers]
        free = [key for key in free if not job_folder.is_started(self.house.directory(*key))]
        if free:
            key = free[which % len(free)]
            directory = self.house.directory(*key)
            lock = job_folder.hold_lock(directory)
            spool = SpoolWriter(directory / "telemetry.spool", key[1])
            spool.append("start", {"layers": ["0"], "step": 0, "total_steps": 9, "warnings": []})
            spool.append("state", {"state": "running", "seq": 0})
            self.workers[key] = spool, lock

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, 5), kind=st.sampled_from(["step", "paused", "running"]))
    def report(self, which: int, kind: str) -> None:
        key = sorted(self.workers)[which % len(self.workers)]
        spool = self.workers[key][0]
        if kind == "step":
            spool.append("metrics", loss(spool._sequence))
        else:
            spool.append("state", {"state": kind, "seq": 0})

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, 5), how=st.sampled_from(["as wished", "failed", "killed", "unseen"]))
    def end(self, which: int, how: str) -> None:
        key = sorted(self.workers)[which % len(self.workers)]
        directory = self.house.directory(*key)
        spool, lock = self.workers.pop(key)
        spool.close()
        reader = job_folder.WishReader(directory)
        wish = reader().state
        reader.close()
        if how == "as wished":
            outcome = {"stop": "stopped", "release": "released"}.get(wish, "succeeded")
            job_folder.write_result(directory, outcome, 0)
        elif how == "failed":
            job_folder.write_result(directory, "failed", 0, reason="user_code", message="No.")
        job_folder._held.remove(lock)
        os.close(lock)
        if how == "killed":
            job_folder.write_exit(directory, code=None, signal_number=9)
        elif how != "unseen":
            job_folder.write_exit(directory, code=0, signal_number=None)

    # ------------------------------------------------------------------------------- servers

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def tick(self, seconds: float) -> None:
        self.house.tick(seconds)

    @rule()
    def restart(self) -> None:
        now = self.house.now
        self.house.db.close()
        self.house = self.open()
        self.house.now = now + 100
        self.house.tick()

    # ------------------------------------------------------------------------------- what holds

    @invariant()
    def the_history_is_sound(self) -> None:
        self.history.look()

    @invariant()
    def every_transition_is_in_the_table(self) -> None:
        with self.house.db.read() as session:
            made = (
                session.connection().execute(text('SELECT before, after FROM "transition"')).all()
            )
        assert all(after in jobs.TRANSITIONS[before] for before, after in made), made

    @invariant()
    def a_job_tells_what_its_state_means(self) -> None:
        for job in self.house.service.list_jobs():
            assert job["worker_pid"] is None or job["state"] not in jobs.ENDED
            assert (job["position"] is not None) == (job["state"] == "queued")


Life.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase

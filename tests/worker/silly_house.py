"""A store, a service and a runner around a keeper whose workers are played by the test itself."""

import os
from pathlib import Path
from typing import Any

from sqlmodel import Session

from app.freezing.graph import ModelGraph, Module, Parameter
from app.jobs import folder as job_folder
from app.jobs.devices import Device
from app.jobs.rebuild import keep_model_card, open_database
from app.jobs.runner import Runner
from app.jobs.spool import SpoolWriter
from app.service import Service
from app.settings import Settings
from app.store.tables import Model, Task

CPU = Device("cpu", "silly", "cpu", 2**30, "")
GPUS = tuple(Device(f"cuda:{n}", "silly GPU", "cuda", 2**34, str(n + 4)) for n in range(2))
GRAPH = ModelGraph(
    modules=(Module("", "Sequential", 0), Module("0", "Linear", 1, ("0.weight",))),
    parameters=(Parameter("0.weight", (2, 2), "float32", 4, 16, True, True),),
)


class SillyKeeper:
    """Starts nobody and notes everything; its pids belong to no process."""

    def __init__(self) -> None:
        self.started: list[tuple[Path, int, dict[str, str]]] = []
        self.signals: list[int] = []
        self.is_broken = False
        self.is_late = False  # it starts a worker, and says so to nobody
        self.trouble: str | None = None

    def ready(self) -> bool:
        return True

    def start(
        self, folder: Path, attempt: int, environment: dict[str, str], python: str | None
    ) -> int:
        if self.is_broken:
            raise RuntimeError("no more processes")
        self.started.append((folder, attempt, environment))
        if self.is_late:
            raise RuntimeError("no answer within 120 s")
        return 2**22 + len(self.started)

    def kill(self, pid: int, number: int) -> None:
        assert pid > 2**22
        self.signals.append(number)

    def close(self) -> None:
        pass


class House:
    """A store, a service and a runner around one silly keeper."""

    def __init__(self, data_dir: Path, *devices: Device, **settings: Any) -> None:
        self.settings = Settings(data_dir=data_dir, **settings)
        self.db, _ = open_database(self.settings)
        self.keeper = SillyKeeper()
        self.devices = (CPU, *devices)
        self.runner = self.new_runner()
        self.service = Service(self.settings, self.db, self.runner)
        self.now = 1000.0
        self.locks: list[int] = []

    def new_runner(self) -> Runner:
        return Runner(self.settings, self.db, lambda: self.keeper, self.devices)

    def tick(self, seconds: float = 0.1) -> bool:
        self.now += seconds
        return self.runner.tick(self.now)

    def add_model(self) -> None:
        self.service.add_model({"uri": "demo:digits"})
        self.db.write(ready)
        path = self.settings.data_dir / "graphs" / "1.json"
        path.parent.mkdir()
        job_folder.write_document(path, GRAPH.to_document())
        with self.db.read() as session:
            keep_model_card(self.settings.data_dir, session.get_one(Model, 1))

    def launch(self, **training: Any) -> int:
        document = {"model_id": 1, "config": {}, "dataset": {"uri": "demo:digits"}}
        return int(self.service.launch_job({**document, "training": training})["id"])

    def job(self, job_id: int = 1) -> dict[str, Any]:
        return self.service.get_job(job_id)

    def directory(self, job_id: int = 1, attempt: int = 1) -> Path:
        return self.settings.data_dir / "jobs" / str(job_id) / "attempts" / str(attempt)

    def play_start(self, job_id: int = 1, attempt: int = 1, step: int = 0) -> SpoolWriter:
        """Do what a worker does first."""
        directory = self.directory(job_id, attempt)
        self.locks.append(job_folder.hold_lock(directory))
        spool = SpoolWriter(directory / "telemetry.spool", attempt)
        spool.append("start", {"layers": ["0"], "step": step, "total_steps": 9, "warnings": []})
        spool.append("state", {"state": "running", "seq": 0})
        return spool

    def play_end(self, code: int | None = 0, signal_number: int | None = None, **of: int) -> None:
        """Let the worker's process be gone, as the keeper sees it."""
        job_folder._held.remove(lock := self.locks.pop())
        os.close(lock)
        job_folder.write_exit(self.directory(**of), code=code, signal_number=signal_number)


def ready(session: Session) -> None:
    model, task = session.get_one(Model, 1), session.get_one(Task, 1)
    model.state, task.state = "ready", "succeeded"
    session.add_all([model, task])


def loss(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "values": {"loss": 1.0}, "step_ms": 1.0}

"""The runner with the real keeper and real workers: servers come and go, workers are killed."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.jobs.keeper import Keeper
from app.jobs.runner import Runner
from app.service import Service
from app.settings import Settings
from app.store import jobs
from app.store.db import Database

PATIENCE_SECONDS = 120


class Server:
    """What app.main puts together, without a web."""

    def __init__(self, data_dir: Path) -> None:
        settings = Settings(data_dir=data_dir)
        self.db = Database(data_dir / "frostline.db")
        self.runner = Runner(settings, self.db, lambda: Keeper.connect(data_dir))
        self.service = Service(settings, self.db, self.runner)

    def until(self, verb: Callable[[], dict[str, Any]], *states: str) -> dict[str, Any]:
        """Wait until what the verb answers is in one of the states."""
        return self.until_true(verb, lambda document: document["state"] in states)

    def until_true(
        self, verb: Callable[[], dict[str, Any]], is_so: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        version = -1
        while not is_so(document := verb()):
            assert time.monotonic() < deadline, document
            version = self.db.wait_for_change(version, timeout=1)
        return document


@contextlib.contextmanager
def serving(data_dir: Path) -> Iterator[Server]:
    """A server for a while; like the real one it leaves its workers alone when it goes."""
    server, stop = Server(data_dir), threading.Event()
    thread = threading.Thread(target=server.runner.run, args=(stop, time.monotonic))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        server.runner.wake()
        thread.join()
        server.db.close()


def test_a_job_survives_its_server_a_kill_and_a_stop(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        model = server.service.add_model({"uri": "demo:three-layers"})
        model = server.until(lambda: server.service.get_model(1), "ready", "failed")
        assert model["state"] == "ready", model["error"]
        server.service.launch_job(
            {
                "model_id": 1,
                "config": {"rules": [{"action": "freeze", "match": "layer2"}]},
                "dataset": {"uri": "demo:three-layers"},
                "training": {"epochs": 10**5, "eval_every": 10**6, "checkpoint_every": 50},
            }
        )
        job = server.until_true(lambda: server.service.get_job(1), lambda job: job["step"] > 60)
        pid = job["worker_pid"]
    with serving(tmp_path) as server:
        old = job["step"]
        job = server.until_true(lambda: server.service.get_job(1), lambda job: job["step"] > old)
        assert (job["worker_pid"], job["attempt"], job["state"]) == (pid, 1, "running")

        os.kill(pid, signal.SIGKILL)
        job = server.until(lambda: server.service.get_job(1), *jobs.ENDED)
        assert (job["state"], job["error"]["reason"]) == ("interrupted", "killed")
        assert "SIGKILL" in job["error"]["message"]
        killed_at = job["step"]

        server.service.resume_job(1)
        server.until_true(lambda: server.service.get_job(1), lambda job: job["step"] > killed_at)
        server.service.stop_job(1)
        job = server.until(lambda: server.service.get_job(1), *jobs.ENDED)
        assert (job["state"], job["attempt"], job["error"]) == ("stopped", 2, None)
        every_step = list(range(1, job["step"] + 1))
        assert server.service.read_metrics(1, "loss")["loss"]["steps"] == every_step
        layers = server.service.read_layers(1, "update_norm")
        assert layers["steps"] == every_step
        frozen = layers["values"][layers["layers"].index("layer2")]
        assert set(frozen) == {0.0}
        gradients = server.service.read_layers(1, "grad_norm", match="layer2")["values"]
        assert set(gradients[0]) == {None}
        assert server.service.list_checkpoints(1)[-1]["step"] == job["step"]
        assert server.service.read_proof(1)["verdict"] == "holds"

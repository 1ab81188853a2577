"""A server in a process of its own, without a web: driven line by line, and killed at will."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.jobs.keeper import Keeper
from app.jobs.rebuild import open_database
from app.jobs.runner import Runner
from app.service import Conflict, Service
from app.settings import Settings
from app.store.lock import hold_data_folder
from tests.worker import scripted

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120


def serve(data_dir: Path) -> None:
    """Run jobs and answer verbs of the service: a JSON list a line in, an object a line out."""
    settings = Settings(data_dir=data_dir)
    with hold_data_folder(data_dir, "http://127.0.0.1:1"):
        db, _ = open_database(settings)
        runner = Runner(settings, db, lambda: Keeper.connect(data_dir, preload=False))
        service = Service(settings, db, runner)
        stop = threading.Event()
        thread = threading.Thread(target=runner.run, args=(stop, time.monotonic))
        thread.start()
        try:  # whatever a verb raises ends the process: who waits for its answer must not hang
            print(json.dumps({"ready": True}), flush=True)
            for line in sys.stdin:
                verb, *arguments = json.loads(line)
                try:
                    answer = {"is": getattr(service, verb)(*arguments)}
                except Conflict as error:
                    answer = {"conflict": error.detail}
                print(json.dumps(answer), flush=True)
        finally:
            stop.set()
            runner.wake()
            thread.join()
            db.close()


class ServerProcess:
    """`serve` in a process; `kill` it and `start` it again on the same folder.

    Args:
        variables: FROSTLINE_* variables, without the prefix.
    """

    def __init__(self, data_dir: Path, **variables: str) -> None:
        self.data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        given = {
            "CODE_DIRS": str(Path(scripted.__file__).parent),
            "WORKER_PYTHON": str(scripted.write_shim(data_dir.parent)),
            "RESTART_SECONDS": "0.2",
            "CPU_SLOTS": "3",
            **variables,
        }
        self.environment = {
            **os.environ, **{f"FROSTLINE_{name}": value for name, value in given.items()}
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        with (self.data_dir.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.worker.servers", str(self.data_dir)],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            assert self._read() == {"ready": True}
        except AssertionError:  # it has refused to start, and said why
            self._reap()
            raise

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def close(self) -> None:
        """Let it end in order; its workers go on."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reap()

    def _reap(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()

    def ask(self, verb: str, *arguments: Any) -> Any:
        """What a verb of the service answers; None where it conflicts with the state."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._read().get("is")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        log = (self.data_dir.parent / "server.log").read_text()
        assert line, f"The server has ended: {log[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def until(self, job_id: int, *states: str) -> dict[str, Any]:
        """Wait until a job is in one of the states and is not about to leave it by itself."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        between_looks = threading.Event()
        while True:
            job: dict[str, Any] = self.ask("get_job", job_id)
            if job["state"] in states and not job["is_restarting"]:
                return job
            assert time.monotonic() < deadline, job
            between_looks.wait(0.02)

    def launch(self, script: list[list[Any]], **more: Any) -> int:
        """A job that plays a script; the first call adds the model's row, too."""
        model = self.ask("add_model", {"uri": scripted.URI, "kwargs": {"script": script}})
        deadline = time.monotonic() + PATIENCE_SECONDS
        between_looks = threading.Event()
        while model["state"] == "inspecting":
            assert time.monotonic() < deadline
            between_looks.wait(0.02)
            model = self.ask("get_model", model["id"])
        assert model["state"] == "ready", model
        document = {"model_id": model["id"], "config": {"rules": []}, **more}
        document["dataset"] = {"uri": "demo:digits"}
        return int(self.ask("launch_job", document)["id"])


@contextlib.contextmanager
def serving(data_dir: Path, **variables: str) -> Iterator[ServerProcess]:
    """A server for a while; whatever runs at the end is killed with it."""
    server = ServerProcess(data_dir, **variables)
    try:
        yield server
    finally:
        server.process.kill()
        server._reap()
        kill_everybody(data_dir)


def kill_everybody(data_dir: Path) -> None:
    """End the workers and the keeper of a data folder, and wait until they have gone."""
    from app.jobs import folder as job_folder
    from tests.worker.silly_jobs import eventually

    for attempt in [*data_dir.glob("jobs/*/attempts/*"), *data_dir.glob("tasks/*/attempts/*")]:
        job_folder.signal_holder(attempt, signal.SIGKILL)
    keeper = find_keeper(data_dir)
    if keeper is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{keeper}/cmdline").exists() or is_zombie(keeper))


def find_keeper(data_dir: Path) -> int | None:
    """The pid of the keeper of a data folder, where one lives."""
    try:
        pid = int(json.loads((data_dir / "warm.json").read_text())["pid"])
        is_it = str(data_dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if is_it else None


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

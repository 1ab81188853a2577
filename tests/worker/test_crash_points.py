"""Killed right before or after any call that writes: what is there is whole, and it goes on."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from app.jobs import folder as job_folder
from app.jobs.spool import SpoolWriter, read_spool
from app.store import catalog, files
from app.store.tables import Task
from app.training.places import checkpoint_steps
from tests.worker import scripted
from tests.worker.crash_points import Point, scan
from tests.worker.history import check_checkpoints, replay
from tests.worker.silly_house import GRAPH, House, SillyKeeper

STEPS = 6
SOME = 8
INSPECTED, SIZES = 2, {"sequence_length": 9}  # the model of which a trace is made
ROOT = Path(__file__).resolve().parents[2]
# Reached by neither scenario: each is on the way of an error, or has its own test.
ELSEWHERE = {
    "attendance._end:": "a start that fails; tests/worker/test_runner.py",
    "attendance.end:": "a start that fails; tests/worker/test_runner.py",
    "attendance._look_closer:": "workers that live for seconds; test_faults.py",
    "attendance._set_aside:": "a corrupt checkpoint; test_faults.py",
    "attendance._settle:_set_aside": "a corrupt checkpoint; test_faults.py",
    "attendance._store_rest:": "records of the last moment; the kill loop",
    "attendance.settle:queue_job": "a claim without a folder; the second starts here",
    "db._in_words:": "a damaged file; test_rebuild.py",
    "db.upgrade_schema:": "one transaction, and a copy before it; tests/unit/test_store.py",
    "rebuild._": "one transaction; test_rebuild.py",
    "rebuild.open_database:": "one transaction; test_rebuild.py",
    "rebuild.re": "test_rebuild.py",
    "rebuild.store:": "test_rebuild.py",
    "rebuild.write:write_spec": "a job that waits long; test_rebuild.py",
    "runner._tidy:write:1": "expired statistics, one transaction; tests/unit/",
    "runner._note_waiting:": "a job that waits long; tests/worker/test_runner.py",
    "runner._restart_what_is_due:": "the kill loop",
    "tasks._keep:": "tasks that fail, and previews; tests/worker/test_runner.py",
    "tasks._keep_traced:": "one document, written whole; tests/contract/test_own_data.py",
    "tasks.keep_assumed:unlink": "a deleted model, the oldest; tests/contract/test_sizes.py",
    "tasks.attend:": "tasks that fail or are stopped; tests/worker/test_runner.py",
    "tasks.start:write:2": "a start that fails; tests/worker/test_runner.py",
    "folder.write_exit:write_document": "the keeper's; tests/worker/test_warm.py",
    "folder.bar_attempt": "a start that fails; tests/worker/test_runner.py",
    "folder.write_document:unlink": "a write that fails; a full disk in test_faults.py",
    "folder.prepare_attempt:unlink": "twice prepared; tests/unit/test_folder.py",
    "folder.prepare_attempt:rmdir": "twice prepared; tests/unit/test_folder.py",
    "folder.tidy_": "what a crash left; every second start of these scenarios",
    "spool.append:ftruncate": "a full disk; test_faults.py",
    "checkpoint.write_checkpoint:rmtree": "what a crash left, and a full disk",
    "checkpoint.write_checkpoint:write_text:2": "a library's own files; tests/unit/",
    "checkpoint.write_checkpoint:rename:1": "the same step again; tests/unit/test_checkpoint.py",
}


def chosen(points: list[Point]) -> list[Point]:
    """Some of them by lot; with FROSTLINE_EVERY_POINT (`make kill-loop`) every one."""
    if os.environ.get("FROSTLINE_EVERY_POINT"):
        return points
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed, file=sys.stderr)
    return random.Random(seed).sample(points, min(SOME, len(points)))


# ── the server's side ────────────────────────────────────────────────────────────────────────────


class ActingKeeper(SillyKeeper):
    """Its workers have come to their end by the time that it says that they have started."""

    def start(
        self, folder: Path, attempt: int, environment: dict[str, str], python: str | None
    ) -> int:
        directory = folder / "attempts" / str(attempt)
        with contextlib.suppress(job_folder.AttemptTaken):
            lock = job_folder.hold_lock(directory)
            kind = job_folder.read_spec(folder)["kind"]
            if kind == "inspect":
                job_folder.write_document(directory / "graph.json", GRAPH.to_document())
            elif kind == "trace":
                found = {"fingerprint": GRAPH.fingerprint, "graph": None, "refused": SIZES}
                job_folder.write_document(directory / "graph.json", found)
            else:
                self.train(directory, attempt)
            job_folder.write_result(directory, "succeeded", STEPS)
            job_folder._held.remove(lock)
            os.close(lock)
            job_folder.write_exit(directory, code=0, signal_number=None)
        return super().start(folder, attempt, environment, python)

    def train(self, directory: Path, attempt: int) -> None:
        spool = SpoolWriter(directory / "telemetry.spool", attempt)
        spool.append("start", {"layers": ["0"], "step": 0, "total_steps": STEPS, "warnings": []})
        spool.append("state", {"state": "running", "seq": 0})
        for step in range(1, STEPS + 1):
            values = {"loss": scripted.loss_at(step)}
            metrics = {"step": step, "epoch": 0.0, "values": values, "step_ms": 1.0}
            spool.append("metrics", metrics)
        spool.close()


def play_server(data_dir: Path) -> None:
    """Bring an inspection, a trace and a job to their ends, wherever a server was cut off."""
    house = House(data_dir, min_free_bytes=0)
    house.keeper = ActingKeeper()
    if len(house.service.list_models()) < 2:
        house.service.add_model({"uri": "demo:three-layers"})
    if not house.service.list_jobs():
        house.launch()
    for _ in range(400):
        house.tick(1.0)
        models, found = house.service.list_models(), house.service.list_jobs()
        traces = find_traces(house)
        if models[0]["state"] == "ready" and not traces:
            spec = {"kind": "trace", "model": {"uri": "demo:three-layers"}, "assumed": SIZES}
            task = Task(kind="trace", model_id=INSPECTED, spec=spec)
            house.db.write(lambda session, task=task: session.add(task))
        ended = [one["state"] in ("ready", "succeeded") for one in (*models, *found)]
        if all(ended) and traces == ["succeeded"]:
            break
    else:
        raise AssertionError(f"{models} {found} {traces}")
    house.tick()
    house.db.close()


def find_traces(house: House) -> list[str]:
    with house.db.read() as session:
        return [task.state for task in catalog.tasks_of_model(session, INSPECTED, "trace")]


def make_lived_in(data_dir: Path) -> None:
    house = House(data_dir)
    house.add_model()
    house.db.close()


SERVER_STAGE = """if True:
    import json, shutil, sys
    from pathlib import Path
    from tests.worker import test_crash_points as stage
    from tests.worker.crash_points import SERVER_SIDE, crash_at, find_reached, points_of
    from tests.worker.history import History
    place = Path(sys.argv[1])
    assert crash_at(None, lambda: stage.make_lived_in(place / "lived-in")) == 0
    folder = place / "whole"
    shutil.copytree(place / "lived-in", folder)
    points = points_of(SERVER_SIDE)
    reached = find_reached(points, lambda: stage.play_server(folder), place / "reached")
    for number, point in enumerate(stage.chosen(reached)):
        folder = place / str(number)
        shutil.copytree(place / "lived-in", folder)
        assert crash_at(point, lambda: stage.play_server(folder)) == -9, point
        assert crash_at(None, lambda: stage.play_server(folder)) == 0, point
        History(folder).check_end()
        stage.check_server(folder)
        shutil.rmtree(folder)
    print(json.dumps([point.name for point in points if point not in reached]))
"""


def check_server(data_dir: Path) -> None:
    """The job stands there once, whole, and what was found of the sizes."""
    document = job_folder.read_document(files.assumed_graph_path(data_dir, INSPECTED, SIZES))
    assert document is not None
    assert document["refused"] == SIZES
    metrics, _ = replay(data_dir / "jobs" / "1")
    assert metrics == {("loss", step): scripted.loss_at(step) for step in range(1, STEPS + 1)}


def test_a_server_killed_at_any_point_goes_on_where_it_was(tmp_path: Path) -> None:
    run_stage(SERVER_STAGE, tmp_path)


# ── the worker's side ────────────────────────────────────────────────────────────────────────────


def play_worker(folder: Path) -> None:
    """Go on from the newest checkpoint to the end, as a worker does, noting what was confirmed."""
    from safetensors.numpy import save_file  # noqa: F401 (imported before the tracing begins)

    job_folder.write_spec(folder, {"kind": "train"})
    newest = job_folder.newest_attempt(folder)
    number = int(newest.name) + 1 if newest else 1
    job_folder.tidy_checkpoints(folder)
    job_folder.tidy_drafts(folder)
    steps = checkpoint_steps(folder / "checkpoints")
    resume = steps[-1] if steps else None
    directory = job_folder.prepare_attempt(
        folder, number, resume_step=resume, device="cpu", environment={}
    )
    job_folder.write_wish(directory, job_folder.Wish(1, "running"))
    actor = scripted.Actor(folder, number)
    actor.spool.append("start", {"layers": scripted.LAYERS, "step": actor.step, "warnings": []})
    confirmed = os.open(folder / "confirmed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while actor.step < STEPS:
        actor.report()
        os.write(confirmed, b"step %d\n" % actor.step)
        if actor.step % 2 == 0:
            save_for_real(folder, actor.step)
            os.write(confirmed, b"saved %d\n" % actor.step)
    actor.spool.close()
    job_folder.write_result(directory, "succeeded", actor.step)
    os.write(confirmed, b"done 0\n")


def save_for_real(folder: Path, step: int) -> None:
    from app.training.checkpoint import Checkpoint, delete_checkpoint, write_checkpoint

    tensor = TENSORS[step]
    found = Checkpoint(step, {"step": tensor}, {"step": tensor}, {"step": step})
    write_checkpoint(folder / "checkpoints", found)
    for old in checkpoint_steps(folder / "checkpoints")[:-2]:
        delete_checkpoint(folder / "checkpoints", old)


TENSORS: dict[int, Any] = {}


def check_worker(folder: Path) -> None:
    """Whatever was confirmed is there."""
    confirmed = [line.split() for line in _read(folder / "confirmed").splitlines()]
    found: set[int] = set()
    for attempt in folder.glob("attempts/[0-9]*"):
        records, _ = read_spool(attempt / "telemetry.spool")
        assert [record.sequence for record in records] == list(range(1, len(records) + 1))
        found |= {record.payload["step"] for record in records if record.kind == "metrics"}
        if (attempt / "result.json").exists():
            assert job_folder.read_result(attempt)
    assert {int(step) for what, step in confirmed if what == "step"} <= found
    job_folder.tidy_checkpoints(folder)
    saved = [int(step) for what, step in confirmed if what == "saved"]
    steps = check_checkpoints(folder)
    assert max(steps, default=0) >= max(saved, default=0)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


STAGE = """if True:
    import json, shutil, sys
    from pathlib import Path
    import torch
    import app.training.checkpoint
    from tests.worker import test_crash_points as stage
    from tests.worker.crash_points import WORKER_SIDE, crash_at, find_reached, points_of
    # One operation at most a process, and none that needs a second thread: forks stay safe.
    stage.TENSORS.update({n: torch.tensor([n]) for n in range(20)})
    place = Path(sys.argv[1])
    points = points_of(WORKER_SIDE)
    (place / "whole").mkdir()
    reached = find_reached(points, lambda: stage.play_worker(place / "whole"), place / "reached")
    for number, point in enumerate(stage.chosen(reached)):
        folder = place / str(number)
        folder.mkdir()
        assert crash_at(point, lambda: stage.play_worker(folder)) == -9, point
        stage.check_worker(folder)
        assert crash_at(None, lambda: stage.play_worker(folder)) == 0, point
        stage.check_worker(folder)
        assert stage._read(folder / "confirmed").endswith("done 0\\n"), point
        shutil.rmtree(folder)
    print(json.dumps([point.name for point in points if point not in reached]))
"""


def test_a_worker_killed_at_any_point_leaves_what_it_confirmed(tmp_path: Path) -> None:
    run_stage(STAGE, tmp_path)


def run_stage(code: str, place: Path) -> None:
    """Forks belong in a process that has no threads and does nothing else."""
    command = [sys.executable, "-W", "ignore", "-c", code, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    missed = {name.rpartition(":")[0] for name in json.loads(done.stdout)}
    unknown = sorted(name for name in missed if not name.startswith(tuple(ELSEWHERE)))
    assert not unknown, "Let a scenario of this file come by there, or say in ELSEWHERE who does."


def test_a_new_call_that_writes_is_a_new_point(tmp_path: Path) -> None:
    source = tmp_path / "new.py"
    source.write_text("import os\n\ndef keep(a, b):\n    os.replace(a, b)\n")
    found = [point.name for point in scan(type("Module", (), {"__file__": str(source)}))]
    assert found == ["new.keep:replace:1:before", "new.keep:replace:1:after"]

"""The runner, tick by tick, against a keeper whose workers are played by the test itself."""

import os
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session

from app.jobs import folder as job_folder
from app.jobs.attendance import CHECKPOINT_SECONDS, STOP_SECONDS
from app.jobs.processes import START_SECONDS
from app.jobs.spool import SpoolWriter
from app.jobs.tasks import Tasks
from app.store import jobs
from app.store.tables import Attempt, Job, Task
from app.training.places import checkpoint_path
from tests.worker.silly_house import GPUS, GRAPH, House, loss


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    made.add_model()
    yield made
    made.db.close()
    for lock in made.locks:
        job_folder._held.remove(lock)
        os.close(lock)


def test_a_job_goes_from_the_queue_to_its_end(house: House) -> None:
    house.tick()  # finds the keeper
    house.launch()
    house.tick()
    assert house.job()["state"] == "starting"
    assert house.keeper.started == [
        (
            house.directory().parent.parent,
            1,
            {
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": "",
                "FROSTLINE_DEVICE": "cpu",
            },
        )
    ]
    spec = job_folder.read_spec(house.directory().parent.parent)
    assert spec["config"]["trainable"] == ["0.weight"]
    assert spec["threads"] >= 1
    spool = house.play_start()
    spool.append("metrics", loss(1))
    assert house.tick()
    assert house.job()["state"] == "running"
    assert house.job()["step"] == 1
    assert house.job()["worker_pid"] == 2**22 + 1
    spool.append("metrics", loss(2))
    spool.close()
    job_folder.write_result(house.directory(), "succeeded", 2)
    house.play_end()
    house.tick()
    assert house.job()["state"] == "succeeded"
    assert house.job()["worker_pid"] is None
    assert house.service.read_metrics(1)["loss"]["steps"] == [1, 2]
    assert not house.tick()


def test_a_live_change_reaches_the_worker_with_all_before_it(house: House) -> None:
    house.launch()
    house.tick()
    spool = house.play_start()
    house.tick()
    rules = [{"action": "unfreeze", "match": "0"}]
    for state in ("fresh", "keep"):
        house.service.change_freeze(1, {"rules": rules, "optimizer_state": state})
    house.tick()
    wish = job_folder.WishReader(house.directory())()
    assert [(edit["rules"], edit["optimizer_state"]) for edit in wish.edits] == [
        (rules, "fresh"),
        (rules, "keep"),
    ]
    assert (wish.seq, wish.state) == (2, "running")
    schedule = [{"at": {"step": 4}, **rules[0]}]
    spool.append("freeze", {"seq": 1, "step": 4, "config": {"schedule": schedule}})
    house.tick()
    assert house.service.find_edit(1, 1, 1)["step"] == 5
    assert house.service.find_edit(1, 1, 2)["step"] is None


def test_slots_are_kept_and_the_queue_is_fair(house: House) -> None:
    house.tick()
    first, second = house.launch(), house.launch()
    house.tick()
    assert [house.job(n)["state"] for n in (first, second)] == ["starting", "queued"]
    assert house.runner.slots()["cpu"] == {"total": 1, "busy": 1}
    house.play_start().close()
    job_folder.write_result(house.directory(), "succeeded", 0)
    house.play_end()
    house.tick()
    assert [house.job(n)["state"] for n in (first, second)] == ["succeeded", "starting"]


def test_each_gpu_is_one_slot_and_a_worker_sees_its_own_alone(tmp_path: Path) -> None:
    house = House(tmp_path, *GPUS)
    house.add_model()
    house.tick()
    launched = [house.launch(device=name) for name in ("cuda:1", "auto", "cuda", "cpu")]
    house.tick()
    states = [house.job(job)["state"] for job in launched]
    assert states == ["starting", "starting", "queued", "starting"]
    visible = [environment["CUDA_VISIBLE_DEVICES"] for _, _, environment in house.keeper.started]
    assert visible == ["5", "4", ""]
    devices = [
        job_folder.read_attempt(folder / "attempts" / "1")["device"]
        for folder, _, _ in house.keeper.started
    ]
    assert devices == ["cuda:0", "auto", "cpu"]
    house.db.close()


@pytest.mark.parametrize(
    ("end", "state", "reason"),
    [
        ({"code": None, "signal_number": 9}, "interrupted", "killed"),
        ({"code": 0}, "failed", "user_code"),
        ({"code": 3}, "failed", "user_code"),
    ],
)
def test_an_end_without_a_result_is_never_a_success(
    house: House, end: dict[str, Any], state: str, reason: str
) -> None:
    house.tick()
    house.launch()
    house.tick()
    spool = house.play_start()
    spool.append("metrics", loss(7))
    spool.close()
    house.play_end(**end)
    house.tick()
    job = house.job()
    assert job["state"] == state
    assert job["error"]["reason"] == reason
    assert "after step 7" in job["error"]["message"]
    assert job["step"] == 7


def test_a_failure_shows_what_the_worker_said(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    house.play_start().close()
    job_folder.write_result(
        house.directory(), "failed", 0, reason="nonfinite", message="The loss is NaN."
    )
    house.play_end(code=1)
    house.tick()
    assert house.job()["state"] == "failed"
    assert house.job()["error"] == {"reason": "nonfinite", "message": "The loss is NaN."}


def test_a_stop_while_loading_asks_at_once_and_then_insists(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    house.service.stop_job(1)
    house.tick()
    assert house.keeper.signals == [signal.SIGTERM]
    wish = job_folder.WishReader(house.directory())
    assert wish().state == "stop"
    wish.close()
    house.tick(STOP_SECONDS - 1)
    assert house.keeper.signals == [signal.SIGTERM]
    house.tick(1)
    assert house.keeper.signals == [signal.SIGTERM, signal.SIGKILL]
    job_folder.write_exit(house.directory(), code=None, signal_number=9)
    house.tick()
    assert house.job()["state"] == "stopped"
    assert house.job()["error"] is None


def test_a_stop_is_patient_with_a_checkpoint(house: House, deaf_worker: Any) -> None:
    house.tick()
    house.launch()
    house.tick()
    worker = deaf_worker(house.directory())
    spool = SpoolWriter(house.directory() / "telemetry.spool", 1)
    spool.append("metrics", loss(1))
    spool.close()
    house.tick()
    draft = house.directory().parent.parent / "checkpoints" / ".step-000000001.tmp"
    draft.mkdir(parents=True)
    house.service.stop_job(1)
    for _ in range(3):
        with (draft / "model.safetensors").open("ab") as file:
            file.write(b"more")
        for _ in range(int(CHECKPOINT_SECONDS) - 2):
            house.tick(1)
    assert worker.poll() is None
    for _ in range(4):
        house.tick(1)
    assert worker.wait(timeout=10) == -signal.SIGKILL
    job_folder.write_exit(house.directory(), code=None, signal_number=9)
    house.tick()
    assert house.job()["state"] == "stopped"
    assert house.job()["error"]["reason"] == "killed"
    assert "SIGKILL after step 1" in house.job()["error"]["message"]
    assert "no checkpoint at all" in house.job()["error"]["message"]


def test_what_breaks_while_a_job_is_stopped_is_told(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    house.play_start().close()
    house.tick()
    house.service.stop_job(1)
    job_folder.write_result(
        house.directory(), "stopped", 3, reason="disk_full", message="No space left."
    )
    house.play_end()
    house.tick()
    assert house.job()["state"] == "stopped"
    assert house.job()["error"] == {"reason": "disk_full", "message": "No space left."}


def test_a_resume_while_a_release_is_under_way_goes_on(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    house.play_start().close()
    house.tick()
    house.service.pause_job(1, "release")
    house.service.resume_job(1)
    job_folder.write_result(house.directory(), "released", 3)
    house.play_end()
    house.tick()
    assert (house.job()["state"], house.job()["attempt"]) == ("starting", 2)


def test_a_worker_without_progress_is_stalled(tmp_path: Path, deaf_worker: Any) -> None:
    house = House(tmp_path, stall_seconds=60)
    house.add_model()
    house.tick()
    house.launch()
    house.tick()
    worker = deaf_worker(house.directory())
    house.tick(1)
    house.tick(3000)  # the server itself was stopped: not the worker's fault
    for _ in range(55):
        house.tick(1)
    assert worker.poll() is None
    house.tick(5)
    assert worker.wait() == -signal.SIGKILL
    job_folder.write_exit(house.directory(), code=None, signal_number=9)
    house.tick()
    assert house.job()["state"] == "failed"
    assert house.job()["error"]["reason"] == "stalled"
    house.db.close()


def test_a_new_runner_adopts_what_lives_and_loses_no_record(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    spool = house.play_start()
    spool.append("metrics", loss(1))
    house.tick()
    spool.append("metrics", loss(2))  # while no server is there
    house.runner = house.new_runner()
    house.tick(10_000)
    assert house.job()["state"] == "running"
    assert house.service.read_metrics(1)["loss"]["steps"] == [1, 2]
    assert len(house.keeper.started) == 1
    spool.close()


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_a_clock_that_jumps_by_an_hour_ends_and_restarts_nothing(
    tmp_path: Path, jump_s: int
) -> None:
    """As if it had been an hour ahead or behind when everything was written."""
    house = House(tmp_path, stall_seconds=60)
    house.add_model()
    house.tick()
    house.launch()
    house.tick()
    spool = house.play_start()
    spool.append("metrics", loss(1))
    house.tick()

    def shift(session: Session) -> None:
        for row in (session.get_one(Job, 1), session.get_one(Attempt, (1, 1))):
            for name, value in row.model_dump().items():
                if name.endswith("_at") and value is not None:
                    moment = datetime.fromisoformat(value) + timedelta(seconds=jump_s)
                    setattr(row, name, moment.isoformat(timespec="milliseconds")[:-6] + "Z")

    house.db.write(shift)
    for path in [house.directory(), *house.directory().parents[1].rglob("*")]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + jump_s))
    for is_new in (False, True):
        house.runner = house.new_runner() if is_new else house.runner
        for _ in range(20):
            house.tick(1)
        assert (house.job()["state"], house.job()["attempt"]) == ("running", 1)
    assert house.keeper.signals == []
    spool.append("metrics", loss(2))
    spool.close()
    job_folder.write_result(house.directory(), "succeeded", 2)
    house.play_end()
    house.tick()
    assert (house.job()["state"], house.job()["attempt"]) == ("succeeded", 1)
    assert house.service.read_metrics(1)["loss"]["steps"] == [1, 2]
    house.db.close()


def test_a_worker_that_nobody_saw_end_is_lost(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    house.play_start().close()
    house.tick()
    job_folder._held.remove(lock := house.locks.pop())
    os.close(lock)
    house.tick()
    assert house.job()["state"] == "running"  # the keeper's word may be on its way
    house.tick(5)
    assert house.job()["state"] == "interrupted"
    assert house.job()["error"]["reason"] == "lost"


def test_a_claim_without_a_folder_goes_back_to_the_queue(house: House) -> None:
    house.launch()
    house.db.write(lambda s: jobs.start_attempt(s, s.get_one(Job, 1), "cpu", None))
    house.tick()
    assert house.job()["state"] == "starting"
    assert house.job()["attempt"] == 2
    assert len(house.keeper.started) == 1


def test_a_folder_without_a_process_goes_back_to_the_queue(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()

    def forget_pid(session: Session) -> None:
        session.get_one(Attempt, (1, 1)).pid = None

    house.db.write(forget_pid)
    house.runner = house.new_runner()
    house.tick()
    house.tick(START_SECONDS)
    house.tick()
    assert house.job()["attempt"] == 2
    assert house.job()["state"] == "starting"


def test_a_worker_that_cannot_be_started_is_told_and_tried_again(house: House) -> None:
    house.tick()
    house.keeper.is_broken = True
    house.launch()
    house.tick()
    assert (house.job()["state"], house.job()["is_restarting"]) == ("interrupted", True)
    assert house.job()["error"]["reason"] == "lost"
    assert "no more processes" in house.job()["error"]["message"]
    with pytest.raises(job_folder.AttemptTaken):  # a start that was only late comes too late
        job_folder.hold_lock(house.directory())
    house.keeper.is_broken = False
    house.tick(house.settings.restart_seconds)
    house.tick(house.settings.restart_seconds)
    assert (house.job()["state"], house.job()["attempt"]) == ("starting", 2)


def test_a_worker_that_started_although_its_keeper_did_not_say_so_is_adopted(house: House) -> None:
    house.tick()
    house.keeper.is_late = True
    start = house.keeper.start

    def start_and_run(folder: Path, attempt: int, *more: Any) -> int:
        house.play_start().close()
        return start(folder, attempt, *more)

    house.keeper.start = start_and_run  # type: ignore[method-assign]
    house.launch()
    house.tick()
    house.tick()
    assert (house.job()["state"], house.job()["attempt"]) == ("running", 1)


def test_an_attempt_goes_on_from_the_newest_checkpoint(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    house.play_start().close()
    house.tick()
    house.service.pause_job(1, "release")
    for step in (5, 10):
        checkpoint_path(house.directory().parents[1] / "checkpoints", step).mkdir(parents=True)
    job_folder.write_result(house.directory(), "released", 10)
    house.play_end()
    house.tick()
    assert house.job()["state"] == "paused"
    house.service.resume_job(1)
    house.tick()
    assert job_folder.read_attempt(house.directory(attempt=2))["resume_step"] == 10


def test_an_inspection_makes_its_model_ready(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.tick()
    model = house.service.add_model({"uri": "demo:digits"})
    house.tick()
    folder, attempt, _ = house.keeper.started[0]
    directory = folder / "attempts" / str(attempt)
    job_folder.write_document(directory / "graph.json", GRAPH.to_document())
    job_folder.write_result(directory, "succeeded", 0)
    job_folder.write_exit(directory, code=0, signal_number=None)
    house.tick()
    model = house.service.get_model(model["id"])
    assert model["state"] == "ready"
    assert model["parameter_count"] == 4
    assert model["fingerprint"] == GRAPH.fingerprint
    assert house.service.read_graph(1) == GRAPH
    assert house.service.get_task(model["task_id"])["state"] == "succeeded"
    assert not folder.exists()
    house.db.close()


def test_a_failed_inspection_says_why_on_its_model(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.tick()
    house.service.add_model({"uri": "demo:digits"})
    house.tick()
    folder, attempt, _ = house.keeper.started[0]
    directory = folder / "attempts" / str(attempt)
    job_folder.write_result(directory, "failed", 0, reason="import_error", message="No timm.")
    job_folder.write_exit(directory, code=1, signal_number=None)
    house.tick()
    assert house.service.get_model(1)["state"] == "failed"
    assert house.service.get_model(1)["error"] == {"reason": "import_error", "message": "No timm."}
    house.db.close()


def test_a_task_that_is_stopped_in_the_moment_of_its_start_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path)
    house.tick()
    house.service.add_model({"uri": "demo:digits"})
    start = Tasks.start

    def stop_and_start(tasks: Tasks, task: Task, *arguments: Any) -> None:
        house.service.stop_task(1)
        start(tasks, task, *arguments)

    monkeypatch.setattr(Tasks, "start", stop_and_start)
    house.tick()
    assert house.keeper.started == []
    assert house.service.get_task(1)["state"] == "stopped"
    house.db.close()


def test_a_model_deleted_while_it_is_inspected_ends_the_inspection(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.tick()
    house.service.add_model({"uri": "demo:digits"})
    house.tick()
    house.service.delete_model(1)
    house.tick()
    assert house.keeper.signals == [signal.SIGKILL]
    folder = house.keeper.started[0][0]
    job_folder.write_exit(folder / "attempts" / "1", code=None, signal_number=9)
    house.tick()
    assert house.service.get_task(1)["state"] == "stopped"
    assert not folder.exists()
    house.db.close()

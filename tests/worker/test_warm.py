"""The keeper: starts workers at once, outlives its server, leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from app.jobs import folder as job_folder
from app.jobs.keeper import Keeper, KeeperError, allowed_environment
from tests.worker.silly_jobs import eventually, prepare, wait_for_exit, wait_until_left

MakeJob = Callable[..., Path]


def read_pid(data_dir: Path) -> int:
    return int(json.loads((data_dir / "warm.json").read_text())["pid"])


def is_gone(pid: int) -> bool:
    """True where the process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def start_hanging(keeper: Keeper, folder: Path, number: int = 1) -> int:
    pid = keeper.start(folder, number)
    log = folder / "attempts" / str(number) / "log.txt"
    eventually(lambda: log.exists() and "hanging" in log.read_text())
    return pid


def test_a_warm_keeper_has_one_thread_and_its_worker_is_a_group_of_its_own(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    folder = make_job("tells", kind="inspect")
    pid = warm_keeper.start(folder, 1, {"PASSED": "on"})
    assert wait_for_exit(folder) == {"format": 1, "code": 0, "signal": None}
    holder = job_folder.read_holder(folder / "attempts" / "1")
    assert holder is not None
    assert holder.pid == pid
    log = (folder / "attempts" / "1" / "log.txt").read_text()
    assert f"secret on {folder} True" in log
    assert "threads 1 " in log
    assert "modules []" in log
    keeper_pid = read_pid(warm_keeper._data_dir)
    assert len(list(Path(f"/proc/{keeper_pid}/task").iterdir())) == 1


def test_a_worker_sees_no_secret_of_the_server(
    monkeypatch: pytest.MonkeyPatch, warm_keeper: Keeper, make_job: MakeJob
) -> None:
    monkeypatch.setenv("FROSTLINE_TOKEN", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    assert "HF_HOME" in allowed_environment(os.environ)
    folder = make_job("tells", kind="inspect")
    warm_keeper.start(folder, 1)
    wait_for_exit(folder)
    log = (folder / "attempts" / "1" / "log.txt").read_text()
    assert "HF_HOME" in log
    assert "CUDA_VISIBLE_DEVICES" in log
    assert "TOKEN" not in log
    assert "AWS" not in log


def test_a_worker_that_is_killed_is_seen_with_its_signal_and_its_children_are_gone(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    folder = make_job("hangs")
    pid = start_hanging(warm_keeper, folder)
    warm_keeper.kill(pid, signal.SIGKILL)
    assert wait_for_exit(folder) == {"format": 1, "code": None, "signal": 9}
    assert not job_folder.is_held(folder / "attempts" / "1")
    with pytest.raises(KeeperError, match="not a living child"):
        warm_keeper.kill(pid, signal.SIGKILL)


def test_children_of_user_code_end_with_the_worker(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("spawns")
    warm_keeper.start(folder, 1)
    assert wait_for_exit(folder)["code"] == 1
    log = (folder / "attempts" / "1" / "log.txt").read_text()
    child = int(log.split("child ")[1].split()[0])
    eventually(lambda: is_gone(child))


def test_the_keeper_refuses_to_signal_a_stranger(cold_keeper: Keeper) -> None:
    with pytest.raises(KeeperError, match="not a living child"):
        cold_keeper.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeeperError, match="KeyError"):
        cold_keeper._call({"verb": "dance"})
    assert cold_keeper.ready()


def test_what_was_not_prepared_is_not_started(cold_keeper: Keeper, make_job: MakeJob) -> None:
    with pytest.raises(KeeperError, match="has not been prepared"):
        cold_keeper.start(make_job(prepared=False), 1)


def test_a_connection_that_was_closed_starts_nothing_again(tmp_path: Path) -> None:
    keeper = Keeper.connect(tmp_path, preload=False)
    keeper.close()
    wait_until_left(tmp_path)
    assert not keeper.ready()
    with pytest.raises(KeeperError, match="has been closed"):
        keeper.kill(1, signal.SIGTERM)
    assert not (tmp_path / "warm.json").exists()


def test_of_many_simultaneous_starts_one_starts(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("hangs")
    pids, refused = [], []

    def start() -> None:
        try:
            pids.append(warm_keeper.start(folder, 1))
        except KeeperError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 1
    assert len(refused) == 49
    warm_keeper.kill(pids[0], signal.SIGKILL)
    assert wait_for_exit(folder)["signal"] == 9


def test_a_server_that_returns_finds_its_keeper_and_the_keeper_leaves_with_the_last_of_them(
    tmp_path: Path, make_job: MakeJob
) -> None:
    data_dir = tmp_path / "data"
    keeper = Keeper.connect(data_dir, preload=False)
    keeper_pid = read_pid(data_dir)
    folder = make_job("hangs")
    worker_pid = start_hanging(keeper, folder)
    keeper.close()
    assert not is_gone(worker_pid)
    again = Keeper.connect(data_dir, preload=False)
    assert read_pid(data_dir) == keeper_pid
    again.kill(worker_pid, signal.SIGKILL)
    assert wait_for_exit(folder)["signal"] == 9
    again.close()
    wait_until_left(data_dir)
    eventually(lambda: is_gone(keeper_pid))
    assert not (data_dir / "warm.json").exists()
    assert not (data_dir / "warm.sock").exists()


def test_a_keeper_that_is_killed_is_replaced_and_its_workers_live_on(
    tmp_path: Path, make_job: MakeJob
) -> None:
    data_dir = tmp_path / "data"
    keeper = Keeper.connect(data_dir, preload=False)
    eventually(keeper.ready)
    first = make_job("hangs")
    worker_pid = start_hanging(keeper, first)
    keeper_pid = read_pid(data_dir)
    os.kill(keeper_pid, signal.SIGKILL)
    eventually(lambda: keeper.ready() and read_pid(data_dir) != keeper_pid)
    assert job_folder.is_held(first / "attempts" / "1")
    second = make_job("hangs")
    start_hanging(keeper, second)  # by a new keeper, without anybody's help
    with pytest.raises(KeeperError):
        keeper.kill(worker_pid, signal.SIGTERM)
    assert job_folder.signal_holder(first / "attempts" / "1", signal.SIGKILL)
    eventually(lambda: not job_folder.is_held(first / "attempts" / "1"))
    assert job_folder.signal_holder(second / "attempts" / "1", signal.SIGKILL)
    assert wait_for_exit(second)["signal"] == 9
    keeper.close()
    wait_until_left(data_dir)


def test_a_keeper_of_another_version_finishes_its_children_and_is_replaced(
    tmp_path: Path, make_job: MakeJob
) -> None:
    data_dir = tmp_path / "data"
    old = Keeper.connect(data_dir, preload=False)
    old_pid = read_pid(data_dir)
    folder = make_job("hangs")
    start_hanging(old, folder)
    old.close()
    known = json.loads((data_dir / "warm.json").read_text())
    (data_dir / "warm.json").write_text(json.dumps({**known, "version": ["0.0.1", "python"]}))
    new = Keeper.connect(data_dir, preload=False)
    assert read_pid(data_dir) != old_pid
    assert not is_gone(old_pid)
    assert job_folder.signal_holder(folder / "attempts" / "1", signal.SIGKILL)
    assert wait_for_exit(folder)["signal"] == 9
    eventually(lambda: is_gone(old_pid))
    new.close()
    wait_until_left(data_dir)


def test_a_data_folder_with_a_long_name_has_its_socket_elsewhere(tmp_path: Path) -> None:
    data_dir = tmp_path / ("long" * 30)
    keeper = Keeper.connect(data_dir, preload=False)
    eventually(keeper.ready)
    address = Path(json.loads((data_dir / "warm.json").read_text())["address"])
    assert address.parent.stat().st_mode & 0o777 == 0o700
    keeper.close()
    wait_until_left(data_dir)
    assert not address.parent.exists()


def test_a_socket_left_behind_by_a_killed_keeper_is_no_obstacle(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "warm.sock"))
    stale.close()
    job_folder.write_document(
        tmp_path / "warm.json",
        {"address": str(tmp_path / "warm.sock"), "pid": 1, "version": ["0"]},
    )
    keeper = Keeper.connect(tmp_path, preload=False)
    assert (tmp_path / "warm.sock").stat().st_mode & 0o777 == 0o600
    keeper.close()
    wait_until_left(tmp_path)


def test_a_keeper_that_nobody_calls_leaves(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "app.jobs.warm", str(tmp_path), "--no-preload"]
    subprocess.run(command, timeout=60, check=True)


def test_a_worker_runs_in_the_users_own_interpreter(cold_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("tells", kind="inspect")
    pid = cold_keeper.start(folder, 1, {}, sys.executable)
    assert wait_for_exit(folder)["code"] == 0
    holder = job_folder.read_holder(folder / "attempts" / "1")
    assert holder is not None
    assert holder.pid == pid


def test_an_interpreter_without_torch_is_told_in_the_result(
    tmp_path: Path, cold_keeper: Keeper, make_job: MakeJob
) -> None:
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    folder = make_job()
    cold_keeper.start(folder, 1, {}, python)
    assert wait_for_exit(folder)["code"] == 1
    result = job_folder.read_result(folder / "attempts" / "1")
    assert result is not None
    assert result["outcome"] == "failed"
    assert result["reason"] == "import_error"
    assert str(python) in result["message"]
    assert "it needs torch, numpy and safetensors" in result["message"]


def test_an_interpreter_that_does_not_exist_is_told_in_the_result(
    cold_keeper: Keeper, make_job: MakeJob
) -> None:
    folder = make_job()
    cold_keeper.start(folder, 1, {}, "/nowhere/python")
    assert wait_for_exit(folder)["code"] == 1
    result = job_folder.read_result(folder / "attempts" / "1")
    assert result is not None
    assert result["reason"] == "import_error"
    assert "/nowhere/python, cannot be started: No such file" in result["message"]


def test_an_attempt_that_has_ended_is_not_started_again(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    folder = make_job("raises", kind="inspect")
    warm_keeper.start(folder, 1)
    before = wait_for_exit(folder)
    with pytest.raises(KeeperError, match="started before"):
        warm_keeper.start(folder, 1)
    prepare(folder, 2)
    warm_keeper.start(folder, 2)
    assert wait_for_exit(folder, 2)["code"] == 1
    assert job_folder.read_exit(folder / "attempts" / "1") == before

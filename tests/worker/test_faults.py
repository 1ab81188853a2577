"""The table of faults, row by row, with a real server, a real keeper and workers that misbehave."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.jobs import folder as job_folder
from app.jobs.leftovers import find_processes
from app.jobs.oom import count_oom_kills
from tests.worker.history import ENDED, History, replay
from tests.worker.scripted import loss_at
from tests.worker.servers import ServerProcess, find_keeper, serving
from tests.worker.silly_jobs import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all rows that need no setting of their own."""
    folder = tmp_path_factory.mktemp("faults")
    with serving(folder / "data", RESTART_SECONDS="0.1", MIN_FREE_BYTES="0") as server:
        yield server
        History(server.data_dir).check_end()


def attempts_of(server: ServerProcess, job: int) -> list[tuple[str, str | None, int | None]]:
    """(outcome, reason, step that it went on from) of each attempt."""
    return [
        (one["outcome"], one["error"] and one["error"]["reason"], one["resume_step"])
        for one in server.ask("list_attempts", job)
    ]


def until_step(server: ServerProcess, job: int, step: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_there() -> bool:
        found.update(server.ask("get_job", job))
        return found["step"] >= step

    eventually(is_there)
    return found


def job_path(server: ServerProcess, job: int) -> Path:
    return server.data_dir / "jobs" / str(job)


# ── workers that die ─────────────────────────────────────────────────────────────────────────────


def test_one_that_is_killed_where_it_was_before_is_not_started_for_ever(
    server: ServerProcess,
) -> None:
    job = server.launch([["train", 10], ["kill", 9]])
    ended = server.until(job, *ENDED)
    assert ended["state"] == "interrupted"
    assert "SIGKILL after step 10" in ended["error"]["message"]
    killed = ("interrupted", "killed")
    assert attempts_of(server, job) == [(*killed, None), (*killed, 10)]


def test_one_that_is_killed_is_started_three_times_while_it_makes_progress(
    server: ServerProcess,
) -> None:
    job = server.launch([["train", 10_000, 5]])
    for attempt in range(1, 5):
        eventually(lambda: server.ask("get_job", job)["attempt"] == attempt)  # noqa: B023
        started = server.ask("list_attempts", job)[-1]["resume_step"] or 0
        until_step(server, job, started + 7)
        directory = job_path(server, job) / "attempts" / str(attempt)
        assert job_folder.signal_holder(directory, signal.SIGKILL)
    ended = server.until(job, *ENDED)
    assert (ended["state"], ended["attempt"], ended["restarts_left"]) == ("interrupted", 4, 0)


def test_a_death_is_seen_within_two_seconds(server: ServerProcess) -> None:
    job = server.launch([["train", 100, 5, 0.01]])
    pid = until_step(server, job, 7)["worker_pid"]
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: attempts_of(server, job)[0][1] == "killed")
    assert time.monotonic() - killed_at < 2
    assert server.until(job, *ENDED)["state"] == "succeeded"  # it went on by itself


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM])
def test_the_signal_is_named(server: ServerProcess, number: signal.Signals) -> None:
    script = [["kill", int(number)]] if number != signal.SIGTERM else [["kill", 15], ["train", 3]]
    ended = server.until(server.launch(script), *ENDED)
    if number == signal.SIGTERM:
        assert ended["state"] == "stopped"
    else:
        assert number.name in ended["error"]["message"]


@pytest.mark.parametrize(
    ("script", "reason", "words"),
    [
        ([["train", 3], ["leave", 0]], "user_code", "exit status 0 after step 3"),
        ([["fail", "no such luck"]], "user_code", "no such luck"),
        ([["train", 3], ["diverge"]], "nonfinite", ""),
    ],
)
def test_an_end_of_its_own_is_a_failure_with_its_reason(
    server: ServerProcess, script: list[list[Any]], reason: str, words: str
) -> None:
    job = server.launch(script)
    ended = server.until(job, *ENDED)
    assert (ended["state"], ended["error"]["reason"]) == ("failed", reason)
    assert words in (ended["error"]["message"] or "")
    assert ended["attempt"] == 1
    if reason == "nonfinite":
        assert server.ask("read_metrics", job)["loss"]["values"][-1] == "NaN"


@pytest.mark.parametrize("apart", [False, True])
def test_what_a_worker_leaves_behind_goes_with_it(server: ServerProcess, apart: bool) -> None:
    job = server.launch([["fork", apart], ["sleep", 0.3], ["leave", 3]])
    directory = job_path(server, job) / "attempts" / "1"
    eventually(lambda: len(find_processes(directory)) == 2)
    server.until(job, *ENDED)
    assert find_processes(directory) == []


def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_is_taken(
    server: ServerProcess,
) -> None:
    job = server.launch([["train", 10], ["spoil"], ["kill", 9]])
    server.until(job, *ENDED)
    assert attempts_of(server, job)[:3] == [
        ("interrupted", "killed", None),
        ("failed", "checkpoint_corrupt", 10),
        ("interrupted", "killed", 5),
    ]
    message = server.ask("list_attempts", job)[1]["error"]["message"]
    assert "set aside; the next attempt goes on from step 5" in message
    assert (job_path(server, job) / "checkpoints" / "corrupt-step-000000010").is_dir()


def test_what_is_no_record_ends_the_reading_and_nothing_else(server: ServerProcess) -> None:
    job = server.launch([["train", 4], ["garble"], ["train", 6]])
    assert server.until(job, *ENDED)["state"] == "succeeded"
    assert server.ask("read_metrics", job)["loss"]["steps"] == [1, 2, 3, 4]


# ── workers that do not die ──────────────────────────────────────────────────────────────────────


def test_a_hang_is_ended_and_a_process_held_still_is_not(tmp_path: Path) -> None:
    with serving(tmp_path / "data", STALL_SECONDS="1.5") as server:
        held = server.launch([["train", 10_000]])
        hung = server.launch([["train", 3], ["hang"]])
        pid = until_step(server, held, 5)["worker_pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            ended = server.until(hung, *ENDED)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (ended["state"], ended["error"]["reason"]) == ("failed", "stalled")
        step = server.ask("get_job", held)["step"]
        until_step(server, held, step + 5)
        server.ask("stop_job", held)
        server.until(held, *ENDED)
        assert attempts_of(server, held) == [("stopped", None, None)]


def test_a_stop_is_heeded_whenever_it_comes(server: ServerProcess) -> None:
    model = server.ask("get_job", server.launch([["train", 10_000]]))["model_id"]
    document = {"model_id": model, "config": {"rules": []}, "dataset": {"uri": "demo:digits"}}
    waits = threading.Event()
    for delay in (0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3):
        job = server.ask("launch_job", document)["id"]
        waits.wait(delay)
        server.ask("stop_job", job)
        ended = server.until(job, *ENDED)
        assert (ended["state"], ended["error"]) == ("stopped", None)
        assert ended["attempt"] <= 1
    for job in server.ask("list_jobs"):
        if job["state"] not in ENDED:
            server.ask("stop_job", job["id"])
            server.until(job["id"], *ENDED)


def test_of_fifty_starts_and_a_stop_the_last_wish_is_what_comes(server: ServerProcess) -> None:
    job = server.launch([["train", 10_000]])
    for _ in range(50):
        server.ask("resume_job", job)
    server.ask("stop_job", job)
    server.ask("stop_job", job)
    ended = server.until(job, *ENDED)
    assert (ended["state"], ended["attempt"] <= 1) == ("stopped", True)


def test_the_queue_has_an_order_and_says_what_it_waits_for(tmp_path: Path) -> None:
    with serving(tmp_path / "data", CPU_SLOTS="1") as server:
        running = server.launch([["train", 10_000]])
        until_step(server, running, 1)
        first, second = server.launch([["train", 2]]), server.launch([["train", 3]])
        eventually(lambda: server.ask("get_job", second)["waiting_for"])
        waiting = server.ask("get_job", second)
        assert waiting["waiting_for"] == f"It waits for cpu, where job {running} must end first."
        assert waiting["position"] == 2
        server.ask("edit_job", second, {"priority": 5})
        assert server.ask("get_job", second)["position"] == 1
        assert server.ask("get_job", first)["position"] == 2
        server.ask("stop_job", running)
        for job in (second, first):
            ended = server.until(job, *ENDED)
            assert (ended["state"], ended["waiting_for"]) == ("succeeded", None)
        one, other = (server.ask("get_job", job)["started_at"] for job in (second, first))
        assert one < other


# ── servers and keepers that die ─────────────────────────────────────────────────────────────────


def test_three_jobs_outlive_their_server_and_their_keeper(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        jobs = [server.launch([["train", 10_000, 50]]) for _ in range(3)]
        pids = [until_step(server, job, 5)["worker_pid"] for job in jobs]
        server.kill()
        steps = [len(replay(job_path(server, job))[1]) for job in jobs]
        between = zip(jobs, steps, strict=True)
        for job, step in between:  # they train on while nobody is there
            eventually(lambda: len(replay(job_path(server, job))[1]) > step + 5)  # noqa: B023
        server.start()
        started_at = time.monotonic()
        for job, pid, step in zip(jobs, pids, steps, strict=True):
            found = until_step(server, job, step + 5)
            assert found["worker_pid"] == pid
        assert time.monotonic() - started_at < 10
        keeper = find_keeper(server.data_dir)
        assert keeper is not None
        os.kill(keeper, signal.SIGKILL)
        for job in jobs:
            server.ask("stop_job", job)
            last = server.until(job, *ENDED)["step"]
            assert attempts_of(server, job) == [("stopped", None, None)]
            every_step = {("loss", step): loss_at(step) for step in range(1, last + 1)}
            assert replay(job_path(server, job))[0] == every_step
        History(server.data_dir).check_end()


def test_a_second_server_is_refused_and_told_who_holds_the_folder(server: ServerProcess) -> None:
    log = server.data_dir.parent / "server.log"
    before = len(log.read_text())
    with pytest.raises(AssertionError, match="belongs to process"):
        ServerProcess(server.data_dir)
    assert str(server.process.pid) in log.read_text()[before:]
    assert server.process.poll() is None


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root may mount a small file system, and not in every container")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_told_waited_out_and_nothing_is_lost(small_disk: Path) -> None:
    (small_disk / "place").mkdir()
    with serving(small_disk / "place" / "data", MIN_FREE_BYTES="500000") as server:
        job = server.launch([["train", 300, 5]])
        until_step(server, job, 10)
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            fill(ballast)
        folder = job_path(server, job)
        eventually(lambda: not job_folder.is_held(folder / "attempts" / "1"))
        assert job_folder.read_result(folder / "attempts" / "1") is not None
        ballast.unlink()
        ended = server.until(job, *ENDED)
        assert ended["state"] == "succeeded"
        assert attempts_of(server, job)[0][:2] == ("failed", "disk_full")
        assert attempts_of(server, job)[1][2] is not None
        assert replay(folder)[0] == {("loss", n): loss_at(n) for n in range(1, 301)}
        History(server.data_dir).check_end()


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes get 96 MB together."""
    parents = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    limits = ["memory.limit_in_bytes", "memory.max"]
    for parent, limit in zip(parents, limits, strict=True):
        group = parent / f"frostline-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(96 * 2**20))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        eventually(lambda: not (group / "cgroup.procs").read_text())  # noqa: B023
        group.rmdir()
        return
    pytest.skip("only root may limit the memory of a group, and not in every container")


def test_the_kernels_killer_is_named(tmp_path: Path, small_memory: Path) -> None:
    with serving(tmp_path / "data") as server:
        job = server.launch([["train", 3], ["sleep", 1], ["allocate", 300]])
        until_step(server, job, 3)
        keeper = find_keeper(server.data_dir)
        pid = server.ask("get_job", job)["worker_pid"]
        (small_memory / "cgroup.procs").write_text(str(pid))
        (small_memory / "cgroup.procs").write_text(str(keeper))
        ended = server.until(job, *ENDED)
        assert (ended["state"], ended["error"]["reason"]) == ("interrupted", "oom_host")
        assert "memory ran out" in ended["error"]["message"]
        assert "Lower batch_size" in ended["error"]["message"]
        assert ended["attempt"] == 1


def test_kills_for_want_of_memory_are_counted_wherever_the_kernel_counts(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    (tmp_path / "vmstat").write_text("pgfault 3\noom_kill 7\n")
    assert count_oom_kills(nowhere, tmp_path / "vmstat") == 7
    assert count_oom_kills(nowhere, nowhere) == 0

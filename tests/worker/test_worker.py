"""One attempt in a real process: what it reports, however it ends."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.freezing.errors import InvalidDocument
from app.jobs import folder as job_folder
from app.jobs.folder import Wish
from app.jobs.keeper import Keeper, KeeperError
from app.jobs.spool import Record, read_spool
from app.jobs.worker import LOG_BYTES, TRACEBACK_BYTES, describe_failure
from app.training.places import checkpoint_path, checkpoint_steps
from tests.worker.silly_jobs import eventually, prepare, wait_for_exit

MakeJob = Callable[..., Path]
BY_HAND = [sys.executable, "-m", "app.jobs.worker"]


def run_job(keeper: Keeper, folder: Path, number: int = 1) -> dict[str, Any]:
    """Start a prepared attempt, wait for its end, and return its result."""
    keeper.start(folder, number, {"CUDA_VISIBLE_DEVICES": ""})
    wait_for_exit(folder, number)
    result = job_folder.read_result(folder / "attempts" / str(number))
    assert result is not None, read_log(folder, number)
    return result


def read_log(folder: Path, number: int = 1) -> str:
    log = folder / "attempts" / str(number) / "log.txt"
    return log.read_text() if log.exists() else ""


def read_records(folder: Path, number: int = 1) -> list[Record]:
    return read_spool(folder / "attempts" / str(number) / "telemetry.spool")[0]


def read_facts(folder: Path, number: int = 1, *kinds: str) -> list[tuple[str, dict[str, Any]]]:
    """What the loop reported, but for time and memory, which no two runs have alike."""
    varying = ("step_ms", "measure_ms", "elapsed_s", "cost", "peak_bytes")
    return [
        (record.kind, {name: v for name, v in record.payload.items() if name not in varying})
        for record in read_records(folder, number)
        if record.kind in (kinds or ("metrics", "layers", "proof"))
    ]


def newest_step(folder: Path, number: int = 1) -> int:
    steps = [r.payload["step"] for r in read_records(folder, number) if r.kind == "layers"]
    return max(steps, default=0)


# ── to the end ───────────────────────────────────────────────────────────────────────────────────


def test_a_job_reports_every_step_a_proof_and_a_checkpoint(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    folder = make_job()
    result = run_job(warm_keeper, folder)
    assert (result["outcome"], result["step"], result["reason"]) == ("succeeded", 8, None)
    kinds = [record.kind for record in read_records(folder)]
    assert kinds[:2] == ["start", "state"]
    layers = [payload for _, payload in read_facts(folder, 1, "layers")]
    assert [payload["step"] for payload in layers] == list(range(1, 9))
    assert checkpoint_steps(folder / "checkpoints") == [8]
    _, proof = read_facts(folder, 1, "proof")[-1]
    assert proof["verdict"] == "holds"
    assert job_folder.read_exit(folder / "attempts" / "1") == {
        "format": 1,
        "code": 0,
        "signal": None,
    }


def test_a_worker_started_by_hand_does_the_same(warm_keeper: Keeper, make_job: MakeJob) -> None:
    by_keeper, by_hand = make_job(), make_job(prepared=False)
    run_job(warm_keeper, by_keeper)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*BY_HAND, str(by_hand)]
    first = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=True)
    assert first.stderr == "attempt 1: succeeded at step 8\n"
    assert read_facts(by_hand) == read_facts(by_keeper)
    weights = "checkpoints/step-000000008/model.safetensors"
    assert (by_hand / weights).read_bytes() == (by_keeper / weights).read_bytes()


def test_a_worker_by_hand_goes_on_from_a_checkpoint_that_a_kill_left_aside(
    make_job: MakeJob,
) -> None:
    folder = make_job(prepared=False, training={"epochs": 1, "checkpoint_every": 2})
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*BY_HAND, str(folder)]
    subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
    newest = checkpoint_path(folder / "checkpoints", 4)
    newest.rename(newest.with_name(f".old-{newest.name}"))
    subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
    assert job_folder.read_attempt(folder / "attempts" / "2")["resume_step"] == 4


def test_an_evaluation_reports_metrics_only(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job(kind="evaluate")
    assert run_job(warm_keeper, folder)["outcome"] == "succeeded"
    names = {name for _, facts in read_facts(folder, 1, "metrics") for name in facts["values"]}
    assert {"eval/eval/loss", "eval/eval/accuracy"} <= names
    assert read_facts(folder, 1, "layers") == []


def test_an_inspection_leaves_a_graph(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job(kind="inspect")
    assert run_job(warm_keeper, folder)["outcome"] == "succeeded"
    graph = job_folder.read_document(folder / "attempts" / "1" / "graph.json")
    assert graph is not None
    assert [module["path"] for module in graph["modules"]] == ["", "0", "1", "2", "3"]


# ── not to the end ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "reason", "words"),
    [
        ("raises", "user_code", "no such luck"),
        ("leaves", "user_code", "sys.exit(0)"),
        ("hogs", "oom_host", "no room"),
        ("fills", "disk_full", "No space left"),
        ("missing", "bad_spec", "has no 'missing'"),
    ],
)
def test_a_failure_has_a_reason_a_sentence_and_a_traceback(
    warm_keeper: Keeper, make_job: MakeJob, model: str, reason: str, words: str
) -> None:
    folder = make_job(model, kind="inspect")
    result = run_job(warm_keeper, folder)
    assert (result["outcome"], result["reason"]) == ("failed", reason)
    assert words in result["message"]
    assert "\n" not in result["message"]
    assert not result["message"].startswith("app.")  # our own errors are sentences
    assert "Traceback" in result["traceback"]
    assert "Traceback" in read_log(folder)
    assert wait_for_exit(folder)["code"] == 1
    assert not (folder / "attempts" / "1" / "result.room").exists()


def test_a_module_that_cannot_be_imported_is_an_import_error(
    warm_keeper: Keeper, make_job: MakeJob, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("import a_package_nobody_has")
    folder = make_job("python:broken:model", kind="inspect", code_dirs=[str(tmp_path)])
    result = run_job(warm_keeper, folder)
    assert result["reason"] == "import_error"
    assert "a_package_nobody_has" in result["message"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{", "spec.json cannot be read"),
        ('{"format": 1, "kind": "dance"}', "'dance'; it must be one of train"),
        ('{"format": 1, "kind": "train"}', "has no 'model'"),
    ],
)
def test_a_spec_that_cannot_be_used_is_a_bad_spec(
    warm_keeper: Keeper, make_job: MakeJob, spec: str, words: str
) -> None:
    folder = make_job()
    (folder / "spec.json").write_text(spec)
    result = run_job(warm_keeper, folder)
    assert result["reason"] == "bad_spec"
    assert words in result["message"]


@pytest.mark.parametrize(
    ("model", "end"),
    [("vanishes", {"code": 0, "signal": None}), ("crashes", {"code": None, "signal": 11})],
)
def test_a_process_that_vanishes_leaves_no_result_and_never_a_success(
    warm_keeper: Keeper, make_job: MakeJob, model: str, end: dict[str, Any]
) -> None:
    folder = make_job(model, kind="inspect")
    warm_keeper.start(folder, 1)
    assert wait_for_exit(folder) == {"format": 1, **end}
    assert job_folder.read_result(folder / "attempts" / "1") is None


def test_what_a_crash_was_doing_stands_in_the_log(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("crashes", kind="inspect")
    warm_keeper.start(folder, 1)
    wait_for_exit(folder)
    assert "Segmentation fault" in read_log(folder)
    assert "in crashes" in read_log(folder)


def test_a_flood_of_output_is_capped_and_the_log_says_so(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    folder = make_job("shouts", kind="inspect")
    assert run_job(warm_keeper, folder)["outcome"] == "succeeded"
    size = (folder / "attempts" / "1" / "log.txt").stat().st_size
    assert LOG_BYTES < size < LOG_BYTES + 1000
    assert "the log ends here, at its limit" in read_log(folder)


def test_threads_left_behind_do_not_hold_up_the_end(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("lingers", kind="inspect")
    assert run_job(warm_keeper, folder)["outcome"] == "succeeded"


def test_a_second_worker_of_an_attempt_is_refused(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("hangs")
    pid = warm_keeper.start(folder, 1)
    eventually(lambda: job_folder.is_held(folder / "attempts" / "1"))
    for arguments in (["--attempt", "1"], []):
        command = [*BY_HAND, str(folder), *arguments]
        refused = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
    warm_keeper.kill(pid, signal.SIGKILL)
    assert wait_for_exit(folder)["signal"] == 9


def test_a_folder_that_is_no_job_is_refused(tmp_path: Path) -> None:
    refused = subprocess.run([*BY_HAND, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 2
    assert "is not a job folder: it has no spec.json" in refused.stderr


# ── stopped ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("wish", "outcome"), [("stop", "stopped"), ("release", "released")])
def test_an_end_that_was_wished_before_the_start_needs_no_loading(
    warm_keeper: Keeper, make_job: MakeJob, wish: str, outcome: str
) -> None:
    folder = make_job("hangs")
    job_folder.write_wish(folder / "attempts" / "1", Wish(1, wish))
    assert run_job(warm_keeper, folder)["outcome"] == outcome


def test_sigterm_while_the_model_loads_stops_it(warm_keeper: Keeper, make_job: MakeJob) -> None:
    folder = make_job("hangs")
    pid = warm_keeper.start(folder, 1)
    eventually(lambda: "hanging" in read_log(folder))
    warm_keeper.kill(pid, signal.SIGTERM)
    assert wait_for_exit(folder)["code"] == 0
    result = job_folder.read_result(folder / "attempts" / "1")
    assert result is not None
    assert (result["outcome"], result["step"], result["reason"]) == ("stopped", 0, None)


@pytest.mark.parametrize("by_signal", [False, True])
def test_a_stop_while_training_ends_after_the_step_with_a_checkpoint(
    warm_keeper: Keeper, make_job: MakeJob, by_signal: bool
) -> None:
    folder = make_job(dataset="slow_data", training={"epochs": 1000})
    pid = warm_keeper.start(folder, 1)
    eventually(lambda: newest_step(folder) >= 2)
    if by_signal:
        warm_keeper.kill(pid, signal.SIGTERM)
    else:
        job_folder.write_wish(folder / "attempts" / "1", Wish(1, "stop"))
    assert wait_for_exit(folder)["code"] == 0
    result = job_folder.read_result(folder / "attempts" / "1")
    assert result is not None
    assert result["outcome"] == "stopped"
    assert checkpoint_steps(folder / "checkpoints")[-1] == result["step"] == newest_step(folder)


def test_a_killed_job_loses_no_recorded_step_and_resumes_to_the_same_end(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    training = {"epochs": 3, "checkpoint_every": 1}
    whole = make_job(dataset="slow_data", training=training)
    assert run_job(warm_keeper, whole)["outcome"] == "succeeded"
    broken = make_job(dataset="slow_data", training=training)
    pid = warm_keeper.start(broken, 1)
    eventually(lambda: newest_step(broken) >= 4)
    warm_keeper.kill(pid, signal.SIGKILL)
    assert wait_for_exit(broken)["signal"] == 9
    resume_step = checkpoint_steps(broken / "checkpoints")[-1]
    assert resume_step >= 3
    prepare(broken, 2, resume_step=resume_step)
    assert run_job(warm_keeper, broken, 2)["outcome"] == "succeeded"

    first = {key: row for key, row in read_rows(broken, 1).items() if key[1] <= resume_step}
    second = {key: row for key, row in read_rows(broken, 2).items() if key[1] > resume_step}
    assert first | second == read_rows(whole, 1)
    assert read_weights(broken, 12) == read_weights(whole, 12)


def test_killed_at_any_moments_it_still_comes_to_the_same_end(
    warm_keeper: Keeper, make_job: MakeJob
) -> None:
    training = {"epochs": 20, "checkpoint_every": 1}
    whole = make_job(training=training)
    assert run_job(warm_keeper, whole)["outcome"] == "succeeded"
    broken = make_job(training=training, prepared=False)
    moments = random.Random(0)
    rows: dict[tuple[str, int], Any] = {}
    for number in range(1, 200):
        resume_step = max(checkpoint_steps(broken / "checkpoints"), default=None)
        prepare(broken, number, resume_step)
        pid = warm_keeper.start(broken, number)
        # Later and later, so that a busy machine comes to the end as well.
        threading.Event().wait(moments.uniform(0, 0.2 + number / 40))
        with contextlib.suppress(KeeperError):  # it has come to its end before
            warm_keeper.kill(pid, signal.SIGKILL)
        end = wait_for_exit(broken, number)
        assert (end["code"], end["signal"]) in ((None, signal.SIGKILL), (0, None))
        kept = {key: row for key, row in rows.items() if key[1] <= (resume_step or -1)}
        rows = read_rows(broken, number) | kept
        if end["code"] == 0:
            break
    assert number > 3, "it was hardly ever killed"
    assert rows == read_rows(whole, 1)
    assert read_weights(broken, 80) == read_weights(whole, 80)


def read_rows(folder: Path, number: int) -> dict[tuple[str, int], Any]:
    facts = read_facts(folder, number, "layers", "metrics")
    rows: dict[tuple[str, int], Any] = {}
    for kind, payload in facts:  # an evaluation after a step adds to the metrics of that step
        row = rows.setdefault((kind, payload["step"]), dict(payload))
        if kind == "metrics":
            row["values"] = row["values"] | payload["values"]
    return rows


def read_weights(folder: Path, step: int) -> bytes:
    return (checkpoint_path(folder / "checkpoints", step) / "model.safetensors").read_bytes()


# ── a disk that is full ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root may mount a small file system, and not in every container")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_what_was_recorded_stays(
    warm_keeper: Keeper, make_job: MakeJob, small_disk: Path
) -> None:
    spec = job_folder.read_spec(make_job(dataset="slow_data", training={"epochs": 10_000}))
    job_folder.write_spec(small_disk / "job", spec)
    prepare(small_disk / "job")
    warm_keeper.start(small_disk / "job", 1)
    eventually(lambda: newest_step(small_disk / "job") >= 1)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(bytes(2**20))
    eventually(lambda: not job_folder.is_held(small_disk / "job" / "attempts" / "1"))
    result = job_folder.read_result(small_disk / "job" / "attempts" / "1")
    assert result is not None
    assert (result["outcome"], result["reason"]) == ("failed", "disk_full")
    records = read_records(small_disk / "job")
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    assert result["step"] == records[-1].payload["step"]


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def test_a_traceback_keeps_its_end_within_its_limit() -> None:
    failure = describe_failure(ValueError("long \udc80" * 100_000 + "the end"))
    assert len(failure["traceback"].encode()) <= TRACEBACK_BYTES
    assert failure["traceback"].rstrip().endswith("the end")
    assert len(failure["message"]) <= 1000


def test_the_reason_is_that_of_the_exhausted_resource_behind_the_error() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    def fail(cause: BaseException) -> str:
        try:
            raise RuntimeError("loading failed") from cause
        except RuntimeError as error:
            return describe_failure(error)["reason"]

    assert fail(OutOfMemoryError()) == "oom_cuda"
    assert fail(MemoryError()) == "oom_host"
    assert fail(OSError(28, "No space left on device")) == "disk_full"
    assert fail(RuntimeError("CUDA error: device-side assert triggered")) == "cuda_fatal"
    assert fail(ValueError()) == "user_code"
    assert describe_failure(InvalidDocument([("a", "b")]))["reason"] == "bad_spec"
    assert describe_failure(ImportError("x"))["reason"] == "import_error"

"""The job folder: what one end writes, the other reads, whatever happens in between."""

import fcntl
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.jobs import folder as job_folder
from app.jobs.folder import Wish, WishReader
from app.jobs.spool import SpoolWriter, read_spool

PAYLOADS = [
    ("start", {"layers": ["stem.conv", "fc"], "total_steps": None, "step": 0, "warnings": ["é"]}),
    ("state", {"state": "running", "seq": 3}),
    ("metrics", {"step": 1, "epoch": 0.5, "values": {"loss": 2.0, "lr": 1e-3}, "step_ms": None}),
    (
        "layers",
        {
            "step": 2**40,
            "grad_norm": [1.5, None],
            "update_norm": [0.0, 0.0],
            "weight_norm": [math.inf, 3e-310],
        },
    ),
    ("proof", {"verdict": "holds", "step": 1}),
    ("checkpoint", {"step": 1, "bytes": 10, "created_at": "2026-01-01T00:00:00Z"}),
    ("checkpoint_deleted", {"step": 1}),
    ("freeze", {"step": 1, "seq": 1, "config": {}}),
]


def make_attempt(folder: Path, number: int = 1) -> Path:
    return job_folder.prepare_attempt(
        folder, number, resume_step=None, device="cpu", environment={}
    )


def write_spool(path: Path, attempt: int = 1) -> None:
    spool = SpoolWriter(path, attempt)
    for kind, payload in PAYLOADS:
        spool.append(kind, payload)
    spool.close()


def test_every_record_comes_back_as_it_was_emitted(tmp_path: Path) -> None:
    write_spool(tmp_path / "spool", attempt=7)
    records, offset = read_spool(tmp_path / "spool")
    assert [(record.kind, record.payload) for record in records] == PAYLOADS
    assert [record.sequence for record in records] == list(range(1, len(PAYLOADS) + 1))
    assert {record.attempt for record in records} == {7}
    assert offset == (tmp_path / "spool").stat().st_size
    assert read_spool(tmp_path / "spool", offset) == ([], offset)


def test_a_loss_that_exploded_comes_back_as_the_float_it_was(tmp_path: Path) -> None:
    spool = SpoolWriter(tmp_path / "spool", 1)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}
    spool.append("metrics", {"step": 1, "epoch": 0.0, "values": values, "step_ms": math.nan})
    nan = {"step": 1, "grad_norm": [math.nan], "update_norm": [None], "weight_norm": [1.0]}
    spool.append("layers", nan)
    spool.close()
    (metrics, layers), _ = read_spool(tmp_path / "spool")
    assert str(metrics.payload["values"]) == str(values)
    assert metrics.payload["step_ms"] == "NaN"
    assert math.isnan(layers.payload["grad_norm"][0])
    assert layers.payload["update_norm"] == [None]


def test_an_emitted_kind_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    spool = SpoolWriter(tmp_path / "spool", 1)
    with pytest.raises(KeyError):
        spool.append("gossip", {})
    spool.close()


def test_a_spool_cut_anywhere_gives_a_prefix_and_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    write_spool(path)
    whole = path.read_bytes()
    expected, _ = read_spool(path)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        records, offset = read_spool(path)
        assert records == expected[: len(records)]
        assert offset <= length
        spool = SpoolWriter(path, 1)
        spool.append("state", {"state": "running", "seq": 9})
        spool.close()
        after, _ = read_spool(path)
        assert after[:-1] == records
        assert after[-1].sequence == len(records) + 1


def test_no_changed_byte_is_taken_for_a_record(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    write_spool(path)
    whole = path.read_bytes()
    expected, _ = read_spool(path)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        records, _ = read_spool(path)
        assert records == expected[: len(records)]
        assert len(records) < len(expected)


def test_a_small_limit_still_brings_every_record_one_read_after_the_other(tmp_path: Path) -> None:
    write_spool(tmp_path / "spool")
    expected, end = read_spool(tmp_path / "spool")
    seen, offset = [], 0
    while offset < end:
        records, offset = read_spool(tmp_path / "spool", offset, limit_bytes=8)
        assert len(records) == 1
        seen += records
    assert seen == expected


def test_a_length_beyond_all_reason_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(struct.pack("<II", 2**32 - 1, 0) + bytes(100))
    assert read_spool(tmp_path / "spool") == ([], 0)
    assert read_spool(tmp_path / "none") == ([], 0)


def test_what_was_recorded_before_a_sigkill_is_there_after_it(tmp_path: Path) -> None:
    writer = """if True:
        import sys
        from pathlib import Path
        from app.jobs.spool import SpoolWriter
        spool = SpoolWriter(Path(sys.argv[1]), 1)
        step = 0
        while True:
            step += 1
            layers = [float(step)] * 200
            spool.append("layers", {"step": step, "grad_norm": layers, "update_norm": layers,
                                    "weight_norm": layers})
            print(step, flush=True)
    """
    path, before = tmp_path / "spool", 0
    for round_number in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        for _ in range(random.Random(round_number).randrange(1, 400)):
            process.stdout.readline()
        process.kill()
        acknowledged = process.stdout.read().split("\n")[-2:-1]
        process.wait()
        process.stdout.close()
        records, _ = read_spool(path, limit_bytes=2**30)
        assert [record.sequence for record in records] == list(range(1, len(records) + 1))
        assert len(records) - before >= int(acknowledged[0] if acknowledged else 0)
        before = len(records)


def test_a_document_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "wish.json"
    stop = threading.Event()
    torn = []

    def look() -> None:
        while not stop.is_set():
            try:
                job_folder.read_document(path)
            except ValueError as error:
                torn.append(error)

    job_folder.write_document(path, {"n": "x" * 5000})
    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        job_folder.write_document(path, {"n": "x" * random.randrange(5000)})
    stop.set()
    reader.join()
    assert torn == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_document_of_the_future_is_refused_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="format 2; this version of Frostline reads"):
        job_folder.read_result(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="not a document of a job folder"):
        job_folder.read_result(tmp_path)
    assert job_folder.read_exit(tmp_path) is None


def test_a_wish_is_read_again_only_when_it_was_replaced(tmp_path: Path) -> None:
    wishes = WishReader(tmp_path)
    assert wishes() == Wish(0, "running", ())
    first = None
    for seq in range(1, 200):  # so fast that sizes, times and recycled inode numbers repeat
        wish = Wish(seq % 10, "hold", ({"action": "freeze", "match": "a"},))
        job_folder.write_wish(tmp_path, wish)
        assert wishes() == wish
        first = first or wishes()
        assert wishes() is wishes()
    wishes.close()


def test_an_attempt_is_prepared_once_and_as_a_whole(tmp_path: Path) -> None:
    attempts: list[Path] = []
    refused: list[str] = []

    def prepare() -> None:
        try:
            attempts.append(make_attempt(tmp_path, 1))
        except FileExistsError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=prepare) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attempts) == 1
    assert len(refused) == 19
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["1"]
    assert job_folder.read_attempt(attempts[0])["device"] == "cpu"
    for number in (2, 10):
        make_attempt(tmp_path, number)
    assert job_folder.newest_attempt(tmp_path) == tmp_path / "attempts" / "10"
    assert job_folder.newest_attempt(tmp_path / "elsewhere") is None


HOLDER = """if True:
    import os, sys
    from pathlib import Path
    from app.jobs.folder import hold_lock, AttemptTaken
    try:
        hold_lock(Path(sys.argv[1]))
    except AttemptTaken:
        print("taken")
        sys.exit()
    if len(sys.argv) > 2 and os.fork() == 0:
        os.setsid()  # a child that outlives its parent and everything that is sent to its group
    os.write(1, b"%d\\n" % os.getpid())  # whole, for both write to one pipe
    sys.stdin.read()
"""


def start_holder(attempt: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(attempt), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_lock_proves_life_and_ends_with_it(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    assert not job_folder.is_started(attempt)
    assert not job_folder.is_held(attempt)
    assert job_folder.read_holder(attempt) is None
    assert not job_folder.signal_holder(attempt, signal.SIGTERM)
    with start_holder(attempt) as process:
        assert process.stdout
        assert int(process.stdout.readline()) == process.pid
        assert job_folder.is_held(attempt)
        holder = job_folder.read_holder(attempt)
        assert holder is not None
        assert holder.pid == process.pid
        assert job_folder.signal_holder(attempt, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    assert job_folder.is_started(attempt)
    assert not job_folder.is_held(attempt)
    assert not job_folder.signal_holder(attempt, signal.SIGTERM)
    with pytest.raises(job_folder.AttemptTaken):
        job_folder.hold_lock(attempt)


def test_a_forked_child_does_not_keep_a_dead_workers_lock(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    with start_holder(attempt, "with a child") as process:
        assert process.stdout
        pids = {int(process.stdout.readline()) for _ in range(2)}
        assert job_folder.is_held(attempt)
        process.kill()
        process.wait()
        (child,) = pids - {process.pid}
        os.kill(child, 0)  # it lives
        assert not job_folder.is_held(attempt)
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("started", "host", "is_locked", "lives"),
    [
        (0, None, True, True),
        (-1, None, True, False),  # a stranger has its pid, and a child of it the lock
        (0, None, False, False),  # its pid and start time are known, and nobody has the lock
        (0, "another boot", False, False),
        (0, "another machine", True, True),  # which alone can tell more
    ],
)
def test_a_reused_pid_and_a_boot_bring_nobody_back_to_life(
    tmp_path: Path, started: int, host: str | None, is_locked: bool, lives: bool
) -> None:
    attempt = make_attempt(tmp_path)
    with start_holder(attempt) as process:
        assert process.stdout
        process.stdout.readline()
        lock = job_folder.read_document(attempt / "lock")
        assert lock is not None
        process.kill()
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        ticks = int(Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[19])
        named = {"pid": stranger.pid, "started": ticks + started, "host": host or lock["host"]}
        (attempt / "lock").write_text(json.dumps({**lock, **named}))
        with (attempt / "lock").open() as held:
            if is_locked:
                fcntl.flock(held, fcntl.LOCK_EX)
            assert job_folder.is_held(attempt) is lives
            assert job_folder.signal_holder(attempt, signal.SIGTERM) is (lives and host is None)
    finally:
        stranger.kill()
        stranger.wait()


def test_of_many_workers_one_gets_the_attempt_while_somebody_looks(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            job_folder.is_held(attempt)

    watcher = threading.Thread(target=look)
    watcher.start()
    processes = [start_holder(attempt) for _ in range(6)]
    lines = [process.stdout.readline().strip() for process in processes if process.stdout]
    stop.set()
    watcher.join()
    for process in processes:
        process.communicate()
    assert lines.count("taken") == 5
    assert [name.name for name in attempt.iterdir() if name.name.startswith(".")] == []


def test_an_attempt_that_was_barred_cannot_start_any_more(tmp_path: Path) -> None:
    assert job_folder.bar_attempt(tmp_path)
    assert not job_folder.is_held(tmp_path)
    assert not job_folder.signal_holder(tmp_path, 0)
    with pytest.raises(job_folder.AttemptTaken):
        job_folder.hold_lock(tmp_path)
    assert not job_folder.bar_attempt(tmp_path)


def test_leftovers_of_killed_writers_go_and_what_was_aside_comes_back(tmp_path: Path) -> None:
    names = (".step-000000003.7", ".deleted-step-000000001.7", ".old-step-000000002")
    for name in (*names, "step-000000004", ".old-step-000000004"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    job_folder.tidy_checkpoints(tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000000002", "step-000000004"]

"""The job folder, for both ends of the conversation; it knows neither torch nor who runs a job.

    FOLDER/spec.json                    what to run; written once, before the first attempt
    FOLDER/checkpoints/step-000000123/  complete checkpoints only
    FOLDER/attempts/N/attempt.json      how attempt N was started
                      lock              held (flock) while its one worker lives; names that worker
                      wish.json         what the server wants now, replaced as a whole
                      telemetry.spool   what happened: records, appended
                      log.txt           what the process printed
                      found.json        what a task found out, a preview for example
                      result.json       the worker's last act
                      exit.json         how the process ended, written by the one who waited for it

Every document has a ``format``; that of attempt.json speaks for the spool beside it.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FORMAT = 1
FOUND = "found.json"

OUTCOMES = ("succeeded", "stopped", "released", "failed")
REASONS = (
    "user_code",
    "import_error",
    "bad_spec",
    "data_error",
    "oom_host",
    "oom_cuda",
    "cuda_fatal",
    "nonfinite",
    "disk_full",
    "checkpoint_corrupt",
    "stalled",
    "killed",
    "lost",
)
WISHES = ("running", "hold", "release", "stop")


# ── documents ────────────────────────────────────────────────────────────────────────────────────


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Replace ``path`` by the document: after any crash it holds the old one or this one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **document}, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def read_document(path: Path) -> dict[str, Any] | None:
    """The document at ``path``, or None where there is none (yet).

    Raises:
        ValueError: it is not a JSON object, or a newer version of Frostline wrote it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply.") from error
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ValueError(f"{path} is not a document of a job folder: it has no format number.")
    if document["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {document['format']}; this version of Frostline reads formats up"
            f" to {FORMAT}. Use the version that wrote it, or a newer one."
        )
    return document


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_spec(folder: Path, spec: Mapping[str, Any]) -> None:
    """Say what to run: kind, model, config, dataset, training, code_dirs, file_dirs, threads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_document(folder / "spec.json", spec)


def read_spec(folder: Path) -> dict[str, Any]:
    """What to run. A folder without a spec is not a job folder: ValueError."""
    spec = read_document(folder / "spec.json")
    if spec is None:
        raise ValueError(f"{folder} is not a job folder: it has no spec.json.")
    return spec


def checkpoints_folder(folder: Path) -> Path:
    """Where the job's checkpoints lie; their own names are ``training.places``'s."""
    return folder / "checkpoints"


def tidy_checkpoints(folder: Path) -> None:
    """Remove what killed writers left; put back a checkpoint that was aside for one never there."""
    checkpoints = checkpoints_folder(folder)
    for path in checkpoints.glob(".*"):
        published = path.with_name(path.name.removeprefix(".old-"))
        if path.name.startswith(".old-step-") and not published.exists():
            path.rename(published)
        elif path.name.startswith((".old-step-", ".step-", ".deleted-", ".removed-")):
            shutil.rmtree(path, ignore_errors=True)


def tidy_drafts(folder: Path) -> None:
    """Remove what killed writers left of documents, locks and attempts; nobody may be writing."""
    for path in (*folder.glob(".*"), *folder.glob("attempts/.*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# ── attempts ─────────────────────────────────────────────────────────────────────────────────────


def prepare_attempt(
    folder: Path,
    number: int,
    *,
    resume_step: int | None,
    device: str,
    environment: Mapping[str, str],
) -> Path:
    """Make the folder of attempt ``number``, complete or not at all.

    Args:
        resume_step: the checkpoint to go on from; None starts afresh.
        device: as seen from inside the process: ``cpu``, ``cuda:0``, or ``auto``.
        environment: variables that the worker sets before it loads anything.

    Raises:
        FileExistsError: the attempt has been prepared before.
    """
    attempts = folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(16)
    draft = attempts / f".{number}-{token}"
    draft.mkdir()
    document = {
        "attempt": number,
        "token": token,
        "resume_step": resume_step,
        "device": device,
        "environment": dict(environment),
    }
    write_document(draft / "attempt.json", document)
    try:
        # The kernel refuses to rename a folder onto one that is not empty: who comes first, wins.
        draft.rename(attempts / str(number))
    except OSError as error:
        (draft / "attempt.json").unlink()
        draft.rmdir()
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            message = f"Attempt {number} of {folder} exists already."
            raise FileExistsError(errno.EEXIST, message) from None
        raise
    _sync_directory(attempts)
    return attempts / str(number)


def newest_attempt(folder: Path) -> Path | None:
    """The folder of the attempt with the highest number, or None before the first."""
    attempts = [path for path in (folder / "attempts").glob("*") if path.name.isdecimal()]
    return max(attempts, key=lambda path: int(path.name), default=None)


def read_attempt(directory: Path) -> dict[str, Any]:
    """How the attempt was started: attempt, token, resume_step, device, environment."""
    document = read_document(directory / "attempt.json")
    if document is None:
        raise ValueError(f"{directory} is not an attempt: it has no attempt.json.")
    return document


def write_result(
    directory: Path,
    outcome: str,
    step: int,
    *,
    reason: str | None = None,
    message: str | None = None,
    traceback: str | None = None,
) -> None:
    """Say how the attempt ended; the worker's last act."""
    assert outcome in OUTCOMES
    assert reason in (None, *REASONS)
    document = {
        "outcome": outcome,
        "step": step,
        "reason": reason,
        "message": message,
        "traceback": traceback,
    }
    write_document(directory / "result.json", document)


def read_result(directory: Path) -> dict[str, Any] | None:
    """How the worker says it ended: outcome, step, reason, message, traceback."""
    return read_document(directory / "result.json")


def write_exit(
    directory: Path, *, code: int | None, signal_number: int | None, out_of_memory: bool = False
) -> None:
    """Say how the process ended: exactly one of code and signal is a number.

    Args:
        out_of_memory: the signal was the kernel's, which had no memory left.
    """
    document = {"code": code, "signal": signal_number}
    if out_of_memory:
        document["out_of_memory"] = True
    write_document(directory / "exit.json", document)


def read_exit(directory: Path) -> dict[str, Any] | None:
    """How the process ended, as seen by the one who waited for it: code or signal, as numbers.

    ``out_of_memory`` is there, and true, where the kernel ended it for want of memory.
    """
    return read_document(directory / "exit.json")


# ── wishes ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Wish:
    """What the server wants of a worker now.

    ``edits`` holds every edit so far, oldest first, so that two between two looks are both seen.
    """

    seq: int = 0
    state: str = "running"
    edits: tuple[Mapping[str, Any], ...] = ()


def write_wish(directory: Path, wish: Wish) -> None:
    """Replace what is wanted of the attempt's worker."""
    assert wish.state in WISHES
    document = {"seq": wish.seq, "state": wish.state, "edits": list(wish.edits)}
    write_document(directory / "wish.json", document)


class WishReader:
    """Tells what is wanted now; cheap enough to be asked at every step."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "wish.json"
        # The version last read stays open: its inode cannot be given to a newer one, so that an
        # equal inode number proves an equal version, which times and sizes would not.
        self._seen: int | None = None
        self._inode: tuple[int, int] | None = None
        self._wish = Wish()

    def __call__(self) -> Wish:
        try:
            found = os.stat(self._path)  # noqa: PTH116 (half the price of Path.stat, at every step)
        except FileNotFoundError:
            return self._wish
        if (found.st_dev, found.st_ino) != self._inode:
            self._read()
        return self._wish

    def _read(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY)
        self.close()
        self._seen = descriptor
        opened = os.fstat(descriptor)
        self._inode = (opened.st_dev, opened.st_ino)
        document = json.loads(os.pread(descriptor, opened.st_size, 0))
        self._wish = Wish(document["seq"], document["state"], tuple(document["edits"]))

    def close(self) -> None:
        """Let go of the version last read."""
        if self._seen is not None:
            os.close(self._seen)
            self._seen = self._inode = None


# ── life ─────────────────────────────────────────────────────────────────────────────────────────


class AttemptTaken(RuntimeError):
    """The attempt has, or had, its worker; there is never a second one."""


@dataclass(frozen=True)
class Holder:
    """The process that holds an attempt: its pid, when it started, and where that pid is valid."""

    pid: int
    started: int
    host: str


# Descriptors of locks that this process holds; a forked child must not keep them alive.
_held: list[int] = []


def _let_go_after_fork() -> None:
    while _held:
        os.close(_held.pop())  # closing, never unlocking: the lock belongs to the parent


os.register_at_fork(after_in_child=_let_go_after_fork)


def hold_lock(directory: Path) -> int:
    """Become the attempt's worker, for as long as this process lives.

    The lock file appears already locked and named, by a link: nobody ever sees it in between, a
    look at it (``is_held``) never disturbs the start, and an attempt cannot be started twice.

    Raises:
        AttemptTaken: it has been started before.
    """
    draft = directory / f".lock.{os.getpid()}"
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder = {
            "format": FORMAT,
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "host": _host(),
        }
        os.write(descriptor, json.dumps(holder).encode())
        os.link(draft, directory / "lock")
    except FileExistsError:
        os.close(descriptor)
        raise AttemptTaken(f"{directory} has been started before; prepare another one.") from None
    finally:
        draft.unlink()
    _held.append(descriptor)
    return descriptor


def bar_attempt(directory: Path) -> bool:
    """Make a late start impossible; False where the attempt has had its worker already.

    The lock file names nobody and is never locked: nobody is taken to live, or gets a signal.
    """
    draft = directory / f".bar.{os.getpid()}"
    try:
        holder = {"format": FORMAT, "pid": 0, "started": 0, "host": ""}
        draft.write_text(json.dumps(holder), encoding="utf-8")
        os.link(draft, directory / "lock")
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def is_started(directory: Path) -> bool:
    """True from the moment that the attempt's worker holds it, for ever."""
    return (directory / "lock").exists()


def read_holder(directory: Path) -> Holder | None:
    """The attempt's worker, dead or alive; None before it has started."""
    document = read_document(directory / "lock")
    if document is None:
        return None
    return Holder(document["pid"], document["started"], document["host"])


def is_held(directory: Path) -> bool:
    """True while the attempt's worker lives."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        # A child that some library forked without Python's knowledge may keep a dead worker's lock.
        holder = read_holder(directory)
        assert holder is not None, "a lock file is complete before it has its name"
        return holder.host != _host() or _start_time(holder.pid) == holder.started
    finally:
        os.close(descriptor)


def signal_holder(directory: Path, number: int) -> bool:
    """Send a signal to the process group of the attempt's worker, if that lives.

    Returns:
        False where there was nobody to send it to (or it lives on another machine).
    """
    holder = read_holder(directory)
    if holder is None or holder.host != _host() or not is_held(directory):
        return False
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(holder.pid) == holder.pid:
            os.killpg(holder.pid, signal.Signals(number))
        else:  # started by hand inside somebody's group
            os.kill(holder.pid, signal.Signals(number))
        return True
    return False


def _start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 where none lives or none can tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return 0 if state in "ZX" else int(fields[18])


@lru_cache
def _host() -> str:
    """Names this boot of this machine and the namespace of its pids; empty where none can tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""

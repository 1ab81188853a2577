"""How attempts end: what an end means, in words, and which ends a job is started again after."""

import errno
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from app.jobs import folder as job_folder
from app.jobs.records import read_result

# Reasons after which the same job may end otherwise. After every other one the same would happen
# again: those wait for somebody who changes something.
RETRYABLE = frozenset({"killed", "lost", "disk_full", "checkpoint_corrupt"})
HINTS: Mapping[str, str] = {
    "oom_host": "Lower batch_size or num_workers, or run fewer jobs at once.",
    "oom_cuda": "Lower batch_size, use precision bf16 or gradient_checkpointing, or freeze more "
    "layers from the input on.",
    "cuda_fatal": "Set CUDA_LAUNCH_BLOCKING=1 for the server, or run on the CPU, to see where.",
}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: succeeded, stopped, released, failed or interrupted, and why."""

    outcome: str
    reason: str | None = None
    message: str | None = None


class Tried(Protocol):
    """What is known of the job that was tried."""

    @property
    def kind(self) -> str: ...
    @property
    def wish(self) -> str: ...
    @property
    def step(self) -> int: ...


def read_end(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What the worker, and what the keeper, says about the end of an attempt.

    A document that cannot be read (any more) counts as one that is not there.
    """
    found: list[dict[str, Any] | None] = []
    for read in (read_result, job_folder.read_exit):
        try:
            found.append(read(directory))
        except ValueError:
            logger.exception("%s: how it ended cannot be read.", directory)
            found.append(None)
    return found[0], found[1]


def judge(
    result: Mapping[str, Any] | None,
    ended: Mapping[str, Any] | None,
    job: Tried | None = None,
    *,
    has_stalled: bool = False,
    refused: str | None = None,
    has_begun: bool = False,
    checkpoints: Sequence[int] = (),
) -> Ending:
    """How an attempt ended.

    Args:
        result, ended: what `read_end` found.
        refused: why what it recorded is not believed; then neither is its result.
        has_begun: the loop has reported something, so that there was something to lose.
        checkpoints: the steps of which there are checkpoints, oldest first.
    """
    if refused is not None:
        outcome = "stopped" if job is not None and job.wish == "stop" else "failed"
        return Ending(outcome, "user_code", f"{refused} What was recorded before is kept.")
    if result is not None:  # one that ended as wished may still have something to tell
        return Ending(result["outcome"], result["reason"], _advise(result, checkpoints))
    if job is not None and job.wish == "stop":
        if not has_begun:
            return Ending("stopped")
        end = _explain(ended, job)
        message = end.message or ""
        if job.kind == "train":
            newest = f"after step {checkpoints[-1]}" if checkpoints else "at all"
            message += f" It was to stop, and did not by itself; there is no checkpoint {newest}."
        return Ending("stopped", end.reason, message)
    if has_stalled:
        return Ending("failed", "stalled", "The worker got nowhere for too long and was ended.")
    return _explain(ended, job)


def _advise(result: Mapping[str, Any], checkpoints: Sequence[int]) -> str | None:
    """What the worker said, and what to do about it."""
    if result["message"] is None:
        return None
    hint = HINTS.get(result["reason"] or "", "")
    if result["reason"] == "checkpoint_corrupt":
        older = f"from step {checkpoints[-2]}" if len(checkpoints) > 1 else "from the beginning"
        hint = f"It was set aside; the next attempt goes on {older}."
    return f"{result['message']} {hint}".rstrip()


def _explain(ended: Mapping[str, Any] | None, job: Tried | None) -> Ending:
    """The end of an attempt that left no result."""
    where = f" after step {job.step}" if job is not None and job.step else ""
    if ended is None:
        message = f"The worker is gone{where}, and nobody saw how it ended."
        return Ending("interrupted", "lost", message)
    if ended.get("out_of_memory"):
        message = f"The kernel ended the worker{where}, because memory ran out. "
        return Ending("interrupted", "oom_host", message + HINTS["oom_host"])
    if ended["signal"] is not None:
        name = signal.Signals(ended["signal"]).name
        hint = " The system does that when memory runs out." if name == "SIGKILL" else ""
        message = f"The worker was ended by {name}{where}.{hint}"
        return Ending("interrupted", "killed", message)
    left = f"The worker left with exit status {ended['code']}{where}"
    return Ending("failed", "user_code", f"{left}, without a result; see its log.")


def explain_start(error: Exception) -> Ending:
    """The end of an attempt whose worker could not be started."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "disk_full" if is_full else "lost"
    return Ending("interrupted", reason, f"The worker could not be started: {error}")


def is_worth_a_restart(
    ending: Ending, *, wish: str, has_progressed: bool, has_older_checkpoint: bool
) -> bool:
    """Whether the same job, started again, may get further than it did.

    Args:
        wish: the user's, as it was when the attempt ended.
        has_progressed: it completed a step that was not in the checkpoint it began with.
        has_older_checkpoint: there is one before the one that it began with.
    """
    if ending.outcome not in ("failed", "interrupted") or wish != "running":
        return False
    if ending.reason == "killed":
        return has_progressed  # else whatever killed it would do so again
    if ending.reason == "checkpoint_corrupt":
        return has_older_checkpoint
    return ending.reason in RETRYABLE

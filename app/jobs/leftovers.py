"""Leftovers: processes that an attempt left behind when its worker ended. Linux alone can tell."""

import contextlib
import os
import signal
from pathlib import Path

PROC = Path("/proc")
# In the environment of every worker that a keeper starts, and so of all that it starts itself.
MARK = "FROSTLINE_ATTEMPT"
ROUNDS = 20  # one that forks while it is being ended needs a second look, and no endless one


def mark_of(directory: Path) -> tuple[str, str]:
    """The variable, and its value, that tells whose an attempt's processes are."""
    return MARK, str(directory)


def end_leftovers(directory: Path) -> list[int]:
    """End every process of an attempt whose worker has gone; their pids."""
    ended: list[int] = []
    for _ in range(ROUNDS):
        found = find_processes(directory)
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ended += found
    return ended


def find_processes(directory: Path) -> list[int]:
    """Living processes that were started with the attempt's mark, its worker among them."""
    mark = "=".join(mark_of(directory)).encode()
    found = []
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def find_children(pid: int) -> list[int]:
    """Direct children of a process with one thread, zombies too; none where nobody can tell."""
    try:
        return [int(child) for child in (PROC / f"{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []

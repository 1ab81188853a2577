"""Worker processes as the server sees them: started, signalled, ended. Knows no job and no row."""

import logging
import math
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from app.jobs import folder as job_folder
from app.jobs.devices import Device
from app.jobs.leftovers import end_leftovers
from app.jobs.usage import Usage
from app.settings import Settings
from app.store.files import files_below

logger = logging.getLogger(__name__)

EXIT_SECONDS = 2.0  # between the end of a worker and the keeper's word about it
START_SECONDS = 60.0  # between the start of a process and its taking the attempt's lock
RECONNECT_SECONDS = 5.0
DEVICE = "FROSTLINE_DEVICE"  # the device's name as users know it, told to the worker
LOOK_SECONDS = 2.0  # between two looks at what costs more than a glance


class Keeper(Protocol):
    """What the server needs of the process that starts workers; it may raise RuntimeError.

    Attributes:
        trouble: why it is not there, None while nothing is known to be wrong.
    """

    trouble: str | None

    def ready(self) -> bool: ...
    def start(
        self, folder: Path, attempt: int, environment: dict[str, str], python: str | None
    ) -> int: ...
    def kill(self, pid: int, number: int) -> None: ...
    def close(self) -> None: ...


@dataclass
class Watch:
    """What is remembered of one live attempt; all of it can be forgotten by a restart."""

    progress_at: float
    told_seq: int = -1
    unheld_at: float | None = None
    stopping_at: float | None = None
    written: dict[Path, tuple[int, int]] | None = None
    asked_to_leave: bool = False
    has_stalled: bool = False
    refused: str | None = None  # why what it records is not believed
    looked_at: float = -math.inf
    usage: Usage | None = None
    peak: Usage | None = None

    def is_due(self, now: float) -> bool:
        """Whether it is time for a closer look; then the next one is as far away again."""
        is_due = now - self.looked_at >= LOOK_SECONDS
        if is_due:
            self.looked_at = now
        return is_due

    def note_usage(self, usage: Usage | None) -> None:
        """Keep what a worker takes of memory, and the most that it took."""
        self.usage = usage
        if usage is not None:
            self.peak = usage.peak(self.peak)

    def forgive(self, seconds: float) -> None:
        """Time in which the server itself stood still counts against no worker."""
        self.progress_at += seconds
        if self.stopping_at is not None:
            self.stopping_at += seconds

    def note_written(self, paths: Iterable[Path], now: float) -> None:
        """Take it as progress when any of these files has changed since the last look."""
        written = {path: state for path in paths if (state := _state_of(path)) is not None}
        if self.written is not None and written != self.written:
            self.progress_at = now
        self.written = written


class Processes:
    """Starts and signals workers, through the keeper where it must, and knows when they have ended.

    Args:
        connect: finds or starts the keeper; tried again where it raises RuntimeError or OSError.
    """

    def __init__(self, settings: Settings, connect: Callable[[], Keeper]) -> None:
        self._settings = settings
        self._connect = connect
        self._keeper: Keeper | None = None
        self._connect_at = -math.inf
        self.is_ready = False
        self.trouble: str | None = None

    def reach(self, now: float) -> bool:
        """Whether workers can be started now. A keeper that is found sees to its own life."""
        if self._keeper is None and now >= self._connect_at:
            self._connect_at = now + RECONNECT_SECONDS
            try:
                self._keeper = self._connect()
            except (RuntimeError, OSError) as error:
                self.trouble = str(error)
                logger.error("Workers cannot be started: %s", error)
        if self._keeper is not None:
            self.is_ready = self._keeper.ready()
            self.trouble = None if self.is_ready else self._keeper.trouble
        return self.is_ready

    def close(self) -> None:
        """Hang up; whatever runs goes on."""
        if self._keeper is not None:
            self._keeper.close()

    def start(self, folder: Path, number: int, device: Device) -> int | None:
        """Start the worker of a prepared attempt.

        Returns:
            Its pid; None where the keeper could not say it and the worker has started all the same.

        Raises:
            RuntimeError, OSError: it has not started, and cannot any more.
        """
        assert self._keeper is not None
        python = self._settings.worker_python
        try:
            return self._keeper.start(
                folder, number, environment_of(device), None if python is None else str(python)
            )
        except (RuntimeError, OSError):
            # A keeper that was too slow to answer may still be about to start it.
            if job_folder.bar_attempt(folder / "attempts" / str(number)):
                raise
            return None

    @staticmethod
    def has_ended(directory: Path, pid: int | None, watch: Watch, now: float) -> bool:
        """Whether nothing more will come from a worker; the keeper's word, or a lock long free."""
        if (directory / "exit.json").exists():
            return True
        if job_folder.is_held(directory):
            watch.unheld_at = None
            return False
        watch.unheld_at = now if watch.unheld_at is None else watch.unheld_at
        is_young = pid is not None and not job_folder.is_started(directory)
        return now - watch.unheld_at >= (START_SECONDS if is_young else EXIT_SECONDS)

    def signal(self, directory: Path, pid: int | None, number: signal.Signals) -> None:
        """Send a signal to a worker's process group, wherever it is known."""
        if job_folder.signal_holder(directory, number) or pid is None or self._keeper is None:
            return
        try:
            self._keeper.kill(pid, number)
        except RuntimeError as error:  # it has ended in between: the next tick sees how
            logger.info("Worker %s got no %s: %s", pid, number.name, error)

    def clear(self, directory: Path, pid: int | None) -> None:
        """End whatever is left of a worker that its keeper did not see to the end."""
        self.signal(directory, pid, signal.SIGKILL)
        end_leftovers(directory)


def environment_of(device: Device) -> dict[str, str]:
    """Variables that show a process one device alone."""
    # By bus, as the driver numbers them: CUDA's own order puts the fastest first.
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": device.visible,
        DEVICE: device.id,
    }


def is_held_still(pid: int | None) -> bool:
    """Whether somebody holds the process still, with SIGSTOP or a debugger."""
    try:
        return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it has ended: others see to that
        return False


def written_files(directory: Path) -> list[Path]:
    """Every file that an attempt may be writing, half-written checkpoints too."""
    checkpoints = job_folder.checkpoints_folder(directory.parent.parent)
    return [*files_below(directory), *files_below(checkpoints)]


def _state_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:  # the worker has just renamed or removed it
        return None
    return found.st_size, found.st_mtime_ns

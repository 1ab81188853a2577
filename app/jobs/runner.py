"""The runner: brings rows and job folders together, tick by tick. It runs no job itself."""

import logging
import shutil
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlmodel import Session

from app.jobs import folder as job_folder
from app.jobs.attendance import Attendance
from app.jobs.devices import Device, find_devices, find_kernels
from app.jobs.processes import Keeper, Processes
from app.jobs.rebuild import Cards, read_unread
from app.jobs.tasks import Tasks
from app.jobs.usage import measure_device
from app.settings import Settings
from app.store import catalog, files, jobs
from app.store.db import Database
from app.store.tables import Job
from app.training.places import checkpoint_path, checkpoint_steps

logger = logging.getLogger(__name__)

TIDY_SECONDS = 3600.0  # between two looks for what may be removed
LIVE_SECONDS = 0.1  # between two looks while something runs: how fresh charts are
IDLE_SECONDS = 1.0
ABSENT_SECONDS = 5.0  # a longer gap between two looks means that this process stood still
TASK_SLOTS = 1
WAITED_FOR = ("inspect", "preview", "trace")
RESTART_FACTORS = (1, 6, 24)  # of the setting restart_seconds: the wait before each restart


class Runner:
    """Starts what is queued, stores what runs, ends what is to stop, settles what has ended.

    Only `run` (or a test) calls `tick`; the other methods may be called from any thread.

    Args:
        connect: finds or starts the keeper; tried again where it raises RuntimeError or OSError.
        devices: what there is to run on; asked of the driver where it is not given.
    """

    def __init__(
        self,
        settings: Settings,
        db: Database,
        connect: Callable[[], Keeper],
        devices: tuple[Device, ...] | None = None,
    ) -> None:
        self._settings = settings
        self._db = db
        self._devices = find_devices() if devices is None else devices
        self._processes = Processes(settings, connect)
        self._jobs = Attendance(settings, db, self._processes)
        self._tasks = Tasks(settings, db, self._processes)
        self._troubles: dict[str, str] = {}
        self._cards = Cards(settings, db)
        self._tidy_at = 0.0
        self._has_caught_up = False
        self._last_tick: float | None = None
        self._busy: dict[str, list[int]] = {}
        self._busy_tasks = 0
        self._restart_at: dict[int, float] = {}
        self._wanted = threading.Event()

    # ------------------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event, clock: Callable[[], float]) -> None:
        """Tick until `stop` is set, at once where `wake` is called. Leaves jobs running."""
        while not stop.is_set():
            is_live = False

            def tick() -> None:
                nonlocal is_live
                is_live = self.tick(clock())

            self._guarded("the runner", tick)
            self._wanted.wait(LIVE_SECONDS if is_live else IDLE_SECONDS)
            self._wanted.clear()
        self._processes.close()

    def wake(self) -> None:
        """Something is to be done: do not wait for the next look."""
        self._wanted.set()

    def tick(self, now: float) -> bool:
        """Do everything that can be done now; whether something is alive or about to be.

        Args:
            now: seconds on a monotonic clock.
        """
        self._forgive_absence(now)
        if not self._has_caught_up:  # a database that was rebuilt: before anything is added
            self._guarded("what was recorded before", self._catch_up)
        with self._db.read() as session:
            live = jobs.live_attempts(session)
            tasks = catalog.tasks_in(session, "running", "stopping")
        for job, attempt in live:
            attend = partial(self._jobs.attend, job, attempt, self._device(attempt.device), now)
            self._guarded(f"job {job.id}", attend)
        for task in tasks:
            self._guarded(f"task {task.id}", partial(self._tasks.attend, task, now))
        is_ready = self._processes.reach(now)
        self._restart_what_is_due(now)
        started = self._start_queued(now, is_ready)
        self._guarded("the cards in the job folders", self._cards.keep)
        self._count_busy()
        if now >= self._tidy_at:
            self._guarded("what may be removed", partial(self._tidy, now))
        return bool(live or tasks or started or not is_ready)

    def _tidy(self, now: float) -> None:
        """Remove what is too old and what a deleted job left, a portion at a time."""
        if (days := self._settings.keep_stats_days) is not None:
            self._db.write(lambda session: jobs.expire_stats(session, days))
        is_more = self._db.write(jobs.delete_leftovers)
        self._tidy_at = now if is_more else now + TIDY_SECONDS

    def _catch_up(self) -> None:
        read_unread(self._db, self._settings.data_dir)
        self._has_caught_up = True

    def _guarded(self, what: str, attend: Callable[[], None]) -> None:
        try:
            attend()
            self._troubles.pop(what, None)
        except Exception as error:
            # A full disk, a damaged folder, a fault of ours: it is that one's trouble alone, may
            # pass, and is told once, not ten times a second.
            if self._troubles.get(what) != str(error):
                logger.exception("Attending to %s failed; it is tried again.", what)
            self._troubles[what] = str(error)

    def _forgive_absence(self, now: float) -> None:
        """Time in which this process itself was stopped counts against no worker."""
        gap = now - self._last_tick - IDLE_SECONDS if self._last_tick is not None else 0.0
        if gap > ABSENT_SECONDS:
            for watch in (*self._jobs.watches.values(), *self._tasks.watches.values()):
                watch.forgive(gap)
        self._last_tick = now

    # ------------------------------------------------------------------------------ status

    def devices(self) -> list[dict[str, Any]]:
        """Every device with whether all its slots are taken."""
        return [
            {
                "id": device.id,
                "name": device.name,
                "kind": device.kind,
                "bytes": device.memory_bytes,
                "busy": len(self._busy.get(device.id, ())) >= self._slots_of(device),
                "jobs": sorted(self._busy.get(device.id, ())),
            }
            for device in self._devices
        ]

    def kernels(self) -> str:
        """Whose operations a trace is to follow."""
        return find_kernels(self._devices)

    def measure_devices(self) -> dict[str, dict[str, Any]]:
        """Device → what it is doing at this moment, whoever uses it."""
        return {device.id: measure_device(device) for device in self._devices}

    def slots(self) -> dict[str, dict[str, int]]:
        """Kind → how many jobs may run at once, and how many do."""
        slots = {
            kind: {
                "total": sum(self._slots_of(d) for d in self._devices if d.kind == kind),
                "busy": sum(len(self._busy.get(d.id, ())) for d in self._devices if d.kind == kind),
            }
            for kind in ("cpu", "cuda")
        }
        return {**slots, "tasks": {"total": TASK_SLOTS, "busy": self._busy_tasks}}

    def keeper(self) -> dict[str, Any]:
        """Whether workers can be started, and why not; the process that starts them."""
        known = job_folder.read_document(self._settings.data_dir / "warm.json") or {}
        return {
            "ready": self._processes.is_ready,
            "error": self._processes.trouble,
            "pid": known.get("pid"),
        }

    def usage(self) -> dict[int, dict[str, int | None]]:
        """Job → the memory that its worker was last seen to take, on the host and its device."""
        found: dict[int, dict[str, int | None]] = {}
        for directory, watch in list(self._jobs.watches.items()):
            if watch.usage is not None:
                found[int(directory.parent.parent.name)] = {
                    "memory_bytes": watch.usage.memory_bytes,
                    "device_memory_bytes": watch.usage.device_bytes,
                }
        return found

    def troubles(self) -> dict[str, str]:
        """What could not be attended to at the last look, and why."""
        return dict(self._troubles)

    def _slots_of(self, device: Device) -> int:
        return self._settings.cpu_slots if device.kind == "cpu" else 1

    def _device(self, name: str) -> Device | None:
        return next((device for device in self._devices if device.id == name), None)

    def _count_busy(self) -> None:
        with self._db.read() as session:
            live = jobs.live_attempts(session)
            self._busy_tasks = len(catalog.tasks_in(session, "running", "stopping"))
        busy: dict[str, list[int]] = {}
        for _, attempt in live:
            busy.setdefault(attempt.device, []).append(attempt.job_id)
        self._busy = busy

    # ------------------------------------------------------------------------------ starting

    def _start_queued(self, now: float, is_ready: bool) -> bool:
        with self._db.read() as session:
            queued, tasks = jobs.queued_jobs(session), catalog.tasks_in(session, "queued")
        started = False
        self._count_busy()
        obstacle = self._find_obstacle(is_ready)
        # Somebody sits there and waits for these; what times a model takes long.
        tasks = sorted(tasks, key=lambda task: task.kind not in WAITED_FOR)
        for task in tasks[: 0 if obstacle else max(0, TASK_SLOTS - self._busy_tasks)]:
            start = partial(self._tasks.start, task, self._devices[0], now)
            self._guarded(f"task {task.id}", start)
            started = True
        for job in queued:
            device, why = self._find_device(job.spec["training"]["device"])
            if obstacle or device is None:
                self._note_waiting(job, obstacle or why)
                continue
            self._busy.setdefault(device.id, []).append(job.id or 0)
            self._guarded(f"job {job.id}", partial(self._jobs.start, job, device, now))
            started = True
        return started

    def _find_obstacle(self, is_ready: bool) -> str | None:
        """What keeps every job from starting, in words."""
        if not is_ready and self._processes.trouble:
            return f"Workers cannot be started: {self._processes.trouble}"
        if not is_ready:
            return "The warm process, which starts the workers, is still importing torch."
        return self._find_shortage()

    def _find_shortage(self, needed_bytes: int = 0) -> str | None:
        """Whether the disk has too little left to start anything, in words."""
        needed = max(self._settings.min_free_bytes, needed_bytes)
        free = shutil.disk_usage(self._settings.data_dir).free
        if free >= needed:
            return None
        return (
            f"The disk of {self._settings.data_dir} is full: a job starts when"
            f" {needed / 1e6:,.0f} MB are free. The System page says what can be deleted."
        )

    def _find_device(self, wanted: str) -> tuple[Device | None, str]:
        """A device with a free slot that the job may run on; else why there is none.

        `auto` is a GPU where there is one.
        """
        if wanted == "auto":
            has_gpu = any(device.kind == "cuda" for device in self._devices)
            wanted = "cuda" if has_gpu else "cpu"
        fitting = [d for d in self._devices if wanted in (d.id, d.kind)]
        if not fitting:
            there = ", ".join(device.id for device in self._devices)
            return None, f"There is no device {wanted} here any more. There are: {there}."
        for device in fitting:
            if len(self._busy.get(device.id, ())) < self._slots_of(device):
                return device, ""
        users = sorted(job for device in fitting for job in self._busy.get(device.id, ()))
        names = " and ".join(device.id for device in fitting)
        jobs_named = f"job{'s' if len(users) > 1 else ''} {', '.join(map(str, users))}"
        return None, f"It waits for {names}, where {jobs_named} must end first."

    def _note_waiting(self, job: Job, why: str) -> None:
        if job.waiting_for == why:
            return

        def note(session: Session) -> None:
            row = session.get(Job, job.id)
            if row is not None and (row.state == "queued" or row.is_restarting):
                jobs.update_job(session, row, waiting_for=why)

        self._db.write(note)

    # ------------------------------------------------------------------------------ starting again

    def _restart_what_is_due(self, now: float) -> None:
        """Queue again what was cut short, after a pause that grows; and what found a full disk."""
        with self._db.read() as session:
            waiting = jobs.restarting_jobs(session)
        self._restart_at = {
            job.id: self._restart_at.get(job.id, now + self._pause_before(job))
            for job in waiting
            if job.id is not None
        }
        for job in waiting:
            assert job.id is not None
            shortage = None
            if job.error_reason == "disk_full":
                shortage = self._find_shortage(2 * self._checkpoint_bytes(job.id))
            if shortage or now < self._restart_at[job.id]:
                self._note_waiting(job, shortage or _describe_restart(job))
            else:
                self._db.write(partial(_restart, job_id=job.id))

    def _pause_before(self, job: Job) -> float:
        used = max(0, jobs.RESTARTS - job.restarts_left)
        return self._settings.restart_seconds * RESTART_FACTORS[min(used, len(RESTART_FACTORS) - 1)]

    def _checkpoint_bytes(self, job_id: int) -> int:
        checkpoints = job_folder.checkpoints_folder(
            files.job_folder(self._settings.data_dir, job_id)
        )
        steps = checkpoint_steps(checkpoints)
        return files.folder_bytes(checkpoint_path(checkpoints, steps[-1])) if steps else 0


def _describe_restart(job: Job) -> str:
    left = job.restarts_left - 1
    after = f"{left} more time{'' if left == 1 else 's'}" if left else "not once more"
    return f"It is queued again by itself in a moment; after that, {after}."


def _restart(session: Session, job_id: int) -> None:
    row = session.get(Job, job_id)
    if row is not None:
        jobs.restart_job(session, row)

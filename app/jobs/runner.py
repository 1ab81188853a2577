"""The runner: brings rows and job folders together, tick by tick. It runs no job itself."""

import contextlib
import errno
import logging
import math
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
from sqlmodel import Session

from app.freezing.graph import ModelGraph
from app.jobs import folder as job_folder
from app.jobs.devices import Device, find_devices
from app.jobs.spool import read_spool
from app.settings import Settings
from app.store import catalog, files, jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model, Task, utc_now
from app.training.places import checkpoint_steps

logger = logging.getLogger(__name__)

LIVE_SECONDS = 0.1  # between two looks while something runs: how fresh charts are
IDLE_SECONDS = 1.0
STOP_SECONDS = 5.0  # patience with a worker that is to stop while it loads: nothing is lost
CHECKPOINT_SECONDS = 30.0  # without progress, with one that is to stop and has begun
EXIT_SECONDS = 2.0  # between the end of a worker and the keeper's word about it
START_SECONDS = 60.0  # between the start of a process and its taking the attempt's lock
RECONNECT_SECONDS = 5.0
TASK_SLOTS = 1
MAX_PORTIONS = 8  # of a spool in one tick, so that a backlog does not keep others waiting


class Keeper(Protocol):
    """What the runner needs of the process that starts workers; it may raise RuntimeError.

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
    """What the runner remembers of one live attempt; all of it can be forgotten by a restart."""

    progress_at: float
    told_seq: int = -1
    unheld_at: float | None = None
    stopping_at: float | None = None
    written: dict[Path, int] | None = None
    asked_to_leave: bool = False
    has_stalled: bool = False


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
        self._connect = connect
        self._devices = find_devices() if devices is None else devices
        self._keeper: Keeper | None = None
        self._connect_at = -math.inf
        self._is_ready = False
        self._keeper_error: str | None = None
        self._watches: dict[Path, Watch] = {}
        self._troubles: dict[str, str] = {}
        self._last_tick: float | None = None
        self._busy: dict[str, int] = {}
        self._busy_tasks = 0
        self._wanted = threading.Event()

    # ------------------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event, clock: Callable[[], float]) -> None:
        """Tick until `stop` is set, at once where `wake` is called. Leaves jobs running."""
        while not stop.is_set():
            try:
                is_live = self.tick(clock())
            except Exception:
                # One broken tick must not end all others; what broke is tried again.
                logger.exception("A tick of the runner failed.")
                is_live = False
            self._wanted.wait(LIVE_SECONDS if is_live else IDLE_SECONDS)
            self._wanted.clear()
        if self._keeper is not None:
            self._keeper.close()

    def wake(self) -> None:
        """Something is to be done: do not wait for the next look."""
        self._wanted.set()

    def tick(self, now: float) -> bool:
        """Do everything that can be done now; whether something is alive or about to be.

        Args:
            now: seconds on a monotonic clock.
        """
        self._forgive_absence(now)
        with self._db.read() as session:
            live = jobs.live_attempts(session)
            tasks = catalog.tasks_in(session, "running", "stopping")
        for job, attempt in live:
            self._guarded(f"job {job.id}", partial(self._attend_job, job, attempt, now))
        for task in tasks:
            self._guarded(f"task {task.id}", partial(self._attend_task, task, now))
        self._is_ready = self._reach_keeper(now)
        started = self._is_ready and self._start_queued(now)
        self._count_busy()
        return bool(live or tasks or started or not self._is_ready)

    def _guarded(self, what: str, attend: Callable[[], None]) -> None:
        try:
            attend()
            self._troubles.pop(what, None)
        except (OSError, ValueError) as error:
            # A full disk or a damaged folder is that one's trouble alone, may pass, and is told
            # once, not ten times a second.
            if self._troubles.get(what) != str(error):
                logger.exception("Attending to %s failed; it is tried again.", what)
            self._troubles[what] = str(error)

    def _forgive_absence(self, now: float) -> None:
        """Time in which this process itself was stopped counts against no worker."""
        gap = now - self._last_tick - IDLE_SECONDS if self._last_tick is not None else 0.0
        if gap > 5.0:
            for watch in self._watches.values():
                watch.progress_at += gap
                if watch.stopping_at is not None:
                    watch.stopping_at += gap
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
                "busy": self._busy.get(device.id, 0) >= self._slots_of(device),
            }
            for device in self._devices
        ]

    def slots(self) -> dict[str, dict[str, int]]:
        """Kind → how many jobs may run at once, and how many do."""
        slots = {
            kind: {
                "total": sum(self._slots_of(d) for d in self._devices if d.kind == kind),
                "busy": sum(self._busy.get(d.id, 0) for d in self._devices if d.kind == kind),
            }
            for kind in ("cpu", "cuda")
        }
        return {**slots, "tasks": {"total": TASK_SLOTS, "busy": self._busy_tasks}}

    def keeper(self) -> dict[str, Any]:
        """Whether workers can be started, and why not."""
        return {"ready": self._is_ready, "error": self._keeper_error}

    def _slots_of(self, device: Device) -> int:
        return self._settings.cpu_slots if device.kind == "cpu" else 1

    def _count_busy(self) -> None:
        with self._db.read() as session:
            live = jobs.live_attempts(session)
            self._busy_tasks = len(catalog.tasks_in(session, "running", "stopping"))
        busy: dict[str, int] = {}
        for _, attempt in live:
            busy[attempt.device] = busy.get(attempt.device, 0) + 1
        self._busy = busy

    def _reach_keeper(self, now: float) -> bool:
        """Whether workers can be started now. A keeper that is found sees to its own life."""
        if self._keeper is None and now >= self._connect_at:
            self._connect_at = now + RECONNECT_SECONDS
            try:
                self._keeper = self._connect()
            except (RuntimeError, OSError) as error:
                self._keeper_error = str(error)
                logger.error("Workers cannot be started: %s", error)
        if self._keeper is None:
            return False
        is_ready = self._keeper.ready()
        self._keeper_error = None if is_ready else self._keeper.trouble
        return is_ready

    # ------------------------------------------------------------------------------ starting

    def _start_queued(self, now: float) -> bool:
        with self._db.read() as session:
            queued, tasks = jobs.queued_jobs(session), catalog.tasks_in(session, "queued")
        started = False
        self._count_busy()
        for task in tasks[: max(0, TASK_SLOTS - self._busy_tasks)]:
            self._guarded(f"task {task.id}", partial(self._start_task, task, now))
            started = True
        for job in queued:
            device = self._free_device(job.spec["training"]["device"])
            if device is not None:
                self._busy[device.id] = self._busy.get(device.id, 0) + 1
                self._guarded(f"job {job.id}", partial(self._start_job, job, device, now))
                started = True
        return started

    def _free_device(self, wanted: str) -> Device | None:
        """A device with a free slot that the job may run on; `auto` is a GPU where there is one."""
        gpus = [device for device in self._devices if device.kind == "cuda"]
        if wanted == "auto":
            wanted = "cuda" if gpus else "cpu"
        fitting = [d for d in self._devices if wanted in (d.id, d.kind)]
        return next((d for d in fitting if self._busy.get(d.id, 0) < self._slots_of(d)), None)

    def _start_job(self, job: Job, device: Device, now: float) -> None:
        folder = files.job_folder(self._settings.data_dir, _id(job))
        newest = job_folder.newest_attempt(folder)
        if newest is None or not job_folder.is_held(newest):  # a worker by hand may be writing
            job_folder.tidy_checkpoints(folder)
        steps = checkpoint_steps(job_folder.checkpoints_folder(folder))
        resume_step = steps[-1] if steps else None

        def claim(session: Session) -> Attempt | None:
            row = session.get(Job, job.id)
            if row is None:
                return None
            return jobs.start_attempt(session, row, device.id, resume_step)

        attempt = self._db.write(claim)
        if attempt is None:
            return
        wanted = job.spec["training"]["device"]
        directory = self._directory(job, attempt)
        self._watches[directory] = Watch(now)
        try:
            job_folder.write_spec(folder, {**job.spec, "config": job.config})
            job_folder.prepare_attempt(
                folder,
                attempt.number,
                resume_step=resume_step,
                device="auto" if wanted == "auto" else _inside(device),
                environment=_environment(device),
            )
            pid = self._start(folder, attempt.number, device)
        except (RuntimeError, OSError) as error:
            if not job_folder.is_started(directory):
                self._end(job, attempt, "failed", *_explain_start(error))
            return

        def note_pid(session: Session) -> None:
            row = session.get(Attempt, (attempt.job_id, attempt.number))
            if row is not None:
                row.pid = pid
                session.add(row)

        self._db.write(note_pid)

    def _start_task(self, task: Task, now: float) -> None:
        folder = files.task_folder(self._settings.data_dir, _id(task))
        files.remove_folder(folder)  # of a start that a crash cut short
        device = self._devices[0]

        def change(session: Session, **changes: Any) -> None:
            row = session.get_one(Task, task.id)
            for name, value in changes.items():
                setattr(row, name, value)
            session.add(row)

        self._db.write(lambda s: change(s, state="running", started_at=utc_now()))
        directory = folder / "attempts" / "1"
        self._watches[directory] = Watch(now)
        try:
            job_folder.write_spec(folder, task.spec)
            job_folder.prepare_attempt(
                folder, 1, resume_step=None, device="cpu", environment=_environment(device)
            )
            pid = self._start(folder, 1, device)
        except (RuntimeError, OSError) as error:
            if not job_folder.is_started(directory):
                why = _explain_start(error)
                self._db.write(lambda s: _end_task(s, task, "failed", *why))
            return
        self._db.write(lambda s: change(s, pid=pid))

    def _start(self, folder: Path, number: int, device: Device) -> int:
        assert self._keeper is not None
        python = self._settings.worker_python
        return self._keeper.start(
            folder, number, _environment(device), None if python is None else str(python)
        )

    # ------------------------------------------------------------------------------ attending

    def _attend_job(self, job: Job, attempt: Attempt, now: float) -> None:
        directory = self._directory(job, attempt)
        watch = self._watches.setdefault(directory, Watch(now))
        if not directory.is_dir():  # a crash between the claim and the folder
            self._settle_job(job, attempt, directory, watch)
            return
        if job.wish_seq > watch.told_seq:
            wish = job_folder.Wish(job.wish_seq, job.wish, tuple(attempt.edits))
            job_folder.write_wish(directory, wish)
            watch.told_seq = job.wish_seq
        has_ended = self._has_ended(directory, attempt.pid, watch, now)  # before the last look
        if self._store_spool(job, attempt, directory):
            watch.progress_at = now
        if has_ended:
            self._settle_job(job, attempt, directory, watch)
        elif job.wish == "stop":
            self._insist(job, attempt, directory, watch, now)
        else:
            self._end_if_stalled(job, attempt, directory, watch, now)

    def _has_ended(self, directory: Path, pid: int | None, watch: Watch, now: float) -> bool:
        """Whether nothing more will come from a worker; the keeper's word, or a lock long free."""
        if job_folder.read_exit(directory) is not None:
            return True
        if job_folder.is_held(directory):
            watch.unheld_at = None
            return False
        watch.unheld_at = now if watch.unheld_at is None else watch.unheld_at
        is_young = pid is not None and not job_folder.is_started(directory)
        return now - watch.unheld_at >= (START_SECONDS if is_young else EXIT_SECONDS)

    def _store_spool(self, job: Job, attempt: Attempt, directory: Path) -> bool:
        """Bring what is new in the spool into the database; whether there was anything."""
        for portion in range(MAX_PORTIONS):
            records, offset = read_spool(directory / "telemetry.spool", attempt.spool_offset)
            if not records:
                return portion > 0

            def store(session: Session) -> Attempt:
                rows = _rows(session, job, attempt)
                samples.ingest(session, *rows, records, offset)  # noqa: B023 (runs at once)
                return rows[1]

            stored = self._db.write(store)
            attempt.spool_offset, attempt.sequence = stored.spool_offset, stored.sequence
        return True

    def _settle_job(self, job: Job, attempt: Attempt, directory: Path, watch: Watch) -> None:
        """Give an ended attempt its outcome, in one transaction with the last of its records."""
        spool = directory / "telemetry.spool"
        result, ended = _read_end(directory)
        if (
            result is None and ended is None
        ):  # whatever is left of it must not go on beside the next
            self._signal(directory, attempt.pid, signal.SIGKILL)
        never_started = attempt.pid is None and not job_folder.is_started(directory)
        is_open = directory.is_dir() and not job_folder.is_started(directory)
        if is_open and not job_folder.bar_attempt(directory):
            return  # it has started after all, in this very moment: the next tick sees it live

        def settle(session: Session) -> None:
            row, tried = _rows(session, job, attempt)
            while True:
                records, offset = read_spool(spool, tried.spool_offset)
                if not records:
                    break
                samples.ingest(session, row, tried, records, offset)
            if result is not None and row.kind == "train" and result["step"] > row.step:
                jobs.update_job(session, row, step=result["step"])
            kept = checkpoint_steps(job_folder.checkpoints_folder(directory.parent.parent))
            outcome, reason, message = _judge(
                result, ended, row, watch.has_stalled, tried.sequence > 0, kept
            )
            jobs.end_attempt(session, row, tried, outcome, reason=reason, message=message)
            if never_started and row.state == "interrupted":
                jobs.queue_job(session, row)  # a crash before the start; nothing is lost

        self._db.write(settle)
        self._watches.pop(directory, None)

    def _end(self, job: Job, attempt: Attempt, outcome: str, reason: str, message: str) -> None:
        def end(session: Session) -> None:
            rows = _rows(session, job, attempt)
            jobs.end_attempt(session, *rows, outcome, reason=reason, message=message)

        self._db.write(end)
        self._watches.pop(self._directory(job, attempt), None)

    def _insist(
        self, job: Job, attempt: Attempt, directory: Path, watch: Watch, now: float
    ) -> None:
        """A worker that is to stop does so by itself between two steps; see that it does.

        Its last step, proof and checkpoint may take long, and a kill would cost all steps since the
        checkpoint before: as long as there is progress, of whatever kind, it is let alone.
        """
        if watch.stopping_at is None:
            watch.stopping_at = watch.progress_at = now
        if attempt.sequence == 0:
            if not watch.asked_to_leave:
                # It is still loading and looks at no wish. Later a signal would say nothing that
                # the wish does not, and end the children that load its data.
                self._signal(directory, attempt.pid, signal.SIGTERM)
                watch.asked_to_leave = True
            is_overdue = now - watch.stopping_at >= STOP_SECONDS
        else:
            written = _written_files(directory)
            if written != watch.written:
                watch.written, watch.progress_at = written, now
            patience = CHECKPOINT_SECONDS + 2 * (job.step_ms or 0.0) / 1000
            is_overdue = now - watch.progress_at >= patience
        if is_overdue:
            self._signal(directory, attempt.pid, signal.SIGKILL)

    def _end_if_stalled(
        self, job: Job, attempt: Attempt, directory: Path, watch: Watch, now: float
    ) -> None:
        if job.state not in ("starting", "running") or _is_stopped(attempt.pid):
            watch.progress_at = now
        if now - watch.progress_at >= self._settings.stall_seconds:
            watch.has_stalled = True
            self._signal(directory, attempt.pid, signal.SIGKILL)

    def _attend_task(self, task: Task, now: float) -> None:
        folder = files.task_folder(self._settings.data_dir, _id(task))
        directory = folder / "attempts" / "1"
        watch = self._watches.setdefault(directory, Watch(now))
        if directory.is_dir() and not self._has_ended(directory, task.pid, watch, now):
            written = _written_files(directory)
            if written != watch.written or _is_stopped(task.pid):
                watch.written, watch.progress_at = written, now
            watch.has_stalled |= now - watch.progress_at >= self._settings.stall_seconds
            if task.state == "stopping" or watch.has_stalled:
                self._signal(directory, task.pid, signal.SIGKILL)
            return
        self._watches.pop(directory, None)
        result, ended = _read_end(directory)
        if task.state == "stopping":
            self._db.write(lambda s: _end_task(s, task, "stopped"))
        elif result is not None and result["outcome"] == "succeeded":
            if task.kind != "inspect":  # what it found lies in its folder, for whoever asks
                self._db.write(lambda s: _end_task(s, task, "succeeded"))
                return
            try:
                self._keep_graph(task, directory)
            except (ValueError, KeyError, TypeError) as error:
                unread = f"What the inspection found cannot be read: {error}"
                self._db.write(lambda s: _end_task(s, task, "failed", "lost", unread))
                return
        elif result is None and ended is None and not job_folder.is_started(directory):
            self._db.write(lambda s: _requeue_task(s, task))  # a crash before the start
            return
        else:
            _, reason, message = _judge(result, ended, has_stalled=watch.has_stalled)
            self._db.write(lambda s: _end_task(s, task, "failed", reason, message))
            return
        files.remove_folder(folder)

    def _keep_graph(self, task: Task, directory: Path) -> None:
        """Keep what an inspection found, and say so in the model's row."""
        found = directory / "graph.json"
        document = job_folder.read_document(found)
        if document is None:
            raise ValueError(f"{found} is missing although its inspection succeeded.")
        graph = ModelGraph.from_document(document)
        assert task.model_id is not None
        path = files.graph_path(self._settings.data_dir, task.model_id)
        path.parent.mkdir(exist_ok=True)

        def keep(session: Session) -> None:
            row = session.get_one(Task, task.id)
            model = session.get(Model, task.model_id)
            if row.state == "running" and model is not None:
                found.replace(path)
                model.state, model.fingerprint = "ready", graph.fingerprint
                model.weights_digest = document.get("weights_digest")
                model.parameter_count = graph.parameter_count
                model.tensor_count = graph.tensor_count
                model.module_count = graph.module_count
                session.add(model)
            catalog.end_task(session, row, "succeeded")

        self._db.write(keep)

    def _signal(self, directory: Path, pid: int | None, number: signal.Signals) -> None:
        """Send a signal to a worker's process group, wherever it is known."""
        if job_folder.signal_holder(directory, number) or pid is None or self._keeper is None:
            return
        try:
            self._keeper.kill(pid, number)
        except RuntimeError as error:  # it has ended in between: the next tick sees how
            logger.info("Worker %s got no %s: %s", pid, number.name, error)

    def _directory(self, job: Job, attempt: Attempt) -> Path:
        folder = files.job_folder(self._settings.data_dir, _id(job))
        return folder / "attempts" / str(attempt.number)


def _id(row: Job | Task) -> int:
    assert row.id is not None
    return row.id


def _rows(session: Session, job: Job, attempt: Attempt) -> tuple[Job, Attempt]:
    """The rows as they are now; those that a tick began with may be old."""
    return (
        session.get_one(Job, job.id),
        session.get_one(Attempt, (attempt.job_id, attempt.number)),
    )


def _inside(device: Device) -> str:
    """The device's name in a process that sees no other."""
    return "cuda:0" if device.kind == "cuda" else "cpu"


def _environment(device: Device) -> dict[str, str]:
    # By bus, as the driver numbers them: CUDA's own order puts the fastest first.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": device.visible}


def _explain_start(error: Exception) -> tuple[str, str]:
    """(reason, message) of a worker that could not be started."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "disk_full" if is_full else "lost", f"The worker could not be started: {error}"


def _written_files(directory: Path) -> dict[Path, int]:
    """Every file that an attempt may be writing, half-written checkpoints too, and its size."""
    checkpoints = job_folder.checkpoints_folder(directory.parent.parent)
    sizes = {}
    for path in (*directory.rglob("*"), *checkpoints.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # the worker has just renamed or removed it
            sizes[path] = path.stat().st_size
    return sizes


def _is_stopped(pid: int | None) -> bool:
    """Whether somebody holds the process still, with SIGSTOP or a debugger."""
    try:
        return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it has ended: others see to that
        return False


def _read_end(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What the worker, and what the keeper, says about the end of an attempt."""
    return job_folder.read_result(directory), job_folder.read_exit(directory)


def _judge(
    result: dict[str, Any] | None,
    ended: dict[str, Any] | None,
    job: Job | None = None,
    has_stalled: bool = False,
    has_begun: bool = False,
    checkpoints: Sequence[int] = (),
) -> tuple[str, str | None, str | None]:
    """(outcome, reason, message) of an attempt that has ended.

    Args:
        has_begun: the loop has reported something, so that there was something to lose.
        checkpoints: the steps of which there are checkpoints, oldest first.
    """
    if result is not None:  # one that ended as wished may still have something to tell
        return result["outcome"], result["reason"], result["message"]
    if job is not None and job.wish == "stop":
        if not has_begun:
            return "stopped", None, None
        _, reason, message = _explain_end(ended, job)
        if job.kind == "train":
            newest = f"after step {checkpoints[-1]}" if checkpoints else "at all"
            message += f" It was to stop, and did not by itself; there is no checkpoint {newest}."
        return "stopped", reason, message
    if has_stalled:
        return "failed", "stalled", "The worker got nowhere for too long and was ended."
    return _explain_end(ended, job)


def _explain_end(ended: dict[str, Any] | None, job: Job | None) -> tuple[str, str, str]:
    """(outcome, reason, message) of an attempt that left no result."""
    where = f" after step {job.step}" if job is not None and job.step else ""
    if ended is None:
        message = f"The worker is gone{where}, and nobody saw how it ended."
        return "interrupted", "lost", message
    if ended["signal"] is not None:
        name = signal.Signals(ended["signal"]).name
        hint = " The system does that when memory runs out." if name == "SIGKILL" else ""
        return "interrupted", "killed", f"The worker was ended by {name}{where}.{hint}"
    left = f"The worker left with exit status {ended['code']}{where}"
    return "failed", "user_code", f"{left}, without a result; see its log."


def _end_task(session: Session, task: Task, state: str, *why: str | None) -> None:
    catalog.end_task(session, session.get_one(Task, task.id), state, *why)


def _requeue_task(session: Session, task: Task) -> None:
    row = session.get_one(Task, task.id)
    row.state, row.started_at = "queued", None
    session.add(row)

"""Attends the jobs that run: stores reports, ends what is to stop, settles what has ended."""

import signal
from pathlib import Path
from typing import Any

from sqlmodel import Session

from app.jobs import folder as job_folder
from app.jobs.devices import Device
from app.jobs.endings import Ending, explain_start, is_worth_a_restart, judge, read_end
from app.jobs.processes import (
    Processes,
    Watch,
    environment_of,
    is_held_still,
    written_files,
)
from app.jobs.records import read_records
from app.jobs.spool import BadRecord
from app.jobs.usage import Usage, measure_worker
from app.settings import Settings
from app.store import files, jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job
from app.training.places import checkpoint_path, checkpoint_steps

STOP_SECONDS = 5.0  # patience with a worker that is to stop while it loads: nothing is lost
CHECKPOINT_SECONDS = 30.0  # without progress, with one that is to stop and has begun
MAX_PORTIONS = 8  # of a spool in one tick, so that a backlog does not keep others waiting
CORRUPT = "corrupt-"  # before the name of a checkpoint that is not what was written


class Attendance:
    """One attempt of a job from its claim to its end; one thread calls it, tick by tick."""

    def __init__(self, settings: Settings, db: Database, processes: Processes) -> None:
        self._settings = settings
        self._db = db
        self._processes = processes
        self.watches: dict[Path, Watch] = {}

    def start(self, job: Job, device: Device, now: float) -> None:
        """Claim a queued job and start its next attempt."""
        folder = self._folder(job)
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
        self.watches[directory] = Watch(now)
        try:
            job_folder.write_spec(folder, {**job.spec, "config": job.config})
            job_folder.prepare_attempt(
                folder,
                attempt.number,
                resume_step=resume_step,
                device="auto" if wanted == "auto" else _inside(device),
                environment=environment_of(device),
            )
            pid = self._processes.start(folder, attempt.number, device)
        except (RuntimeError, OSError) as error:
            self._end(job, attempt, explain_start(error))
            return

        def note_pid(session: Session) -> None:
            row = session.get(Attempt, _key(attempt))
            if row is not None:
                row.pid = pid
                session.add(row)

        self._db.write(note_pid)

    def attend(self, job: Job, attempt: Attempt, device: Device | None, now: float) -> None:
        """Do what can be done now for an attempt that has not ended, as far as its row knows."""
        directory = self._directory(job, attempt)
        watch = self.watches.setdefault(directory, Watch(now))
        if not directory.is_dir():  # a crash between the claim and the folder
            self._settle(job, attempt, directory, watch)
            return
        if job.wish_seq > watch.told_seq:
            wish = job_folder.Wish(job.wish_seq, job.wish, tuple(attempt.edits))
            job_folder.write_wish(directory, wish)
            watch.told_seq = job.wish_seq
        # Asked before the last look into the spool, so that nothing comes after that look.
        has_ended = self._processes.has_ended(directory, attempt.pid, watch, now)
        try:
            if self._store_spool(job, attempt, directory):
                watch.progress_at = now
        except BadRecord as error:
            watch.refused = str(error)
        if has_ended:
            self._settle(job, attempt, directory, watch)
            return
        if watch.refused is not None:
            self._processes.signal(directory, attempt.pid, signal.SIGKILL)
            return
        if watch.is_due(now):
            self._look_closer(attempt, device, directory, watch, now)
        if job.wish == "stop":
            self._insist(job, attempt, directory, watch, now)
        else:
            self._end_if_stalled(job, attempt, directory, watch, now)

    def _look_closer(
        self, attempt: Attempt, device: Device | None, directory: Path, watch: Watch, now: float
    ) -> None:
        """Measure its memory; find progress that is no record."""
        holder = job_folder.read_holder(directory)
        watch.note_usage(measure_worker(holder.pid, device) if holder and holder.pid else None)
        if watch.peak is not None and watch.peak.memory_bytes > 1.02 * (attempt.peak_bytes or 0):
            self._db.write(lambda s: _note_peak(s.get_one(Attempt, _key(attempt)), watch))
        if watch.stopping_at is None:
            # The loop touches attempt.json while it waits for nobody; a checkpoint may be long in
            # the writing; and who loads prints. Any thread prints, so later that proves nothing.
            checkpoints = job_folder.checkpoints_folder(directory.parent.parent)
            log = [directory / "log.txt"] if attempt.sequence == 0 else []
            files_now = [directory / "attempt.json", *files.files_below(checkpoints), *log]
            watch.note_written(files_now, now)

    def _store_spool(self, job: Job, attempt: Attempt, directory: Path) -> bool:
        """Bring what is new in the spool into the database; whether there was anything."""
        for portion in range(MAX_PORTIONS):
            records, offset = read_records(directory, attempt.spool_offset)
            if not records:
                return portion > 0

            def store(session: Session) -> Attempt:
                rows = _rows(session, job, attempt)
                samples.ingest(session, *rows, records, offset)  # noqa: B023 (runs at once)
                return rows[1]

            stored = self._db.write(store)
            attempt.spool_offset, attempt.sequence = stored.spool_offset, stored.sequence
        return True

    def _settle(self, job: Job, attempt: Attempt, directory: Path, watch: Watch) -> None:
        """Give an ended attempt its outcome, in one transaction with the last of its records."""
        result, ended = read_end(directory)
        if ended is None:  # nobody has seen to what is left: it must not go on beside the next
            self._processes.clear(directory, attempt.pid)
        is_started = job_folder.is_started(directory)
        never_started = attempt.pid is None and not is_started
        if directory.is_dir() and not is_started and not job_folder.bar_attempt(directory):
            return  # it has started after all, in this very moment: the next tick sees it live
        checkpoints = job_folder.checkpoints_folder(self._folder(job))
        kept = checkpoint_steps(checkpoints)
        older = [step for step in kept if step < (attempt.resume_step or 0)]

        def settle(session: Session) -> Ending:
            row, tried = _rows(session, job, attempt)
            try:
                _store_rest(session, row, tried, directory)
            except BadRecord as error:
                watch.refused = str(error)
            if result is not None and row.kind == "train" and result["step"] > row.step:
                jobs.update_job(session, row, step=result["step"])
            ending = judge(
                result,
                ended,
                row,
                has_stalled=watch.has_stalled,
                refused=watch.refused,
                has_begun=tried.sequence > 0,
                checkpoints=kept,
            )
            is_worth_it = is_worth_a_restart(
                ending,
                wish=row.wish,
                has_progressed=row.step > (tried.resume_step or 0),
                has_older_checkpoint=bool(older),
            )
            _note_peak(tried, watch)
            jobs.end_attempt(
                session,
                row,
                tried,
                ending.outcome,
                reason=ending.reason,
                message=ending.message,
                is_worth_a_restart=is_worth_it,
            )
            if never_started and row.state == "interrupted":
                jobs.queue_job(session, row)  # a crash before the start; nothing is lost
            return ending

        ending = self._db.write(settle)
        if ending.reason == "checkpoint_corrupt" and attempt.resume_step in kept:
            _set_aside(checkpoint_path(checkpoints, attempt.resume_step or 0))
        job_folder.tidy_drafts(directory)
        self.watches.pop(directory, None)

    def _end(self, job: Job, attempt: Attempt, ending: Ending) -> None:
        """End an attempt whose worker has not started."""

        def end(session: Session) -> None:
            row, tried = _rows(session, job, attempt)
            is_worth_it = is_worth_a_restart(
                ending, wish=row.wish, has_progressed=False, has_older_checkpoint=False
            )
            jobs.end_attempt(
                session,
                row,
                tried,
                "stopped" if row.wish == "stop" else ending.outcome,
                reason=ending.reason,
                message=ending.message,
                is_worth_a_restart=is_worth_it,
            )

        self._db.write(end)
        self.watches.pop(self._directory(job, attempt), None)

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
                self._processes.signal(directory, attempt.pid, signal.SIGTERM)
                watch.asked_to_leave = True
            is_overdue = now - watch.stopping_at >= STOP_SECONDS
        else:
            watch.note_written(written_files(directory), now)
            patience = CHECKPOINT_SECONDS + 2 * (job.step_ms or 0.0) / 1000
            is_overdue = now - watch.progress_at >= patience
        if is_overdue:
            self._processes.signal(directory, attempt.pid, signal.SIGKILL)

    def _end_if_stalled(
        self, job: Job, attempt: Attempt, directory: Path, watch: Watch, now: float
    ) -> None:
        if job.state not in ("starting", "running") or is_held_still(attempt.pid):
            watch.progress_at = now
        if now - watch.progress_at >= self._settings.stall_seconds:
            watch.has_stalled = True
            self._processes.signal(directory, attempt.pid, signal.SIGKILL)

    def _folder(self, job: Job) -> Path:
        assert job.id is not None
        return files.job_folder(self._settings.data_dir, job.id)

    def _directory(self, job: Job, attempt: Attempt) -> Path:
        return self._folder(job) / "attempts" / str(attempt.number)


def _store_rest(session: Session, job: Job, attempt: Attempt, directory: Path) -> None:
    while True:
        records, offset = read_records(directory, attempt.spool_offset)
        if not records:
            return
        samples.ingest(session, job, attempt, records, offset)


def _set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint that is not what was written, so that no attempt goes on from it."""
    aside = checkpoint.with_name(f"{CORRUPT}{checkpoint.name}")
    files.remove_folder(aside)
    checkpoint.rename(aside)


def _note_peak(attempt: Attempt, watch: Watch) -> None:
    """Keep the most memory that an attempt was seen to take; a server before may have seen more."""
    if watch.peak is not None:
        before = Usage(attempt.peak_bytes or 0, attempt.peak_device_bytes)
        most = watch.peak.peak(before)
        attempt.peak_bytes, attempt.peak_device_bytes = most.memory_bytes, most.device_bytes


def _rows(session: Session, job: Job, attempt: Attempt) -> tuple[Any, Any]:
    """The rows as they are now; those that a tick began with may be old."""
    return session.get_one(Job, job.id), session.get_one(Attempt, _key(attempt))


def _key(attempt: Attempt) -> tuple[int, int]:
    return attempt.job_id, attempt.number


def _inside(device: Device) -> str:
    """The device's name in a process that sees no other."""
    return "cuda:0" if device.kind == "cuda" else "cpu"

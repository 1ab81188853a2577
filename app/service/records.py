"""Verbs that read what a job left: samples, proof, checkpoints, log, news."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sqlmodel import Session

from app.freezing.config import config_document, parse_config
from app.freezing.errors import InvalidDocument, show_value
from app.freezing.globs import compile_match
from app.jobs import folder as job_folder
from app.service.documents import (
    NO_PROOF,
    Conflict,
    Document,
    NotFound,
    find_row,
    iso,
)
from app.service.export import FORMATS
from app.service.insights import find_insights, read_course
from app.service.jobs import Jobs
from app.service.news import Event, Place, find_end, read_all_news, read_job_news
from app.service.timeline import describe_timeline, rules_now
from app.store import charts, files, jobs, samples
from app.store.tables import Job, Proof
from app.training.places import checkpoint_path, checkpoint_steps


class Records(Jobs):
    """Verbs that read what a job left."""

    def read_metrics(
        self,
        job_id: int,
        name: str | None = None,
        points: int | None = None,
        from_: int | None = None,
        to: int | None = None,
    ) -> Document:
        with self._db.read() as session:
            find_row(session, Job, job_id)
            return dict(charts.read_series(session, job_id, name, points, from_, to))

    def read_layers(
        self,
        job_id: int,
        stat: str = "grad_norm",
        points: int | None = None,
        from_: int | None = None,
        to: int | None = None,
        match: str | None = None,
        reduce: str = "max",
    ) -> Document:
        if stat not in charts.STATS:
            choices = ", ".join(charts.STATS)
            raise InvalidDocument(
                [("stat", f"{show_value(stat)} is not a measure; {choices} are.")]
            )
        if reduce not in charts.REDUCTIONS:
            raise InvalidDocument(
                [("reduce", f"{show_value(reduce)} may be 'max', 'min' or 'last'.")]
            )
        try:
            is_wanted = compile_match(match) if match else lambda _: True
        except ValueError as error:
            raise InvalidDocument([("match", str(error))]) from error
        with self._db.read() as session:
            find_row(session, Job, job_id)
            marks = samples.read_marks(session, job_id)
            positions = [layer.position for layer in marks if is_wanted(layer.path)]
            steps, values = charts.read_matrix(
                session, job_id, stat, positions, points, from_, to, reduce
            )
        shown = [marks[position] for position in positions]
        return {
            "layers": [layer.path for layer in shown],
            "steps": steps,
            "values": values,
            # Between two exact passes, an update norm of these is an estimate from a sample.
            "estimated": [layer.path for layer in shown if layer.estimated and "update" in stat],
            "unreached": [layer.path for layer in shown if layer.unreached],
        }

    def read_proof(self, job_id: int) -> Document:
        with self._db.read() as session:
            find_row(session, Job, job_id)
            proof = session.get(Proof, job_id)
            return NO_PROOF if proof is None else proof.document

    def read_job_config(self, job_id: int) -> Document:
        with self._db.read() as session:
            return find_row(session, Job, job_id).config

    def read_freeze(self, job_id: int) -> Document:
        """What is frozen in a job now, and at which steps that changed."""
        with self._db.read() as session:
            job = find_row(session, Job, job_id)
            attempts = jobs.list_attempts(session, job_id)
        return describe_timeline(
            job, attempts, parse_config(job.config), self.read_graph(job.model_id)
        )

    def plan_job(self, job_id: int, *, now: bool = False) -> Document | None:
        """The plan of a job's config as it began, or with what changed since; None without one."""
        with self._db.read() as session:
            job = find_row(session, Job, job_id)
        training, config = job.spec["training"], parse_config(job.config)
        asked = config_document(rules_now(job, config) if now else config)
        assume = {key: training[key] for key in ("batch_size", "optimizer", "precision")}
        try:
            return self.make_plan(job.model_id, {**asked, "assume": assume})
        except Conflict:
            return None  # the model's inspection is gone; what the job recorded is not

    def count_layers(self, job_id: int) -> int:
        with self._db.read() as session:
            return len(samples.read_layers(session, job_id))

    def list_checkpoints(self, job_id: int) -> list[Document]:
        """Complete checkpoints, oldest first.

        The disk is asked, not the database: a checkpoint gets its name by one rename, so that what
        is there is complete, whatever happened to the process that wrote it.
        """
        self.get_job(job_id)
        found = []
        checkpoints = job_folder.checkpoints_folder(self._folder(job_id))
        for step in checkpoint_steps(checkpoints):
            path = checkpoint_path(checkpoints, step)
            try:
                size = sum(file.stat().st_size for file in path.iterdir())
                written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            except (FileNotFoundError, NotADirectoryError):
                continue  # the worker has just removed this one, or never wrote it as a folder
            found.append({"step": step, "bytes": size, "created_at": iso(written)})
        return found

    def checkpoint_file(self, job_id: int, step: int) -> Path:
        """The model's tensors after `step` steps, as a safetensors file."""
        self.get_job(job_id)
        checkpoints = job_folder.checkpoints_folder(self._folder(job_id)).resolve()
        path = checkpoint_path(checkpoints, step) / "model.safetensors"
        if not path.is_file() or path.resolve() != path:  # a link that user code put there
            raise NotFound(f"Job {job_id} has no checkpoint of step {step}.")
        return path

    def delete_checkpoint(self, job_id: int, step: int) -> None:
        path = self.checkpoint_file(job_id, step).parent

        def check(session: Session) -> None:
            self._idle_job(session, job_id, "rid of a checkpoint")
            files.remove_folder(path)  # inside the transaction: no resume begins meanwhile

        self._db.write(check)

    def read_log(self, job_id: int, after: int = 0) -> str:
        """What the job's attempts printed, one after the other, from that byte on."""
        self.get_job(job_id)
        return files.read_logs(self._folder(job_id), after).decode(errors="replace")

    def export_job(self, job_id: int, format: str = "csv") -> tuple[str, str, Iterator[bytes]]:  # noqa: A002
        """(filename, media type, pieces) of all samples, one a row: step, layer, name, value."""
        document = self.get_job(job_id)
        if format not in FORMATS:
            choices = ", ".join(FORMATS)
            raise InvalidDocument([("format", f"{format!r} is not a format; {choices} are.")])
        chosen = FORMATS[format]
        filename = chosen.filename.format(id=job_id)
        return filename, chosen.media_type, chosen.write(self._db, document)

    def read_insights(self, job_id: int) -> Document:
        """What the layers' measures say: findings with their evidence, over the steps recorded."""
        with self._db.read() as session:
            job = find_row(session, Job, job_id)
            return find_insights(read_course(session, job))

    @property
    def version(self) -> int:
        """Changes whenever anything was stored."""
        return self._db.version

    async def wait_for_change(self, last: int, timeout: float) -> int:
        """Wait until the version differs from `last`, `timeout` seconds at most; the version."""
        return await self._db.async_wait(last, timeout)

    def news(self, job_id: int | None, cursor: str | None) -> tuple[list[Event], str, bool]:
        """What happened since the cursor.

        Args:
            job_id: None for the states of all jobs.
            cursor: None (or one that is unreadable) for the beginning, of layers at most the last
                1,000 steps; "now" for nothing of what there is. Long news come in portions.

        Returns:
            Events, each (name, data, the cursor behind it); the cursor to go on from; and whether
            the job has ended and all is told.
        """
        with self._db.read() as session:
            if job_id is None:
                if cursor == "now":
                    return [], str(jobs.last_version(session)), False
                is_known = cursor is not None and re.fullmatch(r"[0-9]{1,18}", cursor)
                since = cursor if cursor is not None and is_known else "0"
                events = read_all_news(session, int(since))
                return events, events[-1][2] if events else since, False
            job, folder = find_row(session, Job, job_id), self._folder(job_id)
            if cursor == "now":
                has_ended = job.state in jobs.ENDED and not job.is_restarting
                return [], str(find_end(session, job, folder)), has_ended
            events = list(read_job_news(session, job, folder, Place.read(cursor)))
            after = Place.read(events[-1][2] if events else cursor)
            is_told = after.attempt == job.attempt and after.version == job.version
            has_ended = job.state in jobs.ENDED and not job.is_restarting
            return events, str(after), is_told and has_ended

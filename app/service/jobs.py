"""Verbs that start, change and end jobs."""

from collections.abc import Mapping
from typing import Any

from sqlmodel import Session

from app.freezing.config import (
    parse_config,
)
from app.freezing.errors import InvalidDocument, show_value
from app.service.configs import Configs
from app.service.documents import (
    CONFIG_ROW_MEMBERS,
    JOB_NUMBERS,
    MAX_TEXT,
    Document,
    NotFound,
    attempt_document,
    check_members,
    collecting,
    find_row,
    impossible,
    is_id,
    job_document,
    job_documents,
    members,
    read_id,
    read_numbers,
    read_texts,
    shorten_config,
)
from app.service.edits import add_edit, always_trains, edit_document, read_edit
from app.service.resuming import check_end, read_ends
from app.sources.spec import parse_dataset_spec, spec_document
from app.store import files, jobs
from app.store.tables import Attempt, Job, Model
from app.training.recipe import parse_recipe, recipe_document

JOB_MEMBERS = ("kind", "model_id", "config", "dataset", "training", "name", "notes", *JOB_NUMBERS)
NOTHING_TRAINABLE = (
    "Nothing is trainable under this config, so there is nothing to train. Unfreeze something, or "
    "start an evaluation (kind 'evaluate')."
)


class Jobs(Configs):
    """Verbs that start, change and end jobs."""

    def launch_job(self, doc: Mapping[str, Any]) -> Document:
        """Queue a training run or an evaluation."""
        fields = self._read_launch(doc)

        def add(session: Session) -> Document:
            find_row(session, Model, fields["model_id"])  # not deleted in between
            return job_document(session, jobs.add_job(session, **fields))

        document = self._db.write(add)
        self._runner.wake()
        return document

    def _read_launch(self, doc: Mapping[str, Any]) -> Document:
        """The columns of the job that a document asks for."""
        errors: list[tuple[str, str]] = []
        with collecting(errors):
            check_members(doc, JOB_MEMBERS)
        kind = doc.get("kind", "train")
        if kind not in ("train", "evaluate"):
            errors.append(
                ("kind", f"{show_value(kind)} is not a kind of job; 'train' and 'evaluate' are.")
            )
        with collecting(errors):
            given = {**read_texts(doc), **read_numbers(doc)}
        with collecting(errors):
            dataset = spec_document(parse_dataset_spec(doc.get("dataset"), **self._dirs()))
        with collecting(errors):
            training = self._read_training(doc.get("training"))
        with collecting(errors):
            model_id = read_id(doc, "model_id")
            config, config_id = self._read_config(model_id, doc.get("config"), kind)
        if errors:
            raise InvalidDocument(errors)
        spec = {
            "kind": kind,
            "model": self.get_model(model_id)["spec"],
            "config": shorten_config(config),
            "dataset": dataset,
            "training": training,
            **self._surroundings(),
        }
        row = {"kind": kind, "spec": spec, "model_id": model_id}
        return {**row, "config_id": config_id, "config": config, **given}

    def _read_training(self, doc: Any) -> Document:
        recipe = parse_recipe({} if doc is None else doc)
        known = [device["id"] for device in self._runner.devices()]
        wanted = recipe.device
        if wanted != "auto" and not any(wanted in (name, name.partition(":")[0]) for name in known):
            there = ", ".join(known)
            raise InvalidDocument(
                [("training.device", f"There is no device {wanted!r} here. There are: {there}.")]
            )
        return recipe_document(recipe)

    def _read_config(self, model_id: int, given: Any, kind: str) -> tuple[Document, int | None]:
        """The config that a job is to have, by id or as a document, expanded on its model."""
        if given is None:
            raise InvalidDocument(
                [
                    (
                        "config",
                        "'config' is missing: give the id of a saved one, or a document.",
                    )
                ]
            )
        config_id = given if is_id(given) else None
        if config_id is not None:
            try:
                given = members(self.get_config(config_id), drop=CONFIG_ROW_MEMBERS)
            except NotFound as error:
                raise InvalidDocument([("config", error.detail)]) from error
        errors: list[tuple[str, str]] = []
        with collecting(errors, under="config"):
            parsed = parse_config(
                members(given, drop=CONFIG_ROW_MEMBERS) if isinstance(given, Mapping) else given
            )
        if errors:
            raise InvalidDocument(errors)
        document = self._expand(model_id, parsed)
        if kind == "train" and not always_trains(parsed, self.read_graph(model_id)):
            raise InvalidDocument([("config", NOTHING_TRAINABLE)])
        return document, config_id

    def list_jobs(self, limit: int = 100, before: int | None = None) -> list[Document]:
        with self._db.read() as session:
            return job_documents(session, jobs.list_jobs(session, limit, before))

    def get_job(self, job_id: int) -> Document:
        with self._db.read() as session:
            return job_document(session, find_row(session, Job, job_id))

    def edit_job(self, job_id: int, doc: Mapping[str, Any]) -> Document:
        """Change a job's name or notes, its priority, or how often it may restart by itself."""
        check_members(doc, (*MAX_TEXT, *JOB_NUMBERS))
        errors: list[tuple[str, str]] = []
        changes: Document = {}
        for read in (read_texts, read_numbers):
            with collecting(errors):
                changes |= read(doc)
        if errors:
            raise InvalidDocument(errors)
        if changes.get("restarts_left") == 0:
            changes |= {"is_restarting": False}

        def edit(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            if job.is_restarting and not changes.get("is_restarting", True):
                changes["waiting_for"] = None
            jobs.update_job(session, job, **changes)
            return job_document(session, job)

        return self._write_and_wake(edit)

    def list_attempts(self, job_id: int) -> list[Document]:
        """Every start of a job, the first one first: when, where, from which step, how it ended."""
        with self._db.read() as session:
            find_row(session, Job, job_id)
            return [attempt_document(one) for one in jobs.attempts_of(session, job_id)]

    def delete_job(self, job_id: int) -> None:
        """Remove a job that does not run, with everything that lies on disk."""

        def delete(session: Session) -> None:
            job = self._idle_job(session, job_id, "deleted")
            jobs.delete_job(session, job)

        self._db.write(delete)
        files.remove_folder(self._folder(job_id))
        while self._db.write(jobs.delete_leftovers):
            pass

    def stop_job(self, job_id: int) -> Document:
        """End a job after its current step, with a checkpoint."""

        def stop(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            match job.state:
                case "queued":
                    jobs.move_job(session, job, "stopped")
                case "starting" | "running" | "paused":
                    jobs.wish_for(session, job, "stop")
                    jobs.move_job(session, job, "stopping")
                    if jobs.living_attempt(session, job) is None:
                        jobs.move_job(session, job, "stopped")
                case "stopping" | "stopped":
                    pass
                case _:
                    raise impossible(job, "stopped", "It has ended already.")
            return job_document(session, job)

        return self._write_and_wake(stop)

    def pause_job(self, job_id: int, mode: str = "hold") -> Document:
        """Let a job rest: ``hold`` keeps its model loaded, ``release`` frees the device."""
        if mode not in ("hold", "release"):
            raise InvalidDocument(
                [("mode", f"{show_value(mode)} is not a mode; 'hold' and 'release' are.")]
            )

        def pause(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            if job.state not in ("running", "paused") or job.kind != "train":
                raise impossible(job, "paused", "Only training that runs can rest.")
            is_living = jobs.living_attempt(session, job) is not None
            if is_living and job.wish != mode:
                jobs.wish_for(session, job, mode)
            return job_document(session, job)

        return self._write_and_wake(pause)

    def resume_job(self, job_id: int, doc: Mapping[str, Any] | None = None) -> Document:
        """Let a job go on, from memory where it is held, else from its newest checkpoint.

        Args:
            doc: optionally another `config`, and `training` with more `epochs` or `max_steps`, or
                another `patience`.

        Raises:
            Conflict: the state forbids it, or nothing would be left to do.
        """
        doc = doc or {}
        check_members(doc, ("config", "training"))
        changes = self._read_changes(job_id, doc)

        def resume(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            is_living = jobs.living_attempt(session, job) is not None
            if job.state == "stopping":
                raise impossible(job, "resumed", "Wait until it has stopped.")
            if changes and (is_living or job.state == "queued"):
                raise impossible(job, "resumed with changes", "Stop or release it first.")
            if is_living and job.wish != "running":
                jobs.wish_for(session, job, "running")
            elif not is_living and job.state != "queued":
                check_end(job, changes.get("spec", job.spec)["training"])
                jobs.queue_job(session, job, **changes)
            return job_document(session, job)

        return self._write_and_wake(resume)

    def _read_changes(self, job_id: int, doc: Mapping[str, Any]) -> Document:
        """Columns of a job that a resume changes."""
        with self._db.read() as session:
            job = find_row(session, Job, job_id)
        changes: Document = {}
        spec = dict(job.spec)
        if doc.get("config") is not None:
            config, changes["config_id"] = self._read_config(job.model_id, doc["config"], job.kind)
            for which in (job.config, config):
                if which["mechanism"] != "requires_grad":
                    raise InvalidDocument(
                        [
                            (
                                "config",
                                "Resuming with another config needs the mechanism 'requires_grad'; "
                                f"this one has {which['mechanism']!r}.",
                            )
                        ]
                    )
            changes["config"], spec["config"] = config, shorten_config(config)
        if doc.get("training") is not None:
            spec["training"] = self._read_training(read_ends(job, doc["training"]))
        return changes | ({"spec": spec} if spec != job.spec else {})

    def change_freeze(self, job_id: int, doc: Mapping[str, Any]) -> Document:
        """Append rules to those that a job trains under, from its next step on.

        Returns:
            The edit, as `find_edit` tells it from then on.
        """
        edit = read_edit(doc)
        graph = self.read_graph(self.get_job(job_id)["model_id"])

        def change(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            attempt = jobs.living_attempt(session, job)
            add_edit(job, attempt, graph, edit)
            assert attempt is not None
            session.add(attempt)
            jobs.wish_for(session, job, job.wish)
            return edit_document(job, attempt, job.wish_seq)

        return self._write_and_wake(change)

    def find_edit(self, job_id: int, attempt: int, seq: int) -> Document:
        """An edit by its number: `step` is the first that it holds for, None while not known."""
        with self._db.read() as session:
            job = find_row(session, Job, job_id)
            return edit_document(job, session.get_one(Attempt, (job_id, attempt)), seq)

    def _idle_job(self, session: Session, job_id: int, done: str) -> Job:
        job = find_row(session, Job, job_id)
        if jobs.living_attempt(session, job) is not None:
            raise impossible(job, done, "Stop it first.")
        return job

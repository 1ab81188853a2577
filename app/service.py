"""Everything a user can do, one verb each; it knows no HTTP, no SQL and no torch."""

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import psutil
from sqlmodel import Session

from app import __version__
from app.documents import (
    CONFIG_ROW_MEMBERS,
    NO_PROOF,
    Conflict,
    Document,
    NotFound,
    check_members,
    collecting,
    config_row_document,
    digest,
    error_document,
    find_row,
    impossible,
    is_id,
    iso,
    job_document,
    job_documents,
    members,
    model_document,
    read_id,
    read_texts,
    shorten_config,
)
from app.edits import add_edit, always_trains, edit_document, read_edit
from app.export import export_csv, export_json
from app.freezing.config import (
    FreezeConfig,
    config_document,
    differing_names,
    parse_config,
)
from app.freezing.errors import InvalidDocument
from app.freezing.export import config_as_python
from app.freezing.globs import compile_match
from app.freezing.graph import ModelGraph
from app.freezing.plan import parse_assumption, plan_config
from app.freezing.presets import adopt_names
from app.jobs import folder as job_folder
from app.news import Event, Place, find_end, read_all_news, read_job_news
from app.settings import Settings
from app.sources.spec import parse_dataset_spec, parse_model_spec, spec_document
from app.store import catalog, files, jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, FreezeConfigRow, Job, Model, Proof, Task, utc_now
from app.training.places import checkpoint_path, checkpoint_steps
from app.training.recipe import parse_recipe, recipe_document

__all__ = ["Conflict", "Document", "NotFound", "RunnerStatus", "Service"]

JOB_MEMBERS = ("kind", "model_id", "config", "dataset", "training", "name", "notes")
NOTHING_TRAINABLE = (
    "Nothing is trainable under this config, so there is nothing to train. Unfreeze something, or "
    "start an evaluation (kind 'evaluate')."
)
LINK_MINUTES = 15
SESSION_DAYS = 30


class RunnerStatus(Protocol):
    """What the service may ask of whoever runs the jobs."""

    def devices(self) -> list[Document]: ...
    def slots(self) -> dict[str, dict[str, int]]: ...
    def keeper(self) -> Document: ...
    def wake(self) -> None: ...


class Service:
    """The verbs: synchronous, and callable from any thread.

    They take and give JSON-ready documents in the contract's shapes; a number that is not finite is
    the string "NaN", "Infinity" or "-Infinity".

    Raises (all verbs): InvalidDocument, NotFound, Conflict.
    """

    def __init__(self, settings: Settings, db: Database, runner_status: RunnerStatus) -> None:
        self._settings = settings
        self._db = db
        self._runner = runner_status
        # A graph never changes once it is there, and ids are never given twice.
        self._load_graph = lru_cache(maxsize=4)(self._load_graph_uncached)

    # -------------------------------------------------------------------------------- models

    def add_model(self, doc: Mapping[str, Any]) -> Document:
        """Take a model spec and have it inspected."""
        spec = spec_document(parse_model_spec(doc, **self._dirs()))
        task_spec = {"kind": "inspect", "model": spec, **self._surroundings()}

        def add(session: Session) -> Document:
            model = Model(spec=spec)
            session.add(model)
            session.flush()
            session.add(Task(model_id=model.id, spec=task_spec))
            session.flush()
            return model_document(session, model)

        document = self._db.write(add)
        self._runner.wake()
        return document

    def list_models(self, limit: int = 100, before: int | None = None) -> list[Document]:
        with self._db.read() as session:
            rows = catalog.list_newest(session, Model, limit, before)
            return [model_document(session, row) for row in rows]

    def get_model(self, model_id: int) -> Document:
        with self._db.read() as session:
            return model_document(session, find_row(session, Model, model_id))

    def delete_model(self, model_id: int) -> None:
        """Remove a model that no job uses, with its saved configs and its inspection."""

        def delete(session: Session) -> Task | None:
            model = find_row(session, Model, model_id)
            count = catalog.count_jobs_of_model(session, model_id)
            if count:
                raise Conflict(
                    f"Model {model_id} is used by {count} job{'s' * (count > 1)}; delete "
                    f"{'them' if count > 1 else 'it'} first.",
                    state=model.state,
                )
            task = catalog.task_of_model(session, model_id)
            if task is not None and task.state in ("queued", "running"):
                task.state = "stopping" if task.state == "running" else "stopped"
                session.add(task)
            catalog.delete_model(session, model)
            return task

        task = self._db.write(delete)
        files.graph_path(self._settings.data_dir, model_id).unlink(missing_ok=True)
        if task is not None and task.state == "stopping":
            self._runner.wake()
        elif task is not None and task.id is not None:
            files.remove_folder(files.task_folder(self._settings.data_dir, task.id))

    def read_tree(self, model_id: int) -> Document:
        return self.read_graph(model_id).tree()

    def read_graph(self, model_id: int) -> ModelGraph:
        """The model's graph; Conflict while it is not ready."""
        with self._db.read() as session:
            model = find_row(session, Model, model_id)
        if model.state != "ready":
            why = f": {model.error_message}" if model.error_message else ""
            verb = (
                "is still being inspected" if model.state == "inspecting" else "could not be read"
            )
            raise Conflict(f"Model {model_id} {verb}{why}", state=model.state)
        return self._load_graph(model_id)

    def _load_graph_uncached(self, model_id: int) -> ModelGraph:
        document = job_folder.read_document(files.graph_path(self._settings.data_dir, model_id))
        if document is None:
            raise Conflict(f"What was read of model {model_id} is gone; add the model again.")
        return ModelGraph.from_document(document)

    def make_plan(self, model_id: int, doc: Mapping[str, Any]) -> Document:
        graph = self.read_graph(model_id)
        document = members(doc, drop=("assume", *CONFIG_ROW_MEMBERS))
        config, assume = parse_config(document), parse_assumption(doc.get("assume"))
        memory = {device["id"]: device["bytes"] for device in self._runner.devices()}
        return plan_config(graph, config, assume, memory).document()

    # ------------------------------------------------------------------------------- configs

    def save_config(self, doc: Mapping[str, Any]) -> Document:
        """Save a freeze config; its member `model_id` says for which model."""
        model_id = read_id(members(doc), "model_id")
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        return self._store_config(model_id, config)

    def _store_config(self, model_id: int, config: FreezeConfig) -> Document:
        document = self._expand(model_id, config)

        def save(session: Session) -> Document:
            find_row(session, Model, model_id)
            row = FreezeConfigRow(model_id=model_id, document=document)
            session.add(row)
            session.flush()
            return config_row_document(row)

        return self._db.write(save)

    def list_configs(
        self, model_id: int | None = None, limit: int = 100, before: int | None = None
    ) -> list[Document]:
        with self._db.read() as session:
            if model_id is None:
                rows = catalog.list_newest(session, FreezeConfigRow, limit, before)
            else:
                rows = catalog.list_configs(session, model_id, limit, before)
            return [shorten_config(config_row_document(row)) for row in rows]

    def get_config(self, config_id: int) -> Document:
        with self._db.read() as session:
            return config_row_document(find_row(session, FreezeConfigRow, config_id))

    def replace_config(self, config_id: int, doc: Mapping[str, Any]) -> Document:
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        model_id = read_id({"model_id": self.get_config(config_id)["model_id"], **doc}, "model_id")
        document = self._expand(model_id, config)

        def change(session: Session) -> Document:
            row = find_row(session, FreezeConfigRow, config_id)
            row.model_id, row.document, row.updated_at = model_id, document, utc_now()
            session.add(row)
            session.flush()
            return config_row_document(row)

        return self._db.write(change)

    def delete_config(self, config_id: int) -> None:
        self._db.write(lambda s: s.delete(find_row(s, FreezeConfigRow, config_id)))

    def download_config(self, config_id: int, as_: str = "json") -> tuple[str, str, str]:
        """(filename, media type, text) of a saved config as a JSON document or a Python module."""
        row = self.get_config(config_id)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", row["name"]).strip("-.") or "freeze-config"
        if as_ == "json":
            document = members(row, drop=CONFIG_ROW_MEMBERS)
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            return f"{stem}.json", "application/json", text
        if as_ == "python":
            config = parse_config(members(row, drop=CONFIG_ROW_MEMBERS))
            text = config_as_python(config, self.read_graph(row["model_id"]))
            return f"{re.sub(r'[^A-Za-z0-9_]', '_', stem)}.py", "text/x-python", text
        raise InvalidDocument([("as", f"{as_!r} is not a form; 'json' and 'python' are.")])

    def import_config(
        self, model_id: int, doc: Mapping[str, Any], accept: str | None = None
    ) -> Document:
        """Save a config that was made elsewhere.

        Args:
            accept: what counts where its lists of names and its rules differ on this model:
                ``rules`` or ``names``; None raises a Conflict that has the names as `differing`.
        """
        if accept not in (None, "rules", "names"):
            raise InvalidDocument([("accept", f"{accept!r} may be 'rules' or 'names'.")])
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        graph = self.read_graph(model_id)
        differing = differing_names(config, graph)
        if accept is None and any(differing.values()):
            count = len(set().union(*differing.values()))
            raise Conflict(
                f"On this model the rules give something else than the lists say, for {count:,} "
                "names. Accept the rules or the names.",
                differing=differing,
            )
        return self._store_config(
            model_id, adopt_names(config, graph) if accept == "names" else config
        )

    def _expand(self, model_id: int, config: FreezeConfig) -> Document:
        """A config's document on that model: its names listed, the model named."""
        try:
            graph = self.read_graph(model_id)
            uri = self.get_model(model_id)["uri"]
        except NotFound as error:
            raise InvalidDocument([("model_id", error.detail)]) from error
        return config_document(replace(config, model={"uri": uri}), graph)

    # ---------------------------------------------------------------------------------- jobs

    def launch_job(self, doc: Mapping[str, Any]) -> Document:
        """Queue a training run or an evaluation."""
        errors: list[tuple[str, str]] = []
        with collecting(errors):
            check_members(doc, JOB_MEMBERS)
        kind = doc.get("kind", "train")
        if kind not in ("train", "evaluate"):
            errors.append(("kind", f"{kind!r} is not a kind of job; 'train' and 'evaluate' are."))
        with collecting(errors):
            texts = read_texts(doc)
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

        def add(session: Session) -> Document:
            find_row(session, Model, model_id)  # not deleted in between
            fields = {"model_id": model_id, "config_id": config_id, "config": config, **texts}
            return job_document(session, jobs.add_job(session, kind=kind, spec=spec, **fields))

        document = self._db.write(add)
        self._runner.wake()
        return document

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
        """Change a job's name or notes."""
        check_members(doc, ("name", "notes"))
        texts = read_texts(doc)

        def edit(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            jobs.update_job(session, job, **texts)
            return job_document(session, job)

        return self._db.write(edit)

    def delete_job(self, job_id: int) -> None:
        """Remove a job that does not run, with everything that lies on disk."""

        def delete(session: Session) -> None:
            job = self._idle_job(session, job_id, "deleted")
            jobs.delete_job(session, job)

        self._db.write(delete)
        files.remove_folder(self._folder(job_id))
        self._db.write(jobs.give_space_back)

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
            raise InvalidDocument([("mode", f"{mode!r} is not a mode; 'hold' and 'release' are.")])

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
            doc: optionally another `config`, and `training` with more `epochs` or `max_steps`.
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
            check_members(doc["training"], ("epochs", "max_steps"), "training")
            spec["training"] = self._read_training({**spec["training"], **doc["training"]})
        return changes | ({"spec": spec} if spec != job.spec else {})

    def change_freeze(self, job_id: int, doc: Mapping[str, Any]) -> Document:
        """Append rules to those that a job trains under, from its next step on.

        Returns:
            The edit, as `find_edit` tells it from then on.
        """
        rules, state = read_edit(doc)
        graph = self.read_graph(self.get_job(job_id)["model_id"])

        def change(session: Session) -> Document:
            job = find_row(session, Job, job_id)
            attempt = jobs.living_attempt(session, job)
            add_edit(job, attempt, graph, rules, state)
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
            return dict(samples.read_series(session, job_id, name, points, from_, to))

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
        if stat not in samples.STATS:
            choices = ", ".join(samples.STATS)
            raise InvalidDocument([("stat", f"{stat!r} is not a measure; {choices} are.")])
        if reduce not in samples.REDUCTIONS:
            raise InvalidDocument([("reduce", f"{reduce!r} may be 'max', 'min' or 'last'.")])
        try:
            is_wanted = compile_match(match) if match else lambda _: True
        except ValueError as error:
            raise InvalidDocument([("match", str(error))]) from error
        with self._db.read() as session:
            find_row(session, Job, job_id)
            layers = samples.read_layers(session, job_id)
            positions = [index for index, path in enumerate(layers) if is_wanted(path)]
            steps, values = samples.read_matrix(
                session, job_id, stat, positions, points, from_, to, reduce
            )
        return {"layers": [layers[i] for i in positions], "steps": steps, "values": values}

    def read_proof(self, job_id: int) -> Document:
        with self._db.read() as session:
            find_row(session, Job, job_id)
            proof = session.get(Proof, job_id)
            return NO_PROOF if proof is None else proof.document

    def read_job_config(self, job_id: int) -> Document:
        with self._db.read() as session:
            return find_row(session, Job, job_id).config

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
            except FileNotFoundError:
                continue  # the worker keeps the last few, and has just removed this one
            found.append({"step": step, "bytes": size, "created_at": iso(written)})
        return found

    def checkpoint_file(self, job_id: int, step: int) -> Path:
        """The model's tensors after `step` steps, as a safetensors file."""
        self.get_job(job_id)
        checkpoints = job_folder.checkpoints_folder(self._folder(job_id))
        path = checkpoint_path(checkpoints, step) / "model.safetensors"
        if not path.is_file():
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
        if format == "csv":
            return f"job-{job_id}.csv", "text/csv", export_csv(self._db, job_id)
        if format == "json":
            pieces = export_json(self._db, job_id, document)
            return f"job-{job_id}.json", "application/json", pieces
        raise InvalidDocument(
            [("format", f"{format!r} is not a format of this version; 'csv' and 'json' are.")]
        )

    # -------------------------------------------------------------------------------- stream

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
                return [], str(find_end(session, job, folder)), job.state in jobs.ENDED
            events = list(read_job_news(session, job, folder, Place.read(cursor)))
            after = Place.read(events[-1][2] if events else cursor)
            is_told = after.attempt == job.attempt and after.version == job.version
            return events, str(after), is_told and job.state in jobs.ENDED

    # ------------------------------------------------------------------------ tasks, system

    def get_task(self, task_id: int) -> Document:
        with self._db.read() as session:
            task = find_row(session, Task, task_id)
        return {
            "id": task.id,
            "kind": task.kind,
            "model_id": task.model_id,
            "state": task.state,
            "error": error_document(task),
            "created_at": task.created_at,
            "started_at": task.started_at,
            "ended_at": task.ended_at,
        }

    def health(self) -> Document:
        """`workers` is how many jobs can run at once; 0 while no worker can be started."""
        slots = self._runner.slots()
        total = slots["cpu"]["total"] + slots["cuda"]["total"]
        is_ready = self._runner.keeper()["ready"]
        return {"status": "ok", "version": __version__, "workers": total if is_ready else 0}

    def system_report(self) -> Document:
        with self._db.read() as session:
            counts = jobs.count_by_state(session)
        disk, memory = shutil.disk_usage(self._settings.data_dir), psutil.virtual_memory()
        python = self._settings.worker_python
        return {
            "version": __version__,
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "data_dir": str(self._settings.data_dir),
            "database_bytes": self._db.path.stat().st_size,
            "devices": self._runner.devices(),
            "slots": self._runner.slots(),
            "keeper": self._runner.keeper(),
            "disk": {"free": disk.free, "total": disk.total},
            "memory": {
                "server": psutil.Process().memory_info().rss,
                "available": memory.available,
                "total": memory.total,
            },
            "jobs": counts,
            "code_dirs": [str(path) for path in self._settings.code_dirs],
            "file_dirs": [str(path) for path in self._settings.file_dirs],
            "worker_python": None if python is None else str(python),
        }

    # ------------------------------------------------------------------------------- logins

    def make_link(self) -> str:
        """A new one-time login secret; only its digest is kept."""
        return self._make_login("link", timedelta(minutes=LINK_MINUTES))

    def use_link(self, link: str) -> str | None:
        """Spend a link for a session's secret; None where it is unknown, spent or too old."""
        if not self._db.write(lambda s: catalog.spend_login(s, digest(link), "link")):
            return None
        return self._make_login("session", timedelta(days=SESSION_DAYS))

    def check_session(self, session: str) -> bool:
        with self._db.read() as reader:
            return catalog.has_login(reader, digest(session), "session")

    def end_session(self, session: str) -> None:
        self._db.write(lambda s: catalog.spend_login(s, digest(session), "session"))

    def _make_login(self, kind: str, lifetime: timedelta) -> str:
        secret = secrets.token_urlsafe(32)
        expires_at = iso(datetime.now(UTC) + lifetime)
        self._db.write(lambda s: catalog.add_login(s, digest(secret), kind, expires_at))
        return secret

    # ------------------------------------------------------------------------------ documents

    def _idle_job(self, session: Session, job_id: int, done: str) -> Job:
        job = find_row(session, Job, job_id)
        if jobs.living_attempt(session, job) is not None:
            raise impossible(job, done, "Stop it first.")
        return job

    def _write_and_wake(self, change: Callable[[Session], Document]) -> Document:
        document = self._db.write(change)
        self._runner.wake()
        return document

    def _folder(self, job_id: int) -> Path:
        return files.job_folder(self._settings.data_dir, job_id)

    def _dirs(self) -> dict[str, tuple[Path, ...]]:
        return {"code_dirs": self._settings.code_dirs, "file_dirs": self._settings.file_dirs}

    def _surroundings(self) -> Document:
        """What a worker is told beside the spec; threads are fixed with it, for equal results."""
        threads = max(1, _usable_cores() // self._settings.cpu_slots)
        dirs = {name: [str(path) for path in paths] for name, paths in self._dirs().items()}
        return {**dirs, "threads": threads}


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

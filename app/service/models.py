"""Verbs on models: have one inspected, read its tree, plan a freeze config on it."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sqlmodel import Session

from app.freezing.config import FreezeConfig, parse_config
from app.freezing.graph import ModelGraph
from app.freezing.plan import parse_assumption, plan_config
from app.jobs import folder as job_folder
from app.service.documents import (
    CONFIG_ROW_MEMBERS,
    Conflict,
    Document,
    find_row,
    members,
    model_document,
)
from app.service.ground import Ground, RunnerStatus
from app.settings import Settings
from app.sources.spec import parse_model_spec, spec_document
from app.store import catalog, files
from app.store.db import Database
from app.store.tables import Model, Task


class Models(Ground):
    """Verbs on models."""

    def __init__(self, settings: Settings, db: Database, runner_status: RunnerStatus) -> None:
        super().__init__(settings, db, runner_status)
        # A graph never changes once it is there, and ids are never given twice.
        self._load_graph = lru_cache(maxsize=4)(self._load_graph_uncached)

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
        return self.plan_graph(graph, parse_config(document), doc.get("assume"))

    def plan_graph(self, graph: ModelGraph, config: FreezeConfig, assume: Any) -> Document:
        """The plan of a config on a graph, for the devices that there are."""
        memory = {device["id"]: device["bytes"] for device in self._runner.devices()}
        return plan_config(graph, config, parse_assumption(assume), memory).document()

"""Verbs on models: have one inspected, read its tree, delete it."""

import gc
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlmodel import Session

from app.freezing.graph import ModelGraph
from app.jobs import folder as job_folder
from app.service.documents import Conflict, Document, find_row, model_document
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
        # Told apart by when they were written; ids are never given twice.
        self._load_graph = lru_cache(maxsize=4)(self._load_graph_uncached)

    def add_model(self, doc: Mapping[str, Any]) -> Document:
        """Take a model spec and have it inspected."""
        spec = spec_document(parse_model_spec(doc, **self._dirs()))
        wanted = {"kind": "inspect", "model": spec, "kernels": self._runner.kernels()}
        task_spec = {**wanted, **self._surroundings()}

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
            document = model_document(session, find_row(session, Model, model_id))
        is_waiting = document["state"] == "inspecting" and document["task_id"] is not None
        return document | {
            "progress": self._last_words(document["task_id"]) if is_waiting else None
        }

    def delete_model(self, model_id: int) -> None:
        """Remove a model that no job uses, with its saved configs and its inspection."""

        def delete(session: Session) -> Task | None:
            model = find_row(session, Model, model_id)
            used = catalog.jobs_of_model(session, model_id)
            if used:
                many = len(used) > 1
                raise Conflict(
                    f"Model {model_id} is used by {len(used)} job{'s' * many}; delete "
                    f"{'them' if many else 'it'} first.",
                    state=model.state,
                    jobs=used,
                )
            task = catalog.task_of_model(session, model_id)
            for waiting in catalog.tasks_of_model(session, model_id):
                catalog.stop_task(session, waiting)
            catalog.delete_model(session, model)
            return task

        task = self._db.write(delete)
        for place in (files.graph_path, files.model_card_path, files.timing_path):
            place(self._settings.data_dir, model_id).unlink(missing_ok=True)
        for path in files.assumed_graph_paths(self._settings.data_dir, model_id):
            path.unlink(missing_ok=True)
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
        return self._load_graph(model_id, self._traced_at(model_id))

    def _load_graph_uncached(self, model_id: int, _traced_at: int | None) -> ModelGraph:
        document = job_folder.read_document(files.graph_path(self._settings.data_dir, model_id))
        if document is None:
            raise Conflict(f"What was read of model {model_id} is gone; add the model again.")
        graph = ModelGraph.from_document(document)
        settle()
        return graph

    def _traced_at(self, model_id: int) -> int | None:
        """When the model was last traced: one without an example also is on a dataset's batch."""
        return written_at(files.graph_path(self._settings.data_dir, model_id))


def settle() -> None:
    """Have the collector leave out what is there now.

    A graph is hundreds of thousands of lasting objects: looked through at every full collection,
    they would stop a tick for 80 ms now and then. They hold no cycles, so they go by their counts.
    """
    gc.collect()
    gc.freeze()


def written_at(path: Path) -> int | None:
    """When a file was last written, None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None

"""Verbs on plans: what a freeze config does to a model in a run as it is assumed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from app.freezing.assume import Assumption, parse_assumption
from app.freezing.config import FreezeConfig, config_document, parse_config
from app.freezing.graph import ModelGraph
from app.freezing.plan import plan_config
from app.freezing.timing import Timing, read_timing
from app.jobs import folder as job_folder
from app.service.documents import CONFIG_ROW_MEMBERS, Conflict, Document, members
from app.service.ground import LIVE_TASKS, RunnerStatus
from app.service.models import Models, settle, written_at
from app.settings import Settings
from app.store import catalog, files
from app.store.db import Database
from app.store.tables import Task

TRACES_KEPT = 50
# A trace that failed for reasons of its own (a full disk, a kill) is tried again after so long.
RETRY_SECONDS = 60
# A forward that must be run for real to be traced may take so much for its activations.
MAX_REAL_BYTES = 2 * 2**30
TRACED = ("sequence_length", "image_size", "precision")  # what of an assumption changes the graph

BEING_TRACED = "it is being traced at it now; ask again in a moment"

Assumed = dict[str, Any]


class Plans(Models):
    """Verbs on plans."""

    def __init__(self, settings: Settings, db: Database, runner_status: RunnerStatus) -> None:
        super().__init__(settings, db, runner_status)
        # Told apart by when they were written; ids are never given twice.
        self._load_timing = lru_cache(maxsize=4)(self._load_timing_uncached)
        self._load_trace = lru_cache(maxsize=4)(self._load_trace_uncached)
        # The rows that somebody opens next are of the plan that was just made.
        self._plan = lru_cache(maxsize=16)(self._plan_uncached)

    def make_plan(self, model_id: int, doc: Mapping[str, Any]) -> Document:
        """The plan with what is known now; a size that is not traced yet is not waited for."""
        config, assume = _read_request(doc)
        memory = tuple((device["id"], device["bytes"]) for device in self._runner.devices())
        asked = json.dumps([config_document(config), asdict(assume)], sort_keys=True)
        assumed = self._find_untraced(model_id, assume)
        found = self._find_trace(model_id, assumed) if assumed else ""
        written = self._traced_at(model_id), self._timed_at(model_id)
        return self._plan(model_id, asked, memory, json.dumps(assumed), found, *written)

    def is_tracing(self, model_id: int, doc: Mapping[str, Any]) -> bool:
        """Whether a worker traces the model as a plan assumes a run; has one begin."""
        _, assume = _read_request(doc)
        assumed = self._find_untraced(model_id, assume)
        return bool(assumed) and self._find_trace(model_id, assumed) == BEING_TRACED

    def _find_untraced(self, model_id: int, assume: Assumption) -> Assumed:
        """The sizes and the precision that are assumed and that the model's own graph is not of.

        Refuses what is not ready, plan or no plan.
        """
        graph = self.read_graph(model_id)
        wanted = {name: getattr(assume, name) for name in TRACED}
        return {
            name: value
            for name, value in wanted.items()
            if value is not None and graph.nodes and value != getattr(graph, name)
        }

    def _find_trace(self, model_id: int, assumed: Assumed) -> int | str:
        """When the model was traced like this, else why it is not; has a worker begin."""
        path = files.assumed_graph_path(self._settings.data_dir, model_id, assumed)
        at, own = written_at(path), self._traced_at(model_id)
        if at is not None and own is not None and at >= own:
            return at
        with self._db.read() as session:
            tasks = catalog.tasks_of_model(session, model_id, "trace")
        newest = next((task for task in tasks if task.spec.get("assumed") == assumed), None)
        if newest is not None and newest.state in LIVE_TASKS:
            return BEING_TRACED
        if newest is not None and _has_just_ended(newest):
            if newest.state != "succeeded":
                return _describe_end(newest)
            if at is not None:  # as new as can be, whatever clocks say
                return at
        return self._begin_trace(model_id, assumed)

    def _begin_trace(self, model_id: int, assumed: Assumed) -> str:
        graph = self.read_graph(model_id)
        if graph.traced_by == "real" and _real_bytes(graph, assumed) > MAX_REAL_BYTES:
            return (
                "the model's forward must be run for real to be traced, and at that size it might "
                f"take {_real_bytes(graph, assumed) / 2**30:,.0f} GiB"
            )
        how = {"traced_by": graph.traced_by, "kernels": graph.kernels}
        spec = {"kind": "trace", "assumed": assumed, **how}
        try:
            self._add_task(model_id, {**spec, **self._surroundings()}, TRACES_KEPT)
        except Conflict as conflict:
            return conflict.detail.rstrip(".")
        return BEING_TRACED

    def _plan_uncached(
        self,
        model_id: int,
        asked: str,
        memory: tuple[tuple[str, int], ...],
        assumed: str,
        found: int | str,
        traced_at: int | None,
        timed_at: int | None,
    ) -> Document:
        config, assume = json.loads(asked)
        graph = self._load_graph(model_id, traced_at)
        timing = None if timed_at is None else self._load_timing(model_id, timed_at)
        why_not = dict.fromkeys(json.loads(assumed), str(found))
        if isinstance(found, int):
            traced, why_not = self._load_trace(model_id, assumed, found, traced_at)
            graph = traced or graph
        return plan_config(
            graph, parse_config(config), parse_assumption(assume), dict(memory), timing, why_not
        ).document()

    def _load_trace_uncached(
        self, model_id: int, assumed: str, _written_at: int, traced_at: int | None
    ) -> tuple[ModelGraph | None, dict[str, str]]:
        """The model's graph in a run like this, and why what of it could not be had.

        Its modules and parameters are those of the model's own graph, and held once.
        """
        path = files.assumed_graph_path(self._settings.data_dir, model_id, json.loads(assumed))
        document = job_folder.read_document(path)
        if document is None:  # the oldest go, perhaps in this moment
            return None, dict.fromkeys(json.loads(assumed), BEING_TRACED)
        if document["graph"] is None:
            return None, document["refused"]
        own = self._load_graph(model_id, traced_at)
        nodes = ModelGraph.from_document({**document["graph"], "modules": [], "parameters": []})
        settle()
        return replace(nodes, modules=own.modules, parameters=own.parameters), document["refused"]

    def _timed_at(self, model_id: int) -> int | None:
        """When the model was last calibrated, None if never."""
        return written_at(files.timing_path(self._settings.data_dir, model_id))

    def _load_timing_uncached(self, model_id: int, _timed_at: int) -> Timing | None:
        path = files.timing_path(self._settings.data_dir, model_id)
        document = job_folder.read_document(path)
        return None if document is None else read_timing(document, self.read_graph(model_id))


def _read_request(doc: Mapping[str, Any]) -> tuple[FreezeConfig, Assumption]:
    document = members(doc, drop=("assume", *CONFIG_ROW_MEMBERS))
    return parse_config(document), parse_assumption(doc.get("assume"))


def _describe_end(task: Task) -> str:
    if task.state != "failed":
        return "its trace was stopped"
    return f"its trace failed: {task.error_message or 'no reason was recorded'}".rstrip(".")


def _has_just_ended(task: Task) -> bool:
    ended = datetime.fromisoformat(task.ended_at or task.created_at)
    return (datetime.now(UTC) - ended).total_seconds() < RETRY_SECONDS


def _real_bytes(graph: ModelGraph, assumed: Assumed) -> float:
    """What activations take at other sizes, at most: attention grows with the square of a text."""
    now = plan_config(graph, parse_config({})).cost["full"]["activation_bytes"]
    sizes = {name: size for name, size in assumed.items() if name != "precision"}
    growth = [size / (getattr(graph, name) or 1) for name, size in sizes.items()]
    return float(now * max(1.0, *growth) ** 2) if growth else float(now)

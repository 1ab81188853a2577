"""Verbs on sweeps: the same training under several freeze sets, and one table of what came out."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlmodel import Session

from app.freezing.config import config_document
from app.freezing.errors import InvalidDocument
from app.freezing.presets import PRESETS, preset_config
from app.service.documents import (
    Conflict,
    Document,
    NotFound,
    check_members,
    collecting,
    find_row,
    is_id,
    job_documents,
    members,
    read_id,
    read_texts,
)
from app.service.records import Records
from app.store import catalog, charts, files, jobs
from app.store.tables import Model, Sweep

SWEEP_MEMBERS = ("model_id", "sets", "dataset", "training", "name", "notes")
SET_MEMBERS = ("name", "preset", "count", "config")
MAX_SETS = 32


class Sweeps(Records):
    """Verbs on sweeps."""

    def launch_sweep(self, doc: Mapping[str, Any]) -> Document:
        """Queue one job for each freeze set, alike in all else: data, options, seed, order.

        Args:
            doc: `model_id`, `dataset` and `training` as for a job, and `sets`: each a `preset`
                (some with a `count`), or a `config` by id or document; with a `name`.
        """
        check_members(doc, SWEEP_MEMBERS)
        texts = read_texts(doc)
        model_id = read_id(doc, "model_id")
        sets = doc.get("sets")
        if not isinstance(sets, list) or not 1 <= len(sets) <= MAX_SETS:
            raise InvalidDocument([("sets", f"'sets' must be a list of 1 to {MAX_SETS} sets.")])
        shared = {key: doc[key] for key in ("dataset", "training") if key in doc}
        errors: list[tuple[str, str]] = []
        launches: list[tuple[str, Document]] = []
        for index, given in enumerate(sets):
            faults: list[tuple[str, str]] = []
            with collecting(faults):
                name, config = self._read_set(model_id, given)
                title = f"{texts.get('name') or 'sweep'}: {name}"[:200]
                launch = {**shared, "model_id": model_id, "config": config, "name": title}
                launches.append((name, self._read_launch(launch)))
            for field, message in faults:
                is_shared = field.partition(".")[0] in shared
                errors.append((field if is_shared else f"sets.{index}.{field}", message))
        if errors:
            raise InvalidDocument(list(dict.fromkeys(errors)))

        def add(session: Session) -> Document:
            find_row(session, Model, model_id)
            sweep = Sweep(
                model_id=model_id, name=texts.get("name", ""), notes=texts.get("notes", "")
            )
            session.add(sweep)
            session.flush()
            for name, fields in launches:
                jobs.add_job(session, sweep_id=sweep.id, sweep_set=name, **fields)
            return _describe_sweep(session, sweep)

        return self._write_and_wake(add)

    def _read_set(self, model_id: int, given: Any) -> tuple[str, Any]:
        """A set's name, and its config as a job takes it."""
        check_members(given, SET_MEMBERS)
        name = given.get("name")
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 100):
            raise InvalidDocument([("name", "'name' must be a text of at most 100 characters.")])
        if ("preset" in given) == ("config" in given):
            raise InvalidDocument([("", "A set has either a 'preset' or a 'config'.")])
        if "preset" in given:
            count = given.get("count")
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise InvalidDocument([("count", "'count' must be a whole number of blocks.")])
            config = preset_config(str(given["preset"]), self.read_graph(model_id), count)
            words = dict(PRESETS)[given["preset"]]
            label = words if count is None else f"{words} ({count})"
            return name or label, config_document(config)
        config = given["config"]
        if not is_id(config):
            return name or str(members(config).get("name") or "rules"), config
        try:
            saved = self.get_config(config)["name"]
        except NotFound as error:
            raise InvalidDocument([("config", error.detail)]) from error
        return name or str(saved or f"config {config}"), config

    def list_sweeps(self, limit: int = 100, before: int | None = None) -> list[Document]:
        with self._db.read() as session:
            rows = catalog.list_newest(session, Sweep, limit, before)
            return [_describe_sweep(session, row) for row in rows]

    def get_sweep(self, sweep_id: int) -> Document:
        """A sweep with its table: one row a freeze set, filled as its job goes on.

        A row has ``metrics`` (name → `before` training and `after` its newest step), the measured
        step time and memory, and what the plan foretold.
        """
        with self._db.read() as session:
            sweep = find_row(session, Sweep, sweep_id)
            document = _describe_sweep(session, sweep)
            rows = jobs.jobs_of_sweep(session, sweep_id)
            names = [row.sweep_set for row in rows]
            found = job_documents(session, rows)
        table = [self._row(name or "", job) for name, job in zip(names, found, strict=True)]
        return {**document, "table": table}

    def _row(self, name: str, job: Document) -> Document:
        with self._db.read() as session:
            first = charts.read_series(session, job["id"], first=0, last=0)
            last = charts.read_series(session, job["id"], points=1)
        metrics = {
            key: {"before": _only(first.get(key)), "after": _only(series)}
            for key, series in last.items()
            if key.startswith("eval/")
        }
        cost = (self.plan_job(job["id"]) or {}).get("cost") or {}
        return {
            "set": name,
            "job_id": job["id"],
            "state": job["state"],
            "step": job["step"],
            "total_steps": job["total_steps"],
            "frozen_count": job["config"]["frozen_count"],
            "trainable_count": job["config"]["trainable_count"],
            "metrics": metrics,
            "step_ms": job["step_ms"],
            "peak_bytes": job.get("peak_bytes"),
            "proof": job["proof"],
            "predicted": {
                key: cost.get(key) for key in ("predicted_step_ms", "peak_bytes", "speedup_bound")
            },
            "step_flops_share": _share(cost.get("step_flops"), cost.get("full_step_flops")),
        }

    def stop_sweep(self, sweep_id: int) -> Document:
        """Stop every job of a sweep that has not ended."""
        for job in self.get_sweep(sweep_id)["jobs"]:
            try:
                self.stop_job(job)
            except Conflict:
                continue  # it has ended by itself
        return self.get_sweep(sweep_id)

    def delete_sweep(self, sweep_id: int) -> None:
        """Remove a sweep and all its jobs with what lies on disk; Conflict while one runs."""

        def delete(session: Session) -> Sequence[int]:
            find_row(session, Sweep, sweep_id)
            rows = jobs.jobs_of_sweep(session, sweep_id)
            if any(row.state not in jobs.ENDED for row in rows):
                raise Conflict(f"Sweep {sweep_id} has jobs that run or wait; stop it first.")
            for row in rows:
                self._idle_job(session, row.id or 0, "deleted")
                jobs.delete_job(session, row)  # with the last of them goes the sweep
            return [row.id for row in rows if row.id is not None]

        for job_id in self._db.write(delete):
            files.remove_folder(self._folder(job_id))
        while self._db.write(jobs.delete_leftovers):
            pass


def _describe_sweep(session: Session, sweep: Sweep) -> Document:
    assert sweep.id is not None
    rows = jobs.jobs_of_sweep(session, sweep.id)
    return {
        "id": sweep.id,
        "name": sweep.name,
        "notes": sweep.notes,
        "model_id": sweep.model_id,
        "created_at": sweep.created_at,
        "state": "ended" if all(row.state in jobs.ENDED for row in rows) else "running",
        "jobs": [row.id for row in rows],
    }


def _only(series: Mapping[str, Sequence[Any]] | None) -> Any:
    """The last value of a series, None where it has none."""
    return series["values"][-1] if series and series["values"] else None


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None

"""Rebuilds the rows of jobs and models from their folders, and keeps there what that takes."""

import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlmodel import Session, select

from app.freezing.graph import ModelGraph
from app.jobs import folder as job_folder
from app.jobs.devices import find_devices, find_kernels
from app.jobs.endings import judge, read_end
from app.jobs.processes import DEVICE
from app.jobs.records import read_records
from app.jobs.spool import BadRecord
from app.settings import Settings
from app.store import damage, files, jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model, Task
from app.training.places import checkpoint_steps

logger = logging.getLogger(__name__)

CARD = "about.json"
# What a job's card says of its row; the spec and the config stand in spec.json.
ON_CARD = (
    "kind", "state", "model_id", "config_id", "name", "notes", "priority", "restarts_left",
    "error_reason", "error_message", "created_at", "queued_at", "started_at", "ended_at",
)  # fmt: skip
LIVE = ("starting", "running", "paused", "stopping")


class Cards:
    """Keeps every job's card equal to its row, so that a lost database can be rebuilt."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._version = 0
        self._written: dict[int, dict[str, Any]] = {}

    def keep(self) -> None:
        """Write the cards of the jobs that changed since the last call."""
        while True:
            with self._db.read() as session:
                changed = jobs.jobs_changed_since(session, self._version)
            for job in changed:
                self._keep_one(job)
                self._version = job.version
            if not changed:
                return

    def _keep_one(self, job: Job) -> None:
        assert job.id is not None
        job_id = job.id
        card = {name: getattr(job, name) for name in ON_CARD}
        folder = files.job_folder(self._settings.data_dir, job_id)
        if job_id not in self._written:  # the first look: nobody but a dead server wrote here
            job_folder.tidy_drafts(folder)
            self._written[job_id] = _read(folder / CARD)
        if self._written[job_id] == card:
            return

        def write(session: Session) -> None:
            row = session.get(Job, job_id)
            if row is None:  # deleted meanwhile, and its folder is gone or about to be
                return
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "spec.json").exists():  # it has not started yet
                job_folder.write_spec(folder, {**row.spec, "config": row.config})
            job_folder.write_document(folder / CARD, card)

        self._db.write(write)
        self._written[job_id] = card


def keep_model_card(data_dir: Path, model: Model) -> None:
    """Keep beside a model's graph what the graph does not say."""
    assert model.id is not None
    card = {"spec": model.spec, "created_at": model.created_at}
    job_folder.write_document(files.model_card_path(data_dir, model.id), card)


@dataclass(frozen=True)
class Rebuilt:
    """How much there is again."""

    jobs: int
    models: int


def open_database(settings: Settings) -> tuple[Database, bool]:
    """The data folder's database; a damaged or missing one is rebuilt from the folders.

    Returns:
        The database, and whether it is new and there was nothing to rebuild it from.
    """
    path = settings.data_dir / "frostline.db"
    said = damage.find_damage(path)
    aside = None
    if said is not None:
        aside = damage.set_aside(path)
        logger.error("%s was damaged (%s). It was set aside as %s.", path, said, aside.name)
    is_new = not path.exists()
    db = Database(path)
    if is_new:
        rebuilt = db.write(lambda session: rebuild_rows(session, settings, aside))
        if rebuilt.jobs or rebuilt.models or aside:
            logger.warning(
                "The database was rebuilt: %d models, %d jobs. Their metrics follow.",
                rebuilt.models,
                rebuilt.jobs,
            )
            is_new = False
    return db, is_new


def rebuild_rows(session: Session, settings: Settings, aside: Path | None = None) -> Rebuilt:
    """Write the rows of models and jobs that have folders; `read_unread` brings their records.

    Args:
        aside: a damaged database, of which some tables may still be readable.
    """
    if aside is not None:
        damage.save_rows(session, aside)
    for card in settings.data_dir.glob("graphs/*.about.json"):
        number = card.name.partition(".")[0]
        if number.isdecimal():
            document = _read(card)
            _add_model(session, settings, int(number), document.get("spec") or {}, document)
    found = 0
    for folder in sorted(settings.data_dir.glob("jobs/*"), key=lambda path: path.name.zfill(20)):
        if folder.name.isdecimal():
            found += _add_job(session, settings, folder)
    session.flush()
    return Rebuilt(found, len(session.exec(select(Model.id)).all()))


def read_unread(db: Database, data_dir: Path) -> None:
    """Store what ended attempts recorded and the database lacks.

    In an ordinary database there is nothing of the kind: an attempt ends with its last record.
    """
    with db.read() as session:
        ended = session.exec(select(Attempt).where(Attempt.ended_at != None))  # noqa: E711
        attempts = sorted(ended, key=lambda attempt: (attempt.job_id, attempt.number))
    for attempt in attempts:
        directory = files.job_folder(data_dir, attempt.job_id) / "attempts" / str(attempt.number)
        spool = directory / "telemetry.spool"
        while spool.exists() and spool.stat().st_size > attempt.spool_offset:
            try:
                records, offset = read_records(directory, attempt.spool_offset)
            except BadRecord:  # the attempt ended with it
                break
            if not records:  # a torn last one
                break

            def store(session: Session, attempt: Attempt = attempt) -> Attempt:
                row = session.get_one(Attempt, (attempt.job_id, attempt.number))
                job = session.get_one(Job, attempt.job_id)
                samples.ingest(session, job, row, records, offset)  # noqa: B023 (runs at once)
                return row

            attempt = db.write(store)


def _add_job(session: Session, settings: Settings, folder: Path) -> bool:
    spec, card = _read(folder / "spec.json"), _read(folder / CARD)
    if "model" not in spec or "dataset" not in spec:  # not a job of ours, or torn beyond use
        logger.warning("%s has no readable spec.json; it was left alone.", folder)
        return False
    config = spec.pop("config", {})
    model_id = card.get("model_id") or _find_model(session, spec["model"])
    model_id = _add_model(session, settings, model_id, spec["model"], {})
    attempts = _read_attempts(folder, int(folder.name))
    fields = {name: card[name] for name in ON_CARD if name in card}
    fields |= {"kind": spec["kind"], "model_id": model_id}
    newest = attempts[-1] if attempts else None
    fields |= _state_of(card.get("state"), newest)
    wish = _read(folder / "attempts" / str(newest.number) / "wish.json") if newest else {}
    if newest is not None and newest.ended_at is None:
        newest.edits = wish.get("edits", [])
        fields |= {"wish": wish.get("state", "running"), "wish_seq": wish.get("seq", 0)}
    fields["created_at"] = fields.get("created_at") or _moment(folder / "spec.json")
    short = {key: value for key, value in config.items() if key not in ("frozen", "trainable")}
    short |= {f"{key}_count": len(config.get(key, ())) for key in ("frozen", "trainable")}
    jobs.add_job(
        session,
        id=int(folder.name),
        spec={**spec, "config": short},
        config=config,
        attempt=newest.number if newest else 0,
        **fields,
    )
    session.add_all(attempts)
    return True


def _state_of(state: str | None, newest: Attempt | None) -> dict[str, Any]:
    """A job's state where its newest attempt says more than its card, or there is no card."""
    if newest is not None and newest.ended_at is None:
        return {"state": state if state in LIVE else "running"}
    if state is not None and state not in LIVE:
        return {}
    if newest is None:
        return {"state": "queued" if state else "stopped"}
    ended = "paused" if newest.outcome == "released" else newest.outcome
    return {
        "state": ended,
        "error_reason": newest.reason,
        "error_message": newest.message,
        "ended_at": newest.ended_at,
    }


def _read_attempts(folder: Path, job_id: int) -> list[Attempt]:
    """An attempt without an end is the newest one, and lives or is about to be settled."""
    numbers = sorted(int(path.name) for path in folder.glob("attempts/*") if path.name.isdecimal())
    kept = checkpoint_steps(job_folder.checkpoints_folder(folder))
    attempts = []
    for number in numbers:
        directory = folder / "attempts" / str(number)
        facts = _read(directory / "attempt.json")
        device = (facts.get("environment") or {}).get(DEVICE, "cpu")
        row = Attempt(
            job_id=job_id,
            number=number,
            device=device,
            resume_step=facts.get("resume_step"),
            started_at=_moment(directory),
        )
        result, ended = read_end(directory)
        if number != numbers[-1] or result or ended:
            ending = judge(result, ended, has_begun=True, checkpoints=kept)
            row.outcome, row.reason, row.message = ending.outcome, ending.reason, ending.message
            row.ended_at = _moment(directory)
        attempts.append(row)
    return attempts


def _find_model(session: Session, spec: dict[str, Any]) -> int | None:
    found = [model.id for model in session.exec(select(Model)) if model.spec == spec]
    return found[0] if found else None


def _add_model(
    session: Session,
    settings: Settings,
    model_id: int | None,
    spec: dict[str, Any],
    card: dict[str, Any],
) -> int:
    """The model's row, made where it is missing; without a graph it is inspected again."""
    if model_id is not None and session.get(Model, model_id) is not None:
        return model_id
    model = Model(id=model_id, spec=spec)
    model.created_at = card.get("created_at") or model.created_at
    session.add(model)
    session.flush()
    assert model.id is not None
    try:
        document = job_folder.read_document(files.graph_path(settings.data_dir, model.id)) or {}
        graph = ModelGraph.from_document(document)
    except (ValueError, KeyError, TypeError):
        told = {"kind": "inspect", "model": spec, "threads": 1}
        told["kernels"] = find_kernels(find_devices())
        for name in ("code_dirs", "file_dirs"):
            told[name] = [str(path) for path in getattr(settings, name)]
        session.add(Task(model_id=model.id, spec=told))
        return model.id
    model.state, model.fingerprint = "ready", graph.fingerprint
    model.weights_digest = document.get("weights_digest")
    model.parameter_count = graph.parameter_count
    model.tensor_count, model.module_count = graph.tensor_count, graph.module_count
    return model.id


def _read(path: Path) -> dict[str, Any]:
    """A document without its format; empty where it is missing or cannot be read."""
    try:
        document = job_folder.read_document(path) or {}
    except (ValueError, json.JSONDecodeError, OSError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        document = {}
    document.pop("format", None)
    return document


def _moment(path: Path) -> str:
    when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")

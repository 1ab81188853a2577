"""Documents: what the service takes and gives, in the contract's shapes. It changes no row."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeGuard, TypeVar

from sqlmodel import Session

from app.freezing.errors import MAX_FAULTS, InvalidDocument, describe_unknown
from app.store import catalog, jobs
from app.store.tables import Attempt, FreezeConfigRow, Job, Model, Sweep, Task

Document = dict[str, Any]
Row = TypeVar("Row", Model, FreezeConfigRow, Job, Task, Sweep)

NOUNS = {Model: "model", FreezeConfigRow: "config", Job: "job", Task: "task", Sweep: "sweep"}
# Members that a saved config has beside those of the freeze config itself.
CONFIG_ROW_MEMBERS = (
    "id", "model_id", "created_at", "updated_at", "frozen_count", "trainable_count",
)  # fmt: skip
MAX_TEXT = {"name": 200, "notes": 20_000}
MAX_ID = 2**63 - 1
# Whole numbers of a job that may be given and changed: name → (least, most).
JOB_NUMBERS = {"priority": (-1000, 1000), "restarts_left": (0, jobs.RESTARTS)}
NO_PROOF: Document = {
    "verdict": "pending",
    "frozen": {"checked": 0, "identical": 0, "changed": []},
    "gradients": {"checked": 0, "present": []},
    "trained": {"checked": 0, "moved": 0, "still": []},
    "buffers": {"checked": 0, "identical": 0, "changed": [], "allowed": []},
}


class NotFound(LookupError):
    """Nothing has that id; `detail` is the sentence to show."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Conflict(RuntimeError):
    """Possible in general, not in this state.

    Attributes:
        detail: the sentence to show.
        extra: members that belong beside it in the answer (``state``, ``differing``).
    """

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


# --------------------------------------------------------------------------------- what came in


def find_row(session: Session, table: type[Row], row_id: int) -> Row:
    row = session.get(table, row_id) if 0 < row_id <= MAX_ID else None
    if row is None:
        raise NotFound(f"There is no {NOUNS[table]} {row_id}.")
    return row


def is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_ID


def read_id(doc: Mapping[str, Any], key: str) -> int:
    value = doc.get(key)
    if not is_id(value):
        raise InvalidDocument([(key, f"{key!r} must be an id, a whole number from 1 on.")])
    return value


def members(doc: Any, drop: Iterable[str] = ()) -> Document:
    """The members of what must be an object, without some."""
    if not isinstance(doc, Mapping):
        raise InvalidDocument([("", "A JSON object is needed here.")])
    return {key: value for key, value in doc.items() if key not in drop}


def check_members(doc: Any, known: Iterable[str], field: str = "") -> None:
    known = tuple(known)
    if unknown := [str(key) for key in members(doc) if key not in known]:
        raise InvalidDocument(
            (f"{field}.{key}".lstrip("."), describe_unknown(key, known, "known here"))
            for key in unknown[:MAX_FAULTS]
        )


def read_texts(doc: Mapping[str, Any]) -> dict[str, str]:
    """The `name` and `notes` that are given."""
    texts = {key: doc[key] for key in MAX_TEXT if doc.get(key) is not None}
    errors = [
        (key, f"{key!r} must be a text of at most {MAX_TEXT[key]:,} characters.")
        for key, text in texts.items()
        if not isinstance(text, str) or len(text) > MAX_TEXT[key]
    ]
    if errors:
        raise InvalidDocument(errors)
    return texts


def read_numbers(doc: Mapping[str, Any]) -> dict[str, int]:
    """The `priority` and `restarts_left` that are given."""
    numbers = {key: doc[key] for key in JOB_NUMBERS if doc.get(key) is not None}
    errors = [
        (key, f"{key!r} must be a whole number from {least} to {most}.")
        for key, (least, most) in JOB_NUMBERS.items()
        if key in numbers and not _is_whole(numbers[key], least, most)
    ]
    if errors:
        raise InvalidDocument(errors)
    return numbers


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


@contextmanager
def collecting(errors: list[tuple[str, str]], under: str = "") -> Iterator[None]:
    """Add the faults of an InvalidDocument to `errors`, so that all are told at once."""
    try:
        yield
    except InvalidDocument as error:
        errors += [
            (".".join(filter(None, (under, field))), message) for field, message in error.errors
        ]


def impossible(job: Job, done: str, advice: str) -> Conflict:
    return Conflict(f"Job {job.id} is {job.state} and cannot be {done}. {advice}", state=job.state)


# --------------------------------------------------------------------------------- what goes out


def model_document(session: Session, model: Model) -> Document:
    assert model.id is not None
    task = catalog.task_of_model(session, model.id)
    return {
        "id": model.id,
        "uri": model.spec["uri"],
        "spec": model.spec,
        "state": model.state,
        "error": error_document(model),
        "parameter_count": model.parameter_count,
        "tensor_count": model.tensor_count,
        "module_count": model.module_count,
        "fingerprint": model.fingerprint,
        "weights_digest": model.weights_digest,
        "task_id": None if task is None else task.id,
        "created_at": model.created_at,
    }


def config_row_document(row: FreezeConfigRow) -> Document:
    return {
        "id": row.id,
        "model_id": row.model_id,
        **row.document,
        "frozen_count": len(row.document["frozen"]),
        "trainable_count": len(row.document["trainable"]),
        "created_at": row.created_at,
        "updated_at": row.updated_at,
    }


def shorten_config(document: Document) -> Document:
    """A config's document with the lengths of its lists of names in their place."""
    counts = {f"{key}_count": len(document[key]) for key in ("frozen", "trainable")}
    return {**members(document, drop=("frozen", "trainable")), **counts}


def _percent(part_ms: float | None, whole_ms: float | None) -> float | None:
    return round(100 * part_ms / whole_ms, 2) if part_ms is not None and whole_ms else None


def job_document(session: Session, job: Job) -> Document:
    return job_documents(session, [job])[0]


def job_documents(session: Session, rows: Iterable[Job]) -> list[Document]:
    found = list(rows)
    ids = [job.id or 0 for job in found]
    attempts, peaks = jobs.newest_attempts(session, ids), jobs.newest_peaks(session, ids)
    is_any_queued = any(job.state == "queued" for job in found)
    positions = jobs.queue_positions(session) if is_any_queued else {}
    return [
        _describe_job(job, attempts.get(number), peaks.get(number), positions.get(number))
        for number, job in zip(ids, found, strict=True)
    ]


def attempt_document(attempt: Attempt) -> Document:
    return {
        "number": attempt.number,
        "device": attempt.device,
        "resume_step": attempt.resume_step,
        "resumed": attempt.resumed,
        "outcome": attempt.outcome,
        "error": None
        if attempt.reason is None
        else {"reason": attempt.reason, "message": attempt.message},
        "worker_pid": attempt.pid if attempt.ended_at is None else None,
        "peak_memory_bytes": attempt.peak_bytes,
        "peak_device_memory_bytes": attempt.peak_device_bytes,
        "started_at": attempt.started_at,
        "ended_at": attempt.ended_at,
    }


def _describe_job(
    job: Job, attempt: Attempt | None, peak: int | None, position: int | None
) -> Document:
    is_live = attempt is not None and attempt.ended_at is None
    is_running = job.state == "running"
    eta = None
    if is_running and job.total_steps is not None and job.step_ms is not None:
        eta = round(max(0, job.total_steps - job.step) * job.step_ms / 1000, 1)
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "name": job.name,
        "notes": job.notes,
        "model_id": job.model_id,
        "config_id": job.config_id,
        "sweep_id": job.sweep_id,
        **{key: job.spec[key] for key in ("model", "config", "dataset", "training")},
        "step": job.step,
        "total_steps": job.total_steps,
        "epoch": job.epoch,
        "eta_seconds": eta,
        "step_ms": job.step_ms,
        "peak_bytes": peak,
        "measure_percent": _percent(job.measure_ms, job.step_ms),
        "error": error_document(job),
        "worker_pid": attempt.pid if attempt is not None and is_live else None,
        "attempt": job.attempt,
        "priority": job.priority,
        "position": position,
        "waiting_for": job.waiting_for,
        "restarts_left": job.restarts_left,
        "is_restarting": job.is_restarting,
        "peak_memory_bytes": attempt and attempt.peak_bytes,
        "peak_device_memory_bytes": attempt and attempt.peak_device_bytes,
        "pause": job.wish if job.wish in ("hold", "release") else None,
        "proof": job.verdict,
        "device": job.spec["training"]["device"],
        "device_name": job.device_name,
        "device_bytes": job.device_bytes,
        "train_size": job.train_size,
        "warnings": job.warnings,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
    }


def error_document(row: Model | Job | Task) -> Document | None:
    if row.error_reason is None and row.error_message is None:
        return None
    return {"reason": row.error_reason, "message": row.error_message}


def iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()

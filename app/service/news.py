"""News: what happened to jobs since a reader's last look. It keeps nothing of who reads."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from sqlmodel import Session

from app.service.documents import Document, job_documents
from app.store import charts, files, jobs, samples
from app.store.tables import Job, Proof

Event = tuple[str, Any, str]

STEPS_A_CALL = 1_000
METRICS_A_CALL = 10_000
LOG_BYTES_A_CALL = 2**18


@dataclass(frozen=True, slots=True)
class Place:
    """How far a reader of one job's stream has come; as a text it is the cursor."""

    attempt: int = 0
    metric_id: int = 0
    step: int = -1
    log_bytes: int = 0
    proof_step: int = -1
    version: int = 0

    @classmethod
    def read(cls, cursor: str | None) -> "Place":
        """The place that a cursor names; the beginning for None and for what is no cursor."""
        numbers = (cursor or "").split(".")
        if len(numbers) != 6 or not all(re.fullmatch(r"-1|[0-9]{1,18}", n) for n in numbers):
            return cls()
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return ".".join(map(str, astuple(self)))


def find_end(session: Session, job: Job, folder: Path) -> Place:
    """The place behind everything that there is."""
    assert job.id is not None
    steps = samples.find_steps(session, job.id, after=-1, limit=1, newest=True)
    return Place(
        attempt=job.attempt,
        metric_id=samples.last_metric(session, job.id),
        step=steps[1] if steps else -1,
        log_bytes=files.log_size(folder),
        proof_step=_step_of(session.get(Proof, job.id)),
        version=job.version,
    )


def read_job_news(session: Session, job: Job, folder: Path, place: Place) -> Iterator[Event]:
    """Events behind a place, each (name, data, cursor behind it), in portions of bounded size.

    The state comes last, and only when nothing else is left: whoever reads that a job has ended
    has been told everything.
    """
    assert job.id is not None
    if place.attempt != job.attempt:
        # What older attempts recorded after the checkpoint that this one began with is superseded.
        resumed = jobs.resume_step(session, job)
        place = replace(place, attempt=job.attempt, step=min(place.step, resumed), proof_step=-1)

    series, last = samples.read_metrics_since(session, job.id, place.metric_id, METRICS_A_CALL)
    if series:
        place = replace(place, metric_id=last)
        yield "metrics", series, str(place)

    layers = samples.read_layers(session, job.id)
    portion = max(1, min(STEPS_A_CALL, charts.MAX_CELLS // max(1, len(layers))))
    # From the beginning only the last of them: whoever wants all of a long job reads the route.
    span = samples.find_steps(session, job.id, place.step, portion, newest=place.step < 0)
    if span is not None:
        for data in _read_layers(session, job.id, layers, *span):
            # The first two keep the old step: who leaves between them gets all three again.
            if data["stat"] == "weight_norm":
                place = replace(place, step=span[1])
            yield "layers", data, str(place)

    proof = session.get(Proof, job.id)
    if proof is not None and _step_of(proof) != place.proof_step:
        place = replace(place, proof_step=_step_of(proof))
        yield "proof", proof.document, str(place)

    printed = files.read_logs(folder, place.log_bytes, LOG_BYTES_A_CALL)
    text, taken = _decode(printed)
    if text:
        place = replace(place, log_bytes=place.log_bytes + taken)
        yield "log", {"text": text}, str(place)

    is_cut = (
        len(printed) == LOG_BYTES_A_CALL
        or last < samples.last_metric(session, job.id)
        or samples.find_steps(session, job.id, place.step, 1, newest=False) is not None
    )
    if not is_cut and job.version > place.version:
        place = replace(place, version=job.version)
        yield "state", job_documents(session, [job])[0], str(place)


def read_all_news(session: Session, version: int) -> list[Event]:
    """The states of the jobs that changed after a version, a hundred at most, in that order."""
    changed = jobs.jobs_changed_since(session, version, limit=100)
    documents = job_documents(session, changed)
    return [("state", d, str(job.version)) for job, d in zip(changed, documents, strict=True)]


def _read_layers(
    session: Session, job_id: int, layers: list[str], first: int, last: int
) -> Iterator[Document]:
    everywhere = range(len(layers))
    for stat in ("grad_norm", "update_norm", "weight_norm"):
        steps, values = charts.read_matrix(
            session, job_id, stat, everywhere, first=first, last=last
        )
        yield {"stat": stat, "layers": layers, "steps": steps, "values": values}


def _step_of(proof: Proof | None) -> int:
    return -1 if proof is None else int(proof.document.get("step", 0))


def _decode(data: bytes) -> tuple[str, int]:
    """The text, and how many bytes it took: a character that is half there waits for its rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, len(data) - len(decoder.getstate()[0])

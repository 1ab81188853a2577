"""Resuming: what of a job's training it may change, and whether anything is left to do then."""

from collections.abc import Mapping
from typing import Any

from app.service.documents import Conflict, Document, check_members
from app.store.tables import Job

ENDS = ("epochs", "max_steps", "patience")


def read_ends(job: Job, given: Any) -> Document:
    """The job's training options with another end: epochs, steps, or patience.

    New epochs take the place of steps, which would go before them otherwise.
    """
    check_members(given, ENDS, "training")
    replaced = {"max_steps": None} if given.get("epochs") is not None else {}
    return {**job.spec["training"], **replaced, **given}


def check_end(job: Job, training: Mapping[str, Any]) -> None:
    """See that a resume would find something to do.

    Raises:
        Conflict: the end lies behind the steps taken, or training ended early and would again.
    """
    if job.kind != "train" or job.total_steps is None:
        return
    before = job.spec["training"]
    same = all(training[key] == before[key] for key in ("epochs", "max_steps"))
    end = job.total_steps if same else _steps_of(job, training)
    if end is None or (job.state != "succeeded" and same):
        return
    if end <= job.step:
        raise Conflict(
            f"Job {job.id} has taken {job.step:,} steps and would end at step {end:,}. Resume it "
            "with more 'epochs' or 'max_steps'.",
            state=job.state,
        )
    if job.state == "succeeded" and training["patience"] == before["patience"]:
        patience = before["patience"]
        if patience is not None and job.step < job.total_steps:
            raise Conflict(
                f"Job {job.id} ended early after {patience:,} evaluations without a lower loss. "
                "Resume it with a larger 'patience', or null for none.",
                state=job.state,
            )


def _steps_of(job: Job, training: Mapping[str, Any]) -> int | None:
    """The steps that the options come to; None where nobody knows how many an epoch has."""
    if training["max_steps"] is not None:
        return int(training["max_steps"])
    before = job.spec["training"]
    if before["max_steps"] is None and job.total_steps:
        return int(job.total_steps // before["epochs"] * training["epochs"])
    return round(job.step / job.epoch * training["epochs"]) if job.epoch else None

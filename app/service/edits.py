"""Edits: changes of what is frozen while a job runs, checked before they are wished for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from app.freezing.config import (
    Change,
    FreezeConfig,
    Rule,
    expand_rules,
    match_names,
    parse_config,
    parse_rules,
    rule_document,
)
from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph
from app.service.documents import Conflict, Document, check_members, impossible
from app.store.tables import Attempt, Job

BEGINNINGS = ("optimizer_state", "lr_scale", "warmup_steps")
_ANYTHING = {"action": "unfreeze", "match": "**"}


def always_trains(config: FreezeConfig, graph: ModelGraph) -> bool:
    """Whether something is trainable at the start and after each point of the schedule.

    How many steps an epoch has is known to the loop alone. Where both units are mixed, both extreme
    orders are tried, and only what fails in both is refused; the loop sees the rest.
    """

    def trains(steps_per_epoch: int) -> bool:
        def begins(change: Change) -> float:
            return change.begins(steps_per_epoch)

        floating = {parameter.name for parameter in graph.parameters if parameter.floating}
        trainable = {name for name, frozen in expand_rules(config, graph).items() if not frozen}
        changes = sorted(config.schedule, key=begins)
        for index, change in enumerate(changes):
            if not trainable and begins(change) > (begins(changes[index - 1]) if index else 0):
                return False
            names = match_names(change.rule, graph) & floating
            trainable = trainable - names if change.rule.freezes else trainable | names
        return bool(trainable)

    return trains(1) or trains(10**10)


def read_edit(doc: Mapping[str, Any]) -> Document:
    """A live edit: the rules to append, and how what they unfreeze begins, as in a schedule."""
    check_members(doc, ("rules", *BEGINNINGS))
    if not doc.get("rules"):
        raise InvalidDocument([("rules", "'rules' must be a list of at least one rule.")])
    begins = {key: doc[key] for key in BEGINNINGS if doc.get(key) is not None}
    try:
        parse_config({"schedule": [{"at": {"step": 0}, **_ANYTHING, **begins}]})
    except InvalidDocument as error:
        faults = [(field.removeprefix("schedule.0."), text) for field, text in error.errors]
        raise InvalidDocument(faults) from error
    rules = [rule_document(rule) for rule in parse_rules(doc["rules"])]
    return {"rules": rules, "optimizer_state": "fresh", **begins}


def add_edit(job: Job, attempt: Attempt | None, graph: ModelGraph, edit: Mapping[str, Any]) -> None:
    """Append what `read_edit` read to the living attempt's, numbered as the next wish is.

    Raises:
        Conflict: the job does not train now, its mechanism allows no change, or nothing would be
            left to train.
    """
    if attempt is None or job.kind != "train" or job.state not in ("running", "paused"):
        raise impossible(
            job, "changed live", "Only training that runs, or is paused by 'hold', can."
        )
    config = parse_config(job.config)
    if config.mechanism != "requires_grad":
        raise Conflict(
            "Changing what is frozen needs the mechanism 'requires_grad'; job "
            f"{job.id} has {config.mechanism!r}.",
            state=job.state,
        )
    waiting = [earlier for earlier in attempt.edits if earlier["step"] is None]
    rules = [rule for one in (*waiting, edit) for rule in parse_rules(one["rules"])]
    now = replace(config, rules=(*config.rules, *_due_rules(config, job), *rules))
    if all(expand_rules(now, graph).values()):
        raise Conflict(
            "This would freeze the last trainable layer; keep one trainable.", state=job.state
        )
    numbered = {"seq": job.wish_seq + 1, **edit, "step": None}
    attempt.edits = [*attempt.edits, numbered]


def _due_rules(config: FreezeConfig, job: Job) -> list[Rule]:
    """Rules of the schedule that hold by now, in the order in which they began to."""
    steps_per_epoch = job.step / job.epoch if job.epoch else 1.0

    def begins(change: Change) -> float:
        return change.begins(steps_per_epoch)

    # Half a step: the quotient above is rounded.
    due = (change for change in config.schedule if begins(change) < job.step + 0.5)
    return [change.rule for change in sorted(due, key=begins)]


def edit_document(job: Job, attempt: Attempt, seq: int) -> Document:
    """An edit in words: `step` is the first step that it holds for, None until the loop said so.

    Raises:
        Conflict: it never took effect.
    """
    edit = next(edit for edit in attempt.edits if edit["seq"] == seq)
    if edit.get("is_refused"):
        raise Conflict(
            "This would have frozen the last trainable layer; nothing was changed.",
            state=job.state,
        )
    if edit["step"] is None and attempt.ended_at is not None:
        raise impossible(
            job, "changed any more", "It ended before the change; resume it with another config."
        )
    return {"id": job.id, "state": job.state, "attempt": attempt.number, **edit}

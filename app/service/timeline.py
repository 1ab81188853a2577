"""Timeline: what is frozen in a job now, and at which steps that changed. It changes nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from app.freezing.config import Change, FreezeConfig, expand_rules, match_names, rule_document
from app.freezing.graph import ModelGraph
from app.service.documents import Document
from app.store.tables import Attempt, Job


def describe_timeline(
    job: Job, attempts: Iterable[Attempt], config: FreezeConfig, graph: ModelGraph
) -> Document:
    """What a job froze when.

    Returns:
        ``frozen`` and ``trainable``: names after the job's last step, in model order; ``layers``:
        path → whether it began frozen; ``changes``: in the order in which they take effect, with
        the first `step` that each holds for (None while unknown), the `layers` that it turned, and
        whether the schedule or somebody's hand (``live``) made it; ``waiting``: live changes that
        the loop has not come to yet.
    """
    state = expand_rules(config, graph)
    began = _frozen_layers(graph, state)
    edits = [edit for attempt in attempts for edit in attempt.edits]
    by_hand = {
        (edit["step"], _key(rule)) for edit in edits if edit["step"] for rule in edit["rules"]
    }
    layers, changes = began, []
    now = dict(state)
    for change in sorted(config.schedule, key=lambda change: _first_step(job, change) or 10**18):
        step = _first_step(job, change)
        rule = rule_document(change.rule)
        for name in match_names(change.rule, graph):
            if graph.by_name[name].floating:
                state[name] = change.rule.freezes
        after = _frozen_layers(graph, state)
        if step is not None and step <= job.step + 1:
            now = dict(state)
        changes.append(
            {
                "step": step,
                **rule,
                "by": "live" if (step, _key(rule)) in by_hand else "schedule",
                "layers": [path for path, frozen in after.items() if frozen != layers[path]],
            }
        )
        layers = after
    return {
        "step": job.step,
        "frozen": [name for name, frozen in now.items() if frozen],
        "trainable": [name for name, frozen in now.items() if not frozen],
        "layers": began,
        "changes": changes,
        "waiting": [edit["rules"] for edit in edits if edit["step"] is None and not _is_over(edit)],
    }


def rules_now(job: Job, config: FreezeConfig) -> FreezeConfig:
    """The config with the changes of its schedule that hold by now among its rules."""
    due = [c for c in config.schedule if (_first_step(job, c) or 10**18) <= job.step + 1]
    due.sort(key=lambda change: _first_step(job, change) or 0)
    return replace(config, rules=(*config.rules, *(change.rule for change in due)), schedule=())


def _key(rule: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(rule.get(key, "") for key in ("action", "match", "type"))


def _is_over(edit: Mapping[str, object]) -> bool:
    return bool(edit.get("is_refused"))


def _first_step(job: Job, change: Change) -> int | None:
    """The first step that a change holds for."""
    if change.unit == "step":
        return change.count + 1
    steps = _steps_per_epoch(job)
    return None if steps is None else round(change.count * steps) + 1


def _steps_per_epoch(job: Job) -> float | None:
    training = job.spec["training"]
    if job.total_steps and not training.get("max_steps"):
        return float(job.total_steps / training["epochs"])
    return job.step / job.epoch if job.epoch else None


def _frozen_layers(graph: ModelGraph, state: Mapping[str, bool]) -> dict[str, bool]:
    """Path of every layer → whether everything that it owns is frozen."""
    names: Mapping[str, str] = graph.canonical_names

    def is_frozen(parameters: Sequence[str]) -> bool:
        return all(state[names[name]] for name in parameters)

    return {module.path: is_frozen(module.parameters) for module in graph.layers}

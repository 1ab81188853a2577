"""Findings: what a freeze config does that its author may not expect, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.freezing.config import (
    FreezeConfig,
    Group,
    Rule,
    held_norms,
    match_names,
    rule_document,
    unmatched_rules,
)
from app.freezing.globs import compile_match
from app.freezing.graph import ModelGraph, Module


@dataclass(frozen=True)
class Finding:
    """A finding in plain words with what to do; `code` is stable."""

    code: str
    message: str
    names: tuple[str, ...] = ()


def list_findings(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    """What a freeze config does to this model that its author may not expect, in plain words."""
    for find in _FINDERS:
        yield from find(graph, config, frozen)


def _nothing_trainable(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    if frozen and all(frozen.values()):
        yield Finding(
            "nothing_trainable",
            "Nothing is trainable, so there is nothing for backward() to do. "
            "Unfreeze a layer to train, or run an evaluation.",
        )


def _rules_without_effect(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    for index in unmatched_rules(config, graph):
        rule = rule_document(config.rules[index])
        shown = " and ".join(f"{k} {v!r}" for k, v in rule.items() if k != "action")
        yield Finding(
            "rule_without_match",
            f"Rule {index + 1} ({rule['action']} {shown}) matches no parameter of this model. "
            "Correct it, or remove it.",
        )
    entries = [change.rule for change in config.schedule]
    kinds: tuple[tuple[str, Sequence[Rule | Group]], ...] = (
        ("Group", config.groups),
        ("Schedule entry", entries),
    )
    for kind, covers in kinds:
        for index, cover in enumerate(covers):
            if not match_names(cover, graph):
                yield Finding(
                    "rule_without_match",
                    f"{kind} {index + 1} matches no parameter of this model. "
                    "Correct it, or remove it.",
                )
    if not config.rules and not any(frozen.values()):
        yield Finding(
            "nothing_frozen", "No rule freezes anything: this trains every parameter of the model."
        )


def _unreached(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    if graph.nodes:
        names = tuple(n for n in graph.unreached if not frozen[n])
        if names:
            yield Finding(
                "unreached",
                f"{len(names)} trainable parameters never receive a gradient: the loss does not "
                "depend on them. Freeze them, or check the model's forward.",
                names,
            )


def _tied_across_rules(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    for parameter in graph.tied:
        last: dict[str, bool] = {}
        for rule in config.rules:
            matches = _names_matched(rule.match)
            if parameter.name in match_names(rule, graph):
                last |= {n: rule.freezes for n in parameter.names if matches(n)}
        if len(last) == 0:
            continue
        if len(set(last.values())) > 1 or (
            len(last) < len(parameter.names)
            and frozen[parameter.name] != (not parameter.requires_grad)
        ):
            state = "frozen" if frozen[parameter.name] else "trainable"
            yield Finding(
                "tied_parameters",
                f"{' and '.join(parameter.names)} are one tensor, and the rules treat its names "
                f"differently: it is {state} under all of them.",
                parameter.names,
            )


def _names_matched(match: str | None) -> Callable[[str], bool]:
    return compile_match(match) if match else lambda _: True


def _norm_statistics(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    norms = held_norms((m.path for m in graph.modules if m.is_norm), frozen)
    if norms and config.norm_statistics == "update":
        yield Finding(
            "norm_statistics_drift",
            f"Of frozen norm layers ({len(norms)}) the running statistics go on moving, so what "
            "they compute changes. Choose norm_statistics 'freeze' to hold them still.",
            tuple(norms),
        )


def _mechanism(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    if config.mechanism == "requires_grad" or not any(frozen.values()):
        return
    yield Finding(
        "mechanism_saves_nothing",
        f"The mechanism {config.mechanism!r} computes the gradients of frozen parameters all the "
        "same, so the freeze saves no time and no gradient memory. 'requires_grad' does.",
    )
    if config.mechanism == "zero_grad":
        yield Finding(
            "frozen_weights_move",
            "Zeroed gradients do not keep weights still: weight decay and momentum go on moving "
            "them. Use 'requires_grad', or SGD without momentum and weight decay.",
            tuple(n for n, is_frozen in frozen.items() if is_frozen and graph.by_name[n].floating),
        )


def _modules_that_move(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    def is_frozen(module: Module) -> bool:
        prefix = f"{_owner(module)}." if _owner(module) else ""
        below = [n for n in graph.canonical_names if n.startswith(prefix)]
        return bool(below) and all(frozen[graph.canonical_names[n]] for n in below)

    renormed = [m for m in graph.with_facts if m.facts.get("max_norm") is not None and is_frozen(m)]
    if renormed:
        yield Finding(
            "max_norm",
            "A frozen embedding with max_norm rewrites its rows in forward, whatever is frozen. "
            "Remove max_norm to hold it still.",
            tuple(m.path for m in renormed),
        )
    spectral = [m for m in graph.with_facts if m.facts.get("spectral_norm") and is_frozen(m)]
    if spectral:
        yield Finding(
            "spectral_norm",
            "Spectral norm moves its buffers in every forward in train mode, so the effective "
            "weight of these frozen layers changes. Remove it, or keep them in eval mode.",
            tuple(_owner(m) for m in spectral),
        )
    if config.dropout == "keep":
        dropouts = [m.path for m in graph.with_facts if m.facts.get("dropout")]
        held = held_norms(dropouts, frozen)
        if held:
            yield Finding(
                "frozen_dropout",
                f"Dropout modules inside frozen ones ({len(held)}) stay random while training. "
                "Choose dropout 'off' to make the frozen part deterministic.",
                tuple(held),
            )


def _owner(module: Module) -> str:
    """Path of the layer that a parametrization belongs to; of any other module its own."""
    before, is_parametrization, _ = f".{module.path}".partition(".parametrizations.")
    return before.removeprefix(".") if is_parametrization else module.path


def _reentrant_checkpoints(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    if not graph.reentrant:
        return
    live: list[bool] = []
    for node in graph.nodes:
        own = node.parameter == "" or (bool(node.parameter) and not frozen[node.parameter or ""])
        live.append(own or any(i >= 0 and live[i] for i in node.inputs))
    cut = [index for index in graph.reentrant if not live[index]]
    where = tuple(dict.fromkeys(graph.nodes[i].module or "" for i in cut or graph.reentrant))
    does = (
        "will cut gradients here: nothing before it is trained, so that everything inside it gets "
        "no gradient, with only a warning"
        if cut
        else "cuts gradients as soon as everything before it is frozen"
    )
    yield Finding(
        "reentrant_checkpointing",
        f"Reentrant checkpointing {does}. Call checkpoint(…, use_reentrant=False).",
        where,
    )


def _not_floating(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    names = graph.not_floating
    if names:
        yield Finding(
            "not_floating",
            f"Parameters that are not floating point (quantised, {len(names)}) cannot be trained: "
            "they stay frozen whatever the rules say.",
            names,
        )


def _untraced(
    graph: ModelGraph, config: FreezeConfig, frozen: Mapping[str, bool]
) -> Iterator[Finding]:
    if not graph.nodes:
        yield Finding(
            "untraced",
            f"The model could not be traced, so flow states follow the order of its modules and "
            f"FLOPs, activation and peak memory are not known. {graph.trace_note}".strip(),
        )
    elif graph.traced_by != "fake":
        yield Finding(
            "traced_for_real",
            "Fake tensors did not do for this model, so one real batch was run to trace it. "
            + graph.trace_note,
        )
    if graph.nodes and graph.memory is None:
        yield Finding(
            "peak_unknown",
            "What a step holds at most could not be seen, so that peak memory and whether it fits "
            f"are not known. {graph.trace_note or 'The model was traced by an older version.'}",
        )


_FINDERS = (
    _nothing_trainable,
    _rules_without_effect,
    _unreached,
    _tied_across_rules,
    _norm_statistics,
    _mechanism,
    _modules_that_move,
    _reentrant_checkpoints,
    _not_floating,
    _untraced,
)

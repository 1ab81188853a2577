"""The freeze config: ordered rules over names, as an immutable value and as JSON. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.freezing.errors import MAX_FAULTS, InvalidDocument, describe_unknown, show_value
from app.freezing.globs import compile_match
from app.freezing.graph import ModelGraph

FORMAT = "frostline.freeze-config"
VERSION = 1
MECHANISMS = ("requires_grad", "exclude", "zero_lr", "zero_grad")
NORM_POLICIES = ("freeze", "update")
DROPOUT_POLICIES = ("keep", "off")
MAX_RULES = 1_000


@dataclass(frozen=True, slots=True)
class Rule:
    """Freeze or unfreeze what `match` (glob, ``re:``, ``has:``) and `type` (a class) both cover."""

    action: str
    match: str | None = None
    type: str | None = None

    @property
    def freezes(self) -> bool:
        return self.action == "freeze"


@dataclass(frozen=True, slots=True)
class Group:
    """Learning-rate factor and weight decay of the parameters that it covers."""

    match: str | None = None
    type: str | None = None
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A rule that is appended after so many whole epochs or so many optimizer steps.

    Attributes:
        unit: what `count` counts, ``epoch`` or ``step``.
        optimizer_state: what the unfrozen begin with: ``fresh``, or ``keep`` for what was parked.
        lr_scale: the factor on the rate of what this unfreezes, beside that of its group.
        warmup_steps: steps over which the rate of what this unfreezes rises linearly from 0.
    """

    rule: Rule
    unit: str
    count: int
    optimizer_state: str = "fresh"
    lr_scale: float = 1.0
    warmup_steps: int = 0

    def begins(self, steps_per_epoch: float) -> float:
        """After how many steps it holds."""
        return self.count * (steps_per_epoch if self.unit == "epoch" else 1)


@dataclass(frozen=True, slots=True)
class FreezeConfig:
    """What is frozen when: the value behind the JSON document that people download.

    Attributes:
        rules: in order; the last one that matches a parameter decides.
        frozen: the names that the document claims its rules freeze; None where it claims nothing.
        trainable: likewise, every other parameter.
        model: ``{"uri", "fingerprint"}`` of the model that it was written for.
    """

    rules: tuple[Rule, ...] = ()
    name: str = ""
    mechanism: str = "requires_grad"
    norm_statistics: str = "freeze"
    dropout: str = "keep"
    groups: tuple[Group, ...] = ()
    schedule: tuple[Change, ...] = ()
    model: Mapping[str, Any] | None = None
    frozen: tuple[str, ...] | None = None
    trainable: tuple[str, ...] | None = None


# ---------------------------------------------------------------------------------------- reading


def parse_config(document: Any) -> FreezeConfig:
    """Read a freeze config; ``{}`` is one without rules.

    Raises:
        InvalidDocument: with every fault that was found, each under its field.
    """
    reader = _Reader(document)
    reader.check_keys(
        "", document,
        "format", "version", "name", "model", "rules", "mechanism", "norm_statistics", "dropout",
        "groups", "schedule", "frozen", "trainable",
    )  # fmt: skip
    if document.get("format", FORMAT) != FORMAT:
        reader.fault(
            "format", f"The format is {show_value(document['format'])}; it must be {FORMAT!r}."
        )
    if document.get("version", VERSION) != VERSION or document.get("version") is True:
        reader.fault(
            "version",
            f"Version {show_value(document['version'])} is not known; this reads {VERSION}.",
        )
    config = FreezeConfig(
        rules=tuple(reader.rules()),
        name=reader.text("name", limit=200),
        mechanism=reader.choice("mechanism", MECHANISMS),
        norm_statistics=reader.choice("norm_statistics", NORM_POLICIES),
        dropout=reader.choice("dropout", DROPOUT_POLICIES),
        groups=tuple(reader.groups()),
        schedule=tuple(reader.changes()),
        model=reader.model(),
        frozen=reader.names("frozen"),
        trainable=reader.names("trainable"),
    )
    if config.schedule and config.mechanism != "requires_grad":
        reader.fault(
            "schedule",
            f"A schedule needs the mechanism 'requires_grad'; this has {config.mechanism!r}.",
        )
    if reader.errors:
        raise InvalidDocument(reader.errors)
    return config


def parse_rules(items: Any) -> tuple[Rule, ...]:
    """Read rules alone, as a live edit sends them. Raises InvalidDocument."""
    return parse_config({"rules": items}).rules


class _Reader:
    """Collects faults while a document is read, so that all of them are told at once."""

    def __init__(self, document: Any) -> None:
        if not isinstance(document, Mapping):
            raise InvalidDocument(
                [("", f"A freeze config is a JSON object; this is {_kind(document)}.")]
            )
        self.document = document
        self.errors: list[tuple[str, str]] = []

    def fault(self, field: str, message: str) -> None:
        self.errors.append((field, message))

    def check_keys(self, field: str, item: Mapping[str, Any], *known: str) -> None:
        for key in [key for key in item if key not in known][:MAX_FAULTS]:
            where = f"{field}.{key}" if field else str(key)
            self.fault(where[:100], describe_unknown(key, known, "a key here"))

    def text(self, key: str, limit: int) -> str:
        value = self.document.get(key, "")
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > limit:
            self.fault(key, f"{key!r} must be a text of at most {limit} characters.")
            return ""
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.document.get(key, choices[0])
        if value not in choices or not isinstance(value, str):
            self.fault(key, f"{key!r} is {show_value(value)}; it may be {_either(choices)}.")
            return choices[0]
        return value

    def items(self, key: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
        value = self.document.get(key, [])
        if not isinstance(value, list | tuple):
            self.fault(key, f"{key!r} must be a list; this is {_kind(value)}.")
            return
        if len(value) > MAX_RULES:
            self.fault(key, f"{key!r} has {len(value):,} entries; at most {MAX_RULES:,} are read.")
            return
        for index, item in enumerate(value):
            field = f"{key}.{index}"
            if isinstance(item, Mapping):
                yield field, item
            else:
                self.fault(field, f"Each entry of {key!r} is an object; this is {_kind(item)}.")

    def rules(self) -> Iterable[Rule]:
        for field, item in self.items("rules"):
            self.check_keys(field, item, "action", "match", "type")
            yield self.rule(field, item)

    def rule(self, field: str, item: Mapping[str, Any]) -> Rule:
        action = item.get("action")
        if action not in ("freeze", "unfreeze") or not isinstance(action, str):
            self.fault(
                f"{field}.action",
                f"The action is {show_value(action)}; it may be 'freeze' or 'unfreeze'.",
            )
            action = "freeze"
        return Rule(action, *self.cover(field, item))

    def cover(self, field: str, item: Mapping[str, Any]) -> tuple[str | None, str | None]:
        match, type_ = item.get("match"), item.get("type")
        if match is None and type_ is None:
            self.fault(field, "A 'match' (a glob on names) or a 'type' (a module class) is needed.")
        if match is not None:
            try:
                if not isinstance(match, str):
                    raise ValueError(f"'match' must be a text; this is {_kind(match)}.")
                compile_match(match)
            except ValueError as error:
                self.fault(f"{field}.match", str(error))
                match = None
        if type_ is not None and (not isinstance(type_, str) or not type_):
            self.fault(
                f"{field}.type", "'type' must be the name of a module class, as 'LayerNorm'."
            )
            type_ = None
        return match, type_

    def groups(self) -> Iterable[Group]:
        for field, item in self.items("groups"):
            self.check_keys(field, item, "match", "type", "lr_scale", "weight_decay")
            scale = self.number(f"{field}.lr_scale", item.get("lr_scale", 1.0), least=0.0)
            decay = item.get("weight_decay")
            if decay is not None:
                decay = self.number(f"{field}.weight_decay", decay, least=0.0)
            yield Group(*self.cover(field, item), scale, decay)

    def changes(self) -> Iterable[Change]:
        for field, item in self.items("schedule"):
            self.check_keys(
                field, item,
                "at", "action", "match", "type", "optimizer_state", "lr_scale", "warmup_steps",
            )  # fmt: skip
            at = item.get("at")
            if (
                not isinstance(at, Mapping)
                or len(at) != 1
                or next(iter(at)) not in ("epoch", "step")
                or not _is_count(next(iter(at.values())))
            ):
                self.fault(
                    f"{field}.at", "'at' must be {'epoch': n} or {'step': n} with a whole n ≥ 0."
                )
                at = {"epoch": 0}
            state = item.get("optimizer_state", "fresh")
            if state not in ("fresh", "keep"):
                self.fault(
                    f"{field}.optimizer_state", "'optimizer_state' may be 'fresh' or 'keep'."
                )
                state = "fresh"
            ((unit, count),) = at.items()
            yield Change(self.rule(field, item), unit, count, state, *self.pace(field, item))

    def pace(self, field: str, item: Mapping[str, Any]) -> tuple[float, int]:
        """(lr_scale, warmup_steps) of what an entry unfreezes."""
        given = [key for key in ("lr_scale", "warmup_steps") if key in item]
        if given and item.get("action") == "freeze":
            self.fault(
                f"{field}.{given[0]}", f"{given[0]!r} is for what an entry unfreezes; this freezes."
            )
        warmup = item.get("warmup_steps", 0)
        if not _is_count(warmup):
            self.fault(
                f"{field}.warmup_steps", "'warmup_steps' must be a whole number from 0 to 10⁹."
            )
            warmup = 0
        return self.number(f"{field}.lr_scale", item.get("lr_scale", 1.0), least=0.0), warmup

    def number(self, field: str, value: Any, least: float) -> float:
        name = field.rsplit(".", 1)[-1]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(field, f"{name!r} must be a number; this is {_kind(value)}.")
        elif not least <= value <= sys.float_info.max:
            shown = show_value(value)
            self.fault(field, f"{name!r} is {shown}; it must be finite and at least {least:g}.")
        else:
            return float(value)
        return least

    def model(self) -> Mapping[str, Any] | None:
        value = self.document.get("model")
        if value is not None and not isinstance(value, Mapping):
            self.fault("model", "'model' must be an object with 'uri' and 'fingerprint'.")
            return None
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        value = self.document.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            self.fault(key, f"{key!r} must be a list of parameter names.")
            return None
        return tuple(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        type(None): "null",
    }
    if type(value) in names:
        return names[type(value)]
    return f"the number {show_value(value)}" if isinstance(value, int | float) else "something else"


def _either(choices: Sequence[str]) -> str:
    return ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**9


# ---------------------------------------------------------------------------------------- writing


def config_document(config: FreezeConfig, graph: ModelGraph | None = None) -> dict[str, Any]:
    """The config in the contract's JSON; with a graph, its rules expanded on that model."""
    model = dict(config.model) if config.model is not None else None
    frozen, trainable = config.frozen, config.trainable
    if graph is not None:
        model = {"uri": None, **(model or {}), "fingerprint": graph.fingerprint}
        frozen, trainable = split_names(config, graph)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": config.name,
        "model": model,
        "rules": [rule_document(rule) for rule in config.rules],
        "mechanism": config.mechanism,
        "norm_statistics": config.norm_statistics,
        "dropout": config.dropout,
        "groups": [_group_document(group) for group in config.groups],
        "schedule": [_change_document(change) for change in config.schedule],
    }
    if frozen is not None:
        document["frozen"] = list(frozen)
    if trainable is not None:
        document["trainable"] = list(trainable)
    return document


def rule_document(rule: Rule) -> dict[str, str]:
    return {"action": rule.action, **_cover_document(rule)}


def _cover_document(cover: Rule | Group) -> dict[str, str]:
    items = (("match", cover.match), ("type", cover.type))
    return {key: value for key, value in items if value is not None}


def _group_document(group: Group) -> dict[str, Any]:
    decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
    return {**_cover_document(group), "lr_scale": group.lr_scale, **decay}


def _change_document(change: Change) -> dict[str, Any]:
    usual = Change(change.rule, change.unit, change.count)
    special = {
        key: getattr(change, key)
        for key in ("optimizer_state", "lr_scale", "warmup_steps")
        if getattr(change, key) != getattr(usual, key)
    }
    return {"at": {change.unit: change.count}, **rule_document(change.rule), **special}


# -------------------------------------------------------------------------------------- expanding


def due_changes(config: FreezeConfig, step: int, steps_per_epoch: int) -> list[Change]:
    """The entries of the schedule that hold after `step` steps, in the order they began."""

    def begins(change: Change) -> float:
        return change.begins(steps_per_epoch)

    return sorted((c for c in config.schedule if begins(c) <= step), key=begins)


def match_names(cover: Rule | Group, graph: ModelGraph) -> frozenset[str]:
    """First names of the parameters that a rule or group covers, by any of their names."""
    found = graph.matches.get((cover.match, cover.type))
    if found is None:
        found = frozenset(_match_names(cover, graph))
        if len(graph.matches) >= MAX_RULES:
            graph.matches.clear()
        graph.matches[cover.match, cover.type] = found
    return found


def _match_names(cover: Rule | Group, graph: ModelGraph) -> Iterator[str]:
    matches: Callable[[str], bool] = compile_match(cover.match) if cover.match else lambda _: True
    for name, first in graph.canonical_names.items():
        if matches(name) and (cover.type is None or cover.type in graph.owner_types[first]):
            yield first


def expand_rules(config: FreezeConfig, graph: ModelGraph) -> dict[str, bool]:
    """First name of every parameter, in model order → whether it is frozen.

    The last rule that matches any name of a parameter decides; one that no rule matches stays as
    the model came; one that is not floating point is always frozen.
    """
    frozen = graph.came_frozen.copy()
    for rule in config.rules:
        frozen.update(dict.fromkeys(match_names(rule, graph), rule.freezes))
    frozen.update(dict.fromkeys(graph.not_floating, True))
    return frozen


def split_names(config: FreezeConfig, graph: ModelGraph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(frozen, trainable) first names, each in model order."""
    state = expand_rules(config, graph)
    frozen = tuple(name for name, is_frozen in state.items() if is_frozen)
    return frozen, tuple(name for name, is_frozen in state.items() if not is_frozen)


def unmatched_rules(config: FreezeConfig, graph: ModelGraph) -> list[int]:
    """Indices of the rules that match no parameter of this model."""
    return [index for index, rule in enumerate(config.rules) if not match_names(rule, graph)]


def differing_names(config: FreezeConfig, graph: ModelGraph) -> dict[str, list[str]]:
    """Where the names in a document disagree with what its rules give on this model.

    Returns:
        ``frozen``: names that the document calls frozen and the rules leave trainable;
        ``trainable``: the reverse; ``unknown``: names in the document that the model lacks;
        ``missing``: parameters of the model that the document does not mention. All empty where the
        document lists no names.
    """
    if config.frozen is None and config.trainable is None:
        return {"frozen": [], "trainable": [], "unknown": [], "missing": []}
    state = expand_rules(config, graph)
    first = graph.canonical_names
    claimed = {first[name]: True for name in config.frozen or () if name in first}
    claimed |= {first[name]: False for name in config.trainable or () if name in first}
    named = (*(config.frozen or ()), *(config.trainable or ()))
    both_listed = config.frozen is not None and config.trainable is not None
    return {
        "frozen": [n for n, is_frozen in state.items() if claimed.get(n) is True and not is_frozen],
        "trainable": [n for n, is_frozen in state.items() if claimed.get(n) is False and is_frozen],
        "unknown": [name for name in named if name not in first],
        "missing": [name for name in state if name not in claimed] if both_listed else [],
    }


def held_norms(norm_paths: Iterable[str], frozen: Mapping[str, bool]) -> list[str]:
    """The norm layers whose running statistics ``norm_statistics: freeze`` holds still.

    Those whose parameters are all frozen; one without parameters follows the nearest module around
    it that has some.

    Args:
        frozen: any or all names of every parameter → whether it is frozen.
    """
    norm_paths = list(norm_paths)
    if not norm_paths:
        return []
    below: dict[str, bool] = {}  # module path → whether all parameters at and below it are frozen
    for name, is_frozen in frozen.items():
        path = name
        while path:
            path = path.rpartition(".")[0]
            below[path] = below.get(path, True) and is_frozen
    held = []
    for path in norm_paths:
        around = path
        while around not in below and around:
            around = around.rpartition(".")[0]
        if below.get(around, False):
            held.append(path)
    return held

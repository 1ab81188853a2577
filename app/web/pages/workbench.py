"""What somebody has chosen on the workbench, read from an address or a form and written back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from app.freezing.assume import parse_assumption
from app.freezing.config import FreezeConfig, Rule, config_document, parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph
from app.freezing.presets import preset_config, tick_module
from app.training.recipe import OPTIONS
from app.web.pages.entries import (
    COLUMNS,
    MEMBERS,
    Document,
    Entry,
    Items,
    entries_of,
    find_faults,
    part_of,
    read_entries,
    text_of_rule,
    typed,
    write_entries,
)
from app.web.pages.training_form import dataset_request, training_request

ASSUMED = ("batch_size", "sequence_length", "image_size", "optimizer", "precision")
POLICIES = ("mechanism", "norm_statistics", "dropout")
_DEFAULT_POLICIES = {key: str(config_document(FreezeConfig())[key]) for key in POLICIES}
# As a form holds them.
_DEFAULT_OPTIONS = {
    option.name: str(option.default).lower() if option.kind == "bool" else str(option.default)
    for option in OPTIONS
}


@dataclass(frozen=True)
class Choice:
    """Everything chosen on one model's page.

    Attributes:
        rules, phases, groups: as typed (see `entries`), also those that cannot be used.
        base: the saved freeze config that this began as.
        opened: indices of the open modules; None before anybody chose.
        training: what was typed into the training form, by field name.
        assumed: what the plan is to assume instead of what the training form says.
    """

    rules: tuple[Entry, ...] = ()
    phases: tuple[Entry, ...] = ()
    groups: tuple[Entry, ...] = ()
    policies: Mapping[str, str] = field(default_factory=dict)
    base: Document | None = None
    config_name: str = ""
    opened: frozenset[int] | None = None
    search: str = ""
    training: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> Mapping[str, tuple[Entry, ...]]:
        return {"rule": self.rules, "phase": self.phases, "group": self.groups}

    def faults(self, kind: str) -> dict[int, str]:
        """Index of each entry of a kind that cannot be used → why."""
        return dict(find_faults(kind, self.entries[kind], self.policies["mechanism"]))

    def config(self, *, usable_only: bool = True) -> FreezeConfig:
        """The freeze config that was chosen.

        Raises:
            InvalidDocument: an entry or policy cannot be used; of the entries only without
                `usable_only`, since a page is shown while somebody is still typing.
        """
        parts = {}
        for kind, entries in self.entries.items():
            faults = self.faults(kind) if usable_only else {}
            kept = (entry for index, entry in enumerate(entries) if index not in faults)
            parts[MEMBERS[kind]] = [part_of(kind, entry) for entry in kept]
        began = self.base or {}
        model = {"model": began["model"]} if began.get("model") else {}
        policies = {key: value for key, value in self.policies.items() if value}
        name = self.config_name or began.get("name") or ""
        return parse_config({**model, **policies, "name": name, **parts})

    def with_rules(self, rules: Iterable[Rule]) -> Choice:
        """The same choice with other rules; what could not be used stays, to be mended."""
        faults = self.faults("rule")
        unusable = tuple(rule for index, rule in enumerate(self.rules) if index in faults)
        return replace(self, rules=(*((r.action, text_of_rule(r)) for r in rules), *unusable))

    def address(self) -> str:
        """The query string that `read_choice` reads back."""
        items: list[tuple[str, str]] = []
        if self.base:
            items.append(("config", str(self.base["id"])))
        for kind, entries in self.entries.items():
            items += [(key, str(v)) for key, v in write_entries(kind, entries, self.base)]
        began = self.base or {}
        items += [
            (key, value)
            for key, value in self.policies.items()
            if value and value != began.get(key, _DEFAULT_POLICIES[key])
        ]
        if self.opened is not None:
            items.append(("open", ",".join(map(str, sorted(self.opened)))))
        items += [("search", self.search)] * bool(self.search)
        given = self.training.items()
        items += [(f"train.{n}", v) for n, v in given if v and v != _DEFAULT_OPTIONS.get(n)]
        items += [(f"assume.{name}", value) for name, value in self.assumed.items() if value]
        return urlencode(items)

    @property
    def is_changed(self) -> bool:
        """Whether it differs from the saved freeze config that it began as."""
        if not self.base:
            return False
        began = read_choice([], self.base)
        return self.entries != began.entries or dict(self.policies) != dict(began.policies)


def read_choice(items: Items, base: Document | None) -> Choice:
    """The choice in an address or a form; `base` is the saved config that ``config`` names."""
    values: dict[str, str] = dict(items)
    began = base or {}
    opened = None
    if "open" in values:
        opened = frozenset(int(part) for part in values["open"].split(",") if _is_index(part))
    rules, phases, groups = (read_entries(kind, items, base) for kind in COLUMNS)
    return Choice(
        rules=rules,
        phases=phases,
        groups=groups,
        policies={
            key: values.get(key) or str(began.get(key) or _DEFAULT_POLICIES[key])
            for key in POLICIES
        },
        base=base,
        config_name=values.get("config_name", "").strip(),
        opened=opened,
        search=values.get("search", "").strip(),
        training=_filled("train.", items),
        assumed=_filled("assume.", items),
    )


def _filled(prefix: str, items: Items) -> dict[str, str]:
    return {
        key.removeprefix(prefix): value.strip()
        for key, value in items
        if key.startswith(prefix) and value.strip()
    }


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 8


def act(choice: Choice, graph: ModelGraph, items: Items) -> Choice:
    """The choice after the button that was pressed: a tick, a preset, an entry added or removed.

    Raises:
        InvalidDocument: the button names a row, a preset or a rule that does not exist.
    """
    values = dict(items)
    if "tick" in values:
        action, _, path = values["tick"].partition(":")
        ticked = tick_module(choice.config(), graph, path, action == "freeze")
        return choice.with_rules(ticked.rules)
    if "preset" in values:
        count = values.get(f"count.{values['preset']}", "").strip()
        number = int(count) if _is_index(count) else None
        preset = preset_config(values["preset"], graph, number)
        if not preset.groups:
            return choice.with_rules(preset.rules)
        # It is about rates alone: what is frozen stays as it is.
        return replace(choice, groups=entries_of("group", config_document(preset)))
    if "remove" in values:
        kind, index = _read_place(choice, values["remove"])
        return _with_entries(choice, kind, _without(choice.entries[kind], index))
    if "up" in values:
        kind, index = _read_place(choice, values["up"])
        entries = choice.entries[kind]
        before, moved = max(index - 1, 0), entries[index : index + 1]
        rest = _without(entries, index)
        return _with_entries(choice, kind, (*rest[:before], *moved, *rest[before:]))
    if values.get("add_text", "").strip():
        added = (values.get("add_action") or "freeze", values["add_text"].strip())
        return replace(choice, rules=(*choice.rules, added))
    return choice


def _read_place(choice: Choice, text: str) -> tuple[str, int]:
    """``rule:2`` → the kind and the index of an entry."""
    kind, _, index = text.partition(":")
    if kind not in COLUMNS or not _is_index(index) or int(index) >= len(choice.entries[kind]):
        raise InvalidDocument([("", f"There is no {text!r} any more; the list has changed.")])
    return kind, int(index)


def _without(entries: tuple[Entry, ...], gone: int) -> tuple[Entry, ...]:
    return entries[:gone] + entries[gone + 1 :]


def _with_entries(choice: Choice, kind: str, entries: tuple[Entry, ...]) -> Choice:
    changed = {**choice.entries, kind: entries}
    return replace(choice, rules=changed["rule"], phases=changed["phase"], groups=changed["group"])


def assumption(choice: Choice) -> tuple[Document, dict[str, str]]:
    """What the plan is to assume: what was said for it, else what the training form says.

    Returns:
        The values, and for each that was said but cannot be used, why not.
    """
    defaults: dict[str, Any] = {o.name: o.default for o in OPTIONS if o.name in ASSUMED}
    assume: Document = {}
    faults: dict[str, str] = {}
    for name in ASSUMED:
        # the last that can be used wins; one that is still being typed is left out
        for values, is_said in ((choice.training, False), (choice.assumed, True)):
            value = typed(values.get(name, "")) or defaults.get(name)
            if value is None or (is_said and name not in values):
                continue
            try:
                parse_assumption({name: value})
                assume[name] = value
            except InvalidDocument as error:
                faults |= {name: str(error)} if is_said else {}
    return assume, faults


def plan_request(choice: Choice) -> Document:
    """The body of a plan: the freeze config, and what is to be assumed."""
    return {**config_document(choice.config()), "assume": assumption(choice)[0]}


def job_request(choice: Choice, model_id: int, kind: str) -> Document:
    """The body that starts a job from what was typed; wrong values travel on, to be refused."""
    return {
        "kind": kind,
        "model_id": model_id,
        "config": config_document(choice.config(usable_only=False)),
        "dataset": dataset_request(choice.training),
        "training": training_request(choice.training),
        "name": choice.training.get("name", ""),
    }


def shown_entries(choice: Choice, kind: str) -> Iterator[tuple[Entry, str]]:
    """Each entry of a kind with what is wrong with it, "" where nothing is."""
    faults = choice.faults(kind)
    for index, entry in enumerate(choice.entries[kind]):
        yield entry, faults.get(index, "")

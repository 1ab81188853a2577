"""Rules, phases and groups as people type them: in an address, in a form, in a freeze config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.freezing.config import Group, Rule, parse_config
from app.freezing.errors import InvalidDocument

Document = dict[str, Any]
Items = Sequence[tuple[str, str]]
Entry = tuple[str, ...]

# In an address an entry is its columns joined by colons, as rule=freeze:encoder.**; in a form each
# column is a field, as rule_action and rule_text. The text comes last: it may hold colons itself.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "rule": ("action", "text"),
    "phase": ("unit", "count", "action", "state", "text"),
    "group": ("lr_scale", "weight_decay", "text"),
}
MEMBERS: Mapping[str, str] = {"rule": "rules", "phase": "schedule", "group": "groups"}


def read_entries(kind: str, items: Items, base: Document | None) -> tuple[Entry, ...]:
    """The entries of one kind in an address or a form; those of `base` where neither says any."""
    columns = COLUMNS[kind]
    stated = [value for key, value in items if key == kind]
    typed_in = [[v for key, v in items if key == f"{kind}_{column}"] for column in columns]
    if base and not stated and not any(key == "form" for key, _ in items):
        return entries_of(kind, base)
    split = [tuple(value.split(":", len(columns) - 1)) for value in stated if value]
    entries = [entry for entry in split if len(entry) == len(columns)]
    entries += [entry for entry in zip(*typed_in, strict=False) if entry[-1].strip()]
    return tuple(entries)


def write_entries(kind: str, entries: Sequence[Entry], base: Document | None) -> list[Entry]:
    """The address items that `read_entries` reads back."""
    began = entries_of(kind, base) if base else ()
    if tuple(entries) == began:
        return []
    if not entries:
        return [(kind, "")]  # none at all, which is not the same as those of the base
    return [(kind, ":".join(entry)) for entry in entries]


def entries_of(kind: str, config: Mapping[str, Any]) -> tuple[Entry, ...]:
    """The entries of a freeze config's document."""
    return tuple(_entry(kind, part) for part in config.get(MEMBERS[kind]) or ())


def config_items(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The address items that open the workbench with the rules, phases and groups of a config."""
    return [(kind, ":".join(entry)) for kind in COLUMNS for entry in entries_of(kind, config)]


def _entry(kind: str, part: Mapping[str, Any]) -> Entry:
    text = text_of_cover(part.get("match"), part.get("type"))
    if kind == "rule":
        return part["action"], text
    if kind == "phase":
        ((unit, count),) = part["at"].items()
        return unit, str(count), part["action"], part.get("optimizer_state") or "fresh", text
    scale, decay = part.get("lr_scale", 1.0), part.get("weight_decay")
    return f"{scale:g}", "" if decay is None else f"{decay:g}", text


def part_of(kind: str, entry: Entry) -> Document:
    """The entry as its part of a freeze config, wrong values included."""
    cover = cover_of_text(entry[-1])
    if kind == "rule":
        return {"action": entry[0], **cover}
    if kind == "phase":
        unit, count, action, state = entry[:4]
        return {
            "at": {unit: typed(count)},
            "action": action,
            "optimizer_state": state or "fresh",
            **cover,
        }
    scale, decay = (typed(text) for text in entry[:2])
    given = {"lr_scale": scale, "weight_decay": decay}
    return {**{key: value for key, value in given.items() if value != ""}, **cover}


def find_faults(kind: str, entries: Sequence[Entry], mechanism: str) -> Iterator[tuple[int, str]]:
    """Index of each entry that cannot be used, and why."""
    for index, entry in enumerate(entries):
        try:
            parse_config({MEMBERS[kind]: [part_of(kind, entry)], "mechanism": mechanism})
        except InvalidDocument as error:
            yield index, " ".join(message for _, message in error.errors)


def cover_of_text(text: str) -> Document:
    """``type=LayerNorm``, ``type=Linear encoder.**`` or a match alone, as members of a document."""
    text = text.strip()
    if not text.startswith("type="):
        return {"match": text}
    type_, _, match = text.removeprefix("type=").partition(" ")
    return {"type": type_, "match": match.strip()} if match.strip() else {"type": type_}


def text_of_cover(match: str | None, type_: str | None) -> str:
    return " ".join(part for part in (f"type={type_}" if type_ is not None else "", match) if part)


def text_of_rule(rule: Rule | Group) -> str:
    return text_of_cover(rule.match, rule.type)


def typed(text: str) -> Any:
    """A form's text as the JSON number that it spells, else the text."""
    text = text.strip()
    try:
        value = json.loads(text)
    except ValueError:
        return text
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value if is_number or value is None else text

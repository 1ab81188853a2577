"""A freeze config as a Python module that needs torch alone. No torch here."""

from __future__ import annotations

import pprint
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.freezing.config import (
    Change,
    FreezeConfig,
    expand_rules,
    held_norms,
    match_names,
    split_names,
)
from app.freezing.graph import ModelGraph

_BEGIN, _END = "# --- constants ---\n", "# --- end of constants ---\n"
_COMMENTS = {
    "FROZEN": "The parameters that must not move, and those that are trained, in model order.",
    "HELD_IN_EVAL": "Modules that stay in eval mode: frozen norms{}.",
    "MECHANISM": "How the frozen ones are kept still: {}.",
    "GROUPS": "Parameter: (factor on the learning rate, weight decay; None as for the others).",
}
_MECHANISMS = {
    "requires_grad": "no gradient is computed for them",
    "exclude": "the optimizer is not given them; their gradients are computed all the same",
    "zero_lr": "their learning rate is 0; their gradients are computed all the same",
    "zero_grad": "zero_frozen_gradients() before each step; decay and momentum still move them",
}


def config_as_python(config: FreezeConfig, graph: ModelGraph) -> str:
    """Source of a module with `apply_freeze`, `parameter_groups` and `assert_frozen`.

    A schedule has no place in it: what is frozen is what the rules freeze at the start, and the
    module's docstring says so.
    """
    frozen, trainable = split_names(config, graph)
    groups: dict[str, tuple[float, float | None]] = {}
    for group in config.groups:
        covered = match_names(group, graph)
        settings = (group.lr_scale, group.weight_decay)
        groups |= {p.name: settings for p in graph.parameters if p.name in covered}
    constants = {
        "FROZEN": frozen,
        "TRAINABLE": trainable,
        "HELD_IN_EVAL": tuple(_held_modules(config, graph)),
        "MECHANISM": config.mechanism,
        "GROUPS": groups,
    }
    template = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
    head, _, rest = template.partition(_BEGIN)
    imports = head[head.index("import ") :]
    body = rest.partition(_END)[2].lstrip("\n")
    filled = "\n".join(_constant_lines(constants, config))
    return f"{_docstring(config, graph)}\n{imports}{filled}\n\n{body}"


def _constant_lines(constants: dict[str, Any], config: FreezeConfig) -> Iterator[str]:
    dropout = " and dropout inside frozen modules" if config.dropout == "off" else ""
    for name, value in constants.items():
        if name in _COMMENTS:
            words = {"HELD_IN_EVAL": dropout, "MECHANISM": _MECHANISMS[config.mechanism]}
            yield f"# {_COMMENTS[name].format(words.get(name))}"
        if isinstance(value, tuple) and value:
            yield f"{name} = ("
            yield from (f"    {item!r}," for item in value)
            yield ")"
        else:
            kind = "" if value else f": {_KINDS[name]}"
            yield f"{name}{kind} = {pprint.pformat(value, width=96, sort_dicts=False)}"


_NAMES = "tuple[str, ...]"
_KINDS = dict.fromkeys(("FROZEN", "TRAINABLE", "HELD_IN_EVAL"), _NAMES) | {
    "GROUPS": "dict[str, tuple[float, float | None]]"
}


def _held_modules(config: FreezeConfig, graph: ModelGraph) -> Iterator[str]:
    """Paths of what runs in eval mode while training, as `apply_config` holds it on the server."""
    state = expand_rules(config, graph)
    frozen = {name: state[first] for name, first in graph.canonical_names.items()}
    own = [module for module in graph.modules if module.same_as is None]
    if config.norm_statistics == "freeze":
        yield from held_norms((m.path for m in own if m.is_norm), frozen)
    if config.dropout == "off":
        yield from held_norms((m.path for m in own if m.facts.get("dropout")), frozen)


def _docstring(config: FreezeConfig, graph: ModelGraph) -> str:
    name = _tame(config.name) or "A freeze config"
    paragraphs = [
        f"{name}, written by Frostline. It needs torch alone.",
        "    model = apply_freeze(model)\n"
        "    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))\n"
        "    ...  # train as ever\n"
        "    assert_frozen(model)",
        f"The fingerprint of the model that it is for:\n{graph.fingerprint}.",
    ]
    if config.schedule:
        changes = "\n".join(f"    {_describe_change(change)}" for change in config.schedule)
        paragraphs.append(
            "Its schedule is left out: this freezes what the config freezes at the start.\n"
            f"Later it would\n\n{changes}"
        )
    text = "\n\n".join(paragraphs)
    return f'"""{text}\n"""\n'


def _describe_change(change: Change) -> str:
    rule = change.rule
    covers = " of type ".join(filter(None, (rule.match, rule.type)))
    return textwrap.shorten(f"{rule.action} {_tame(covers)} after {change.unit} {change.count}", 90)


def _tame(text: str) -> str:
    """A text that can neither end a docstring nor the line."""
    quoted = text.replace("\\", "/").replace('"', "'")
    return "".join(c if c.isprintable() else " " for c in quoted)

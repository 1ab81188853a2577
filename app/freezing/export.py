"""A freeze config as a Python module that needs torch alone. No torch here."""

from __future__ import annotations

import json
import pprint
from pathlib import Path

from app.freezing.config import FreezeConfig, match_names, split_names
from app.freezing.graph import ModelGraph

_BEGIN, _END = "# --- constants ---\n", "# --- end of constants ---\n"


def config_as_python(config: FreezeConfig, graph: ModelGraph) -> str:
    """Source of a module with `apply_freeze`, `parameter_groups` and `assert_frozen`.

    A schedule has no place in it: what is frozen is what the rules freeze at the start, and the
    module's docstring says so.
    """
    frozen, trainable = split_names(config, graph)
    groups: dict[str, tuple[float, float | None]] = {}
    for group in config.groups:
        groups |= dict.fromkeys(
            sorted(match_names(group, graph)), (group.lr_scale, group.weight_decay)
        )
    constants = {
        "FROZEN": frozen,
        "TRAINABLE": trainable,
        "MECHANISM": config.mechanism,
        "NORM_STATISTICS": config.norm_statistics,
        "DROPOUT": config.dropout,
        "GROUPS": groups,
    }
    template = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
    body = template.partition(_END)[2].replace("  # noqa: E402", "")
    filled = "\n".join(
        f"{name} = {pprint.pformat(value, width=96, sort_dicts=False)}"
        for name, value in constants.items()
    )
    return f"{_docstring(config, graph)}\n{filled}\n{body}"


def _docstring(config: FreezeConfig, graph: ModelGraph) -> str:
    # json.dumps leaves nothing in a name that could end the docstring or the line
    name = json.dumps(config.name or "a freeze config").strip('"').replace('"', "'").strip("\\")
    later = (
        "\nIts schedule is left out: this freezes what the config freezes at the start.\n"
        if config.schedule
        else ""
    )
    return (
        f'"""{name}, written by Frostline for a model with the fingerprint\n'
        f"{graph.fingerprint}.\n{later}\n"
        "model = apply_freeze(model)\n"
        "optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))\n"
        "…train…\n"
        'assert_frozen(model)\n"""\n'
    )

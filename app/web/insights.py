"""A job's findings as its page tells them: each layer's evidence in words. It finds nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from app.web.job_views import Insight
from app.web.render import format_count, format_number, format_percent

Evidence = Mapping[str, Any]

# What is left of these layers' training would be saved by freezing them.
FREEZABLE = ("unreached", "barely_moves", "converged")
LAYERS_LISTED = 200
LAYERS_IN_ADDRESS = 60  # of a link that opens the workbench with them frozen


def tell_insight(finding: Mapping[str, Any], rerun: Callable[[list[str]], str]) -> Insight:
    """One finding of `Service.read_insights`.

    Args:
        rerun: the address that opens the workbench as the job began, with these layers frozen.
    """
    names, code = list(finding["names"]), str(finding["code"])
    can_freeze = code in FREEZABLE and len(names) <= LAYERS_IN_ADDRESS
    words = _WORDS.get(code, _plain)
    return Insight(
        code=code,
        message=str(finding["message"]),
        layers=[(name, words(finding["evidence"][name])) for name in names[:LAYERS_LISTED]],
        layer_count=len(names),
        can_freeze=can_freeze,
        rerun_address=rerun(names) if can_freeze else "",
    )


def _unreached(evidence: Evidence) -> str:
    return f"no gradient up to step {format_count(evidence['step'])}"


def _rounded_away(evidence: Evidence) -> str:
    return f"{format_percent(evidence['lost'])} of its updates lost"


def _still(evidence: Evidence) -> str:
    gradient = format_number(evidence["largest_grad_norm"])
    return f"from step {format_count(evidence['from_step'])} on, gradients up to {gradient}"


def _nonfinite(evidence: Evidence) -> str:
    ((name, value),) = ((k, v) for k, v in evidence.items() if k != "until_step")
    what = {"grad_norm": "gradient", "update_norm": "update"}.get(name, name)
    return f"{what} {value}, by step {format_count(evidence['until_step'])}"


def _explodes(evidence: Evidence) -> str:
    value, usual = format_number(evidence["grad_norm"]), format_number(evidence["usual"])
    return f"{value} by step {format_count(evidence['until_step'])}, usually {usual}"


def _barely_moves(evidence: Evidence) -> str:
    return f"at most {_share(evidence['moved_at_most'])} of its weight norm"


def _converged(evidence: Evidence) -> str:
    late, early = _share(evidence["moved_at_most"]), _share(evidence["at_first"])
    return f"from step {format_count(evidence['from_step'])} on at most {late}, at first {early}"


def _share(value: float) -> str:
    """A share so small that the usual one digit of a percentage would show nothing."""
    return f"{format_number(100 * value)} %"


def _plain(evidence: Evidence) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {format_number(v)}" for key, v in evidence.items())


_WORDS: Mapping[str, Callable[[Evidence], str]] = {
    "unreached": _unreached,
    "rounded_away": _rounded_away,
    "still": _still,
    "nonfinite": _nonfinite,
    "explodes": _explodes,
    "barely_moves": _barely_moves,
    "converged": _converged,
}

"""Globs over dotted names, as one regular expression each. Knows no rules and no models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

try:  # linear time whatever the expression; absent in a worker's own environment, where it may be
    import re2
except ImportError:
    re2 = None

_ENGINE_ERRORS: tuple[type[Exception], ...] = (re.error, RecursionError, OverflowError)
if re2 is not None:
    _ENGINE_ERRORS += (re2.error,)
MAX_EXPANSIONS = 100_000
MAX_LENGTH = 10_000

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BROKEN_RANGE = re.compile(r"\{[^{},]*\.\.[^{},]*\}")  # no name has two dots side by side
_SEGMENT = r"[^.]+"
_BELOW = r"(?:\.[^.]+)*"  # any number of further segments


@lru_cache(maxsize=4096)
def compile_match(match: str) -> Callable[[str], bool]:
    """The claim that `match` makes of a dotted parameter name.

    Args:
        match: a glob (``*`` one segment, ``**`` any number, ``{a,b}``, ``{0..7}``, ``?``), which
            covers all below a module that it names; ``re:EXPRESSION``; or ``has:TEXT``.

    Raises:
        ValueError: one sentence that says what is wrong with it.
    """
    if not match:
        raise ValueError("An empty match matches nothing; '**' matches everything.")
    if len(match) > MAX_LENGTH:
        raise ValueError(
            f"A match has at most {MAX_LENGTH:,} characters; this one has {len(match):,}."
        )
    if match.startswith("has:"):
        text = match.removeprefix("has:")
        if not text:
            raise ValueError("'has:' needs a text after it, as in 'has:conv'.")
        return lambda name: text in name
    if match.startswith("re:"):
        return _full_matcher(match.removeprefix("re:"), match)
    expression = f"(?:{_translate_glob(match)}){_BELOW}"
    return _full_matcher(expression, match, is_tame=_is_tame(match))


def _is_tame(glob: str) -> bool:
    """Whether Python's engine, too, takes time in proportion to the name: it goes back little."""
    segments = glob.split(".")
    return segments.count("**") <= 1 and all(
        segment == "**" or segment.count("*") <= 1 for segment in segments
    )


def _full_matcher(expression: str, shown: str, is_tame: bool = False) -> Callable[[str], bool]:
    """Both engines must accept it, so that a worker without RE2 reads the same rule.

    A tame expression cannot make Python's engine, ten times as quick as RE2's binding, go astray.
    """
    try:
        pattern: Any = re.compile(expression)
        if re2 is not None and not is_tame:
            options = re2.Options()
            options.log_errors = False
            pattern = re2.compile(expression, options)
    except _ENGINE_ERRORS as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
        raise ValueError(
            f"{_short(shown)} is not an expression that can be matched: {reason}."
        ) from error
    return lambda name: pattern.fullmatch(name) is not None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")


def _translate_glob(glob: str) -> str:
    """The glob as a regular expression for the whole of a dotted name."""
    if glob == "**":
        return ".*"
    parts: list[str] = []
    counts: list[list[int]] = [[1]]  # expansions of each alternative, a list for each open brace
    at = 0
    if "{}" in glob:
        raise ValueError(f"{_short(glob)} has empty braces.")
    while at < len(glob):
        char = glob[at]
        if char == "*" and glob[at + 1 : at + 2] == "*" and not _is_whole_segment(glob, at):
            at += 1  # a run of stars inside a segment says no more than one
            continue
        if glob.startswith("**", at) and _is_whole_segment(glob, at):
            at += 2
            if parts and parts[-1] == r"\.":
                parts[-1] = _BELOW
            elif glob[at : at + 1] == ".":
                parts.append(rf"(?:{_SEGMENT}\.)*")
                at += 1
            else:
                parts.append(_SEGMENT + _BELOW)
            continue
        span = _RANGE.match(glob, at)
        if span:
            parts.append(_number_range(span[1], span[2]))
            counts[-1][-1] *= abs(int(span[1]) - int(span[2])) + 1
            at = span.end()
        elif _BROKEN_RANGE.match(glob, at):
            raise ValueError(f"{_short(glob)} has a range that is none; {{0..7}} is one.")
        else:
            parts.append(_translate_character(char, counts, glob))
            at += 1
        if counts[-1][-1] > MAX_EXPANSIONS:
            raise ValueError(f"{_short(glob)} stands for more than {MAX_EXPANSIONS:,} names.")
    if len(counts) > 1:
        raise ValueError(f"{_short(glob)} has a '{{' without its '}}'.")
    return "".join(parts)


def _translate_character(char: str, counts: list[list[int]], glob: str) -> str:
    if char == "{":
        counts.append([1])
        return "(?:"
    if char == "," and len(counts) > 1:
        counts[-1].append(1)
        return "|"
    if char == "}":
        if len(counts) == 1:
            raise ValueError(f"{_short(glob)} has a '}}' without its '{{'.")
        alternatives = sum(counts.pop())
        counts[-1][-1] *= alternatives
        return ")"
    return {"*": "[^.]*", "?": "[^.]"}.get(char, re.escape(char))


def _is_whole_segment(glob: str, at: int) -> bool:
    before, after = glob[at - 1 : at] if at else "", glob[at + 2 : at + 3]
    return before in ("", ".", "{", ",") and after in ("", ".", "}", ",")


def _number_range(first: str, last: str) -> str:
    """Numbers from `first` to `last`, either way round; leading zeros fix the width."""
    if max(len(first), len(last)) > 18:
        raise ValueError(f"'{{{first}..{last}}}' stands for more than {MAX_EXPANSIONS:,} names.")
    low, high = sorted((int(first), int(last)))
    padded = (len(first) > 1 and first[0] == "0") or (len(last) > 1 and last[0] == "0")
    if padded:
        width = max(len(first), len(last))
        return "(?:" + "|".join(_same_width(f"{low:0{width}}", f"{high:0{width}}")) + ")"
    alternatives: list[str] = []
    for width in range(len(str(low)), len(str(high)) + 1):
        start = max(low, 10 ** (width - 1) if width > 1 else 0)
        alternatives += _same_width(str(start), str(min(high, 10**width - 1)))
    return "(?:" + "|".join(alternatives) + ")"


def _same_width(low: str, high: str) -> Iterator[str]:
    """Expressions for the numbers from `low` to `high`, both of the same width."""
    if not low:
        yield ""
    elif low[0] == high[0]:
        yield from (low[0] + rest for rest in _same_width(low[1:], high[1:]))
    else:
        width = len(low) - 1
        yield from (low[0] + rest for rest in _same_width(low[1:], "9" * width))
        first, last = int(low[0]) + 1, int(high[0]) - 1
        if first <= last:
            yield f"[{first}-{last}]" + "[0-9]" * width
        yield from (high[0] + rest for rest in _same_width("0" * width, high[1:]))

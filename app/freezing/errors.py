"""What the heart refuses: documents that cannot be used. Knows not how a refusal is shown."""

import difflib
from collections.abc import Iterable, Mapping


class InvalidDocument(ValueError):
    """A document that somebody sent cannot be used; every fault is named at once.

    Attributes:
        errors: (field, message) pairs; the field is a dotted path into the document
            (``rules.2.match``), empty where the whole document is at fault.
    """

    def __init__(self, errors: Iterable[tuple[str, str]]) -> None:
        self.errors = tuple(errors)
        assert self.errors, "an InvalidDocument names at least one fault"
        told = [message for _, message in self.errors[:MAX_TOLD]]
        if more := len(self.errors) - len(told):
            told.append(f"{more} more fault{'s' * (more > 1)} of this kind.")
        super().__init__(" ".join(told))


MAX_TOLD = 5  # faults that str() puts into words; `errors` has them all
MAX_SHOWN = 100  # characters of what came that a message repeats
MAX_FAULTS = 100  # a document of nothing but unknown keys gets no longer answer
MAX_LISTED = 10  # known keys that a message lists where none is close
CLOSE = 0.7  # difflib's ratio: a typo is at about 0.8 or above, another word below 0.6


def describe_unknown(
    key: object, known: Iterable[str], noun: str, synonyms: Mapping[str, str] | None = None
) -> str:
    """One sentence for a key that is not known.

    With the nearest that is, by any of its names, where one is close; else with all, if few.
    """
    shown, names = str(key)[:MAX_SHOWN], list(known)
    meant = {**{name: name for name in names}, **(synonyms or {})}
    if near := difflib.get_close_matches(shown, list(meant), n=1, cutoff=CLOSE):
        return f"{shown!r} is not {noun}; the nearest is {meant[near[0]]!r}."
    listed = f"; known are {', '.join(names)}" if len(names) <= MAX_LISTED else ""
    return f"{shown!r} is not {noun}{listed}."


def show_value(value: object) -> str:
    """What came, as a message repeats it: a literal, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return "a number of more than a hundred digits"
    shown = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 1] + "…"

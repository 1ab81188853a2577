"""What the heart refuses: documents that cannot be used. Knows not how a refusal is shown."""

from collections.abc import Iterable


class InvalidDocument(ValueError):
    """A document that somebody sent cannot be used; every fault is named at once.

    Attributes:
        errors: (field, message) pairs; the field is a dotted path into the document
            (``rules.2.match``), empty where the whole document is at fault.
    """

    def __init__(self, errors: Iterable[tuple[str, str]]) -> None:
        self.errors = tuple(errors)
        assert self.errors, "an InvalidDocument names at least one fault"
        super().__init__(" ".join(message for _, message in self.errors))

"""What the user assumes of a run to come: batch, sizes, optimizer, precision. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.freezing.errors import InvalidDocument, describe_unknown, show_value

# Bytes of optimizer state for each byte of a parameter that it steps.
OPTIMIZER_STATE = {"sgd": 1, "adam": 2, "adamw": 2}
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Assumption:
    """What the user assumes of a run; None means as the model was traced."""

    batch_size: int | None = None
    sequence_length: int | None = None
    image_size: int | None = None
    optimizer: str = "adamw"
    precision: str = "fp32"


def parse_assumption(document: Any) -> Assumption:
    """Read the `assume` of a plan request. Raises InvalidDocument."""
    if document is None:
        return Assumption()
    if not isinstance(document, Mapping):
        raise InvalidDocument([("assume", "'assume' must be an object.")])
    errors: list[tuple[str, str]] = []
    known = Assumption.__dataclass_fields__
    for key, value in document.items():
        if key not in known:
            errors.append((f"assume.{key}", describe_unknown(key, known, "something to assume")))
        elif key in ("optimizer", "precision"):
            choices = tuple(OPTIMIZER_STATE) if key == "optimizer" else PRECISIONS
            if value not in choices:
                errors.append(
                    (f"assume.{key}", f"{show_value(value)} is not one of {', '.join(choices)}.")
                )
        elif value is not None and (type(value) is not int or not 1 <= value <= 10**6):
            errors.append(
                (
                    f"assume.{key}",
                    f"{show_value(value)} must be a whole number from 1 to 1,000,000.",
                )
            )
    if errors:
        raise InvalidDocument(errors)
    return Assumption(**document)

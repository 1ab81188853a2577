"""Numbers that JSON lacks, by their names: NaN and the infinities. For every room; knows none."""

import math
from collections.abc import Mapping
from typing import Any


def name_non_finite(value: Any) -> Any:
    """The value with such numbers, at any depth, replaced by "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, Mapping):
        return {key: name_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [name_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

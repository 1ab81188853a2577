"""A few examples of a dataset with their labels, as JSON values. Knows no model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Subset

from app.sources.datasets import Data
from app.sources.hub import load_library
from app.sources.items import Items

EXAMPLES = 8
TEXT_CHARACTERS = 500
IMAGE_SIDE = 96


def preview_data(data: Data, count: int = EXAMPLES) -> dict[str, Any]:
    """What a page shows before a job starts.

    Returns:
        ``columns`` (role → column), ``classes`` (names by id), ``sizes`` (set → examples) and
        ``examples``: of the training set, evenly apart; each maps a role to a text, a class's name
        or an image as a data URI, and where the rows are not known, says shape and target.
    """
    size = len(data.train)
    chosen = sorted({index * size // count for index in range(count)})
    return {
        "columns": dict(data.columns),
        "classes": list(data.class_names),
        "sizes": {"train": size, **{name: len(part) for name, part in data.evals.items()}},
        "examples": [_show_example(data.train, index) for index in chosen],
    }


def _show_example(dataset: Any, index: int) -> dict[str, Any]:
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    if isinstance(dataset, Items):
        row = dataset.rows[index]
        return {
            role: _show_image(row[column]) if role == "image" else _show_value(row[column])
            for role, column in dataset.columns.items()
        }
    item = dataset[index]
    values = (
        item if isinstance(item, Mapping) else dict(zip(("input", "target"), item, strict=True))
    )
    return {str(name): _show_value(value) for name, value in values.items()}


def _show_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return value.item()
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, list):
        return [_show_value(part) for part in value[:50]]
    if isinstance(value, int | float):
        return value
    return str(value)[:TEXT_CHARACTERS]


def _show_image(given: Any) -> str:
    image_module = load_library("PIL.Image")
    image = (image_module.open(given) if isinstance(given, str) else given).convert("RGB")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

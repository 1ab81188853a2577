"""Shows a dataset before a job starts: columns, classes, split, examples, as JSON values."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph
from app.freezing.trace import count_rows, double_rows, trace_model
from app.sources.datasets import ROW_SCHEMES, Data, build_data
from app.sources.intake import Intake
from app.sources.items import Items, TextEncoder
from app.sources.libraries import load_library
from app.sources.models import EXAMPLE_BATCH, BuiltModel
from app.sources.rows import TASK_ROLES, Rows, read_labels, read_rows
from app.sources.sizes import size_example
from app.sources.spec import DatasetSpec, split_uri
from app.sources.user_code import run_user_code

EXAMPLES = 8
TEXT_CHARACTERS = 500
TOKENS = 64
CLASSES = 1_000
IMAGE_SIDE = 96


def preview_dataset(
    spec: DatasetSpec,
    *,
    code_dirs: Sequence[Path],
    seed: int,
    intake: Intake | None,
    keep: Callable[[dict[str, Any]], None],
    use: Callable[[Data], Mapping[str, Any]],
) -> None:
    """Look at a dataset twice: as it was read, then as a model that takes `intake` will see it.

    Args:
        use: what else is to be done with a dataset that fits; its members go into the document.
        keep: takes the document of each look; where the data does not fit the model, the first
            look stays, so that somebody can see which columns there are.

    Raises:
        InvalidDocument, UserCodeError: as `build_data` does.
    """
    document: dict[str, Any] = {"uri": spec.uri, "task": intake.task if intake else None}
    rows = None
    if split_uri(spec.uri)[0] in ROW_SCHEMES:
        rows = read_rows(spec.uri)
        document |= show_rows(rows, intake)
        keep(document)
    try:
        data = build_data(spec, code_dirs=code_dirs, seed=seed, intake=intake, rows=rows)
        shown = {**preview_data(data), **use(data)}
    except InvalidDocument as error:
        faults = [{"field": field, "message": message} for field, message in error.errors]
        keep(document | {"errors": faults})
        raise
    keep(document | shown)


def trace_on_data(built: BuiltModel, data: Data, kernels: str) -> ModelGraph:
    """Trace a model that gives no example of its own on the first batch that it would train on."""
    items = [data.train[index] for index in range(min(EXAMPLE_BATCH, len(data.train)))]
    collate = data.collate or default_collate
    batch = run_user_code(lambda: collate(items), "Making a batch of the data", "data_error")
    if isinstance(batch, Mapping):
        graph = trace_model(built.model, batch, loss=built.loss, kernels=kernels)
        return _note_sizes(graph, batch)
    own = built.loss

    def loss(output: Any, inputs: Any) -> Any:
        """Of a trace's inputs, which have each row once or twice."""
        assert own is not None
        is_whole = count_rows(inputs) == count_rows(batch[0])
        return own(output, batch if is_whole else double_rows(batch))

    graph = trace_model(built.model, batch[0], loss=None if own is None else loss, kernels=kernels)
    return _note_sizes(graph, batch[0])


def _note_sizes(graph: ModelGraph, batch: Any) -> ModelGraph:
    sizes = size_example(batch, {}).sizes
    length, side = sizes.get("sequence_length"), sizes.get("image_size")
    return replace(graph, sequence_length=length, image_size=side)


def show_rows(rows: Rows, intake: Intake | None) -> dict[str, Any]:
    """What was read, before anybody knows what it is to the model.

    Returns:
        ``offered`` (every column), ``roles`` (what the model's task needs of a row), ``sizes`` and
        ``examples`` by column.
    """
    train = rows.sets["train"]
    roles = TASK_ROLES.get(intake.task, ()) if intake else ()
    optional = ("text_pair",) if intake and intake.task == "text-classification" else ()
    return {
        "offered": list(rows.columns),
        "roles": [*roles, *optional],
        "optional": list(optional),
        "sizes": {name: len(part) for name, part in rows.sets.items()},
        "examples": [
            {column: _show_value(train[index][column]) for column in rows.columns}
            for index in _spread_indices(len(train))
        ],
    }


def preview_data(data: Data) -> dict[str, Any]:
    """What a page shows before a job starts.

    Returns:
        ``columns`` (role → column), ``classes`` (name and how many of each set, by id), ``sizes``
        (set → examples), ``split`` (a sentence) and ``examples``: of the training set, evenly
        apart. Each maps a role to a text, a class's name or an image as a data URI, and
        ``encoded`` to the tokens or the shape that the model gets; where rows are not known, it
        says shape and target.
    """
    sets = {"train": data.train, **data.evals}
    return {
        "columns": dict(data.columns),
        "classes": _count_classes(sets, data.class_names),
        "sizes": {name: len(part) for name, part in sets.items()},
        "split": data.split,
        "examples": [
            _show_example(data.train, index) for index in _spread_indices(len(data.train))
        ],
    }


def _spread_indices(size: int) -> list[int]:
    return sorted({index * size // EXAMPLES for index in range(EXAMPLES)})


def _count_classes(sets: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Every class with how many examples of it each set has; nothing where labels are not known."""
    counted = {name: Counter(_class_ids(part)) for name, part in sets.items()}
    present = sorted(set().union(*counted.values()))
    ids = range(len(names)) if names else present
    return [
        {
            "name": names[i] if names else str(i),
            "counts": {name: count[i] for name, count in counted.items()},
        }
        for i in list(ids)[:CLASSES]
    ]


def _class_ids(dataset: Any) -> list[int]:
    if isinstance(dataset, Subset):
        whole = _class_ids(dataset.dataset)
        return [whole[index] for index in dataset.indices] if whole else []
    if isinstance(dataset, Items) and "label" in dataset.columns:
        labels = read_labels(dataset.rows, dataset.columns["label"])
        return [dataset.find_class(label) for label in labels]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        targets = dataset.tensors[1]
        return [] if targets.is_floating_point() or targets.dim() > 1 else targets.tolist()
    return []


def _show_example(dataset: Any, index: int) -> dict[str, Any]:
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    if isinstance(dataset, Items):
        return _show_item(dataset, index)
    item = dataset[index]
    values = (
        item if isinstance(item, Mapping) else dict(zip(("input", "target"), item, strict=True))
    )
    return {str(name): _show_value(value) for name, value in values.items()}


def _show_item(items: Items, index: int) -> dict[str, Any]:
    row = items.rows[index]
    shown = {
        role: _show_image(row[column]) if role == "image" else _show_value(row[column])
        for role, column in items.columns.items()
    }
    item = items[index]
    if isinstance(items.encode, TextEncoder):
        ids = list(item["input_ids"])
        tokens = items.encode.tokenizer.convert_ids_to_tokens(ids[:TOKENS])
        is_cut = len(ids) >= items.encode.max_length
        return {**shown, "encoded": {"tokens": tokens, "count": len(ids), "is_full": is_cut}}
    pixels = next(iter(item.values())) if isinstance(item, Mapping) else item[0]
    return {**shown, "encoded": {"shape": list(pixels.shape)}}


def _show_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return value.item()
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, list):
        return [_show_value(part) for part in value[:50]]
    if value is None or isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        return value
    if hasattr(value, "convert"):
        return _show_image(value)
    return str(value)[:TEXT_CHARACTERS]


def _show_image(given: Any) -> str:
    image_module = load_library("PIL.Image")
    image = (image_module.open(given) if isinstance(given, str) else given).convert("RGB")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

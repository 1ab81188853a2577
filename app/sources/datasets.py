"""Builds training and evaluation sets from their spec. Knows no model and no batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from app.sources.demo.digits import Images, shift, split_digits
from app.sources.demo.networks import input_shape
from app.sources.demo.planes import TRAIN_SIZE, draw_divided
from app.sources.intake import Intake
from app.sources.items import Items, make_encoder
from app.sources.rows import (
    Rows,
    check_values,
    choose_columns,
    name_classes,
    read_labels,
    read_rows,
)
from app.sources.spec import FILE_SCHEMES, SET_NAME_WORDS, DatasetSpec, is_set_name, split_uri
from app.sources.user_code import (
    call_factory,
    check_answer_keys,
    name_type,
    refuse_answer,
    run_user_code,
)

DEFAULT_EVAL_FRACTION = 0.1
ROW_SCHEMES = (*FILE_SCHEMES, "hf")


@dataclass(frozen=True)
class Data:
    """What a job trains on and is judged by; every set is map-style and not empty.

    Attributes:
        evals: evaluation sets by name, which stands in ``eval/NAME/loss``; may be empty.
        collate: items → batch; None is torch's default.
        seed_items: whether items may be random, so that each needs a seed of its own.
        num_workers: processes that load batches.
        columns: role → column of a table, as they were named or guessed; empty where it is none.
        class_names: of the labels, by class id; empty where nobody knows.
        split: where the evaluation sets come from, in a sentence.
    """

    train: Any
    evals: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None
    seed_items: bool = True
    num_workers: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    split: str = "Nothing is held out, so nothing is evaluated."


def build_data(
    spec: DatasetSpec,
    *,
    code_dirs: Sequence[Path],
    seed: int,
    intake: Intake | None = None,
    rows: Rows | None = None,
) -> Data:
    """Build the sets that `spec` names.

    Args:
        spec: what `parse_dataset_spec` let through.
        code_dirs: folders in which the modules of ``python:`` URIs lie.
        seed: decides which examples `eval_fraction` holds out.
        intake: what the model takes; tables and folders cannot be prepared without.
        rows: what `read_rows` gave for the URI, where somebody has read it already.

    Raises:
        InvalidDocument: a set is empty, cannot be indexed, or has items that are neither
            (input, target) pairs nor dicts.
        UserCodeError: a user's factory, or reading its first item, raised.
    """
    if split_uri(spec.uri)[0] in ROW_SCHEMES:
        return _build_rows(spec, seed, intake, rows or read_rows(spec.uri))
    data = _load_uri(spec.uri, spec.kwargs, code_dirs)
    if data.train is None:
        raise refuse_answer(f"{spec.uri} returned no 'train'; it needs a dataset to train on.")
    data = replace(_hold_out(data, spec, seed), num_workers=spec.num_workers)
    for name, uri in spec.eval.items():
        other = _load_uri(uri, {}, code_dirs)
        if other.collate not in (None, data.collate):
            raise refuse_answer(
                f"{uri} brings a 'collate' that {spec.uri} does not have; all sets share one."
            )
        data.evals[name] = _only_set(other, uri)
        data = replace(data, seed_items=data.seed_items or other.seed_items)
    return data


def _load_uri(uri: str, kwargs: Mapping[str, Any], code_dirs: Sequence[Path]) -> Data:
    """Every set behind one URI; `train` is None where a ``python:`` factory gives only `eval`."""
    scheme, rest = split_uri(uri)
    if scheme == "demo":
        return _load_demo(rest)
    if scheme in ROW_SCHEMES:
        raise refuse_answer(
            f"{uri} is a table, which cannot judge what another kind of dataset trains; give both "
            "as tables.",
            "dataset.eval",
        )
    assert scheme == "python", f"parse_dataset_spec let {uri!r} through"
    return _read_answer(call_factory(rest, kwargs, code_dirs=code_dirs), uri)


def _only_set(data: Data, uri: str) -> Any:
    """What a URI means as one evaluation set: its `eval`, or its only one, or all it has."""
    if "eval" in data.evals:
        return data.evals["eval"]
    if len(data.evals) > 1:
        names = ", ".join(data.evals)
        raise refuse_answer(f"{uri} has several evaluation sets ({names}) and none named 'eval'.")
    return next(iter(data.evals.values()), data.train)


def _hold_out(
    data: Data, spec: DatasetSpec, seed: int, labels: Sequence[int] | None = None
) -> Data:
    """Split off evaluation examples where the dataset brings none, by class where `labels` are."""
    asked = spec.eval_fraction is not None
    if data.evals:
        if asked:
            raise refuse_answer(
                f"{spec.uri} brings its own evaluation sets; leave 'eval_fraction' out.",
                "dataset.eval_fraction",
            )
        return replace(data, split=f"It brings its own evaluation sets: {', '.join(data.evals)}.")
    fraction = spec.eval_fraction if asked else 0 if spec.eval else DEFAULT_EVAL_FRACTION
    if not fraction:
        return replace(data, split=Data.split if not spec.eval else "The sets that you named.")
    size = len(data.train)
    held_out = max(1, round(size * fraction))
    if held_out >= size:
        raise refuse_answer(
            f"{spec.uri} has {size} training example(s), too few to hold out {held_out}; "
            "give 'eval', or 'eval_fraction': 0 for none.",
            "dataset.eval_fraction",
        )
    order = np.random.default_rng(seed).permutation(size)
    if labels is not None:  # each class by its share: spread evenly over the rows by class
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
        taken = (np.arange(held_out) + 0.5) * size // held_out
        order = np.concatenate([order[taken.astype(int)], np.delete(order, taken.astype(int))])
    # Sorted, so that a dataset that reads from disk is read in its own order.
    evaluated, trained = sorted(order[:held_out].tolist()), sorted(order[held_out:].tolist())
    how = "each class by its share" if labels is not None else "drawn at random"
    return replace(
        data,
        train=Subset(data.train, trained),
        evals={"eval": Subset(data.train, evaluated)},
        split=f"{held_out:,} of {size:,} are held out as 'eval', {how}, with seed {seed}.",
    )


# ----------------------------------------------------------------------- tables and image folders


def _build_rows(spec: DatasetSpec, seed: int, intake: Intake | None, rows: Rows) -> Data:
    """Choose the columns and classes of rows, check them, and encode them for the model."""
    if intake is None:
        raise refuse_answer(
            f"The model does not say what it takes, so {spec.uri} cannot be prepared for it; give "
            "a python: dataset.",
            "dataset.uri",
        )
    columns = choose_columns(rows, intake, spec)
    label = columns.get("label") or columns.get("labels")
    labels = read_labels(rows.sets["train"], label) if label else []
    ids = name_classes(labels, rows, intake, spec.uri) if label else {}
    encode = make_encoder(intake, spec)
    sets = dict(rows.sets)
    for name, uri in spec.eval.items():
        if split_uri(uri)[0] not in ROW_SCHEMES:
            raise refuse_answer(f"{uri} is no table, as {spec.uri} is.", f"dataset.eval.{name}")
        other = read_rows(uri)
        if lacking := [column for column in columns.values() if column not in other.columns]:
            raise refuse_answer(
                f"{uri} has no column {lacking[0]!r}, which {spec.uri} has.", f"dataset.eval.{name}"
            )
        sets[name] = other.sets.get("test", other.sets["train"])
    made: dict[str, Items] = {}
    for name, part in sets.items():
        check_values(part, columns, spec.uri)
        made[name] = Items(part, columns, ids, encode)
        if label:
            for value in set(_flatten(read_labels(part, label))):
                made[name].find_class(value)
    train = made.pop("train")
    data = Data(
        train,
        made,
        encode.collate,
        seed_items=intake.task == "fill-mask",
        num_workers=spec.num_workers,
        columns=columns,
        class_names=tuple(map(str, sorted(ids, key=lambda name: ids[name]))),
    )
    by_class = [ids[value] for value in labels] if "label" in columns else None
    data = _hold_out(data, spec, seed, by_class)
    run_user_code(lambda: data.train[0], f"The first row of {spec.uri}", "data_error")
    return data


def _flatten(labels: list[Any]) -> list[Any]:
    return [x for label in labels for x in (label if isinstance(label, list) else [label])]


# ------------------------------------------------------------------------------------ demo: data


def _load_demo(name: str) -> Data:
    if not name.startswith("digits"):
        inputs, labels = map(torch.from_numpy, draw_divided(input_shape(name), _PLANE_SEEDS[name]))
        return Data(
            train=TensorDataset(inputs[:TRAIN_SIZE], labels[:TRAIN_SIZE]),
            evals={"eval": TensorDataset(inputs[TRAIN_SIZE:], labels[TRAIN_SIZE:])},
            seed_items=False,
        )
    split = split_digits()
    if name == "digits":
        train = split.labelled
        evals = {
            "eval": split.held_out,
            "known": split.held_out.only(range(5)),
            "new": split.held_out.only(range(5, 10)),
        }
    else:
        train = shift(split.labelled, seed=0)
        evals = {"eval": shift(split.held_out, seed=9), "before": split.held_out}
    sets = {key: _as_dataset(images) for key, images in evals.items()}
    return Data(_as_dataset(train), sets, seed_items=False)


_PLANE_SEEDS = {"three-layers": 1, "simple-model": 2, "multi-layer-model": 3}


def _as_dataset(images: Images) -> TensorDataset:
    return TensorDataset(torch.from_numpy(images.pixels), torch.from_numpy(images.labels))


# --------------------------------------------------------------------------------- python: data

_ANSWER_KEYS = ("train", "eval", "collate")


def _read_answer(answer: object, uri: str) -> Data:
    """Check what a factory returned: a mapping of train, eval (one set or several), collate."""
    if not isinstance(answer, Mapping):
        raise refuse_answer(
            f"{uri} returned {name_type(answer)}; it must return a mapping with 'train' "
            "and optionally 'eval' and 'collate'."
        )
    check_answer_keys(answer, _ANSWER_KEYS, uri)
    train, evals, collate = (answer.get(key) for key in _ANSWER_KEYS)
    if not (collate is None or callable(collate)):
        raise refuse_answer(f"'collate' of {uri} is {name_type(collate)}; it must be a function.")
    if evals is None:
        evals = {}
    elif not isinstance(evals, Mapping):
        evals = {"eval": evals}
    for name in evals:
        if not is_set_name(name):
            raise refuse_answer(f"{name!r} in 'eval' of {uri} is no name: {SET_NAME_WORDS}.")
    if train is None and not evals:
        raise refuse_answer(f"{uri} returned a mapping with neither 'train' nor 'eval'.")
    if train is not None:
        _check_dataset(train, f"'train' of {uri}")
    for name, dataset in evals.items():
        _check_dataset(dataset, f"{name!r} in 'eval' of {uri}")
    return Data(train, dict(evals), collate)


def _check_dataset(dataset: Any, what: str) -> None:
    """Refuse a dataset that is not map-style, is empty, or has items that no loss could use."""
    if (
        isinstance(dataset, Mapping | IterableDataset | str | bytes)
        or not hasattr(dataset, "__getitem__")
        or not hasattr(dataset, "__len__")
    ):
        raise refuse_answer(
            f"{what} is {name_type(dataset)}; it must be a map-style dataset, with __len__ and "
            "__getitem__."
        )
    if run_user_code(lambda: len(dataset), f"The length of {what}") == 0:
        raise refuse_answer(f"{what} is empty; it must have at least one item.")
    item = run_user_code(lambda: dataset[0], f"The first item of {what}")
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    if not (is_pair or isinstance(item, Mapping)):
        size = f" and length {len(item)}" if isinstance(item, tuple | list) else ""
        raise refuse_answer(
            f"The first item of {what} is {name_type(item)}{size}; items must be (input, target) "
            "pairs or dicts."
        )

"""The training form of the workbench: fields from the options, documents from what was typed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.freezing.errors import InvalidDocument
from app.sources.demo import DEMO_DATASETS, DEMO_TRAINING
from app.training.recipe import OPTIONS, Option
from app.web.pages.entries import Document, typed
from app.web.views import Fault, Field

DATASET_OPTIONS = {
    "eval_fraction": "Share held out when the dataset brings no evaluation set",
    "max_length": "Tokens per text",
    "image_size": "Pixels per side",
    "num_workers": "Loader processes",
}
COLUMN = "columns."  # before a role, in the name of the field that says its column
FIRST_OPTIONS = ("epochs", "batch_size", "optimizer", "lr", "device")
# The others, under the heading where somebody looks for it; what is named nowhere comes last.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Length": ("max_steps", "patience"),
    "Optimizer": (
        "weight_decay", "momentum", "lr_schedule", "warmup_steps", "max_grad_norm",
        "grad_accumulation",
    ),
    "Speed and memory": ("precision", "compile", "gradient_checkpointing", "num_workers"),
    "Data": ("eval", "kwargs", "eval_fraction", "max_length", "image_size", "seed"),
    "Evaluation, checkpoints, statistics": (
        "eval_every", "eval_batch_size", "checkpoint_every", "keep_last", "stats_every",
    ),
}  # fmt: skip
LABELS = {
    "lr": "learning rate",
    "max_steps": "steps at most",
    "lr_schedule": "LR schedule",
    "eval": "further evaluation sets",
    "kwargs": "arguments (JSON)",
}
# What an empty input means, where no default says it.
WHEN_EMPTY = {"lr": "by optimizer", "eval_every": "each epoch", "checkpoint_every": "at the end"}
KWARGS_HELP = "What a python: dataset's factory is called with"
EVAL_HELP = "What was known before beside what is new: each is judged under its own name"


def suggest_training(uri: str) -> dict[str, str]:
    """For a demo model its own data, and options with which something is seen; else nothing."""
    name = uri.removeprefix("demo:")
    if name == uri or name not in DEMO_TRAINING:
        return {}
    return {"dataset": uri, **DEMO_TRAINING[name]}


def training_request(given: Mapping[str, str]) -> Document:
    """The training options from what was typed; wrong values travel on, to be refused."""
    known = {option.name for option in OPTIONS}
    return {key: typed(value) for key, value in given.items() if key in known}


def dataset_request(given: Mapping[str, str]) -> Document:
    """The dataset's document from what was typed; wrong values travel on, to be refused."""
    roles = {k.removeprefix(COLUMN): v for k, v in given.items() if k.startswith(COLUMN)}
    dataset = {k: typed(v) for k, v in given.items() if k in DATASET_OPTIONS}
    if roles:
        dataset["columns"] = roles
    if given.get("kwargs"):
        dataset["kwargs"] = _read_json(given["kwargs"])
    if given.get("eval"):
        # A comma may stand in a path; one before NAME=SCHEME: does not.
        pairs = re.split(r",\s*(?=[^,=]+=[a-z]+:)", given["eval"])
        dataset["eval"] = {name.strip(): uri.strip() for name, _, uri in map(_halves, pairs)}
    return {"uri": given.get("dataset", ""), **dataset}


def _read_json(text: str) -> Any:
    """What was typed where it is no JSON: it is refused as what it is."""
    # Imported here: the API, whose JSON this is, has reports, which are made of pages.
    from app.web.pages.model_form import read_json

    try:
        return read_json("kwargs", text)
    except InvalidDocument:
        return text


def _halves(pair: str) -> tuple[str, str, str]:
    return pair.partition("=") if "=" in pair else ("more", "=", pair)


def form_fields(
    given: Mapping[str, str], faults: Sequence[Fault]
) -> tuple[list[Field], list[tuple[str, list[Field]]]]:
    """The fields that always show, and the others under their headings.

    Args:
        given: what was typed, by field name without ``train.``.
    """
    wrong = {fault.field: fault.message for fault in faults}
    fields = {option.name: _option_field(option, given, wrong) for option in OPTIONS}
    for key, help_ in DATASET_OPTIONS.items():
        fault = wrong.get(f"dataset.{key}", "")
        value, label = given.get(key, ""), key.replace("_", " ")
        fields[key] = Field(
            f"train.{key}", label, value, "default", numeric=True, help=help_, fault=fault
        )
    sets_fault = next((m for f, m in wrong.items() if f.startswith("dataset.eval.")), "")
    fields["eval"] = Field(
        "train.eval",
        LABELS["eval"],
        given.get("eval", ""),
        "NAME=URI, NAME=URI",
        help=EVAL_HELP,
        fault=sets_fault or wrong.get("dataset.eval", ""),
    )
    fields["kwargs"] = Field(
        "train.kwargs",
        LABELS["kwargs"],
        given.get("kwargs", ""),
        '{"size": 512}',
        help=KWARGS_HELP,
        fault=wrong.get("dataset.kwargs", ""),
    )
    dataset = Field(
        "train.dataset",
        "dataset",
        given.get("dataset", ""),
        "demo:digits, csv:PATH, folder:PATH or python:package.module:factory",
        suggestions=[(f"demo:{name}", words) for name, words in DEMO_DATASETS.items()],
        fault=wrong.get("dataset.uri", wrong.get("dataset", "")),
    )
    name = Field("train.name", "job name", given.get("name", ""), "optional")
    sections = [(title, [fields[key] for key in keys]) for title, keys in SECTIONS.items()]
    placed = {key for keys in (FIRST_OPTIONS, *SECTIONS.values()) for key in keys}
    others = [field for key, field in fields.items() if key not in placed]
    sections += [("Others", others)] * bool(others)
    return [dataset, *(fields[key] for key in FIRST_OPTIONS), name], sections


def _option_field(option: Option, given: Mapping[str, str], wrong: Mapping[str, str]) -> Field:
    default = "" if option.default is None else str(option.default)
    choices = option.choices
    if option.kind == "bool":
        choices, default = ("false", "true"), str(option.default).lower()
    return Field(
        name=f"train.{option.name}",
        label=LABELS.get(option.name, option.name.replace("_", " ")),
        value=given.get(option.name, default if choices else ""),
        placeholder=default or WHEN_EMPTY.get(option.name, "none"),
        choices=choices,
        numeric=option.kind in ("int", "float"),
        help=option.help,
        fault=wrong.get(f"training.{option.name}", wrong.get(option.name, "")),
    )


def training_address(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The address items that fill the training form as a job was started."""
    dataset = document.get("dataset") or {}
    items = {"dataset": dataset.get("uri")}
    items |= {key: dataset.get(key) for key in DATASET_OPTIONS}
    items |= {f"{COLUMN}{role}": name for role, name in (dataset.get("columns") or {}).items()}
    items["kwargs"] = json.dumps(dataset["kwargs"]) if dataset.get("kwargs") else None
    evals = (dataset.get("eval") or {}).items()
    items["eval"] = ", ".join(f"{name}={uri}" for name, uri in evals) or None
    given = document.get("training") or {}
    items |= {o.name: given[o.name] for o in OPTIONS if given.get(o.name, o.default) != o.default}
    return [
        (f"train.{key}", json.dumps(value) if isinstance(value, bool) else str(value))
        for key, value in items.items()
        if value is not None
    ]

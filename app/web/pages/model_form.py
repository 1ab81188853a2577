"""The form that adds a model: its fields, and a model spec from what was typed. No service."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from fastapi import HTTPException

from app.freezing.errors import InvalidDocument
from app.sources.demo import DEMO_MODELS
from app.sources.spec import INPUT_DTYPES, TASKS
from app.web.api.body import parse_json
from app.web.views import Fault, Field

AS_IT_COMES = "as it comes"
_SUGGESTIONS = (
    *((f"demo:{name}", words) for name, words in DEMO_MODELS.items()),
    ("hf:", "Transformers: ORG/NAME from the hub or its cache, or a folder"),
    ("timm:", "a timm model by name"),
    ("torchvision:", "a torchvision model by name"),
    ("python:", "PACKAGE.MODULE:FACTORY, a function of your own that returns an nn.Module"),
)
_TEXTS = {
    "num_classes": ("classes", AS_IT_COMES, "Outputs of the head; another number makes it new"),
    "revision": ("revision", "main", "hf: only: a branch, a tag or a commit"),
    "weights": (
        "weights", "/path/model.safetensors",
        "A .safetensors file, or a folder of shards, loaded over the model",
    ),
    "kwargs": (
        "arguments (JSON)", '{"width": 64}',
        "What a python: factory is called with, or what overrides a configuration",
    ),
    "input": (
        "input shape", "3, 224, 224",
        "Without the batch; for a model that gives no example of its own",
    ),
}  # fmt: skip
_CHECKS = {
    "random_init": ("untrained", "From the configuration alone: no weights are loaded"),
    "new_head": ("new head", "The weights may lack the head, or have one of another size"),
    "allow_pickle": ("allow pickle", "The weights may be a pickle file; no code in it is run"),
}


def form_fields(
    values: Mapping[str, str], faults: Sequence[Fault]
) -> tuple[Field, list[Field], list[Field]]:
    """The URI's field, those of the options, and those that are ticked."""
    wrong: dict[str, str] = {}
    for fault in faults:  # input.shape belongs to input
        wrong.setdefault(fault.field.partition(".")[0], fault.message)
    uri = Field(
        "uri",
        "URI",
        values.get("uri", ""),
        "hf:ORG/NAME, hf:/FOLDER, timm:NAME, torchvision:NAME or python:PACKAGE.MODULE:FACTORY",
        suggestions=_SUGGESTIONS,
        fault=wrong.get("uri", ""),
    )
    task = Field(
        "task",
        "task",
        values.get("task", ""),
        choices=(AS_IT_COMES, *dict.fromkeys(TASKS.values())),
        help="hf: only: which head it gets",
        fault=wrong.get("task", ""),
    )
    dtype = Field(
        "dtype", "input type", values.get("dtype", ""), choices=INPUT_DTYPES, help="Of its values"
    )
    texts = [
        Field(name, words[0], values.get(name, ""), words[1], help=words[2],
              numeric=name == "num_classes", fault=wrong.get(name, ""))
        for name, words in _TEXTS.items()
    ]  # fmt: skip
    checks = [
        Field(name, label, values.get(name, ""), help=help_, fault=wrong.get(name, ""))
        for name, (label, help_) in _CHECKS.items()
    ]
    return uri, [task, *texts, dtype], checks


def read_spec(values: Mapping[str, str]) -> dict[str, Any]:
    """The model spec that was typed; what is wrong with it is for the service to say.

    Raises:
        InvalidDocument: JSON was asked for and is not there.
    """
    given = {key: text.strip() for key, text in values.items() if text.strip()}
    spec: dict[str, Any] = {"uri": given.get("uri", "")}
    spec |= {key: given[key] for key in ("revision", "weights") if key in given}
    spec |= {key: True for key in _CHECKS if key in given}
    if given.get("task", AS_IT_COMES) != AS_IT_COMES:
        spec["task"] = given["task"]
    if count := given.get("num_classes"):
        is_number = count.isascii() and count.isdecimal() and len(count) < 12
        spec["num_classes"] = int(count) if is_number else count
    if "kwargs" in given:
        spec["kwargs"] = read_json("kwargs", given["kwargs"])
    if shape := given.get("input"):
        spec["input"] = _read_input(shape, given.get("dtype", INPUT_DTYPES[0]))
    return spec


def _read_input(text: str, dtype: str) -> Any:
    if text.startswith(("{", "[")):
        value = read_json("input", text)
        return value if isinstance(value, dict) else {"shape": value, "dtype": dtype}
    sizes = re.split(r"[\s,x×]+", text)
    if not all(size.isascii() and size.isdecimal() and len(size) < 12 for size in sizes):
        message = f"The input's shape is sizes without the batch, like 3, 224, 224; not {text!r}."
        raise InvalidDocument([("input", message)])
    return {"shape": [int(size) for size in sizes], "dtype": dtype}


def spec_address(spec: Mapping[str, Any]) -> str:
    """The query string that fills the form with a spec, to change what was wrong with it."""
    items = {key: spec.get(key) for key in ("uri", "revision", "weights", "num_classes", "task")}
    items |= {key: "on" for key in _CHECKS if spec.get(key)}
    if spec.get("kwargs"):
        items["kwargs"] = json.dumps(spec["kwargs"])
    if spec.get("input"):
        items["input"] = ", ".join(map(str, spec["input"]["shape"]))
        items["dtype"] = spec["input"]["dtype"]
    return urlencode({key: value for key, value in items.items() if value is not None})


def read_json(field: str, text: str) -> Any:
    """JSON that somebody typed or uploaded. Raises InvalidDocument with the place of the fault."""
    try:
        return parse_json(text.encode(errors="surrogatepass"))
    except HTTPException as error:
        raise InvalidDocument([(field, str(error.detail).replace("The body", "This"))]) from None

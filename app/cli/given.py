"""What people give a verb: models, datasets and freeze configs as options and files."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from app.client import Failure, Server
from app.training.recipe import parse_recipe

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    pass


Document = dict[str, Any]

ENDED = ("succeeded", "stopped", "failed", "interrupted")


def has_ended(job: dict[str, Any]) -> bool:
    """Whether nothing more comes of a job unless somebody asks for it."""
    return job["state"] in ENDED and not job["is_restarting"]


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A freeze config (JSON).")]
Freeze = Annotated[
    list[str] | None,
    typer.Option(
        "--freeze", metavar="GLOB", help="Freeze what matches: a glob, re:…, has:… or type=CLASS."
    ),
]
Unfreeze = Annotated[
    list[str] | None,
    typer.Option(
        "--unfreeze",
        metavar="GLOB",
        help="Train what matches; of several options the last one decides.",
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A URI (demo:digits), a model's number, or a model spec as JSON."
    ),
]
DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="A URI, or a dataset spec as JSON.")
]
EvalSets = Annotated[
    list[str] | None,
    typer.Option(
        "--eval", metavar="NAME=URI", help="A further evaluation set; may be given several times."
    ),
]
JobArgument = Annotated[int, typer.Argument(metavar="JOB", min=1, help="The job's number.")]
# States of a task that has not ended.
WAITING = ("queued", "running", "stopping")


def read_config(
    file: Path | None, order: list[str], freeze: list[str] | None, unfreeze: list[str] | None
) -> Document:
    """The config of a file; the rules of the options come after its own, in the order given."""
    document = read_json_file(file) if file else {}
    rules = read_rules(order, freeze, unfreeze)
    if not rules:
        return document
    # The lists say what the file's rules alone gave; with further rules they would contradict.
    without = {key: value for key, value in document.items() if key not in ("frozen", "trainable")}
    return {**without, "rules": [*document.get("rules", []), *rules]}


def read_rules(
    order: list[str], freeze: list[str] | None, unfreeze: list[str] | None
) -> list[Document]:
    """The rules of the options, in the order given: the last one that matches decides."""
    globs = {"freeze": iter(freeze or ()), "unfreeze": iter(unfreeze or ())}
    return [_read_rule(action, next(globs[action])) for action in order]


def _read_rule(action: str, text: str) -> Document:
    """A glob, ``re:…`` or ``has:…``; ``type=LayerNorm`` names a class instead."""
    key, _, type_ = text.partition("=")
    return {"action": action, "type": type_} if key == "type" else {"action": action, "match": text}


def read_json_file(file: Path) -> Document:
    try:
        document = json.loads(file.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise Failure(f"Cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise Failure(f"{file} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise Failure(f"{file} must hold a JSON object.")
    return document


def _refuse_constant(name: str) -> NoReturn:
    """Python would read NaN and Infinity, and could not send them."""
    raise ValueError(f"{name} is not a JSON number")


def read_training(options: Mapping[str, Any]) -> Document:
    """The options of a recipe that were given.

    Raises:
        InvalidDocument: in the server's words, which could not be asked: JSON has no NaN.
    """
    given = {option: value for option, value in options.items() if value is not None}
    parse_recipe(given)
    return given


def read_spec(text: str) -> Document:
    """A URI, or a whole spec as a JSON object."""
    if not text.lstrip().startswith("{"):
        return {"uri": text}
    try:
        document: Document = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a JSON object: {error}.") from error
    return document


def read_dataset(text: str, evals: list[str] | None) -> Document:
    """A dataset's spec, with the evaluation sets of the options beside its own."""
    spec = read_spec(text)
    sets = spec.get("eval") or {}
    if not evals or not isinstance(sets, dict):  # the server says what is wrong with it
        return spec
    for pair in evals:
        name, _, uri = pair.partition("=")
        if not (name and uri):
            raise typer.BadParameter(f"--eval {pair!r} must have the form NAME=URI.")
        if name in sets:
            raise typer.BadParameter(f"--eval names the set {name!r} twice.")
        sets = {**sets, name: uri}
    return {**spec, "eval": sets}


def wait_for_task(server: Server, task: Document, otherwise: str) -> Document:
    """The task as it succeeded.

    Raises:
        Failure: it did not; the words are `otherwise` and the reason.
    """
    while (task := server.call("GET", f"/api/tasks/{task['id']}"))["state"] in WAITING:
        time.sleep(0.1)  # over HTTP there is nothing to wait on: only jobs have events
    if task["state"] != "succeeded":
        message = (task["error"] or {}).get("message") or f"its task {task['state']}"
        raise Failure(f"{otherwise}: {message}")
    return task


def find_model(server: Server, text: str) -> Document:
    """The model of that number, else one newly added, when its inspection is done.

    Raises:
        Failure: when it cannot be inspected.
    """
    if text.isdecimal():
        model = server.call("GET", f"/api/models/{text}")
    else:
        spec = read_spec(text)
        known = server.call("GET", "/api/models", limit=1000)
        alike = (one for one in known if one["state"] == "ready" and is_same(one["spec"], spec))
        model = next(alike, None) or server.call("POST", "/api/models", spec)
    path = f"/api/models/{model['id']}"
    while (model := server.call("GET", path))["state"] == "inspecting":
        time.sleep(0.1)  # over HTTP there is nothing to wait on: only jobs have events
    if model["state"] == "failed":
        raise Failure(f"{text} cannot be used: {model['error']['message']}")
    return model


def is_same(known: Document, spec: Document) -> bool:
    """Whether an inspection need not be repeated: of a name, not of code or files that change.

    What an option is that was not given, is false: None, False or nothing.
    """
    changes = str(spec.get("uri")).startswith(("python:", "hf:/", "hf:.")) or spec.get("weights")
    given, known = ({k: v for k, v in one.items() if v} for one in (spec, known))
    return not changes and known == given

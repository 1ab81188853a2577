"""A verb that trains a model under several freeze sets and prints one table: sweep."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.given import (
    DatasetArgument,
    Document,
    EvalSets,
    Json,
    ModelArgument,
    find_model,
    read_dataset,
    read_json_file,
    read_training,
)
from app.cli.train import follow_job, is_number
from app.cli.verb import verb
from app.client import Failure, server_for

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from app.settings import Settings

SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", help="A preset (head-only, last-blocks=2), the id of a saved config, or a file."
    ),
]


@verb
def sweep(
    settings: "Settings",
    model: ModelArgument,
    dataset: DatasetArgument,
    set_: SetOption,
    eval_: EvalSets = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name.")] = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """The same training under several freeze sets, and one table of what came out."""
    request: Document = {
        "sets": [read_set(text) for text in set_],
        "dataset": read_dataset(dataset, eval_),
        "training": read_training(training),
        **({} if name is None else {"name": name}),
    }
    with server_for(settings) as server:
        request["model_id"] = find_model(server, model)["id"]
        started = server.call("POST", "/api/sweeps", request)
        ended = [follow_job(server, job_id) for job_id in started["jobs"]]
        found = server.call("GET", f"/api/sweeps/{started['id']}")
    if json_:
        print(json.dumps(found))
    else:
        _print_table(found)
    failed = [job for job in ended if job["state"] != "succeeded" or job["proof"] == "broken"]
    if failed:
        named = ", ".join(f"{job['id']} ({job['state']})" for job in failed)
        raise Failure(f"Not every job succeeded with a proof that holds: {named}.")


def read_set(text: str) -> Document:
    """A set as the interface takes it, from ``PRESET``, ``PRESET=COUNT``, an id or a file."""
    if text.isdecimal():
        return {"config": int(text)}
    path = Path(text)
    if path.suffix == ".json" or path.exists():
        return {"name": path.stem[:100] or "file", "config": read_json_file(path)}
    preset, _, count = text.partition("=")
    if count and not count.isdecimal():
        raise Failure(f"--set {text!r}: after '=' stands a number of blocks.")
    return {"preset": preset, **({"count": int(count)} if count else {})}


def _print_table(found: Document) -> None:
    metrics = list(dict.fromkeys(name for row in found["table"] for name in row["metrics"]))
    shown = [name for name in metrics if not name.endswith("/loss")] or metrics
    width = max(len(row["set"]) for row in found["table"])
    heads = [f"{name.removeprefix('eval/'):>15}" for name in shown]
    print(f"{'JOB':>5}  {'FREEZE SET':<{width}}  {'MS A STEP':>10}", *heads, sep="  ")
    for row in found["table"]:
        step_ms = "–" if row["step_ms"] is None else f"{row['step_ms']:.2f}"
        cells = [
            f"{_words(row['metrics'].get(name)):>{len(head)}}"
            for name, head in zip(shown, heads, strict=True)
        ]
        print(f"{row['job_id']:>5}  {row['set']:<{width}}  {step_ms:>10}", *cells, sep="  ")


def _words(pair: Document | None) -> str:
    """What a metric was before training and became."""
    if pair is None:
        return "–"
    ends = [pair["before"], pair["after"]]
    return " → ".join(f"{end:.4g}" if is_number(end) else str(end) for end in ends)

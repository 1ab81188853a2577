"""Verbs that run a job in the foreground: train, evaluate."""

import json
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.given import (
    ConfigFile,
    DatasetArgument,
    Document,
    EvalSets,
    Freeze,
    Json,
    ModelArgument,
    Unfreeze,
    find_model,
    has_ended,
    read_config,
    read_dataset,
    read_training,
)
from app.cli.plan import changed_names, proof_words
from app.cli.verb import verb
from app.client import Failure, Server, read_events, server_for

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from app.settings import Settings


@verb
def train(
    settings: "Settings",
    context: typer.Context,
    model: ModelArgument,
    dataset: DatasetArgument,
    config: ConfigFile = None,
    freeze: Freeze = None,
    unfreeze: Unfreeze = None,
    eval_: EvalSets = None,
    name: Annotated[str | None, typer.Option(help="The job's name.")] = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """One job in the foreground; Ctrl-C stops it with a checkpoint, and the exit status is 1."""
    document = read_config(config, context.obj, freeze, unfreeze)
    data = read_dataset(dataset, eval_)
    _run_job(settings, "train", model, data, document, name, training, json_)


@verb
def evaluate(
    settings: "Settings",
    model: ModelArgument,
    dataset: DatasetArgument,
    eval_: EvalSets = None,
    name: Annotated[str | None, typer.Option(help="The job's name.")] = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """A model's metrics on a dataset; nothing is trained."""
    data = read_dataset(dataset, eval_)
    _run_job(settings, "evaluate", model, data, {}, name, training, json_)


def _run_job(
    settings: "Settings",
    kind: str,
    model: str,
    dataset: Document,
    config: Document,
    name: str | None,
    training: Mapping[str, Any],
    json_: bool,
) -> None:
    request: Document = {
        "kind": kind,
        "config": config,
        "dataset": dataset,
        "training": read_training(training),
    }
    if name is not None:
        request["name"] = name
    with server_for(settings) as server:
        request["model_id"] = find_model(server, model)["id"]
        job = server.call("POST", "/api/jobs", request)
        ended = follow_job(server, job["id"])
        for warning in ended["warnings"]:
            typer.echo(f"Warning: {warning}", err=True)
        report_job(server, ended, json_)


def follow_job(server: Server, job_id: int) -> Document:
    """Show a job until it has ended; Ctrl-C (or SIGTERM) stops it, a second one leaves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("job {task.fields[job]}  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Also where a shell started this in the background, which leaves Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = False
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("queued", total=None, job=job_id, numbers="")
            while True:
                try:
                    return _watch(server, job_id, progress, bar)
                except KeyboardInterrupt:
                    if asked:
                        raise Failure(f"Left job {job_id} while it was stopping.") from None
                    asked = True
                    progress.update(bar, description="stopping")
                    server.call("POST", f"/api/jobs/{job_id}/stop")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _watch(server: Server, job_id: int, progress: "Progress", bar: "TaskID") -> Document:
    """Follow the events of one job to its end.

    Raises:
        Failure: the stream ended and the job did not.
    """
    path = f"/api/jobs/{job_id}"
    with server.stream(f"{path}/events", cursor="now") as answer:
        # Read after the stream is open, so that what happens in between is in one of the two.
        job = server.call("GET", path)
        for event, data in read_events(answer.iter_lines()):
            if has_ended(job) or event == "end":
                break
            if event == "state":
                job = data
                progress.update(
                    bar, description=job["state"], completed=job["step"], total=job["total_steps"]
                )
            elif event == "metrics":
                step = max(series["steps"][-1] for series in data.values() if series["steps"])
                last = {name: series["values"][-1] for name, series in data.items()}
                shown = [f"{name} {last[name]:.4g}" for name in SHOWN if is_number(last.get(name))]
                progress.update(bar, completed=step)
                if shown:
                    progress.update(bar, numbers="  ".join(shown))
    job = server.call("GET", path)
    if not has_ended(job):
        raise Failure(f"The server at {server.address} has ended; job {job_id} goes on without it.")
    progress.update(bar, description=job["state"], completed=job["step"])
    return job


SHOWN = ("loss", "eval/eval/accuracy")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # what is not finite comes as a string


def report_job(server: Server, job: Document, json_: bool) -> None:
    """Say how a job ended.

    Raises:
        Failure: unless it succeeded and its proof holds.
    """
    path = f"/api/jobs/{job['id']}"
    series = server.call("GET", f"{path}/metrics")
    metrics = {name: one["values"][-1] for name, one in series.items() if one["values"]}
    proof = server.call("GET", f"{path}/proof") if job["kind"] == "train" else None
    if json_:
        print(json.dumps({**job, "metrics": metrics, "proof": proof}))
    else:
        for name, value in metrics.items():
            print(f"{name:<24}{value:>12.6g}" if is_number(value) else f"{name:<24}{value:>12}")
        if proof is not None:
            print(proof_words(proof))
    if job["state"] == "stopped":
        raise Failure(f"Job {job['id']} was stopped; 'frostline resume {job['id']}' goes on.")
    if job["state"] != "succeeded":
        error = job["error"] or {"reason": "unknown", "message": "no reason was recorded"}
        raise Failure(f"Job {job['id']} {job['state']} ({error['reason']}): {error['message']}")
    if proof is not None and proof["verdict"] == "broken":
        raise Failure(f"THE PROOF IS BROKEN, these moved: {' '.join(changed_names(proof))}")

"""Verbs on jobs that are there: jobs, stop, pause, resume, freeze, delete, export."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.given import (
    ENDED,
    ConfigFile,
    Document,
    Freeze,
    JobArgument,
    Json,
    Unfreeze,
    read_json_file,
    read_rules,
)
from app.cli.train import follow_job, report_job
from app.cli.verb import verb
from app.client import Failure, Server, read_events, server_for

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from app.settings import Settings


@verb
def jobs(settings: "Settings", json_: Json = False) -> None:
    """The jobs, newest first."""
    with server_for(settings) as server:
        found = server.call("GET", "/api/jobs", limit=1000)
    if json_:
        print(json.dumps(found))
        return
    print(f"{'JOB':>5}  {'STATE':<12}{'STEP':>14}  {'MODEL':<28}NAME")
    for job in found:
        step = f"{job['step']}/{job['total_steps'] or '?'}"
        uri = job["model"]["uri"]
        print(f"{job['id']:>5}  {job['state']:<12}{step:>14}  {uri:<28}{job['name'] or ''}")


@verb
def stop(settings: "Settings", job: JobArgument) -> None:
    """Stop a job after its current step, with a checkpoint."""
    with server_for(settings) as server:
        server.call("POST", f"/api/jobs/{job}/stop")
        print(f"Job {job} is {follow_job(server, job)['state']}.")


@verb
def pause(
    settings: "Settings",
    job: JobArgument,
    mode: Annotated[
        Literal["hold", "release"], typer.Option(help="Keep the model loaded, or free the device.")
    ] = "hold",
) -> None:
    """Pause a running job, after its current step."""
    with server_for(settings) as server:
        server.call("POST", f"/api/jobs/{job}/pause", {"mode": mode})
        print(f"Job {job} is {_wait_for(server, job, 'paused', *ENDED)}.")


@verb
def resume(
    settings: "Settings",
    job: JobArgument,
    config: ConfigFile = None,
    epochs: Annotated[int | None, typer.Option(help="Train to so many epochs in all.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Train to so many steps in all.")] = None,
) -> None:
    """Go on with a job, from its pause or its newest checkpoint, also past its end."""
    body: Document = {"config": read_json_file(config)} if config else {}
    ends = {"epochs": epochs, "max_steps": max_steps}
    if given := {name: value for name, value in ends.items() if value is not None}:
        body["training"] = given
    with server_for(settings) as server:
        server.call("POST", f"/api/jobs/{job}/resume", body)
        state = _wait_for(server, job, "queued", "starting", "running", *ENDED)
        print(f"Job {job} is {state}.", flush=True)
        if server.own:  # nobody else would run it
            report_job(server, follow_job(server, job), json_=False)


@verb
def freeze(
    settings: "Settings",
    context: typer.Context,
    job: JobArgument,
    freeze: Freeze = None,
    unfreeze: Unfreeze = None,
    optimizer_state: Annotated[
        Literal["fresh", "keep"], typer.Option(help="What the unfrozen begin with.")
    ] = "fresh",
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps over which the rate of the unfrozen rises from zero.")
    ] = None,
    lr_scale: Annotated[
        float | None, typer.Option(help="A factor on the rate of the unfrozen.")
    ] = None,
) -> None:
    """Change what is frozen in a running job, from its next step on."""
    rules = read_rules(context.obj, freeze, unfreeze)
    if not rules:
        raise typer.BadParameter("Say what to change: --freeze GLOB or --unfreeze GLOB.")
    if lr_scale is not None and not math.isfinite(lr_scale):  # JSON could not say it
        raise Failure(f"'lr_scale' is {lr_scale}; it must be finite and at least 0.")
    begins = {"warmup_steps": warmup_steps, "lr_scale": lr_scale}
    body: Document = {key: value for key, value in begins.items() if value is not None}
    body |= {"rules": rules, "optimizer_state": optimizer_state}
    with server_for(settings) as server:
        edit = server.call("PATCH", f"/api/jobs/{job}/freeze", body)
    step = edit["step"]
    when = "with its next step, which it has not reached yet" if step is None else f"step {step}"
    print(f"Job {job}: holds from {when} on.")


def _wait_for(server: Server, job_id: int, *states: str) -> str:
    """The state of a job once it is one of these."""
    path = f"/api/jobs/{job_id}"
    with server.stream(f"{path}/events", cursor="now") as answer:
        state: str = server.call("GET", path)["state"]
        events = read_events(answer.iter_lines())
        while state not in states and (news := next(events, None)):
            event, data = news
            state = data["state"] if event == "state" else state
    return state


@verb
def delete(settings: "Settings", job: JobArgument) -> None:
    """Delete an ended job with all that lies on disk."""
    with server_for(settings) as server:
        server.call("DELETE", f"/api/jobs/{job}")
    print(f"Job {job} is deleted.")


@verb
def export(
    settings: "Settings",
    job: JobArgument,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file to write; for tensorboard its folder."),
    ],
    format_: Annotated[
        Literal["csv", "parquet", "json", "tensorboard"], typer.Option("--format")
    ] = "csv",
) -> None:
    """A job's metrics and layer statistics as a file."""
    if format_ == "tensorboard":  # which finds its files by what their names contain
        output.mkdir(parents=True, exist_ok=True)
        output /= f"events.out.tfevents.frostline-job-{job}"
    draft = output.with_name(f"{output.name}.{os.getpid()}.part")
    with server_for(settings) as server:
        try:
            with (
                server.stream(f"/api/jobs/{job}/export", format=format_) as answer,
                draft.open("wb") as file,
            ):
                for chunk in answer.iter_bytes():
                    file.write(chunk)
            draft.replace(output)  # whole or not at all
        finally:
            draft.unlink(missing_ok=True)
    print(f"{output}: {output.stat().st_size:,} bytes")

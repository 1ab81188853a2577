"""Verbs on jobs that are there: jobs, stop, pause, resume, delete, export."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.given import ENDED, ConfigFile, JobArgument, Json, read_json_file
from app.cli.train import follow_job, report_job
from app.cli.verb import verb
from app.client import Server, read_events, server_for

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
def resume(settings: "Settings", job: JobArgument, config: ConfigFile = None) -> None:
    """Go on with a job, from its pause or its newest checkpoint."""
    body = {"config": read_json_file(config)} if config else {}
    with server_for(settings) as server:
        server.call("POST", f"/api/jobs/{job}/resume", body)
        state = _wait_for(server, job, "queued", "starting", "running", *ENDED)
        print(f"Job {job} is {state}.", flush=True)
        if server.own:  # nobody else would run it
            report_job(server, follow_job(server, job), json_=False)


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

"""The command line: each verb of the interface, said to the server of a data folder."""

import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

from app import __version__
from app.client import Failure, Server, read_events, server_for
from app.training.recipe import OPTIONS, Option

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from app.settings import Settings

Document = dict[str, Any]

ENDED = ("succeeded", "stopped", "failed", "interrupted")

app = typer.Typer(
    name="frostline",
    help="Decide, apply, prove and profit from freezing layers of PyTorch models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave: 0 success, 2 usage error, 1 anything else, in one line."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(given, prog_name="frostline", standalone_mode=False)
        if status:  # what typer makes of Ctrl-C
            raise Failure("interrupted.")
        sys.exit(0)
    except Exception as error:
        if "--debug" in given:
            raise
        usage = getattr(error, "format_message", None)  # of typer's own errors
        print(f"frostline: {_one_line(usage() if usage else error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


def _one_line(error: object) -> str:
    if isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, str | Failure | OSError | ValueError | RuntimeError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"frostline {__version__}")
        raise typer.Exit


# -------------------------------------------------------------------------- how a verb is declared


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first argument is the settings.

    Instead of the settings it gets --data-dir and --debug, and instead of ``**training`` one
    option for each option of a recipe.
    """
    own = list(inspect.signature(function).parameters.values())[1:]
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        own[-1:] = [_training_parameter(option) for option in OPTIONS]
    shared = [
        _keyword("data_dir", Path | None, None, "--data-dir", "Where the database and jobs lie."),
        _keyword("debug", bool, False, "--debug", "Show the traceback of a failure."),
    ]

    def command(data_dir: Path | None, debug: bool, **options: Any) -> None:  # noqa: ARG001
        function(_read_settings(data_dir=data_dir), **options)

    parameters = [*own, *shared]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(function.__name__.rstrip("_"), cls=_OrderedRules)(command)
    return function


def _keyword(name: str, kind: Any, default: Any, flag: str, words: str) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(flag, help=words, show_default=default is not None)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _training_parameter(option: Option) -> inspect.Parameter:
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool}
    kind = Literal[option.choices] if option.choices else kinds.get(option.kind, str)
    flag = f"--{option.name.replace('_', '-')}"
    if option.kind == "bool":
        flag = f"{flag}/--no-{flag[2:]}"
    usual = "" if option.default is None else f" [{option.default}]"
    return _keyword(option.name, kind | None, None, flag, option.help + usual)


class _OrderedRules(TyperCommand):
    """Remembers in which order --freeze and --unfreeze came: the last rule that matches decides."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = (argument.partition("=")[0] for argument in args)
        ctx.obj = [flag[2:] for flag in flags if flag in ("--freeze", "--unfreeze")]
        return super().parse_args(ctx, args)


def _read_settings(**given: Any) -> "Settings":
    """Options, then FROSTLINE_* variables, then defaults; the current folder may be read too."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fault = error.errors()[0]
        name = "_".join(["FROSTLINE", *map(str, fault["loc"])]).upper()
        raise Failure(f"{name}: {fault['msg']}.") from error
    here = Path.cwd()
    return settings.model_copy(
        update={
            "code_dirs": (*settings.code_dirs, here),
            "file_dirs": (*settings.file_dirs, here),
        }
    )


# --------------------------------------------------------------------------------- serve and link

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
JobArgument = Annotated[int, typer.Argument(metavar="JOB", min=1, help="The job's number.")]


@verb
def serve(
    settings: "Settings",
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = False,
    behind_proxy: Annotated[bool, typer.Option(help="A proxy in front speaks TLS.")] = False,
    root_path: Annotated[str | None, typer.Option(help="The path that a proxy strips.")] = None,
    insecure_http: Annotated[bool, typer.Option(help="Show the token to the network.")] = False,
    stop_jobs: Annotated[bool, typer.Option(help="Stop the jobs before leaving.")] = False,
) -> None:
    """The dashboard with its embedded worker; Ctrl-C leaves jobs running."""
    from app.serving import Dashboard, listen
    from app.web.guard import check_exposure

    given = {
        "host": host,
        "port": port,
        "root_path": root_path,
        "behind_proxy": behind_proxy or None,
        "insecure_http": insecure_http or None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if root_path:
        changes["root_path"] = "/" + root_path.strip("/")
    settings = settings.model_copy(update=changes)
    try:
        check_exposure(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    listener = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})

    def announce(service: Any) -> None:
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{shown}:{settings.port}{settings.root_path}"
        link = f"{address}/login?link={service.make_link()}"
        print(f"Frostline {__version__} serves {settings.data_dir}")
        print(f"Open {link}", flush=True)
        print("The link works once; 'frostline link' prints another. Ctrl-C ends.", flush=True)
        if open_:
            import webbrowser

            webbrowser.open(link)

    def before_end(service: Any) -> None:
        live = [job for job in service.list_jobs(1000) if job["state"] not in ENDED]
        if live and stop_jobs:
            print(f"Stopping {len(live)} jobs, each with a checkpoint …", flush=True)
            for job in live:
                service.stop_job(job["id"])
            _wait_until_ended(service, [job["id"] for job in live])
        elif live:
            names = ", ".join(str(job["id"]) for job in live)
            print(f"Jobs {names} go on without the dashboard; its next start finds them again.")

    # Without handlers of our own, uvicorn would end the process by the signal it has just handled.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Dashboard(settings, listener, announce, before_end).run()


def _wait_until_ended(service: Any, jobs: list[int]) -> None:
    import asyncio

    async def wait() -> None:
        while True:
            seen = service.version
            if all(service.get_job(job)["state"] in ENDED for job in jobs):
                return
            await service.wait_for_change(seen, 1.0)

    asyncio.run(wait())


@verb
def link(settings: "Settings") -> None:
    """A new one-time login link for the running server."""
    from app.store.lock import read_holder

    if read_holder(settings.data_dir) is None:
        raise Failure(f"No server runs on {settings.data_dir}. Start one: frostline serve")
    with server_for(settings) as server:
        print(server.call("POST", "/api/links")["url"])


# ------------------------------------------------------------------------------- plan and verify


@verb
def plan(
    settings: "Settings",
    context: typer.Context,
    model: ModelArgument,
    config: ConfigFile = None,
    freeze: Freeze = None,
    unfreeze: Unfreeze = None,
    json_: Json = False,
) -> None:
    """What a freeze config does to a model: flow states and cost. Nothing is trained."""
    document = _read_config(config, context.obj, freeze, unfreeze)
    with server_for(settings) as server:
        model_id = _find_model(server, model)["id"]
        result = server.call("POST", f"/api/models/{model_id}/plan", document)
        if json_:
            print(json.dumps(result))
        else:
            _print_plan(server.call("GET", f"/api/models/{model_id}/tree"), result)


def _read_config(
    file: Path | None, order: list[str], freeze: list[str] | None, unfreeze: list[str] | None
) -> Document:
    """The config of a file; the rules of the options come after its own, in the order given."""
    document = _read_json_file(file) if file else {}
    globs = {"freeze": iter(freeze or ()), "unfreeze": iter(unfreeze or ())}
    rules = [_read_rule(action, next(globs[action])) for action in order]
    if not rules:
        return document
    # The lists say what the file's rules alone gave; with further rules they would contradict.
    without = {key: value for key, value in document.items() if key not in ("frozen", "trainable")}
    return {**without, "rules": [*document.get("rules", []), *rules]}


def _read_rule(action: str, text: str) -> Document:
    """A glob, ``re:…`` or ``has:…``; ``type=LayerNorm`` names a class instead."""
    key, _, type_ = text.partition("=")
    return {"action": action, "type": type_} if key == "type" else {"action": action, "match": text}


def _read_json_file(file: Path) -> Document:
    try:
        document = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise Failure(f"Cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise Failure(f"{file} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise Failure(f"{file} must hold a JSON object.")
    return document


def _read_spec(text: str) -> Document:
    """A URI, or a whole spec as a JSON object."""
    if not text.lstrip().startswith("{"):
        return {"uri": text}
    try:
        document: Document = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a JSON object: {error}.") from error
    return document


def _find_model(server: Server, text: str) -> Document:
    """The model of that number, else one newly added, when its inspection is done.

    Raises:
        Failure: when it cannot be inspected.
    """
    if text.isdecimal():
        model = server.call("GET", f"/api/models/{text}")
    else:
        spec = _read_spec(text)
        known = server.call("GET", "/api/models", limit=1000)
        alike = (one for one in known if one["state"] == "ready" and _is_same(one["spec"], spec))
        model = next(alike, None) or server.call("POST", "/api/models", spec)
    path = f"/api/models/{model['id']}"
    while (model := server.call("GET", path))["state"] == "inspecting":
        time.sleep(0.1)  # over HTTP there is nothing to wait on: only jobs have events
    if model["state"] == "failed":
        raise Failure(f"{text} cannot be used: {model['error']['message']}")
    return model


def _is_same(known: Document, spec: Document) -> bool:
    """Whether an inspection need not be repeated: a plain name, not code or files that change."""
    uri = str(spec.get("uri"))
    is_name = len(spec) == 1 and not uri.startswith(("python:", "hf:/", "hf:."))
    return is_name and known == {**dict.fromkeys(known), **DEFAULT_SPEC, "uri": uri}


DEFAULT_SPEC = {"random_init": False, "allow_pickle": False, "kwargs": {}}


def _print_plan(tree: Document, result: Document) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    console = Console(highlight=False)
    layers = {layer["path"]: layer for layer in result["layers"]}
    nodes: dict[str, Tree] = {}
    for module in tree["modules"]:
        path, name = module["path"], module["path"].rpartition(".")[2]
        label = Text(name or "model", style="bold").append(f"  {module['type']}", style="dim")
        if path in layers:
            layer = layers[path]
            numel = layer["frozen_numel"] + layer["trainable_numel"]
            glyph, style = FLOW_GLYPHS[layer["flow"]]
            label.append(f"  {glyph} {layer['flow']}", style=style).append(f"  {numel:,}")
        parent = nodes.get(path.rpartition(".")[0]) if path else None
        nodes[path] = parent.add(label) if parent else Tree(label)
    if "" in nodes:
        console.print(nodes[""])
    for line in _cost_lines(result, layers.values()):
        console.print(line)
    for warning in result["warnings"]:
        console.print(f"! {warning['message']}", style="yellow")


FLOW_GLYPHS = {
    "trained": ("●", "dark_orange"),
    "unreached": ("○", "dim"),
    "passes": ("←", "cyan"),
    "idle": ("❄", "bright_cyan"),
}


def _cost_lines(result: Document, layers: Iterable[Document]) -> Iterator[str]:
    frozen = trainable = 0
    for layer in layers:
        frozen += layer["frozen_numel"]
        trainable += layer["trainable_numel"]
    share = 100 * trainable / max(frozen + trainable, 1)
    yield (
        f"{trainable:,} of {frozen + trainable:,} parameters are trained ({share:.1f} %); "
        f"{len(result['frozen'])} of {len(result['frozen']) + len(result['trainable'])} "
        "tensors are frozen"
    )
    cost, full = result["cost"], result["cost"].get("full") or {}
    for key, words in COSTS.items():
        now, then = cost.get(key), full.get(key)
        if now is not None:
            against = f"  ({100 * now / then:.0f} % of training everything)" if then else ""
            yield f"{words:<24}{now:>20,}{against}"
    if cost.get("speedup_bound") is not None:
        yield f"at most {cost['speedup_bound']:.2f} times as fast"


COSTS = {
    "step_flops": "FLOPs in a step",
    "gradient_bytes": "gradients, bytes",
    "optimizer_bytes": "optimizer state, bytes",
    "activation_bytes": "saved activations, bytes",
    "peak_bytes": "peak memory, bytes",
}


@verb
def verify(
    settings: "Settings",  # noqa: ARG001
    before: Annotated[Path, typer.Argument(help="A safetensors file or checkpoint folder.")],
    after: Annotated[Path, typer.Argument(help="The same, after training.")],
    config: Annotated[Path, typer.Option("--config", help="The freeze config (JSON).")],
    json_: Json = False,
) -> None:
    """Compare two checkpoints: frozen tensors bit-identical, trained ones moved."""
    from app.freezing.config import parse_config
    from app.freezing.proof import compare_checkpoints

    proof = compare_checkpoints(before, after, parse_config(_read_json_file(config)))
    print(json.dumps(proof) if json_ else _proof_words(proof))
    still = [item["name"] for item in proof["trained"]["still"]]
    breaches = (
        ("must not change and did", _changed_names(proof)),
        ("were to be trained and did not move", still),
    )
    if told := [f"These {words}: {' '.join(names)}" for words, names in breaches if names]:
        raise Failure(". ".join(told))


def _proof_words(proof: Document) -> str:
    if proof["verdict"] == "pending":
        return "No tensor has been checked yet."
    frozen, trained = proof["frozen"], proof["trained"]
    return (
        f"{frozen['identical']} of {frozen['checked']} frozen tensors are bit-identical, "
        f"{trained['moved']} of {trained['checked']} trained ones moved."
    )


def _changed_names(proof: Document) -> list[str]:
    parts = (proof["frozen"], proof["buffers"])
    return [item["name"] for part in parts for item in part.get("changed", ())]


# ------------------------------------------------------------------------------ train and evaluate


@verb
def train(
    settings: "Settings",
    context: typer.Context,
    model: ModelArgument,
    dataset: DatasetArgument,
    config: ConfigFile = None,
    freeze: Freeze = None,
    unfreeze: Unfreeze = None,
    name: Annotated[str | None, typer.Option(help="The job's name.")] = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """One job in the foreground; Ctrl-C stops it with a checkpoint, and the exit status is 1."""
    document = _read_config(config, context.obj, freeze, unfreeze)
    _run_job(settings, "train", model, dataset, document, name, training, json_)


@verb
def evaluate(
    settings: "Settings",
    model: ModelArgument,
    dataset: DatasetArgument,
    name: Annotated[str | None, typer.Option(help="The job's name.")] = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """A model's metrics on a dataset; nothing is trained."""
    _run_job(settings, "evaluate", model, dataset, {}, name, training, json_)


def _run_job(
    settings: "Settings",
    kind: str,
    model: str,
    dataset: str,
    config: Document,
    name: str | None,
    training: Mapping[str, Any],
    json_: bool,
) -> None:
    request: Document = {
        "kind": kind,
        "config": config,
        "dataset": _read_spec(dataset),
        "training": {option: value for option, value in training.items() if value is not None},
    }
    if name is not None:
        request["name"] = name
    with server_for(settings) as server:
        request["model_id"] = _find_model(server, model)["id"]
        job = server.call("POST", "/api/jobs", request)
        ended = _follow(server, job["id"])
        for warning in ended["warnings"]:
            typer.echo(f"Warning: {warning}", err=True)
        _report(server, ended, json_)


def _follow(server: Server, job_id: int) -> Document:
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
            if job["state"] in ENDED or event == "end":
                break
            if event == "state":
                job = data
                progress.update(
                    bar, description=job["state"], completed=job["step"], total=job["total_steps"]
                )
            elif event == "metrics":
                step = max(series["steps"][-1] for series in data.values() if series["steps"])
                last = {name: series["values"][-1] for name, series in data.items()}
                shown = [f"{name} {last[name]:.4g}" for name in SHOWN if _is_number(last.get(name))]
                progress.update(bar, completed=step)
                if shown:
                    progress.update(bar, numbers="  ".join(shown))
    job = server.call("GET", path)
    if job["state"] not in ENDED:
        raise Failure(f"The server at {server.address} has ended; job {job_id} goes on without it.")
    progress.update(bar, description=job["state"], completed=job["step"])
    return job


SHOWN = ("loss", "eval/eval/accuracy")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # what is not finite comes as a string


def _report(server: Server, job: Document, json_: bool) -> None:
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
            print(f"{name:<24}{value:>12.6g}" if _is_number(value) else f"{name:<24}{value:>12}")
        if proof is not None:
            print(_proof_words(proof))
    if job["state"] == "stopped":
        raise Failure(f"Job {job['id']} was stopped; 'frostline resume {job['id']}' goes on.")
    if job["state"] != "succeeded":
        error = job["error"] or {"reason": "unknown", "message": "no reason was recorded"}
        raise Failure(f"Job {job['id']} {job['state']} ({error['reason']}): {error['message']}")
    if proof is not None and proof["verdict"] == "broken":
        raise Failure(f"THE PROOF IS BROKEN, these moved: {' '.join(_changed_names(proof))}")


# -------------------------------------------------------------------------------------- job control


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
        print(f"Job {job} is {_follow(server, job)['state']}.")


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
    body = {"config": _read_json_file(config)} if config else {}
    with server_for(settings) as server:
        server.call("POST", f"/api/jobs/{job}/resume", body)
        state = _wait_for(server, job, "queued", "starting", "running", *ENDED)
        print(f"Job {job} is {state}.", flush=True)
        if server.own:  # nobody else would run it
            _report(server, _follow(server, job), json_=False)


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
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    format_: Annotated[
        Literal["csv", "parquet", "json", "tensorboard"], typer.Option("--format")
    ] = "csv",
) -> None:
    """A job's metrics and layer statistics as a file."""
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


# ------------------------------------------------------------------------------------------ doctor


@verb
def doctor(settings: "Settings") -> None:
    """What is installed, which devices there are, and what is wrong, in words."""
    from app.doctor import examine

    findings = []
    for name, finding in examine(settings):
        good, words = finding
        print(f"{'ok' if good else 'WRONG':<6}{name:<14}{words}")
        if not good:
            findings.append(name)
    if findings:
        raise Failure(f"{len(findings)} findings: {', '.join(findings)}.")

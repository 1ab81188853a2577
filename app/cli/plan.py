"""Verbs on freeze configs: plan, verify."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.given import (
    ConfigFile,
    Document,
    Freeze,
    Json,
    ModelArgument,
    Unfreeze,
    find_model,
    read_config,
    read_json_file,
    read_spec,
    wait_for_task,
)
from app.cli.mechanisms import print_comparison, run_comparison
from app.cli.outline import count, counted, draw_tree, grow_tree, share_of, size
from app.cli.verb import verb
from app.client import Failure, server_for

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from app.settings import Settings


@verb
def plan(
    settings: "Settings",
    context: typer.Context,
    model: ModelArgument,
    config: ConfigFile = None,
    freeze: Freeze = None,
    unfreeze: Unfreeze = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Assume this batch.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Assume texts of so many tokens.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Assume images of so many pixels per side.")
    ] = None,
    optimizer: Annotated[Literal["sgd", "adam", "adamw"] | None, typer.Option()] = None,
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option()] = None,
    all_: Annotated[bool, typer.Option("--all", help="Fold no repeated blocks.")] = False,
    compare_mechanisms: Annotated[
        bool,
        typer.Option("--compare-mechanisms", help="Train a few steps under each mechanism."),
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(help="For the comparison, or for a model that gives no example of its own."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, max=100, help="Steps of the comparison.")] = 5,
    json_: Json = False,
) -> None:
    """What a freeze config does to a model: flow states and cost. Nothing is trained.

    With --compare-mechanisms a worker trains a copy for a few steps under each of the four
    mechanisms and tells them apart: gradients, memory, time, and what moves.
    """
    document = read_config(config, context.obj, freeze, unfreeze)
    assumed = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "image_size": image_size,
        "optimizer": optimizer,
        "precision": precision,
    }
    assume = {name: value for name, value in assumed.items() if value is not None}
    with server_for(settings) as server:
        model_id = find_model(server, model)["id"]
        if compare_mechanisms:
            training = {k: v for k, v in assume.items() if k in ("optimizer", "batch_size")}
            wanted = {**document, "training": {**training, "max_steps": steps}}
            if dataset is not None:
                wanted["dataset"] = read_spec(dataset)
            found = run_comparison(server, model_id, wanted)
            if json_:
                print(json.dumps(found))
            else:
                print_comparison(found)
            return
        if dataset is not None:
            look = {"model_id": model_id, "dataset": read_spec(dataset)}
            task = server.call("POST", "/api/datasets/preview", look)
            wait_for_task(server, task, "The model cannot be traced on this dataset")
        result = server.call("POST", f"/api/models/{model_id}/plan", {**document, "assume": assume})
        if json_:
            print(json.dumps(result))
        else:
            print_plan(server.call("GET", f"/api/models/{model_id}/tree"), result, all_)


def print_plan(tree: Document, result: Document, show_all: bool = False) -> None:
    """The tree with its frost line, the cost against training everything, and the findings."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for row in draw_tree(grow_tree(tree, result), show_all):
        console.print(row)
    console.print()
    for line in _cost_lines(result):
        console.print(line, markup=False)
    for finding in result["warnings"]:
        names = finding["names"]
        more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        listed = f" ({', '.join(names[:NAMES_SHOWN])}{more})" if names else ""
        words = f"! {finding['message']}{listed} [{finding['code']}]"
        console.print(words, style="yellow", markup=False)


NAMES_SHOWN = 5


def _cost_lines(result: Document) -> Iterator[str]:
    cost, full = result["cost"], result["cost"]["full"]
    frozen = sum(layer["frozen_numel"] for layer in result["layers"])
    trainable = sum(layer["trainable_numel"] for layer in result["layers"])
    share = 100 * trainable / max(frozen + trainable, 1)
    tensors = len(result["frozen"]), len(result["frozen"]) + len(result["trainable"])
    yield (
        f"{share_of(trainable, frozen + trainable, 'parameter')} trained ({share:.1f} %); "
        f"{share_of(*tensors, 'tensor')} frozen"
    )
    yield f"{'':<20}{'this freeze':>14}{'everything':>14}"
    for key, words, show in COSTS:
        now, then = cost.get(key), full.get(key)
        is_there = then or key != "workspace_bytes"  # a CPU has none
        if now is not None and then is not None and is_there:
            against = f"{100 * now / then:>8.0f} %" if then else ""
            yield f"{words:<20}{show(now):>14}{show(then):>14}{against}"
    if cost.get("speedup_bound") is not None:
        yield f"at most {cost['speedup_bound']:.2f} times as fast, by FLOPs"
    if cost.get("predicted_step_ms") is not None:
        yield f"a step is predicted to take {cost['predicted_step_ms']:.3g} ms"
    for device, fits in cost["fits"].items():
        yield f"the peak {'fits' if fits else 'DOES NOT FIT'} the memory of {device}"
    known = {k.replace("_", " "): v for k, v in cost["assumed"].items() if v is not None}
    yield "assumed: " + ", ".join(f"{k} {v}" for k, v in known.items() if not isinstance(v, dict))


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("forward_flops", "forward, FLOPs", count),
    ("backward_flops", "backward, FLOPs", count),
    ("step_flops", "step, FLOPs", count),
    ("gradient_bytes", "gradients", size),
    ("optimizer_bytes", "optimizer state", size),
    ("activation_bytes", "saved activations", size),
    ("workspace_bytes", "cuBLAS workspaces", size),
    ("peak_bytes", "peak memory", size),
)


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
    from app.freezing.verify import compare_checkpoints

    proof = compare_checkpoints(before, after, parse_config(read_json_file(config)))
    print(json.dumps(proof) if json_ else proof_words(proof))
    still = [item["name"] for item in proof["trained"]["still"]]
    breaches = (
        ("must not change and did", changed_names(proof)),
        ("were to be trained and did not move", still),
    )
    if told := [f"These {words}: {' '.join(names)}" for words, names in breaches if names]:
        raise Failure(". ".join(told))


def proof_words(proof: Document) -> str:
    if proof["verdict"] == "pending":
        return "No tensor has been checked yet."
    frozen, trained = proof["frozen"], proof["trained"]
    words = (
        f"{share_of(frozen['identical'], frozen['checked'], 'frozen tensor')} bit-identical, "
        f"{trained['moved']:,} of {counted(trained['checked'], 'trained one')} moved"
    )
    if scheduled := len(proof.get("scheduled", ())):
        verb = "is" if scheduled == 1 else "are"
        words += f"; {counted(scheduled, 'tensor')} that the schedule touches {verb} not judged"
    return f"{words}."


def changed_names(proof: Document) -> list[str]:
    parts = (proof["frozen"], proof["buffers"])
    return [item["name"] for part in parts for item in part.get("changed", ())]

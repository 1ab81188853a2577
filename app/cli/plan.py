"""Verbs on freeze configs: plan, verify."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
)
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
    json_: Json = False,
) -> None:
    """What a freeze config does to a model: flow states and cost. Nothing is trained."""
    document = read_config(config, context.obj, freeze, unfreeze)
    with server_for(settings) as server:
        model_id = find_model(server, model)["id"]
        result = server.call("POST", f"/api/models/{model_id}/plan", document)
        if json_:
            print(json.dumps(result))
        else:
            _print_plan(server.call("GET", f"/api/models/{model_id}/tree"), result)


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
    return (
        f"{frozen['identical']} of {frozen['checked']} frozen tensors are bit-identical, "
        f"{trained['moved']} of {trained['checked']} trained ones moved."
    )


def changed_names(proof: Document) -> list[str]:
    parts = (proof["frozen"], proof["buffers"])
    return [item["name"] for part in parts for item in part.get("changed", ())]

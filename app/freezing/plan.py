"""What a freeze config does to one model: flow states, cost, warnings. A walk, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from app.freezing.config import FreezeConfig, expand_rules
from app.freezing.errors import InvalidDocument, describe_unknown, show_value
from app.freezing.findings import Finding, list_findings
from app.freezing.graph import ModelGraph, Module

# Bytes of optimizer state for each byte of a parameter that it steps.
OPTIMIZER_STATE = {"sgd": 1, "adam": 2, "adamw": 2}
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Assumption:
    """What the user assumes of a run; None means as the model was traced."""

    batch_size: int | None = None
    sequence_length: int | None = None
    image_size: int | None = None
    optimizer: str = "adamw"
    precision: str = "fp32"


def parse_assumption(document: Any) -> Assumption:
    """Read the `assume` of a plan request. Raises InvalidDocument."""
    if document is None:
        return Assumption()
    if not isinstance(document, Mapping):
        raise InvalidDocument([("assume", "'assume' must be an object.")])
    errors: list[tuple[str, str]] = []
    known = Assumption.__dataclass_fields__
    for key, value in document.items():
        if key not in known:
            errors.append((f"assume.{key}", describe_unknown(key, known, "something to assume")))
        elif key in ("optimizer", "precision"):
            choices = tuple(OPTIMIZER_STATE) if key == "optimizer" else PRECISIONS
            if value not in choices:
                errors.append(
                    (f"assume.{key}", f"{show_value(value)} is not one of {', '.join(choices)}.")
                )
        elif value is not None and (type(value) is not int or not 1 <= value <= 10**6):
            errors.append(
                (
                    f"assume.{key}",
                    f"{show_value(value)} must be a whole number from 1 to 1,000,000.",
                )
            )
    if errors:
        raise InvalidDocument(errors)
    return Assumption(**document)


@dataclass(frozen=True)
class LayerPlan:
    """One layer's flow state, with its reason."""

    path: str
    flow: str
    because: str
    weight_gradient: bool
    frozen_numel: int
    trainable_numel: int


@dataclass(frozen=True)
class Plan:
    """What a freeze config does to one model."""

    frozen: tuple[str, ...]
    trainable: tuple[str, ...]
    layers: tuple[LayerPlan, ...]
    cost: Mapping[str, Any]
    warnings: tuple[Finding, ...] = field(default=())

    def document(self) -> dict[str, Any]:
        """The plan in the shape of ``POST /api/models/{id}/plan``."""
        return {
            "frozen": list(self.frozen),
            "trainable": list(self.trainable),
            "layers": [asdict(layer) for layer in self.layers],
            "cost": dict(self.cost),
            "warnings": [{**asdict(w), "names": list(w.names)} for w in self.warnings],
        }


def plan_config(
    graph: ModelGraph,
    config: FreezeConfig,
    assume: Assumption | None = None,
    devices: Mapping[str, int] | None = None,
) -> Plan:
    """Say precisely what backward will do under a freeze config, and what it will cost.

    Args:
        assume: batch size, optimizer and precision of the run to come.
        devices: name → bytes of memory, for ``fits``.

    Returns:
        The plan. Flow states and FLOPs are exact for the traced graph; bytes of activations are
        what its nodes save, each storage counted once. Where the model could not be traced, FLOPs
        and activations are None and the flow states follow the order of the modules.
    """
    assume = assume or Assumption()
    frozen = expand_rules(config, graph)
    trains = {name for name, is_frozen in frozen.items() if not is_frozen}
    computed = _gradients_computed(graph, config, trains)
    live = _live_nodes(graph, trains)
    return Plan(
        frozen=tuple(name for name, is_frozen in frozen.items() if is_frozen),
        trainable=tuple(name for name, is_frozen in frozen.items() if not is_frozen),
        layers=tuple(_plan_layers(graph, trains, computed, live)),
        cost=_cost(graph, config, trains, computed, assume, devices or {}),
        warnings=(*list_findings(graph, config, frozen), *_not_assumed(graph, assume)),
    )


def _gradients_computed(graph: ModelGraph, config: FreezeConfig, trains: set[str]) -> set[str]:
    """Parameters that require a gradient while training, whether or not they are then moved."""
    if config.mechanism == "requires_grad":
        return trains
    return trains | {p.name for p in graph.parameters if p.floating and p.requires_grad}


def _live_nodes(graph: ModelGraph, requiring: set[str]) -> list[bool]:
    """For every node whether backward computes a gradient for it: it leads to one that needs it."""
    live: list[bool] = []
    for node in graph.nodes:
        if node.parameter is None:
            live.append(any(i >= 0 and live[i] for i in node.inputs))
        else:
            live.append(node.parameter == "" or node.parameter in requiring)
    return live


# ------------------------------------------------------------------------------------------ layers


def _plan_layers(
    graph: ModelGraph, trains: set[str], computed: set[str], live: list[bool]
) -> Iterator[LayerPlan]:
    reached = {node.parameter for node in graph.nodes if node.parameter}
    towards = _nearest_trained(graph, live)
    trained_before = ""
    for layer in graph.layers:
        names = [graph.canonical_names[name] for name in layer.parameters]
        own = [name for name in names if name in trains]
        if graph.nodes:
            flow, because = _flow(graph, layer, own, reached, live, towards)
        else:
            flow, because = _flow_by_order(own, trained_before)
        if own:
            trained_before = layer.path
        trainable = sum(graph.by_name[name].numel for name in own)
        yield LayerPlan(
            path=layer.path,
            flow=flow,
            because=because,
            weight_gradient=any(n in computed and (n in reached or not graph.nodes) for n in names),
            frozen_numel=sum(graph.by_name[name].numel for name in names) - trainable,
            trainable_numel=trainable,
        )


def _flow(
    graph: ModelGraph,
    layer: Module,
    own: list[str],
    reached: set[str],
    live: list[bool],
    towards: list[tuple[int, str]],
) -> tuple[str, str]:
    got = [name for name in own if name in reached]
    if got:
        return "trained", f"{len(got)} of its {len(layer.parameters)} parameters receive gradients"
    if own:
        return "unreached", "trainable, but backward from the loss never reaches it"
    operations = graph.layer_nodes[layer.path]
    alive = [index for index in operations if live[index]]
    if alive:
        _, name = min(towards[index] for index in alive)
        return "passes", f"gradients pass through to {name}"
    if not operations:
        return "idle", "frozen, and not on any path to the loss"
    return "idle", "frozen, and nothing trained lies before it: backward stops above"


def _flow_by_order(own: list[str], trained_before: str) -> tuple[str, str]:
    """Without a traced graph: as if the modules ran one after the other in model order."""
    if own:
        return "trained", "trainable (not traced: whether backward reaches it is not known)"
    if trained_before:
        return "passes", f"frozen, and {trained_before} before it is trained (not traced: by order)"
    return "idle", "frozen, and nothing before it is trained (not traced: by order)"


def _nearest_trained(graph: ModelGraph, live: list[bool]) -> list[tuple[int, str]]:
    """For every node (distance, what): the nearest thing that its gradient is on the way to."""
    owners = {
        graph.canonical_names[n]: m.path for m in graph.layers for n in reversed(m.parameters)
    }
    nearest: list[tuple[int, str]] = []
    for index, node in enumerate(graph.nodes):
        if not live[index]:
            nearest.append((len(graph.nodes), ""))
        elif node.parameter:
            path = owners[node.parameter] or "the model's own parameters"
            nearest.append((0, f"{path}, which is trained"))
        elif node.parameter == "":
            nearest.append((0, "an activation that requires a gradient"))
        else:
            distance, what = min(nearest[i] for i in node.inputs if i >= 0 and live[i])
            nearest.append((distance + 1, what))
    return nearest


# -------------------------------------------------------------------------------------------- cost


def _cost(
    graph: ModelGraph,
    config: FreezeConfig,
    trains: set[str],
    computed: set[str],
    assume: Assumption,
    devices: Mapping[str, int],
) -> dict[str, Any]:
    everything = {p.name for p in graph.parameters if p.floating}
    stepped = trains if config.mechanism == "exclude" else computed
    cost = _cost_of(graph, trains, computed, stepped, assume)
    full = _cost_of(graph, everything, everything, everything, assume)
    step, full_step = cost["step_flops"], full["step_flops"]
    return {
        **cost,
        "full_step_flops": full_step,
        "speedup_bound": full_step / step if step else None,
        "predicted_step_ms": None,
        "fits": {name: cost["peak_bytes"] <= size for name, size in devices.items()},
        "full": full,
        "assumed": {
            **asdict(assume),
            "sequence_length": None,
            "image_size": None,
            "batch_size": assume.batch_size or graph.batch_size,
            "traced_by": graph.traced_by,
        },
    }


def _cost_of(
    graph: ModelGraph, trains: set[str], computed: set[str], stepped: set[str], assume: Assumption
) -> dict[str, Any]:
    """FLOPs and bytes of one step when `computed` get gradients and `stepped` optimizer state.

    step = Σ F + Σ (r·Bx + t·Bw): every edge of a node costs its backward FLOPs where what it leads
    to is live. FLOPs and activations grow in proportion to the batch.
    """
    scale = (assume.batch_size or graph.batch_size) / graph.batch_size
    size = {p.name: p.nbytes for p in graph.parameters}
    reached = {n.parameter for n in graph.nodes if n.parameter} if graph.nodes else set(size)
    gradient_bytes = sum(size[name] for name in computed & reached)
    optimizer_bytes = OPTIMIZER_STATE[assume.optimizer] * sum(size[n] for n in stepped & reached)
    buffer_bytes = sum(b.numel * _itemsize(b.dtype) for m in graph.modules for b in m.buffers)
    resting = sum(size.values()) + buffer_bytes + gradient_bytes + optimizer_bytes
    forward = backward = activations = None
    if graph.nodes:
        live = _live_nodes(graph, computed)
        forward = round(graph.forward_flops * scale)
        backward = round(_backward_flops(graph, live) * scale)
        half = 0.5 if assume.precision != "fp32" else 1.0  # autocast keeps activations in 16 bits
        activations = round(_saved_bytes(graph, live) * scale * half)
    return {
        "forward_flops": forward,
        "backward_flops": backward,
        "step_flops": None if forward is None or backward is None else forward + backward,
        "trainable_bytes": sum(size[name] for name in trains),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": optimizer_bytes,
        "activation_bytes": activations,
        "peak_bytes": resting + (activations or 0),
    }


def _backward_flops(graph: ModelGraph, live: list[bool]) -> int:
    total = 0
    for index, node in enumerate(graph.nodes):
        if live[index] and (node.node_flops or node.edge_flops):
            total += node.node_flops
            edges = zip(node.inputs, node.edge_flops, strict=False)
            total += sum(flops for i, flops in edges if i >= 0 and live[i])
    return total


def _saved_bytes(graph: ModelGraph, live: list[bool]) -> int:
    storages: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        if live[index]:
            for storage, size, edges in node.saved:
                kept = [node.inputs[e] for e in edges if e < len(node.inputs)]
                if not edges or any(i >= 0 and live[i] for i in kept):
                    storages[storage] = size
    return sum(storages.values())


def _itemsize(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())[:3]
    return max(1, int(digits or 8) // 8) if dtype != "bool" else 1


def _not_assumed(graph: ModelGraph, assume: Assumption) -> Iterator[Finding]:
    sizes = {"sequence length": assume.sequence_length, "image size": assume.image_size}
    for what, value in sizes.items():
        if value is not None and graph.nodes:
            yield Finding(
                "not_assumed",
                f"A {what} of {value} was not applied: FLOPs and activations are those of the "
                "example that was traced. Give the model's 'input' that size to plan for it.",
            )

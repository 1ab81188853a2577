"""What a freeze config does to one model: flow states, cost, warnings. A walk, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from operator import not_
from typing import Any, NamedTuple

from app.freezing.assume import Assumption
from app.freezing.config import FreezeConfig, expand_rules
from app.freezing.cost import Share, make_cost
from app.freezing.findings import Finding, list_findings
from app.freezing.graph import ModelGraph, is_gpu
from app.freezing.timing import Timing
from app.freezing.walk import DEAD


class LayerPlan(NamedTuple):
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
            "layers": [layer._asdict() for layer in self.layers],
            "cost": dict(self.cost),
            "warnings": [{**asdict(w), "names": list(w.names)} for w in self.warnings],
        }


def plan_config(
    graph: ModelGraph,
    config: FreezeConfig,
    assume: Assumption | None = None,
    devices: Mapping[str, int] | None = None,
    timing: Timing | None = None,
    why_not: Mapping[str, str] | None = None,
) -> Plan:
    """Say precisely what backward will do under a freeze config, and what it will cost.

    Args:
        assume: batch size and optimizer of the run to come; its sizes and precision hold where the
            graph was traced at them.
        devices: name → bytes of memory, for ``fits``.
        timing: what a calibration of this model found, for ``predicted_step_ms``.
        why_not: size or `precision` → why the graph was not traced at the one that is assumed.

    Returns:
        The plan. Flow states and FLOPs are exact for the traced graph; bytes of activations are
        what its nodes save, each storage counted once. Where the model could not be traced, FLOPs
        and activations are None and the flow states follow the order of the modules.
    """
    assume = assume or Assumption()
    frozen = expand_rules(config, graph)
    trains = list(map(not_, frozen.values()))
    near = graph.walk.nearest(trains)
    computed, near_computed = trains, near
    if config.mechanism != "requires_grad":  # gradients are computed, whether or not they are used
        computed = [
            t or (p.floating and p.requires_grad)
            for t, p in zip(trains, graph.parameters, strict=True)
        ]
        near_computed = graph.walk.nearest(computed)
    stepped = trains if config.mechanism == "exclude" else computed
    share = Share(trains, computed, stepped, near_computed)
    return Plan(
        frozen=tuple(compress(frozen, frozen.values())),
        trainable=tuple(compress(frozen, trains)),
        layers=tuple(_plan_layers(graph, bytes(trains), bytes(computed), near, near_computed)),
        cost=make_cost(graph, share, assume, devices or {}, timing),
        warnings=(
            *list_findings(graph, config, frozen),
            *_find_in_assumption(graph, assume, why_not or {}),
            *_find_in_devices(graph, devices or {}),
        ),
    )


def _plan_layers(
    graph: ModelGraph,
    trains: bytes,
    computed: bytes,
    near: Sequence[int],
    near_computed: Sequence[int],
) -> Iterator[LayerPlan]:
    walk = graph.walk
    reached = walk.reached_when(near_computed)
    hides = reached is not walk.is_reached
    same_gradients = trains is computed or trains == computed
    trained_before = ""
    for layer in walk.layers:
        path, own, span, numel, wire, reachable = layer
        count = trains.count(1, span.start, span.stop) if span else sum(trains[i] for i in own)
        if not graph.nodes:
            flow, because = _flow_by_order(count, trained_before)
            trained_before = path if count else trained_before
        elif count:
            got = count
            if hides or reachable < len(own):
                got = sum(trains[i] and reached[i] for i in own)
            flow = "trained" if got else "unreached"
            because = f"{got} of its {len(own)} parameters receive gradients" if got else _UNREACHED
        elif wire >= 0 and near[wire] < DEAD:
            flow, because = "passes", walk.targets[near[wire] % (walk.count + 1)]
        else:
            flow, because = "idle", _NOT_ON_A_PATH if wire < 0 else _NOTHING_BEFORE
        gradient = flow == "trained"
        if not same_gradients:
            gradient = any(computed[i] and reached[i] for i in own)
        trainable = (
            numel
            if count == len(own)
            else count and sum(graph.parameters[i].numel for i in own if trains[i])
        )
        yield LayerPlan(path, flow, because, gradient, numel - trainable, trainable)


_UNREACHED = "trainable, but backward from the loss never reaches it"
_NOTHING_BEFORE = "frozen, and nothing trained lies before it: backward stops above"
_NOT_ON_A_PATH = "frozen, and not on any path to the loss"


def _flow_by_order(trainable: int, trained_before: str) -> tuple[str, str]:
    """Without a traced graph: as if the modules ran one after the other in model order."""
    if trainable:
        return "trained", "trainable (not traced: whether backward reaches it is not known)"
    if trained_before:
        return "passes", f"frozen, and {trained_before} before it is trained (not traced: by order)"
    return "idle", "frozen, and nothing before it is trained (not traced: by order)"


def _find_in_assumption(
    graph: ModelGraph, assume: Assumption, why_not: Mapping[str, str]
) -> Iterator[Finding]:
    for size in ("sequence_length", "image_size"):
        value = getattr(assume, size)
        if value is not None and graph.nodes and value != getattr(graph, size):
            why = why_not.get(size, "the model was not traced at it")
            yield Finding(
                "not_assumed",
                f"A{'n' if size[0] in 'aeiou' else ''} {size.replace('_', ' ')} of {value:,} was "
                f"not applied: {why}. FLOPs and activations are those of the example.",
            )
    if assume.precision != graph.precision and graph.nodes:
        why = why_not.get("precision", "the model was not traced at it")
        yield Finding(
            "not_assumed",
            f"Activations and peak memory under {assume.precision} are a guess, half of what "
            f"{graph.precision} keeps, which may be far too little: {why}.",
        )


def _find_in_devices(graph: ModelGraph, devices: Mapping[str, int]) -> Iterator[Finding]:
    has_gpu = any(map(is_gpu, devices))
    if graph.nodes and has_gpu and not graph.is_for_gpu:
        yield Finding(
            "traced_for_a_cpu",
            "The model was traced as a CPU runs it. A GPU holds other things, so peak memory and "
            "whether it fits are not known there. Add the model again.",
        )
    if graph.nodes and graph.is_for_gpu and devices and not has_gpu:
        yield Finding(
            "traced_for_a_gpu",
            "The model was traced as a GPU runs it, and there is none now. A CPU holds other "
            "things, so activations and peak memory are not those of a job here, and whether it "
            "fits is not known. Add the model again.",
        )

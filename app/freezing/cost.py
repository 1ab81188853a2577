"""What one training step costs under a freeze set: FLOPs, bytes, milliseconds. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

from app.freezing.assume import OPTIMIZER_STATE, Assumption
from app.freezing.graph import ModelGraph, is_gpu
from app.freezing.timing import Timing

FULL_COSTS_KEPT = 100
# What torch gives cuBLAS to work in where CUBLAS_WORKSPACE_CONFIG does not say otherwise.
_WORKSPACE = {"cuda": 8_320 * 1024, "hopper": 32 * 1024**2}


@dataclass(frozen=True)
class Share:
    """Which parameters, in model order, take which part in a step.

    Attributes:
        trains: are moved by it.
        computed: get a gradient, whether or not they are then moved.
        stepped: are in the optimizer with a gradient.
        near: `Walk.nearest` of `computed`.
    """

    trains: Sequence[bool]
    computed: Sequence[bool]
    stepped: Sequence[bool]
    near: Sequence[int]


def make_cost(
    graph: ModelGraph,
    share: Share,
    assume: Assumption,
    devices: Mapping[str, int],
    timing: Timing | None = None,
) -> dict[str, Any]:
    """The `cost` of a plan, beside that of training everything."""
    cost = _cost_of(graph, share, assume)
    if len(graph.full_costs) >= FULL_COSTS_KEPT:
        graph.full_costs.clear()
    asked = (assume, timing)
    if asked not in graph.full_costs:
        every = [p.floating for p in graph.parameters]
        everything = Share(every, every, every, graph.walk.nearest(every))
        graph.full_costs[asked] = {
            **_cost_of(graph, everything, assume),
            "predicted_step_ms": _predict(graph, everything, assume, timing),
        }
    full = graph.full_costs[asked]
    step, full_step = cost["step_flops"], full["step_flops"]
    return {
        **cost,
        "full_step_flops": full_step,
        "speedup_bound": full_step / step if step else None,
        "predicted_step_ms": _predict(graph, share, assume, timing),
        "fits": dict(_find_fits(graph, cost, devices)),
        "full": dict(full),
        "assumed": {
            **asdict(assume),
            "sequence_length": graph.sequence_length,
            "image_size": graph.image_size,
            "batch_size": assume.batch_size or graph.batch_size,
            "traced_by": graph.traced_by,
            "timed_on": None if timing is None else timing.describe(),
        },
    }


def _find_fits(
    graph: ModelGraph, cost: Mapping[str, Any], devices: Mapping[str, int]
) -> Iterator[tuple[str, bool]]:
    """Whether each device has room.

    Where the peak is not known, or is one of other kernels, only those that surely have none.
    """
    peak = cost["peak_bytes"]
    least = graph.resting_bytes + cost["optimizer_bytes"] + cost["gradient_bytes"]
    for name, size in devices.items():
        if peak is not None and is_gpu(name) == graph.is_for_gpu:
            yield name, peak <= size
        elif least > size:
            yield name, False


def _predict(
    graph: ModelGraph, share: Share, assume: Assumption, timing: Timing | None
) -> float | None:
    """Milliseconds of one step where the model has been timed, at full precision and this size."""
    if timing is None or assume.precision != "fp32" or not any(share.computed):
        return None
    if timing.timed_sizes != (graph.sequence_length, graph.image_size):
        return None
    batch_size = assume.batch_size or graph.batch_size
    timed = timing.graph
    near = share.near if timed is graph else timed.walk.nearest(share.computed)
    ms = timing.predict_ms(near, share.stepped, assume.optimizer, batch_size)
    return float(f"{ms:.4g}")


def _cost_of(graph: ModelGraph, share: Share, assume: Assumption) -> dict[str, Any]:
    """FLOPs and bytes of one step.

    step = Σ F + Σ (r·Bx + t·Bw): every edge of a node costs its backward FLOPs where what it leads
    to is live. FLOPs and activations grow in proportion to the batch, but for those of weights. The
    peak is in forward or backward, or while the optimizer steps: on a GPU all tensors at once, and
    with what cuBLAS keeps for each of the threads that run forward and backward.
    """
    walk = graph.walk
    scale = (assume.batch_size or graph.batch_size) / graph.batch_size
    gradient_bytes = sum(compress(walk.reached_bytes, share.computed))
    stepped = list(compress(walk.reached_bytes, share.stepped))
    optimizer_bytes = OPTIMIZER_STATE[assume.optimizer] * sum(stepped)
    forward = backward = activations = peak = workspaces = None
    if graph.nodes:
        forward = walk.forward_flops(scale)
        backward = walk.backward_flops(share.near, scale)
        # Half is a guess, and called one, until the model was traced at that precision.
        growth = scale if assume.precision == graph.precision else scale / 2
        activations = walk.kept_bytes(share.near, growth)
        workspaces = _WORKSPACE.get(graph.kernels, 0) * (bool(forward) + bool(backward))
        held = walk.peak_bytes(share.near, growth)
        if held is not None:
            update = _update_bytes(stepped, assume.optimizer, at_once=graph.is_for_gpu)
            held = max(held, gradient_bytes + update)
            peak = graph.resting_bytes + optimizer_bytes + held + workspaces
    return {
        "forward_flops": forward,
        "backward_flops": backward,
        "step_flops": None if forward is None or backward is None else forward + backward,
        "trainable_bytes": sum(compress(walk.parameter_bytes, share.trains)),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": optimizer_bytes,
        "activation_bytes": activations,
        "workspace_bytes": workspaces,
        "peak_bytes": peak,
    }


def _update_bytes(stepped: Sequence[int], optimizer: str, at_once: bool) -> int:
    """What Adam's step makes for itself: its denominators, each from a root that it divides."""
    if optimizer == "sgd":
        return 0
    return sum(stepped) if at_once else 2 * max(stepped, default=0)

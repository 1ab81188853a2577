"""calibrate_model(model, example, graph): how long each node of a graph takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from app.freezing.graph import ModelGraph
from app.freezing.hidden import nodes_in_order
from app.freezing.timing import FORMAT
from app.freezing.trace import Loss, call_model, scalar_loss

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.0, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.0),
    "adamw": partial(torch.optim.AdamW, lr=0.0),
}


class NotTimed(Exception):
    """The model cannot be timed: one sentence says why."""

    reason = "bad_spec"


def calibrate_model(
    model: nn.Module,
    example: Any,
    graph: ModelGraph,
    *,
    loss: Loss | None = None,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time the operations of a model where they are: in forward and backward passes of its own.

    A few freeze sets are run for real. Each node of the autograd graph tells when backward comes to
    it, so that its time is known with some of its edges live and with others; nodes of one kind and
    size are taken together. Forward passes and optimizer steps are timed whole. All of it at two
    batch sizes, because small operations take no longer on more.

    Args:
        model: on the device that is to be timed; real tensors.
        example: one batch; its first dimension is repeated for the wider batch.
        graph: what `trace_model` read of the same model and example.
        seconds: about how long this may take.
        clock: seconds, by which the CPU is timed.

    Returns:
        The document that `app.freezing.timing` reads.

    Raises:
        NotTimed: a real pass makes another graph than the traced one.

    Side effects: moves the model's buffers, clears its gradients; weights and flags stay.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    model.train()
    started = clock()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            first = _Timer(model, example, graph, loss, clock).time_batch(seconds / 2)
            spent = clock() - started
            factor = max(
                f for f in (2, 4, 8, 16) if f == 2 or first["step_ms"] * f * 40 < seconds * 1e3
            )
            wide = widen_batch(example, graph.batch_size, factor)
            second = _Timer(model, wide, graph, loss, clock).time_batch(
                max(seconds - spent, seconds / 2)
            )
    finally:
        model.train(was_training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return {
        "format": FORMAT,
        "fingerprint": graph.fingerprint,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batches": [
            {"batch_size": graph.batch_size, **first},
            {"batch_size": graph.batch_size * factor, **second},
        ],
    }


def widen_batch(example: Any, batch_size: int, factor: int) -> Any:
    """The example with its rows repeated; tensors of another first dimension stay."""

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] != batch_size:
            return tensor
        return tensor.repeat(factor, *[1] * (tensor.dim() - 1))

    return tree_map_only(torch.Tensor, widen, example)


class _Timer:
    """Times one model on one batch."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        graph: ModelGraph,
        loss: Loss | None,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.example, self.graph, self.loss = model, example, graph, loss
        self.clock = clock
        self.device = next(model.parameters()).device
        named = dict(model.named_parameters())
        self.parameters = [named[p.name] for p in graph.parameters]

    def time_batch(self, seconds: float) -> dict[str, Any]:
        """Milliseconds by node, of a forward pass and of optimizer steps."""
        sets = _choose_sets(self.graph)
        self._take_steps(sets[:1], "adamw", 2)  # warm
        (once,) = self._take_steps(sets[:1], "adamw", 2)
        repeats = max(3, min(40, int(seconds * 1e3 / (sum(once) * 4 * len(sets) + 1))))
        parts = self._take_steps(sets, "adamw", repeats)
        steps = {"adamw": self._fit_optimizer(sets, parts)}
        for name in ("sgd", "adam"):
            steps[name] = self._fit_optimizer(sets, self._take_steps(sets, name, repeats // 4 + 2))
        walk = self.graph.walk
        costs = self._time_nodes(sets, repeats)
        wires = walk.spread(costs)
        near = [walk.nearest(trains) for trains in sets]
        given = np.array([walk.sum_live(wires, n) for n in near])
        ones = np.ones(len(sets))
        fixed, ratio = _fit(np.array([ones, given]).T, np.array([part[1] for part in parts]))
        count = [walk.sum_live(walk.node_count, n) for n in near]
        columns = np.array([ones, count, given * ratio]).T
        return {
            "nodes": [[round(ms * ratio, 6) for ms in cost] for cost in costs],
            "backward_ms": fixed,
            "forward": _fit(columns, np.array([part[0] for part in parts])),
            "optimizers": steps,
            "step_ms": sum(parts[0]),
        }

    # ------------------------------------------------------------------------------- whole passes

    def _forward(self) -> torch.Tensor:
        return scalar_loss(call_model(self.model, self.example), self.example, self.loss)

    def _hold(self, trains: Sequence[bool]) -> list[nn.Parameter]:
        for parameter, flag in zip(self.parameters, trains, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
        return [p for p in self.parameters if p.requires_grad]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() * 1e3

    def _take_steps(
        self, sets: Sequence[Sequence[bool]], optimizer_name: str, repeats: int
    ) -> list[tuple[float, float, float]]:
        """For each set the medians of forward, backward and optimizer step, in milliseconds.

        The sets take turns, so that what else the machine does meets all of them alike.
        """
        optimizer = OPTIMIZERS[optimizer_name](self._hold(sets[0]))
        taken: list[list[tuple[float, float, float]]] = [[] for _ in sets]
        for _ in range(repeats + 1):
            for trains, times in zip(sets, taken, strict=True):
                self._hold(trains)
                start = self._now()
                value = self._forward()
                forward = self._now()
                value.backward()
                backward = self._now()
                optimizer.step()
                optimizer.zero_grad()
                times.append((forward - start, backward - forward, self._now() - backward))
                del value
        return [
            tuple(statistics.median(column) for column in zip(*times[1:], strict=True))
            for times in taken
        ]

    def _fit_optimizer(
        self, sets: Sequence[Sequence[bool]], parts: Sequence[tuple[float, float, float]]
    ) -> list[float]:
        """Milliseconds of a step: fixed, for each tensor, for each byte."""
        reached = self.graph.walk.reached_bytes
        stepped = [[size for size, t in zip(reached, s, strict=True) if t and size] for s in sets]
        columns = [[1.0, len(sizes), sum(sizes)] for sizes in stepped]
        return _fit(np.array(columns), np.array([part[2] for part in parts]))

    # -------------------------------------------------------------------------------------- nodes

    def _time_nodes(self, sets: Sequence[Sequence[bool]], repeats: int) -> list[list[float]]:
        """For each node milliseconds: of itself, then of each of its edges that is live."""
        self._hold(sets[0])
        value = self._forward()
        nodes = list(nodes_in_order(value.grad_fn))
        if _edges_of(nodes) != [_strip(node.inputs) for node in self.graph.nodes]:
            raise NotTimed("A real forward pass makes another graph than the one that was traced.")
        clock = _Clock(self.device, self.clock)
        for index, node in enumerate(nodes):
            node.register_prehook(partial(clock.note, index))
        seen: dict[Any, dict[tuple[bool, ...], list[float]]] = {}
        hook_ms = clock.own_ms()
        runs: list[list[list[tuple[int, float]]]] = [[] for _ in sets]
        for _ in range(repeats + 1):
            for trains, of_set in zip(sets, runs, strict=True):
                for parameter in self.parameters:
                    parameter.grad = None
                wanted = [p for p, t in zip(self.parameters, trains, strict=True) if t]
                with clock:
                    value.backward(inputs=wanted, retain_graph=True)
                of_set.append(clock.read())
        for first, *others in runs:
            ran = {index for index, _ in first}
            for position, (index, _) in enumerate(first):
                taken = [run[position][1] for run in others if run[position][0] == index]
                if taken:
                    mask = tuple(i in ran for i in self.graph.nodes[index].inputs)
                    kind = seen.setdefault(self._signature(index), {})
                    ms = max(0.0, statistics.median(taken) - hook_ms)
                    kind.setdefault(mask, []).append(ms)
        fitted = {signature: _fit_edges(masks) for signature, masks in seen.items()}
        return [
            fitted.get(self._signature(index), [0.0] * (1 + len(node.inputs)))
            for index, node in enumerate(self.graph.nodes)
        ]

    def _signature(self, index: int) -> tuple[Any, ...]:
        """What nodes have in common that take equally long."""
        node = self.graph.nodes[index]
        if node.parameter:
            return node.name, self.graph.by_name[node.parameter].nbytes
        below = tuple(
            None if i < 0 else (self.graph.nodes[i].gradient_bytes, self._size(i))
            for i in node.inputs
        )
        saved = tuple(size for _, size, _ in node.saved)
        return node.name, node.gradient_bytes, node.forward_flops, below, saved

    def _size(self, index: int) -> int:
        name = self.graph.nodes[index].parameter
        return self.graph.by_name[name].nbytes if name else 0


class _Clock:
    """When backward came to which node; on a GPU by its events."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.is_cuda = device.type == "cuda"
        self.stamps: list[tuple[int, Any]] = []

    def note(self, index: int, _gradients: Any) -> None:
        self.stamps.append((index, self._stamp()))

    def _stamp(self) -> Any:
        if not self.is_cuda:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def own_ms(self) -> float:
        """What one note costs."""
        if self.is_cuda:
            return 0.0  # the device does not wait for it
        noted = []
        for index in range(2000):
            self.note(index, None)
        noted = [stamp for _, stamp in self.stamps]
        self.stamps = []
        return (noted[-1] - noted[0]) * 1e3 / len(noted)

    def __enter__(self) -> None:
        self.stamps = []

    def __exit__(self, *_: object) -> None:
        self.end = self._stamp()

    def read(self) -> list[tuple[int, float]]:
        """(node, milliseconds until the next), in the order in which backward came to them."""
        if self.is_cuda:
            torch.cuda.synchronize()
        ends = [stamp for _, stamp in self.stamps[1:]] + [self.end]
        return [
            (index, start.elapsed_time(end) if self.is_cuda else (end - start) * 1e3)
            for (index, start), end in zip(self.stamps, ends, strict=True)
        ]


def _choose_sets(graph: ModelGraph) -> list[list[bool]]:
    """Freeze sets that between them make most nodes' edges live in several ways."""
    reached = [
        p.floating and bool(is_reached)
        for p, is_reached in zip(graph.parameters, graph.walk.is_reached, strict=True)
    ]
    order = [i for i, is_reached in enumerate(reached) if is_reached]

    def keep(chosen: Callable[[int], bool]) -> list[bool]:
        return [is_reached and chosen(i) for i, is_reached in enumerate(reached)]

    flat = {i for i in order if len(graph.parameters[i].shape) < 2}
    early, late = set(order[: 1 + len(order) // 8]), set(order[len(order) // 2 :])
    sets = [
        keep(lambda _: True),
        keep(lambda i: i in flat),
        keep(lambda i: i in late),
        keep(lambda i: i not in flat),
        keep(lambda i: i in early),
        keep(lambda i: i == order[0] or (i in late and i in flat)),
        keep(lambda i: i == order[-1]),
    ]
    return [s for s in sets if any(s)]


def _fit(columns: Any, taken: Any) -> list[float]:
    """Least squares without negative coefficients."""
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-12)
    kept = list(range(columns.shape[1]))
    solution = np.zeros(columns.shape[1])
    while kept:
        part, *_ = np.linalg.lstsq(columns[:, kept] / scale[kept], taken, rcond=1e-6)
        if part.min() >= 0:
            solution[kept] = part / scale[kept]
            break
        kept.pop(int(part.argmin()))
    return [float(value) for value in solution]


def _fit_edges(masks: Mapping[tuple[bool, ...], Sequence[float]]) -> list[float]:
    """Milliseconds of a node itself and of each edge, from its times with several edges live."""
    rows = [[1.0, *map(float, mask)] for mask in masks]
    weights = np.array([len(taken) for taken in masks.values()]) ** 0.5
    times = np.array([statistics.median(taken) for taken in masks.values()])
    return _fit(np.array(rows) * weights[:, None], times * weights)


def _edges_of(nodes: Sequence[Any]) -> list[tuple[int, ...]]:
    """As `Node.inputs`. Names may differ: a view of a real tensor may be a reshaped alias."""
    index = {node: i for i, node in enumerate(nodes)}
    return [_strip([index.get(below, -1) for below, _ in n.next_functions]) for n in nodes]


def _strip(inputs: Sequence[int]) -> tuple[int, ...]:
    """Without edges at the end that lead nowhere: a GPU's attention has one for a mask."""
    count = len(inputs)
    while count and inputs[count - 1] < 0:
        count -= 1
    return tuple(inputs[:count])

"""The autograd graph gathered into wires, so that a freeze set is one short loop. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from app.freezing.memory import Timeline

if TYPE_CHECKING:
    from app.freezing.graph import ModelGraph

DEAD = 1 << 62
TIMELINES_KEPT = 8
ENTRY = "Entry"  # name of a node by which a hidden region reads what lies outside it


class Layer(NamedTuple):
    """What a plan asks of one layer, said once: its parameters by index and the wire it lies on."""

    path: str
    parameters: tuple[int, ...]
    span: slice | None  # the same indices, where they follow one another
    numel: int
    wire: int
    reached: int  # how many of its parameters backward reaches when everything trains


class _Sum:
    """What some nodes cost, by the wire on which it hangs.

    Attributes:
        by_wire: all of it, as traced.
        fixed: (wire, cost) of what no batch makes larger.
    """

    def __init__(self, width: int) -> None:
        self.by_wire = [0] * width
        self.fixed: list[tuple[int, int]] = []

    def add(self, wire: int, cost: int, *, is_fixed: bool) -> None:
        self.by_wire[wire] += cost
        if is_fixed and cost:
            self.fixed.append((wire, cost))


class Walk:
    """Which parts of backward run when certain parameters train.

    Nodes that need a gradient for exactly the same parameters are one *wire*: a parameter is a
    wire, a node with one edge lies on the wire that it leads to, and where several meet a new one
    begins, one for each distinct set. What costs something is noted on the wire on which it
    depends, so that a cost is a sum over live wires.

    Attributes:
        parameter_bytes: of each parameter, in model order; `reached_bytes` of those that backward
            reaches when everything trains, 0 for others.
        node_count: of each wire.
        layers: in model order.
        targets: for each parameter, what to say of a gradient on its way there.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.index = {p.name: i for i, p in enumerate(graph.parameters)}
        self.count = len(self.index)
        self._meet: list[Callable[[Sequence[int]], tuple[int, ...]]] = []
        self._known: dict[tuple[int, ...], int] = {}
        laid = self._lay_wires(graph)
        self._wires = wires = laid[: len(graph.nodes)]
        self._inputs = [node.inputs for node in graph.nodes]
        self.targets = [*_name_targets(graph), "gradients pass through to an activation"]
        self._gates = self._find_gates(graph, laid)
        every = (*graph.nodes, *graph.extras)
        reached = {node.parameter for node in every if node.gets_gradient}
        reached = reached if graph.nodes else set(self.index)
        self.is_reached = bytes(name in reached for name in self.index)
        self.parameter_bytes = [p.nbytes for p in graph.parameters]
        self.reached_bytes = [
            p.nbytes if is_reached else 0
            for p, is_reached in zip(graph.parameters, self.is_reached, strict=True)
        ]
        self.layers = self._read_layers(graph, laid)
        frees = self._lay_storages(graph, wires)
        width = self.count + 1 + len(self._meet)
        self._forward, self._fixed_forward = graph.forward_flops, graph.fixed_flops
        self._backward, self._saved = _Sum(width), _Sum(width)
        self.node_count = [0] * width
        fixed = graph.memory.fixed if graph.memory else frozenset()
        for storage, (wire, size) in frees.items():
            self._saved.add(wire, size, is_fixed=storage in fixed)
        for wire in wires:
            if wire >= 0:
                self.node_count[wire] += 1
        fixed_nodes = frozenset(graph.fixed_nodes)
        for index, (node, wire) in enumerate(zip(every, laid, strict=True)):
            is_fixed = index in fixed_nodes
            if wire >= 0:
                self._backward.add(wire, node.node_flops, is_fixed=is_fixed)
            for below, flops in zip(node.inputs, node.edge_flops, strict=False):
                if below >= 0 and laid[below] >= 0:
                    self._backward.add(laid[below], flops, is_fixed=is_fixed)
        released: dict[int, list[int]] = {}  # the last of those that save it lets it go
        for storage, last in {
            s: i for i in reversed(range(len(wires))) for s, _, _ in graph.nodes[i].saved
        }.items():
            released.setdefault(last, []).append(storage)
        self._memory, self._kept = graph.memory, (frees, released)
        self._timelines: dict[float, Timeline] = {}

    def nearest(self, trains: Iterable[int]) -> list[int]:
        """For every wire the nearest trained parameter, as joins away × (parameters + 1) + index.

        A wire without any is at least DEAD. The index after the last parameter stands for an
        activation that requires a gradient of itself.

        Args:
            trains: for every parameter in model order whether it trains.
        """
        step = self.count + 1
        near = [i if t else DEAD for i, t in enumerate(trains)]
        near.append(self.count)
        append = near.append
        for meet in self._meet:
            append(min(meet(near)) + step)
        return near

    def reached_when(self, near: Sequence[int]) -> bytes:
        """For every parameter whether backward reaches it, if it trains.

        Always, or never; but what a region hides gets a gradient only where something before the
        region does.
        """
        if not self._gates:
            return self.is_reached
        reached = bytearray(self.is_reached)
        for index, wire in self._gates.items():
            reached[index] = near[wire] < DEAD
        return bytes(reached)

    def sum_live(self, values: Sequence[int | float], near: Sequence[int]) -> Any:
        """The sum of `values` over live wires."""
        return sum(compress(values, map(DEAD.__gt__, near)))

    # `scale` is, here and below, that of all that grows with the batch, against the traced one.

    def forward_flops(self, scale: float) -> int:
        return self._fixed_forward + round((self._forward - self._fixed_forward) * scale)

    def backward_flops(self, near: Sequence[int], scale: float) -> int:
        return self._scale(self._backward, near, scale)

    def kept_bytes(self, near: Sequence[int], scale: float) -> int:
        """What forward keeps for backward."""
        return self._scale(self._saved, near, scale)

    def _scale(self, costs: _Sum, near: Sequence[int], scale: float) -> int:
        fixed = sum(cost for wire, cost in costs.fixed if near[wire] < DEAD)
        return fixed + round((self.sum_live(costs.by_wire, near) - fixed) * scale)

    def peak_bytes(self, near: Sequence[int], scale: float) -> int | None:
        """The most that a step holds beside weights and optimizer state; None where not known."""
        if self._memory is None:
            return None
        if scale not in self._timelines:
            if len(self._timelines) >= TIMELINES_KEPT:
                self._timelines.clear()
            self._timelines[scale] = Timeline(self._memory, self._wires, *self._kept, scale)
        return self._timelines[scale].peak_bytes([*map(DEAD.__gt__, near), True])

    def spread(self, costs: Sequence[Sequence[float]]) -> list[float]:
        """Costs of nodes as costs of wires.

        Args:
            costs: for each node its own, where it is live, then those of its edges, where they are.
        """
        wires = [0.0] * len(self.node_count)
        for (own, *edges), wire, inputs in zip(costs, self._wires, self._inputs, strict=True):
            if wire >= 0:
                wires[wire] += own
            for cost, below in zip(edges, inputs, strict=False):
                if below >= 0 and self._wires[below] >= 0:
                    wires[self._wires[below]] += cost
        return wires

    # ------------------------------------------------------------------------------------ gathering

    def _join(self, wires: Iterable[int]) -> int:
        """The wire that is live where any of these is; -1 for none."""
        distinct = sorted({wire for wire in wires if wire >= 0})
        if len(distinct) < 2:
            return distinct[0] if distinct else -1
        key = tuple(distinct)
        if key not in self._known:
            self._known[key] = self.count + 1 + len(self._meet)
            self._meet.append(itemgetter(*key))
        return self._known[key]

    def _join_both(self, wire: int, other: int) -> int:
        """The wire that is live where both of these are, at the distance of the first."""
        if wire < 0 or other < 0:
            return -1
        key = (wire, -other - 1)  # no key of a join: those rise
        if key not in self._known:
            self._known[key] = self.count + 1 + len(self._meet)
            self._meet.append(lambda near: (near[wire] if near[other] < DEAD else DEAD,))
        return self._known[key]

    def _lay_wires(self, graph: ModelGraph) -> list[int]:
        wires: list[int] = []
        for node in (*graph.nodes, *graph.extras):
            if node.parameter is None:
                wire = self._join(wires[i] for i in node.inputs if i >= 0)
                wires.append(wire if node.needs < 0 else self._join_both(wire, wires[node.needs]))
            else:
                wires.append(self.index.get(node.parameter, self.count))
        return wires

    def _find_gates(self, graph: ModelGraph, wires: Sequence[int]) -> dict[int, int]:
        """Parameter that only regions read → the wire that is live where one of them is."""
        openly: set[int] = set()
        regions: dict[int, list[int]] = {}
        every = (*graph.nodes, *graph.extras)
        for node in every:
            below = [every[i].parameter for i in node.inputs if i >= 0]
            for name in (name for name in below if name):
                if node.name == ENTRY:
                    regions.setdefault(self.index[name], []).append(wires[node.needs])
                else:
                    openly.add(self.index[name])
        return {i: self._join(on) for i, on in regions.items() if i not in openly}

    def _read_layers(self, graph: ModelGraph, wires: Sequence[int]) -> tuple[Layer, ...]:
        layers = []
        for layer in graph.layers:
            own = tuple(self.index[graph.canonical_names[name]] for name in layer.parameters)
            follow = own == tuple(range(own[0], own[0] + len(own)))
            layers.append(
                Layer(
                    path=layer.path,
                    parameters=own,
                    span=slice(own[0], own[0] + len(own)) if follow else None,
                    numel=sum(graph.parameters[i].numel for i in own),
                    wire=self._join(wires[i] for i in graph.layer_nodes[layer.path])
                    if graph.nodes
                    else -1,
                    reached=sum(self.is_reached[i] for i in own),
                )
            )
        return tuple(layers)

    def _lay_storages(self, graph: ModelGraph, wires: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Storage → (wire on which it is kept, bytes)."""
        keepers: dict[int, list[int]] = {}
        sizes: dict[int, int] = {}
        for node, wire in zip(graph.nodes, wires, strict=True):
            for storage, size, edges in node.saved:
                sizes[storage] = size
                below = [node.inputs[e] for e in edges if e < len(node.inputs)]
                kept = [wires[i] for i in below if i >= 0] if edges else [wire]
                keepers.setdefault(storage, []).extend(kept)
        kept_on = {storage: self._join(on) for storage, on in keepers.items()}
        return {s: (wire, sizes[s]) for s, wire in kept_on.items() if wire >= 0}


def _name_targets(graph: ModelGraph) -> list[str]:
    """For every parameter, what to say of a gradient that is on its way there."""
    owners: dict[str, str] = {}
    for layer in graph.layers:
        for name in layer.parameters:
            owners.setdefault(graph.canonical_names[name], layer.path)
    own = "the model's own parameters"
    return [
        f"gradients pass through to {owners[p.name] or own}, which is trained"
        for p in graph.parameters
    ]

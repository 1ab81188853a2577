"""The autograd graph of a recorded forward as plain nodes, with what it hides. Knows no config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from app.freezing.flops import COSTLY_EDGES, is_hidden_product, whole_node_flops
from app.freezing.graph import Node
from app.freezing.hidden import (
    Edge,
    Probe,
    is_python,
    nodes_in_order,
    probe_builtin,
    probe_python,
)
from app.freezing.record import Attention, Recorder, Spans, Step, storage_key
from app.freezing.walk import ENTRY

# Tensors that a node saves only where gradients by some of its edges are wanted: attribute → edges.
SAVED_FOR: dict[str, dict[str, tuple[int, ...]]] = {
    "AddbmmBackward0": {"batch1": (2,), "batch2": (1,)},
    "AddcdivBackward0": {"tensor1": (2,), "tensor2": (0, 1, 2)},
    "AddcmulBackward0": {"tensor1": (2,), "tensor2": (1,)},
    "AddmmBackward0": {"mat1": (2,), "mat2": (1,)},
    "AddmvBackward0": {"mat": (2,), "vec": (1,)},
    "AddrBackward0": {"vec1": (2,), "vec2": (1,)},
    "BaddbmmBackward0": {"batch1": (2,), "batch2": (1,)},
    "BmmBackward0": {"self": (1,), "mat2": (0,)},
    "DivBackward0": {"self": (1,), "other": (0, 1)},
    "DotBackward0": {"self": (1,), "tensor": (0,)},
    "FmodBackward1": {"self": (1,), "other": (1,)},
    "GroupedMmBackward0": {"self": (1,), "mat2": (0,)},
    "IndexAddBackward0": {"index": (1,), "source": (1,)},
    "LerpBackward1": {"self": (2,), "end": (2,), "weight": (0, 1, 2)},
    "LinalgCrossBackward0": {"self": (1,), "other": (0,)},
    "MmBackward0": {"self": (1,), "mat2": (0,)},
    "MulBackward0": {"self": (1,), "other": (0,)},
    "MvBackward0": {"self": (1,), "vec": (0,)},
    "RemainderBackward1": {"self": (1,), "other": (1,)},
    "ScatterAddBackward0": {"index": (1,)},
    "TrilinearBackward0": {"i1": (1, 2), "i2": (0, 2), "i3": (0, 1)},
    "VdotBackward0": {"self": (1,), "other": (0,)},
}
# Numbers by channel, some of them buffers: of no weight beside what grows with the batch.
_CHANNEL_STATISTICS = frozenset({"result1", "result2", "running_mean", "running_var"})
# A full backward hook's own node: each of its results is one of its inputs.
_PASSED_ON = "BackwardHookFunctionBackward"
_RESULTS = ("result", "out", "output", "logsumexp")


class Read(NamedTuple):
    """The graph, and what is not in it: see `ModelGraph.nodes` and `ModelGraph.extras`.

    Attributes:
        order: for each node below the loss, as `nodes_in_order` gives them, its index; -1 for none.
    """

    nodes: tuple[Node, ...]
    extras: tuple[Node, ...]
    order: tuple[int, ...]


def read_nodes(
    names: Mapping[int, str],
    value: torch.Tensor,
    spans: Spans,
    recorder: Recorder,
    attentions: Sequence[Attention],
    resting: set[int],
) -> Read:
    """Every node below `value`, and what lies hidden below nodes of Python's.

    Args:
        names: id of each parameter that the model had before the forward → its first name.
        resting: storages of parameters and buffers, as operations see them.
    """
    return _Reader(names, spans, recorder, resting).read(value.grad_fn, attentions)


class _Reader:
    """Reads one graph; called while the forward is still recorded, since it recomputes regions."""

    def __init__(
        self, names: Mapping[int, str], spans: Spans, recorder: Recorder, resting: set[int]
    ) -> None:
        self.names = names
        self.spans, self.recorder, self.resting = spans, recorder, resting
        self.nodes: list[Node] = []
        self.origins: list[frozenset[str]] = []  # of each node, the parameters it comes of alone
        self.index: dict[Any, int] = {}
        self.by_number: dict[int, int] = {}
        self.by_index: dict[int, Any] = {}
        self.parameters: dict[str, int] = {}
        self.storages: dict[int, int] = {}
        self.probes: dict[Any, Probe | None] = {}
        self.owners: dict[int, str] = {}
        self.starts: set[int] = set()  # numbers of the first nodes of calls

    def read(self, root: Any, attentions: Sequence[Attention]) -> Read:
        regions = self._read_graph([root], {}, None)
        width = len(self.nodes)
        order = tuple(self.index.get(grad_fn, -1) for grad_fn in nodes_in_order(root))
        for region in regions:  # grows meanwhile: a region may have regions in it
            regions += self._read_region(region)
        for attention in attentions:
            self._read_attention(attention)
        for steps in self.recorder.regions.values():
            self._read_checkpoint(steps)
        return Read(tuple(self.nodes[:width]), tuple(self.nodes[width:]), order)

    # -------------------------------------------------------------------------------------- graph

    def _read_graph(
        self, roots: Sequence[Any], known: Mapping[Any, int], home: str | None
    ) -> list[Any]:
        """Append the nodes below `roots`; those that had a region recomputed are the answer.

        Args:
            known: nodes that stand for others already.
            home: path of the module that has operations outside all modules' calls.
        """
        used: dict[Any, set[int]] = {root: {0} for root in roots}
        self.starts = {start for _, start, _, _ in self.spans.closed}
        everything = list(nodes_in_order(*roots, edges=self._gradient_edges))
        for grad_fn in everything:
            for next_fn, number in self._gradient_edges(grad_fn):
                used.setdefault(next_fn, set()).add(number)
        for grad_fn in everything:
            if is_python(grad_fn):
                self.probes[grad_fn] = probe_python(grad_fn, used[grad_fn], self.recorder)
            elif is_hidden_product(grad_fn.name()):
                self.probes[grad_fn] = probe_builtin(grad_fn, used[grad_fn], self.recorder)
        self.owners = self.spans.owners()
        self.index.update(known)
        reached = set(nodes_in_order(*roots, edges=self._live_edges))
        regions = []
        for grad_fn in everything:
            if grad_fn in known:
                continue
            node = self._read_node(grad_fn, home)
            if grad_fn not in reached:
                node = replace(node, edge_flops=(), node_flops=0, gets_gradient=False)
            self._append(grad_fn, node)
            probe = self.probes.get(grad_fn)
            if probe is not None and probe.roots:
                regions.append(grad_fn)
        return regions

    def _append(self, grad_fn: Any, node: Node) -> int:
        index = len(self.nodes)
        self.nodes.append(node)
        read = frozenset(node.reads).union(*(self.origins[i] for i in node.inputs if i >= 0))
        own = frozenset([node.parameter]) if node.parameter else frozenset()
        self.origins.append(read if node.from_parameters else own)
        if grad_fn is not None:
            self.index[grad_fn] = index
            if node.parameter is None:
                self.by_number[grad_fn._sequence_nr()] = index
                self.by_index[index] = grad_fn
        if node.parameter:
            self.parameters[node.parameter] = index
        return index

    def _live_edges(self, grad_fn: Any) -> Sequence[Edge]:
        """A node's edges, those left out by which its backward gives nothing."""
        probe = self.probes.get(grad_fn)
        edges = self._gradient_edges(grad_fn)
        if probe is None or not probe.dead:
            return edges
        return [edge for e, edge in enumerate(edges) if e not in probe.dead]

    def _gradient_edges(self, grad_fn: Any) -> Sequence[Edge]:
        """Where gradients go: by a full backward hook on a call's inputs to all of them."""
        return [
            edge if _is_passed_on(edge) and edge[0]._sequence_nr() in self.starts else passed
            for edge, passed in zip(grad_fn.next_functions, _edges(grad_fn), strict=True)
        ]

    def _read_node(self, grad_fn: Any, home: str | None) -> Node:
        inputs = tuple(self.index.get(next_fn, -1) for next_fn, _ in _edges(grad_fn))
        below = frozenset().union(*(self.origins[i] for i in inputs if i >= 0))
        variable = getattr(grad_fn, "variable", None)
        if variable is not None:
            return Node(grad_fn.name(), None, inputs, self.names.get(id(variable), ""))
        number, kind, recorder = grad_fn._sequence_nr(), grad_fn.name(), self.recorder
        flops = recorder.flops.get(number, 0)
        costly = COSTLY_EDGES.get(kind, ())
        whole = 0 if costly else whole_node_flops(kind, flops)
        by_edge = tuple(flops if e in costly else 0 for e in range(len(inputs)))
        from_parameters = recorder.from_parameters.get(number, False)
        reads = recorder.reads.get(number, frozenset())
        if is_python(grad_fn):
            flops += recorder.inner_flops.get(number, 0)
            whole = 2 * flops
            from_parameters = recorder.inner_from_parameters.get(number, False)
            reads = recorder.inner_reads.get(number, frozenset())
        if (probe := self.probes.get(grad_fn)) is not None:
            whole, by_edge = probe.node_flops, probe.edge_flops
        return Node(
            name=kind,
            module=self.owners.get(number, home),
            inputs=inputs,
            forward_flops=flops,
            edge_flops=by_edge if any(by_edge) else (),
            node_flops=whole,
            from_parameters=from_parameters,
            saved=self._read_saved(grad_fn, kind, number) if number in recorder.saving else (),
            gradient_bytes=sum(map(_result_bytes, grad_fn._input_metadata)),
            reads=tuple(sorted(reads - below)),
        )

    def _read_saved(
        self, grad_fn: Any, kind: str, number: int
    ) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """What a node keeps, parameters and buffers left out: (storage, bytes, edges)."""
        storages, wanted_for = self.storages, SAVED_FOR.get(kind, {})
        kept: list[tuple[int, int, tuple[int, ...]]] = []
        if workspace := self.recorder.workspaces.get(number, 0):
            kept.append((storages.setdefault(-number, len(storages)), workspace, ()))
        for name, tensor in kept_tensors(grad_fn, self.resting):
            storage = storages.setdefault(storage_key(tensor), len(storages))
            kept.append((storage, tensor.untyped_storage().nbytes(), wanted_for.get(name, ())))
        return tuple(kept)

    # ------------------------------------------------------------------------------------- hidden

    def _read_region(self, outer: Any) -> list[Any]:
        """Append what a node recomputes and runs backward through, which is live only if it is."""
        probe = self.probes[outer]
        gate = self.index[outer]
        assert probe is not None
        roots = [root.grad_fn for root in probe.roots if root.grad_fn is not None]
        with self.recorder.paused():
            entries = _entries(outer)
        known: dict[Any, int] = {}
        for grad_fn in nodes_in_order(*roots, edges=_edges):
            variable = getattr(grad_fn, "variable", None)
            if variable is None:
                continue
            name = self.names.get(id(variable))
            if name is None:  # what goes into the region, detached
                given = tuple(self.index[fn] for fn in entries.get(storage_key(variable), ()))
                node = Node(ENTRY, None, given or (gate,), needs=gate)
            else:
                if name not in self.parameters:
                    self._append(None, Node(grad_fn.name(), None, (), name))
                node = Node(ENTRY, None, (self.parameters[name],), needs=gate, from_parameters=True)
            known[grad_fn] = self._append(None, node)
        outside = {fn: self.index[fn] for fn in known if fn in self.index}
        regions = self._read_graph(roots, known, self.nodes[gate].module)
        self.index.update(outside)
        return regions

    def _read_attention(self, call: Attention) -> None:
        """Append what changes where the mask needs no gradient, and one kernel does it all."""
        mask = self.index.get(call.mask, -1)
        values = tuple(self.index[fn] for fn in call.values if fn in self.index)
        inside = [self.by_number.get(number, -1) for number in range(call.start, call.end)]
        if mask < 0 or not values:
            return
        changes = [(values, whole_node_flops("ScaledDotProduct", call.flops), call.reads)]
        for node in (self.nodes[i] for i in inside if i >= 0):
            changes.append((node.inputs, -node.node_flops, frozenset()))
            for below, flops in zip(node.inputs, node.edge_flops, strict=False):
                changes.append(((below,), -flops, frozenset()))
        home = self.owners.get(call.start)
        for inputs, flops, reads in changes:
            if flops or reads:
                named = tuple(sorted(reads))
                self._append(None, Node(_FUSED, home, inputs, node_flops=flops, reads=named))
                self._append(None, _cost(_FUSED, inputs, -flops, needs=mask))

    def _read_checkpoint(self, steps: Sequence[Step]) -> None:
        """Append what backward runs again of a checkpointed region.

        That ends with the last tensor that has been saved, which hangs on what is trained.
        """
        after = -1  # the node that is live where anything later is saved
        within: tuple[int, ...] = ()  # what a region in this one saves: it keeps what goes in
        for step in reversed(steps):
            saves, saves_results = self._saves(step)
            if not step.saves_here:
                within, saves = (*within, *saves), ()
            elif within:
                after, within = self._join(after, within), ()
            if saves and saves_results:
                after = self._join(after, saves)
            if step.flops and after >= 0:
                self._append(None, _cost(_AGAIN, (after,), step.flops))
            if saves and not saves_results:
                after = self._join(after, saves)

    def _saves(self, step: Step) -> tuple[tuple[int, ...], bool]:
        """On which nodes it hangs whether a step saves; whether it does so after it has run."""
        index = self.by_number.get(step.number, -1)
        grad_fn = self.by_index.get(index)
        if grad_fn is None or not (step.made_node or is_python(grad_fn)):
            return (), False
        names = {n.removeprefix("_raw_saved_") for n in dir(grad_fn) if n.startswith("_raw_saved_")}
        late = is_python(grad_fn) or not names.isdisjoint(_RESULTS)
        wanted_for = SAVED_FOR.get(grad_fn.name(), {})
        if not names or not names <= wanted_for.keys():
            return (index,) if names else (), late
        edges = {e for name in names for e in wanted_for[name]}
        inputs = self.nodes[index].inputs
        return tuple(inputs[e] for e in sorted(edges) if inputs[e] >= 0), late

    def _join(self, after: int, saves: tuple[int, ...]) -> int:
        return self._append(None, _cost(_AGAIN, (*([after] if after >= 0 else []), *saves), 0))


# Nodes that autograd has not: see `ModelGraph.extras`.
_FUSED, _AGAIN = "Fused", "Again"


def _edges(grad_fn: Any) -> Sequence[Edge]:
    """A node's edges, past the nodes of full backward hooks, which only pass things on."""
    edges: Sequence[Edge] = grad_fn.next_functions
    if not any(map(_is_passed_on, edges)):
        return edges
    passed = []
    for edge in edges:
        while _is_passed_on(edge):
            edge = edge[0].next_functions[edge[1]]
        passed.append(edge)
    return passed


def _is_passed_on(edge: Edge) -> bool:
    return edge[0] is not None and edge[0].name() == _PASSED_ON


def _cost(name: str, inputs: tuple[int, ...], flops: int, needs: int = -1) -> Node:
    """Something that costs where any of `inputs` is live; it is no operation."""
    return Node(name, None, inputs, node_flops=flops, needs=needs, gets_gradient=False)


def _entries(outer: Any) -> dict[int, list[Any]]:
    """Storage of each tensor that a node kept of what it was given → the nodes it came from."""
    entries: dict[int, list[Any]] = {}
    for _, tensor in _saved_tensors(outer):
        if tensor.requires_grad:
            # What is detached of a real parameter under fake tensors lies elsewhere.
            for place in {storage_key(tensor), storage_key(tensor.detach())}:
                entries.setdefault(place, []).append(get_gradient_edge(tensor).node)
    return entries


def _result_bytes(result: Any) -> int:
    return 0 if result.is_nested_tensor else math.prod(result.shape) * result.dtype.itemsize


def kept_tensors(grad_fn: Any, resting: set[int]) -> list[tuple[str, torch.Tensor]]:
    """What a node keeps for backward, by name; weights, buffers and channels' numbers left out."""
    left_out = _CHANNEL_STATISTICS if "BatchNorm" in grad_fn.name() else frozenset()
    return [
        (name, tensor)
        for name, tensor in _saved_tensors(grad_fn)
        if name not in left_out and storage_key(tensor) not in resting
    ]


def _saved_tensors(grad_fn: Any) -> Iterator[tuple[str, torch.Tensor]]:
    names = [name for name in dir(grad_fn) if name.startswith("_saved_")]
    for name in names or ["saved_tensors"]:  # the latter is what a Python autograd function has
        for leaf in tree_leaves(getattr(grad_fn, name, None)):
            if isinstance(leaf, torch.Tensor):
                yield name.removeprefix("_saved_"), leaf

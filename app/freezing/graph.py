"""A model as plain values: modules, parameters, ties, buffers, autograd edges. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from app.freezing.memory import Memory
from app.freezing.walk import Walk

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter tensor under its first name in model order.

    Attributes:
        shared_with: its other names, where it is tied.
        floating: whether it can carry a gradient at all.
        requires_grad: as the model came, before any freeze config.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    nbytes: int
    floating: bool
    requires_grad: bool
    shared_with: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.shared_with)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer of a module; `name` is its dotted name in the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    persistent: bool


@dataclass(frozen=True, slots=True)
class Module:
    """One module: what it owns directly, and the freezing-relevant facts of its type.

    Attributes:
        parameters: dotted names of the parameters that it owns directly, as seen here (a tied one
            appears in each owner under that owner's name).
        is_norm: a norm layer with running statistics.
        same_as: for a module that has several paths, the first of them (on the others).
        facts: further facts by key (``dropout``, ``max_norm``, ``spectral_norm``).
    """

    path: str
    type: str
    depth: int
    parameters: tuple[str, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    is_norm: bool = False
    same_as: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the autograd graph, everything trainable.

    Attributes:
        name: the autograd name (``AddmmBackward0``).
        module: path of the innermost module whose call made it, None outside all.
        inputs: for each of its edges the index of the node it leads to, -1 where none.
        parameter: for an ``AccumulateGrad`` the parameter's first name; "" for another leaf that
            requires a gradient (an input, a hook's leaf); None for everything else.
        forward_flops: of the operation, a multiply and an add counted as two.
        edge_flops: backward FLOPs that each edge costs when what it leads to is live.
        node_flops: backward FLOPs that any live edge costs once (attention).
        from_parameters: whether all that the operation read are parameters, buffers and values
            derived from them (``1 + weight``).
        saved: (storage index, bytes, edges) of each tensor it saves; kept for backward where one of
            the edges is live, where any is for an empty tuple.
        gradient_bytes: size of the gradients that come into it, which are those of its results.
        needs: index of a node without which this one is never live, -1 for none.
        reads: first names of the parameters of which the operation read a value that no edge tells
            of, like a detached weight.
        gets_gradient: whether any comes to it; not below an edge by which a Python function's
            backward gives none.
    """

    name: str
    module: str | None
    inputs: tuple[int, ...]
    parameter: str | None = None
    forward_flops: int = 0
    edge_flops: tuple[int, ...] = ()
    node_flops: int = 0
    from_parameters: bool = False
    saved: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    gradient_bytes: int = 0
    needs: int = -1
    reads: tuple[str, ...] = ()
    gets_gradient: bool = True


@dataclass(frozen=True)
class ModelGraph:
    """A model's modules and, where it could be traced, its autograd graph.

    Attributes:
        modules: in model order, the root (path "") first.
        parameters: every unique parameter in model order.
        nodes: the autograd graph, each node after those that its edges lead to; empty where the
            model could not be traced.
        extras: what autograd's graph does not show, as nodes that go on behind `nodes`: regions
            that a node recomputes and runs backward through, which are live only if it is; what
            backward runs again of a checkpoint; and how FLOPs change (some are negative) where a
            fused kernel is chosen because a mask is frozen.
        traced_by: ``fake``, ``real`` or ``none``: how the graph was got.
        trace_note: why nothing better than `traced_by` worked, "" where nothing failed.
        forward_flops: of one forward pass on the example, operations outside autograd included.
        batch_size: first dimension of the example that was traced.
        memory: what a step makes and lets go; None where that could not be seen.
        fixed_flops: those of `forward_flops` to which no larger batch adds.
        fixed_nodes: indices of nodes whose operation costs the same whatever the batch.
        kernels: whose operations the nodes are, which keep different things: ``cpu``, ``cuda``, or
            ``hopper`` for a GPU of that architecture or a newer one.
        precision: ``fp32``, or ``bf16`` or ``fp16`` for a forward under autocast.
        sequence_length, image_size: of that example, as far as it has them.
    """

    modules: tuple[Module, ...]
    parameters: tuple[Parameter, ...]
    nodes: tuple[Node, ...] = ()
    extras: tuple[Node, ...] = ()
    traced_by: str = "none"
    trace_note: str = ""
    forward_flops: int = 0
    batch_size: int = 1
    memory: Memory | None = None
    fixed_flops: int = 0
    fixed_nodes: tuple[int, ...] = ()
    kernels: str = "cpu"
    precision: str = "fp32"
    sequence_length: int | None = None
    image_size: int | None = None

    @property
    def is_for_gpu(self) -> bool:
        """Whether the nodes are a GPU's operations."""
        return self.kernels != "cpu"

    @property
    def parameter_count(self) -> int:
        """Elements in all parameters, a tied one counted once."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def tensor_count(self) -> int:
        return len(self.parameters)

    @property
    def module_count(self) -> int:
        return len(self.modules)

    @cached_property
    def canonical_names(self) -> dict[str, str]:
        """Every name of every parameter → its first name in model order."""
        return {name: p.name for p in self.parameters for name in p.names}

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """First name → parameter."""
        return {p.name: p for p in self.parameters}

    @cached_property
    def by_path(self) -> dict[str, Module]:
        return {module.path: module for module in self.modules}

    @property
    def layers(self) -> Iterator[Module]:
        """Modules that own parameters directly, parents included, in model order."""
        return (module for module in self.modules if module.parameters)

    @cached_property
    def owner_types(self) -> dict[str, set[str]]:
        """First name of a parameter → class names of the modules that own it directly."""
        types: dict[str, set[str]] = {}
        for module in self.layers:
            for name in module.parameters:
                types.setdefault(self.canonical_names[name], set()).add(module.type)
        return types

    @cached_property
    def name_tree(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(path, paths directly below it) of every module with parameters at or below it.

        Deepest first; a parameter is a path too, under each of its names.
        """
        below: dict[str, dict[str, None]] = {}
        for name in self.canonical_names:
            child = name
            while child:
                parent = child.rpartition(".")[0]
                siblings = below.setdefault(parent, {})
                if child in siblings:
                    break  # and so it is all the way up
                siblings[child] = None
                child = parent
        depth_first = sorted(below, key=lambda path: path.count(".") + bool(path), reverse=True)
        return tuple((path, tuple(below[path])) for path in depth_first)

    @cached_property
    def walk(self) -> Walk:
        """The graph gathered for planning; made once."""
        return Walk(self)

    @cached_property
    def full_costs(self) -> dict[Any, dict[str, Any]]:
        """What training everything costs, by what is assumed: a plan shows it beside its own."""
        return {}

    @cached_property
    def came_frozen(self) -> dict[str, bool]:
        """First name of every parameter → whether the model came with it frozen."""
        return {p.name: not p.requires_grad for p in self.parameters}

    @cached_property
    def not_floating(self) -> tuple[str, ...]:
        """Parameters that cannot carry a gradient."""
        return tuple(p.name for p in self.parameters if not p.floating)

    @cached_property
    def unreached(self) -> tuple[str, ...]:
        """Floating parameters on which the loss does not depend, everything trainable."""
        reached = zip(self.parameters, self.walk.is_reached, strict=True)
        return tuple(p.name for p, is_reached in reached if p.floating and not is_reached)

    @cached_property
    def tied(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.shared_with)

    @cached_property
    def reentrant(self) -> tuple[int, ...]:
        """Nodes of reentrant checkpointing, which hides the nodes of what it wraps."""
        return tuple(i for i, n in enumerate(self.nodes) if n.name == "CheckpointFunctionBackward")

    @cached_property
    def with_facts(self) -> tuple[Module, ...]:
        """Modules of whose type something is to be told."""
        return tuple(module for module in self.modules if module.facts)

    @cached_property
    def resting_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        buffers = sum(b.numel * _itemsize(b.dtype) for m in self.modules for b in m.buffers)
        return sum(p.nbytes for p in self.parameters) + buffers

    @cached_property
    def matches(self) -> dict[tuple[str | None, str | None], frozenset[str]]:
        """What rules matched before, by (match, type): a tick asks for the same again and again."""
        return {}

    @cached_property
    def layer_nodes(self) -> dict[str, tuple[int, ...]]:
        """Path of every layer → indices of the nodes that are its operations.

        Those inside its own module's calls, and those that read its parameters or values derived
        from them elsewhere; but what a module that shares a tied parameter does counts there.
        """
        owners: dict[str, list[str]] = {}
        operations: dict[str, dict[int, None]] = {}
        for layer in self.layers:
            operations[layer.path] = {}
            for name in layer.parameters if layer.same_as is None else ():
                owners.setdefault(self.canonical_names[name], []).append(layer.path)
        origins: list[frozenset[str]] = []  # the parameters that a node's result is derived from
        for index, node in enumerate((*self.nodes, *self.extras)):
            below = [origins[i] for i in node.inputs if i >= 0]
            read = frozenset(node.reads).union(*below)
            if node.parameter:
                origins.append(frozenset([node.parameter]))
                continue
            origins.append(read if node.from_parameters else frozenset())
            if node.gets_gradient:
                if node.module in operations:
                    operations[node.module][index] = None
                for name in read:
                    if node.module not in owners[name]:
                        for path in owners[name]:
                            operations[path][index] = None
        return {layer.path: tuple(operations[layer.same_as or layer.path]) for layer in self.layers}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical list of (name, shape, dtype, ties)."""
        canonical = [
            [p.name, list(p.shape), p.dtype, sorted(p.shared_with)] for p in self.parameters
        ]
        text = json.dumps(canonical, separators=(",", ":"), ensure_ascii=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def tree(self) -> dict[str, Any]:
        """The modules in the shape of ``GET /api/models/{id}/tree``."""
        return {"modules": [self._module_document(module) for module in self.modules]}

    def _module_document(self, module: Module) -> dict[str, Any]:
        return {
            "path": module.path,
            "type": module.type,
            "depth": module.depth,
            "parameters": [self._parameter_document(name) for name in module.parameters],
            "buffers": [
                {"name": b.name, "shape": list(b.shape), "dtype": b.dtype, "numel": b.numel}
                for b in module.buffers
            ],
        }

    def _parameter_document(self, name: str) -> dict[str, Any]:
        parameter = self.by_name[self.canonical_names[name]]
        return {
            "name": name,
            "shape": list(parameter.shape),
            "dtype": parameter.dtype,
            "numel": parameter.numel,
            "shared_with": [other for other in parameter.names if other != name],
        }

    def to_document(self) -> dict[str, Any]:
        """The whole graph as JSON values; `from_document` gives an equal graph back."""
        return {
            "format": FORMAT,
            "modules": [asdict(module) for module in self.modules],
            "parameters": [asdict(parameter) for parameter in self.parameters],
            "nodes": [[getattr(node, name) for name in Node.__slots__] for node in self.nodes],
            "extras": [[getattr(node, name) for name in Node.__slots__] for node in self.extras],
            "traced_by": self.traced_by,
            "trace_note": self.trace_note,
            "forward_flops": self.forward_flops,
            "batch_size": self.batch_size,
            "memory": None if self.memory is None else self.memory.to_document(),
            "fixed_flops": self.fixed_flops,
            "fixed_nodes": self.fixed_nodes,
            "kernels": self.kernels,
            "precision": self.precision,
            "sequence_length": self.sequence_length,
            "image_size": self.image_size,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ModelGraph:
        """Read what `to_document` wrote.

        Raises:
            ValueError: the document is of a format that this version does not know.
        """
        if document.get("format") != FORMAT:
            raise ValueError(
                f"This model graph has format {document.get('format')!r}; "
                f"this version reads {FORMAT}."
            )
        return cls(
            modules=tuple(_read_module(item) for item in document["modules"]),
            parameters=tuple(
                Parameter(**_with_tuples(item, "shape", "shared_with"))
                for item in document["parameters"]
            ),
            nodes=tuple(_read_node(item) for item in document["nodes"]),
            extras=tuple(_read_node(item) for item in document.get("extras", ())),
            traced_by=document["traced_by"],
            trace_note=document["trace_note"],
            forward_flops=document["forward_flops"],
            batch_size=document["batch_size"],
            memory=_read_memory(document.get("memory")),
            fixed_flops=document.get("fixed_flops", 0),  # an older graph says none of these
            fixed_nodes=tuple(document.get("fixed_nodes", ())),
            kernels=document.get("kernels", "cpu"),
            precision=document.get("precision", "fp32"),
            sequence_length=document.get("sequence_length"),
            image_size=document.get("image_size"),
        )


def is_gpu(device: str) -> bool:
    """Whether a device is a GPU, by its name."""
    return device.startswith("cuda")


def _read_memory(document: Mapping[str, Any] | None) -> Memory | None:
    return None if document is None else Memory.from_document(document)  # an older graph has none


def _itemsize(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())[:3]
    return max(1, int(digits or 8) // 8) if dtype != "bool" else 1


def _with_tuples(item: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {**item, **{key: tuple(item[key]) for key in keys}}


def _read_module(item: Mapping[str, Any]) -> Module:
    buffers = tuple(Buffer(**_with_tuples(buffer, "shape")) for buffer in item["buffers"])
    return Module(**{**_with_tuples(item, "parameters"), "buffers": buffers})


def _read_node(item: list[Any]) -> Node:
    values = dict(zip(Node.__slots__, item, strict=False))  # an older graph has fewer
    saved = tuple((storage, size, tuple(edges)) for storage, size, edges in values["saved"])
    given = [key for key in ("inputs", "edge_flops", "reads") if key in values]
    return Node(**{**_with_tuples(values, *given), "saved": saved})

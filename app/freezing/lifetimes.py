"""Lifetimes: runs one step to see what it makes and lets go, and when. Knows no freeze set."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.freezing.fakes import is_whole, run_operation
from app.freezing.flops import flops_of
from app.freezing.graph import Node
from app.freezing.hidden import nodes_in_order
from app.freezing.kernels import workspace_bytes
from app.freezing.memory import Change, Memory
from app.freezing.nodes import SAVED_FOR, Read, kept_tensors
from app.freezing.record import sequence_number, storage_key

Told = TypeVar("Told")
_IN_A_VIEW = "torch::autograd::CopySlices"


class NotSeen(Exception):
    """The step went another way than the one that was traced."""


class Step(NamedTuple):
    """A step to be looked at.

    Attributes:
        take_forward: gives the loss, and what else is held until backward has ended.
        given: the example's tensors, which are held all the while.
        read: the graph that was traced.
        resting: storages of parameters and buffers.
        is_autocast: forward runs under autocast, which keeps copies of weights for itself.
    """

    take_forward: Callable[[], tuple[torch.Tensor, Any]]
    given: Sequence[torch.Tensor]
    model: nn.Module
    read: Read
    resting: set[int]
    is_autocast: bool


def read_memory(step: Step, larger: Grown | None = None) -> Seen:
    """See what a forward and backward pass makes and lets go.

    Nothing that a node saves is kept alive by it: a stand-in of the same shape takes its place in
    backward. So it shows when a forward alone lets go of it.

    Args:
        larger: the same step on a larger batch, where that is known. Without it what is made of
            something that grows is taken to grow.

    Raises:
        NotSeen: this step made another graph.

    Side effects: none; parameters have the gradients that they had, and no others.
    """

    def tell(watch: _Watch, functions: Sequence[Any], ends: dict[int, int]) -> Seen:
        hidden = {
            index: watch.find_hidden(function._sequence_nr(), index)
            for function, index in zip(functions, step.read.order, strict=True)
            if index >= 0 and function.name() == _IN_A_VIEW
        }
        return Seen(watch.tell(step.read.nodes, ends, larger), hidden)

    return _watch_step(step, tell)


class Seen(NamedTuple):
    """What a step makes and lets go.

    Attributes:
        hidden: node that writes into a view → what the operation that is written saves, as
            `Node.saved` has it: its own node lies inside that one, where nobody sees it.
    """

    memory: Memory
    hidden: dict[int, tuple[tuple[int, int, tuple[int, ...]], ...]]


class Grown(NamedTuple):
    """What a step is on a larger batch.

    Attributes:
        sizes: bytes of all that it makes, in order.
        forward_flops: of all of forward.
        fixed_nodes: those whose operation costs what it cost when it was traced.
    """

    sizes: list[int]
    forward_flops: int
    fixed_nodes: tuple[int, ...]


def read_grown(step: Step) -> Grown:
    """See such a step on a larger batch than the one that was traced; as `read_memory` does."""

    def tell(watch: _Watch, *_: object) -> Grown:
        nodes = step.read.nodes
        fixed = (i for i, flops in watch.flops.items() if flops == nodes[i].forward_flops > 0)
        return Grown(watch.sizes, watch.forward_flops, tuple(sorted(fixed)))

    return _watch_step(step, tell)


def _watch_step(step: Step, tell: Callable[[_Watch, Sequence[Any], dict[int, int]], Told]) -> Told:
    """Take a step, and tell of it while all that it made is there.

    Args:
        tell: is given the step, its nodes as autograd has them, and the storage of each
            parameter's gradient → the parameter's node.
    """
    take_forward, given, model, read, resting, is_autocast = step
    nodes = read.nodes
    watch = _Watch(resting, is_autocast, first_free=1 + max(_storages(nodes), default=-1))
    own = [(p, p.grad, dict(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
    for parameter, _, hooks in own:
        parameter.grad = None
        if hooks:  # an optimizer in backward would step
            parameter._post_accumulate_grad_hooks.clear()
    try:
        with watch, torch.autograd.graph.saved_tensors_hooks(watch.pack, watch.unpack):
            for tensor in given:
                watch.note(tensor, is_scaled=True)
            value, held = take_forward()
            functions = list(nodes_in_order(value.grad_fn))
            if len(functions) != len(read.order):
                raise NotSeen("A second forward makes another graph.")
            for function, index in zip(functions, read.order, strict=True):
                if index < 0:
                    continue
                if function.name() != nodes[index].name:
                    raise NotSeen("A second forward makes another graph.")
                if nodes[index].saved:
                    kept = [tensor for _, tensor in kept_tensors(function, resting)]
                    watch.find_saved(kept, nodes[index])
                watch.find_flops(function, index)
                function.register_prehook(lambda _, index=index: watch.start_node(index))
            watch.start_node(read.order[-1])
            value.backward()
        owners = {node.parameter: index for index, node in enumerate(nodes) if node.parameter}
        ends = {
            storage_key(p.grad): owners.get(name, -1)
            for name, p in model.named_parameters()
            if p.grad is not None and p.grad.layout is torch.strided
        }
        del held
        return tell(watch, functions, ends)
    finally:
        for parameter, gradient, hooks in own:
            parameter.grad = gradient
            if hooks:
                parameter._post_accumulate_grad_hooks.update(hooks)


class _Saved:
    """What a node keeps in place of a tensor."""

    def __init__(self, tensor: torch.Tensor, number: int) -> None:
        self.like = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self.number = number
        self.stand_in: torch.Tensor | None = None
        # Whole numbers are looked at: places, truths, pivots.
        self.values = tensor.detach().clone() if is_whole(tensor) else None


class _Watch(TorchDispatchMode):
    """Numbers storages as they are made, and notes when each is made and let go."""

    def __init__(self, resting: set[int], is_autocast: bool, first_free: int) -> None:
        super().__init__()
        self._storages: dict[int, int] = {}  # number of a storage → what the traced graph calls it
        self._free = itertools.count(first_free)
        self._writers: dict[int, str] = {}  # number of the newest node → what wrote in place then
        self._unpacked: dict[int, list[int]] = {}  # node → numbers of what it reads, -1 for weights
        self._is_autocast = is_autocast
        self._ignored = set(resting)
        self._alive: dict[int, int] = {}
        self._made: list[tuple[int, bool]] = []  # bytes, whether they grow with the batch
        self._events: list[tuple[int, bool]] = []  # number of a storage, whether it is made
        self._starts: list[tuple[int, int]] = []  # place in the events, node
        self._stand_ins: dict[int, int] = {}
        self._copies: dict[int, int] = {}  # number of a copy of a weight → place where it was used
        self._waiting: list[int] = []  # copies that the next operation uses
        self._is_paused = False
        self._foretold: set[int] = set()  # numbers of workspaces: of the batch that was traced
        self._newest = sequence_number() - 1
        self._flops: dict[int, int] = {}  # by the number of the node that was made
        self.flops: dict[int, int] = {}  # by node
        self.forward_flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and not self._starts:
            self._writers[sequence_number() - 1] = func._schema.name
        result, read = run_operation(func, args, kwargs)
        if not self._is_paused and func.namespace != "prim":
            if not self._starts:
                self._count_flops(flops_of(func, args, kwargs, result))
            is_scaled = any(map(self._is_scaled, read))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.note(leaf, is_scaled)
            if size := workspace_bytes(func, args):
                self._note_gone(size)
            if self._is_autocast:
                self._note_copies(func, read, result)
        return result

    def _count_flops(self, flops: int) -> None:
        """Count what an operation of forward took, for the node that it made, if it made one."""
        number, before = sequence_number() - 1, self._newest
        self._newest = number
        self.forward_flops += flops
        if number != before and flops:
            self._flops[number] = flops

    def _note_copies(self, func: Any, read: Sequence[torch.Tensor], result: Any) -> None:
        """Note when a copy of a weight that autocast makes was used.

        It keeps those of trained weights until forward ends, and those of frozen ones no longer.
        Who trains is not known here, and what is trained is mostly saved: so none is kept. A view
        of a copy is no use of it.
        """
        if func.is_view:
            return
        if func is not torch.ops.aten._to_copy.default:
            self._copies.update(dict.fromkeys(self._waiting, len(self._events)))
            self._waiting = []
        elif self._rests(read[0]):
            self._waiting.append(self._alive[storage_key(result)])

    def _rests(self, tensor: torch.Tensor) -> bool:
        return _is_plain(tensor) and storage_key(tensor) in self._ignored

    def _is_scaled(self, tensor: torch.Tensor) -> bool:
        if not _is_plain(tensor):
            return False
        key = storage_key(tensor)
        number = self._alive.get(key, self._stand_ins.get(key))
        return number is not None and self._made[number][1]

    def note(self, tensor: torch.Tensor, is_scaled: bool) -> None:
        """Note a tensor's storage, unless it is known."""
        if not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._ignored:
            return
        number = self._alive[key] = len(self._made)
        self._made.append((storage.nbytes(), is_scaled))
        self._events.append((number, True))
        weakref.finalize(storage, self._let_go, key).atexit = False

    def _note_gone(self, size: int) -> int:
        """Note so many bytes of a batch that are made and let go at once."""
        number = len(self._made)
        self._made.append((size, True))
        self._events += [(number, True), (number, False)]
        return number

    def _let_go(self, key: int) -> None:
        self._events.append((self._alive.pop(key), False))

    def start_node(self, index: int) -> None:
        """From now on this node of backward runs."""
        self._starts.append((len(self._events), index))

    def pack(self, tensor: torch.Tensor) -> Any:
        number = self._alive.get(storage_key(tensor)) if _is_plain(tensor) else None
        if number is None:
            return tensor
        with self._paused():
            return _Saved(tensor, number)

    def unpack(self, saved: Any) -> torch.Tensor:
        if self._starts:
            number = saved.number if isinstance(saved, _Saved) else -1
            self._unpacked.setdefault(self._starts[-1][1], []).append(number)
        if not isinstance(saved, _Saved):
            return saved
        if saved.stand_in is None:
            shape, stride, dtype, device = saved.like
            with self._paused(), torch.no_grad():
                saved.stand_in = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                saved.stand_in.zero_()
                if saved.values is not None:
                    saved.stand_in.copy_(saved.values)
            storage = saved.stand_in.untyped_storage()
            key = storage._cdata
            self._ignored.add(key)
            self._stand_ins[key] = saved.number
            weakref.finalize(storage, self._forget_stand_in, key).atexit = False
        return saved.stand_in

    def _forget_stand_in(self, key: int) -> None:
        self._ignored.discard(key)
        del self._stand_ins[key]

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def find_flops(self, function: Any, index: int) -> None:
        """Note what the operation of a node took."""
        self.flops[index] = self._flops.get(function._sequence_nr(), 0)

    def find_saved(self, tensors: Sequence[torch.Tensor], node: Node) -> None:
        """Note what the traced graph calls each storage that a node saves.

        A workspace, which comes first, is no tensor that anybody sees.
        """
        hidden = len(node.saved) - len(tensors)
        if hidden < 0:
            raise NotSeen("A second forward saves other tensors.")
        for storage, size, _ in node.saved[:hidden]:
            number = self._note_gone(size)
            self._storages[number] = storage
            self._foretold.add(number)
        seen = node.saved[hidden:]
        for tensor, (storage, _, _) in zip(tensors, seen, strict=True):
            key = storage_key(tensor)
            if (known := self._stand_ins.get(key, self._alive.get(key))) is not None:
                self._storages[known] = storage

    def find_hidden(self, number: int, index: int) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """What the operation inside such a node saves: what it read when the node ran.

        It is there by new names where no other node saves it. The operation wrote when the newest
        node was the one before this one.

        Args:
            number: of the node, as autograd counts them.
        """
        read = self._unpacked.get(index, [])
        operation = self._writers.get(number - 1, "").removeprefix("aten::").removesuffix("_")
        wanted_for = SAVED_FOR.get(f"{operation.title().replace('_', '')}Backward0", {})
        edges = [wanted_for[name] for name in sorted(wanted_for)]
        if len(edges) != len(read):
            edges = [()] * len(read)
        saved = []
        for made, live in zip(read, edges, strict=True):
            if made < 0:
                continue
            if made not in self._storages:
                self._storages[made] = next(self._free)
            saved.append((self._storages[made], self._made[made][0], live))
        return tuple(saved)

    @property
    def sizes(self) -> list[int]:
        return [size for size, _ in self._made]

    def tell(self, nodes: Sequence[Node], ends: Mapping[int, int], larger: Grown | None) -> Memory:
        """All of it as plain values.

        Args:
            ends: storage of each parameter's gradient → the parameter's node.
            larger: the same on a larger batch.
        """
        is_known = larger is not None and len(larger.sizes) == len(self._made)
        if larger is not None and is_known:
            sizes = enumerate(zip(self.sizes, larger.sizes, strict=True))
            self._made = [(a, a != b or number in self._foretold) for number, (a, b) in sizes]
        border = self._starts[0][0]
        forward: list[Change] = []
        for number, is_made in self._put_forward(border):
            size, is_scaled = self._made[number]
            if not is_made and number in self._storages:
                forward.append(Change(self._storages[number], is_scaled, size, 0))
            else:
                _append(forward, Change(-1, is_scaled, *_step(size, is_made)))
        consumers = self._find_consumers(ends)
        backward = []
        stops = [*(place for place, _ in self._starts[1:]), len(self._events)]
        for (start, node), stop in zip(self._starts, stops, strict=True):
            changes: list[Change] = []
            for number, is_made in self._events[start:stop]:
                size, is_scaled = self._made[number]
                maker, consumer = consumers.get(number, (-1, -1))
                if not is_known:
                    ends_at = (nodes[i] for i in (maker, consumer) if i >= 0)
                    is_scaled &= not any(map(_is_of_weights, ends_at))
                _append(changes, Change(consumer, is_scaled, *_step(size, is_made)))
            backward.append((node, tuple(changes)))
        return Memory(tuple(forward), tuple(backward))

    def _put_forward(self, border: int) -> Iterator[tuple[int, bool]]:
        """The events of forward; copies of weights go as soon as they were used."""
        gone: dict[int, list[int]] = {}
        for number, place in self._copies.items():
            if place <= border:
                gone.setdefault(place, []).append(number)
        for place, (number, is_made) in enumerate(self._events[:border]):
            yield from ((copy, False) for copy in gone.get(place, ()))
            if is_made or number not in self._copies:
                yield number, is_made
        yield from ((copy, False) for copy in gone.get(border, ()))

    def _find_consumers(self, ends: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """Number of each storage that backward makes → the node that makes it, the last that reads.

        The gradient that comes out of a node is let go by the node that it goes into.
        """
        consumers: dict[int, tuple[int, int]] = {}
        stops = [*(place for place, _ in self._starts[1:]), len(self._events)]
        for (start, node), stop in zip(self._starts, stops, strict=True):
            for number, is_made in self._events[start:stop]:
                if is_made:
                    consumers[number] = node, node
                elif number in consumers:
                    consumers[number] = consumers[number][0], node
        for key, number in self._alive.items():
            if number in consumers and key in ends:
                consumers[number] = consumers[number][0], ends[key]
        return consumers


def _storages(nodes: Sequence[Node]) -> Iterator[int]:
    return (storage for node in nodes for storage, _, _ in node.saved)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_of_weights(node: Node) -> bool:
    """Whether gradients of its results are as large as weights, whatever the batch."""
    return node.parameter is not None or node.from_parameters


def _step(size: int, is_made: bool) -> tuple[int, int]:
    return (size, size) if is_made else (-size, 0)


def _append(changes: list[Change], change: Change) -> None:
    """As part of the last one, where they are of one kind."""
    if changes and changes[-1][:2] == change[:2]:
        last = changes[-1]
        high = max(last.high, last.net + change.high)
        changes[-1] = Change(last.on, last.is_scaled, last.net + change.net, high)
    else:
        changes.append(change)

"""Records a forward pass: module calls, FLOPs, what comes of parameters. Knows no graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from app.freezing.fakes import run_operation
from app.freezing.flops import flops_of

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_RECURRENT = torch.ops.aten.mkldnn_rnn_layer.default  # a recurrent layer on a CPU
_FEW_STEPS = 256


def sequence_number() -> int:
    """The number that the next autograd node of this thread will have."""
    return torch._C._autograd._get_sequence_nr()


class Spans:
    """Half-open ranges of autograd sequence numbers, one for each module call."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[nn.Module, str] = {}
        for path, module in model.named_modules():
            self.paths[module] = path
        self.open: list[tuple[nn.Module, int]] = []
        self.closed: list[tuple[int, int, int, str]] = []  # depth, start, end, path

    def __enter__(self) -> Spans:
        # Global hooks run before a module's own, so that what its hooks do is inside its call.
        self.handles = [register_module_forward_pre_hook(self._enter_module)]
        self.handles += [
            module.register_forward_hook(self._leave_module, always_call=True)
            for module in self.paths
            if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if module in self.paths and not isinstance(module, torch.jit.ScriptModule):
            self.open.append((module, sequence_number()))

    def _leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        if self.open and self.open[-1][0] is module:
            _, start = self.open.pop()
            span = (len(self.open), start, sequence_number(), self.paths[module])
            self.closed.append(span)

    def owners(self) -> dict[int, str]:
        """Sequence number → path of the innermost module call in which it was given out."""
        owners: dict[int, str] = {}
        for _, start, end, path in sorted(self.closed):  # deeper calls overwrite those around them
            owners.update(dict.fromkeys(range(start, end), path))
        return owners


class Step(NamedTuple):
    """One operation inside a checkpointed region."""

    number: int  # of the newest node
    flops: int
    made_node: bool
    saves_here: bool  # not in a region within this one


class Recorder(TorchDispatchMode):
    """FLOPs by sequence number, what comes from parameters alone, and what is checkpointed.

    Attributes:
        forward_flops: of all operations.
        flops: sequence number → FLOPs of the operation that made that node.
        inner_flops: FLOPs of operations that made no node, after which node they came.
        from_parameters: sequence number → whether its operation read nothing but parameters,
            buffers and what comes of them.
        reads: sequence number → the parameters of which its operation read something.
        inner_from_parameters, inner_reads: the same of all that ran since the node was made, for a
            Python function's; read without need of a gradient, since the others are its inputs.
        saving: nodes that save where no hook takes what they save, as a checkpoint's does.
        regions: what each non-reentrant checkpoint ran, in order.
        workspaces: bytes that a node saves and fake tensors do not show.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: dict[int, int] = {}
        self.inner_flops: dict[int, int] = {}
        self.newest = sequence_number() - 1
        self.forward_flops = 0
        self.saving: set[int] = set()
        self.workspaces: dict[int, int] = {}
        # Tensors that come of parameters and buffers alone, held, so that their ids stay their own.
        self.origins: dict[int, tuple[Any, frozenset[str]]] = {}
        # The same by storage: `.data` is no operation. Of a buffer and its views nothing comes.
        self.places: dict[int, frozenset[str]] = {
            storage_key(buffer): frozenset()
            for buffer in model.buffers()
            if buffer.layout is torch.strided
        }
        for name, parameter in model.named_parameters():
            self.origins[id(parameter)] = parameter, frozenset([name])
            if parameter.layout is torch.strided:
                place = storage_key(parameter)
                self.places[place] = self.places.get(place, frozenset()) | {name}
        self.from_parameters: dict[int, bool] = {}
        self.inner_from_parameters: dict[int, bool] = {}
        self.reads: dict[int, frozenset[str]] = {}
        self.inner_reads: dict[int, frozenset[str]] = {}
        self.regions: dict[Any, list[Step]] = {}
        self.hooks: list[Any] = []
        self.is_paused = False

    def __enter__(self) -> Recorder:
        self._enter_hooks, self._leave_hooks = (
            saved_tensors_hooks.__enter__,
            saved_tensors_hooks.__exit__,
        )
        recorder = self

        def enter(hooks: Any) -> Any:
            recorder.hooks.append(hooks)
            return recorder._enter_hooks(hooks)

        def leave(hooks: Any, *error: Any) -> None:
            recorder.hooks.pop()
            recorder._leave_hooks(hooks, *error)

        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        saved_tensors_hooks.__exit__ = leave  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        saved_tensors_hooks.__enter__ = self._enter_hooks  # type: ignore[method-assign]
        saved_tensors_hooks.__exit__ = self._leave_hooks  # type: ignore[method-assign]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs meanwhile is no part of the forward."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result, read = run_operation(func, args, kwargs)
        if self.is_paused or func.namespace == "prim":
            return result
        # The newest node is this operation's if there was none as new at the last one. A comparison
        # makes none, nor does what runs under no_grad or inside a Python autograd function.
        number = sequence_number() - 1
        made_node = number != self.newest
        if not self.hooks:
            self.saving.update(range(self.newest + 1, number + 1))
        self.newest = number
        if flops := flops_of(func, args, kwargs, result):
            self.forward_flops += flops
            counted = self.flops if made_node else self.inner_flops
            counted[number] = counted.get(number, 0) + flops
        if func is _RECURRENT and isinstance(result[-1], FakeTensor):
            self.workspaces[number] = _workspace_bytes(func, args)
        self._note_region(number, flops, made_node)
        self._note_origins(number, made_node, read, result)
        return result

    def _note_region(self, number: int, flops: int, made_node: bool) -> None:
        for hooks in self.hooks:
            if type(hooks).__name__ == "_checkpoint_hook":
                step = Step(number, flops, made_node, hooks is self.hooks[-1])
                self.regions.setdefault(hooks, []).append(step)

    def _note_origins(
        self, number: int, made_node: bool, read: list[torch.Tensor], result: Any
    ) -> None:
        origins = [self.origins_of(tensor) for tensor in read]
        known = [names for names in origins if names is not None]
        derived = any(known) and len(known) == len(read)
        inner = self.inner_from_parameters.get(number, True)
        self.inner_from_parameters[number] = inner and derived
        if made_node:
            self.from_parameters[number] = derived
        if made_node and any(known):
            self.reads[number] = frozenset().union(*known)
        held = [n for t, n in zip(read, origins, strict=True) if n and not t.requires_grad]
        if held:
            self.inner_reads[number] = self.inner_reads.get(number, frozenset()).union(*held)
        if read and len(known) == len(read):
            names = frozenset().union(*known)
            for leaf in tree_leaves(result):
                self.origins.setdefault(id(leaf), (leaf, names))

    def origins_of(self, tensor: torch.Tensor) -> frozenset[str] | None:
        """The parameters that a tensor comes of: none for a buffer, None for anything else."""
        if id(tensor) in self.origins:
            return self.origins[id(tensor)][1]
        if tensor.layout is torch.strided and not tensor.requires_grad:
            return self.places.get(storage_key(tensor))
        return None


class Attention(NamedTuple):
    """A call of attention whose mask needs a gradient, which a fused kernel would not give.

    Attributes:
        start, end: the sequence numbers of the nodes that it made instead.
        values: nodes of query, key and value; `mask` that of the mask.
        reads: the parameters of which the mask comes alone.
    """

    start: int
    end: int
    values: tuple[Any, ...]
    mask: Any
    flops: int
    reads: frozenset[str]


class Attentions(TorchFunctionMode):
    """Where the choice of a kernel hangs on whether a mask needs a gradient."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.found: list[Attention] = []
        self.fused: dict[str, bool] = {}  # by what decides it: blocks are often alike

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not _ATTENTION:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        start, before = sequence_number(), self.recorder.forward_flops
        result = _ATTENTION(query, key, value, attn_mask, *args, **kwargs)
        end, flops = sequence_number(), self.recorder.forward_flops - before
        if attn_mask is None or not attn_mask.requires_grad or not torch.is_grad_enabled():
            return result
        shapes = [(t.shape, t.stride(), t.dtype) for t in (query, key, value, attn_mask)]
        asked = str((shapes, args, kwargs))
        if asked not in self.fused:
            with self.recorder.paused(), _Watch() as frozen:
                _ATTENTION(query, key, value, attn_mask.detach(), *args, **kwargs)
            self.fused[asked] = frozen.is_fused
        if self.fused[asked]:
            self.found.append(
                Attention(
                    start,
                    end,
                    tuple(
                        get_gradient_edge(t).node for t in (query, key, value) if t.requires_grad
                    ),
                    get_gradient_edge(attn_mask).node,
                    flops,
                    self.recorder.origins_of(attn_mask) or frozenset(),
                )
            )
        return result


class _Watch(TorchDispatchMode):
    """Whether attention ran as the one kernel that a CPU has for it."""

    is_fused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.is_fused |= func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _workspace_bytes(func: Any, args: Any) -> int:
    """What a recurrent layer keeps beside its results: asked of the real operation, with zeros.

    It grows with the steps, which come first; of many a few are taken, and the rest foretold.
    """
    steps = args[0].shape[0]
    if steps <= 2 * _FEW_STEPS:
        return _ask_workspace(func, args, steps)
    few, more = (_ask_workspace(func, args, n * _FEW_STEPS) for n in (1, 2))
    return more + (steps - 2 * _FEW_STEPS) * (more - few) // _FEW_STEPS


def _ask_workspace(func: Any, args: Any, steps: int) -> int:
    with unset_fake_temporarily():
        real = tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), args[1:])
        x = torch.zeros(steps, *args[0].shape[1:], dtype=args[0].dtype)
        workspace: torch.Tensor | None = func(x, *real)[-1]
    return 0 if workspace is None else workspace.nbytes

"""trace_model(model, example): a ModelGraph, under fake tensors. Knows no config and no data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from app.freezing.fakes import (
    enter_known,
    forget_unwritten,
    know_made,
    known_values,
    see_known,
)
from app.freezing.graph import Buffer, ModelGraph, Module, Node, Parameter

Loss = Callable[[Any, Any], torch.Tensor]


def _rnn_flops(x: torch.Tensor, weights: Iterable[torch.Tensor]) -> int:
    """One product a step with each matrix; x is (steps, batch, features) either way round."""
    steps = x.numel() // x.shape[-1]
    return 2 * steps * sum(w.numel() for w in weights if w.dim() == 2)


# What torch's registry has no formula for: CPU flash attention, grouped products, fused RNN layers.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: (
        2 * a.numel() * b.shape[-1] // (a.shape[0] if a.dim() > b.dim() else 1)
    ),
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *weights, **__: _rnn_flops(x, weights[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _rnn_flops(x, weights),
}
# For matrix products and convolutions: which edges cost as much as the forward when they are live.
_COSTLY_EDGES = {
    "AddmmBackward0": (1, 2),
    "MmBackward0": (0, 1),
    "BmmBackward0": (0, 1),
    "BaddbmmBackward0": (1, 2),
    "ConvolutionBackward0": (0, 1),
    "GroupedMmBackward0": (0, 1),
}
# Tensors that a node saves only where another operand's gradient is wanted: attribute → edges.
_SAVED_FOR: dict[str, dict[str, tuple[int, ...]]] = {
    "AddmmBackward0": {"mat1": (2,), "mat2": (1,)},
    "MmBackward0": {"self": (1,), "mat2": (0,)},
    "BmmBackward0": {"self": (1,), "mat2": (0,)},
    "BaddbmmBackward0": {"batch1": (2,), "batch2": (1,)},
    "MulBackward0": {"self": (1,), "other": (0,)},
    "DivBackward0": {"self": (1,)},
}


def trace_model(
    model: nn.Module,
    example: Any,
    *,
    loss: Loss | None = None,
    ways: Sequence[str] = ("fake", "real"),
) -> ModelGraph:
    """Read a model's modules and its autograd graph, everything trainable, by one forward pass.

    The pass is made in train mode with a fixed seed, stochastic depth forced to keep, and under
    fake tensors: nothing is computed and no weight is touched; a model that was built of fake
    tensors has none. The forward may look at whole numbers of the example and at what follows from
    them alone, and is told that what depends on weights is finite. Where a model cannot run so (its
    forward looks at values), one real pass is made instead; where that fails too, the graph has no
    nodes and says why.

    Args:
        model: on any device; its flags, mode and buffers are left as they were.
        example: what it is called with: a tensor, a tuple of arguments or a dict of keyword
            arguments; None where nothing is known.
        loss: ``(output, example) -> scalar``; by default the output's ``.loss``, else the mean
            square of its logits, last hidden state or first floating tensor.
        ways: those that may be tried, the first that works is taken.

    Returns:
        The graph; `traced_by` says how it was got.
    """
    bare = read_model(model)
    nodes: tuple[Node, ...] = ()
    traced_by, forward_flops = "none", 0
    notes: list[str] = []
    if example is None:
        notes.append("There is no example to call it with; give 'input' a shape, or show it data.")
    else:
        for how in ways:
            if how == "real" and _fake_mode(model):
                break  # there are no weights to compute with
            try:
                with _undisturbed(model):
                    nodes, forward_flops = _trace_nodes(model, example, loss, fake=how == "fake")
            except Exception as error:  # whatever a user's forward raises under this way of tracing
                notes.append(f"{how}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            else:
                traced_by = how
                break
    return replace(
        bare,
        nodes=nodes,
        traced_by=traced_by,
        trace_note=" ".join(notes),
        forward_flops=forward_flops,
        batch_size=_batch_size(example),
    )


def _fake_mode(model: nn.Module) -> FakeTensorMode | None:
    """The mode under which a model was built, None where its tensors are real."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return None


def read_model(model: nn.Module) -> ModelGraph:
    """A model's modules, parameters and buffers alone, without its autograd graph."""
    modules, parameters = _read_modules(model)
    return ModelGraph(modules=modules, parameters=parameters)


def call_model(model: Callable[..., Any], example: Any) -> Any:
    """Call a model with a tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


def _batch_size(example: Any) -> int:
    for leaf in tree_leaves(example):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return max(1, leaf.shape[0])
    return 1


# ----------------------------------------------------------------------------------------- modules


def _read_modules(model: nn.Module) -> tuple[tuple[Module, ...], tuple[Parameter, ...]]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    first_paths: dict[nn.Module, str] = {}
    modules: list[Module] = []
    for path, module in model.named_modules(remove_duplicate=False):
        same_as = first_paths.get(module)
        first_paths.setdefault(module, path)
        modules.append(_read_module(path, module, same_as))
    parameters = tuple(_read_parameter(tensors[key], names[key]) for key in names)
    return tuple(modules), parameters


def _read_parameter(parameter: nn.Parameter, names: list[str]) -> Parameter:
    shape = () if is_lazy(parameter) else tuple(parameter.shape)
    numel = 0 if is_lazy(parameter) else parameter.numel()
    return Parameter(
        name=names[0],
        shape=shape,
        dtype=_dtype_name(parameter.dtype),
        numel=numel,
        nbytes=numel * parameter.element_size(),
        floating=parameter.is_floating_point() or parameter.is_complex(),
        requires_grad=parameter.requires_grad,
        shared_with=tuple(names[1:]),
    )


def _read_module(path: str, module: nn.Module, same_as: str | None) -> Module:
    prefix = f"{path}." if path else ""
    facts: dict[str, Any] = {}
    if drops_at_random(module):
        facts["dropout"] = True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        facts["max_norm"] = module.max_norm
    if type(module).__name__ == "_SpectralNorm" or any(
        type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values()
    ):
        facts["spectral_norm"] = True
    return Module(
        path=path,
        type=type(module).__name__,
        depth=path.count(".") + 1 if path else 0,
        parameters=tuple(prefix + name for name, p in module._parameters.items() if p is not None),
        buffers=tuple(
            Buffer(
                name=prefix + name,
                shape=tuple(buffer.shape),
                dtype=_dtype_name(buffer.dtype),
                numel=buffer.numel(),
                persistent=name not in module._non_persistent_buffers_set,
            )
            for name, buffer in module._buffers.items()
            if buffer is not None
        ),
        is_norm=is_statistics_norm(module),
        same_as=same_as,
        facts=facts,
    )


def is_statistics_norm(module: nn.Module) -> bool:
    """A norm layer with running statistics: BatchNorm, SyncBatchNorm, InstanceNorm, subclasses."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def drops_at_random(module: nn.Module) -> bool:
    """A module that drops values in train mode: dropout itself, attention and RNNs with some."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------- nodes


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Everything trainable, in train mode, nothing dropped; all as it was afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    dropped = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in _depth_attributes(module)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model.train()
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            for module, name, _ in dropped:
                setattr(module, name, 0.0)
            yield
        finally:
            for module, name, value in dropped:
                setattr(module, name, value)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _depth_attributes(module: nn.Module) -> list[str]:
    """Attributes by which whole layers are dropped at random while training."""
    names = ["layerdrop"]
    if type(module).__name__ in ("DropPath", "StochasticDepth"):
        names += ["drop_prob", "p"]
    return [name for name in names if isinstance(getattr(module, name, None), float)]


def _trace_nodes(
    model: nn.Module, example: Any, loss: Loss | None, *, fake: bool
) -> tuple[tuple[Node, ...], int]:
    mode: Any = contextlib.nullcontext()
    if fake:
        mode = _fake_mode(model) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.enable_grad(), known_values(mode):
        resting: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        if isinstance(mode, FakeTensorMode):
            example = tree_map_only(torch.Tensor, partial(enter_known, mode), example)
            resting = [see_known(mode, tensor) for tensor in resting]  # as operations see them
        spans = _Spans(model)
        recorder = _Recorder(model)
        packs = torch.autograd.graph.saved_tensors_hooks(recorder.note_saved, lambda tensor: tensor)
        with spans, packs, recorder:
            output = call_model(model, example)
            value = scalar_loss(output, example, loss)
        if value.grad_fn is None:
            raise ValueError("the loss does not depend on any parameter")
        nodes = _read_nodes(model, value, spans, recorder, {_storage_key(t) for t in resting})
        return nodes, recorder.forward_flops


def scalar_loss(output: Any, example: Any, loss: Loss | None) -> torch.Tensor:
    """The loss that a plan is made for, where no targets are known."""
    if loss is not None:
        return loss(output, example)
    if isinstance(getattr(output, "loss", None), torch.Tensor):
        return output.loss
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, torch.Tensor):
            return tensor.float().square().mean()
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.float().square().mean()
    raise ValueError(f"the model returned {type(output).__name__}, which has no floating tensor")


def _sequence_number() -> int:
    return torch._C._autograd._get_sequence_nr()


class _Spans:
    """Half-open ranges of autograd sequence numbers, one for each module call."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[nn.Module, str] = {}
        for path, module in model.named_modules():
            self.paths[module] = path
        self.open: list[tuple[nn.Module, int]] = []
        self.closed: list[tuple[int, int, int, str]] = []  # depth, start, end, path

    def __enter__(self) -> _Spans:
        # Global hooks run before a module's own, so that what its hooks do is inside its call.
        self.handles = [register_module_forward_pre_hook(self._enter_module)]
        self.handles += [
            module.register_forward_hook(self._leave_module, always_call=True)
            for module in self.paths
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if module in self.paths:
            self.open.append((module, _sequence_number()))

    def _leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        if self.open and self.open[-1][0] is module:
            _, start = self.open.pop()
            span = (len(self.open), start, _sequence_number(), self.paths[module])
            self.closed.append(span)

    def owners(self) -> dict[int, str]:
        """Sequence number → path of the innermost module call in which it was given out."""
        owners: dict[int, str] = {}
        for _, start, end, path in sorted(self.closed):  # deeper calls overwrite those around them
            owners.update(dict.fromkeys(range(start, end), path))
        return owners


class _Recorder(TorchDispatchMode):
    """Forward FLOPs by sequence number, and which results come from parameters alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: dict[int, int] = {}
        self.inner_flops: dict[int, int] = {}  # of operations that made no node, after which node
        self.newest = _sequence_number() - 1
        self.forward_flops = 0
        self.saving: set[int] = set()  # nodes that save under our hook: a checkpoint's do not
        self.workspaces: dict[int, int] = {}  # bytes that a node saves and fake tensors do not show
        self.constants = {id(b): b for b in model.buffers()}
        self.derived: dict[int, Any] = {id(p): p for p in model.parameters()}
        self.from_parameters: dict[int, bool] = {}

    def note_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saving.add(_sequence_number() - 1)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # a question about a tensor, asked in the middle of another
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        forget_unwritten(func, read, result)
        result = know_made(func, args, kwargs, result)
        # The newest node is this operation's if there was none as new at the last one. A comparison
        # makes none, nor does what runs under no_grad or inside a Python autograd function.
        number = _sequence_number() - 1
        made_node, self.newest = number != self.newest, number
        if flops := _flops_of(func, args, kwargs, result):
            self.forward_flops += flops
            counted = self.flops if made_node else self.inner_flops
            counted[number] = counted.get(number, 0) + flops
        if func is _RECURRENT and isinstance(result[-1], FakeTensor):
            self.workspaces[number] = _workspace_bytes(func, args)
        derived = any(id(t) in self.derived for t in read) and all(
            id(t) in self.derived or id(t) in self.constants for t in read
        )
        if made_node:
            self.from_parameters[number] = derived
        if derived:
            for leaf in tree_leaves(result):
                self.derived[id(leaf)] = leaf  # held, so that its id stays its own
        return result


def _read_nodes(
    model: nn.Module,
    value: torch.Tensor,
    spans: _Spans,
    recorder: _Recorder,
    resting: set[int],
) -> tuple[Node, ...]:
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    owners = spans.owners()
    storages: dict[int, int] = {}
    index: dict[Any, int] = {}
    nodes: list[Node] = []
    for grad_fn in nodes_in_order(value.grad_fn):
        index[grad_fn] = len(nodes)
        inputs = tuple(index.get(next_fn, -1) for next_fn, _ in grad_fn.next_functions)
        variable = getattr(grad_fn, "variable", None)
        if variable is not None:
            nodes.append(Node(grad_fn.name(), None, inputs, names.get(id(variable), "")))
            continue
        number, kind = grad_fn._sequence_nr(), grad_fn.name()
        flops = recorder.flops.get(number, 0)
        whole = 0 if kind in _COSTLY_EDGES else _whole_node_flops(kind, flops)
        if isinstance(grad_fn, torch.autograd.function.BackwardCFunction):
            flops += recorder.inner_flops.get(number, 0)
            whole = _custom_backward_flops(grad_fn, flops)
        edges = _COSTLY_EDGES.get(kind)
        nodes.append(
            Node(
                name=kind,
                module=owners.get(number),
                inputs=inputs,
                forward_flops=flops,
                edge_flops=tuple(flops if e in edges else 0 for e in range(len(inputs)))
                if edges and flops
                else (),
                node_flops=whole,
                from_parameters=recorder.from_parameters.get(number, False),
                saved=_read_saved(
                    grad_fn, kind, resting, storages, recorder.workspaces.get(number, 0)
                )
                if number in recorder.saving
                else (),
                gradient_bytes=sum(map(_result_bytes, grad_fn._input_metadata)),
            )
        )
    return tuple(nodes)


def _whole_node_flops(kind: str, flops: int) -> int:
    """Attention's backward is five products to the forward's two; anything else two to one."""
    return flops * 5 // 2 if "ScaledDotProduct" in kind else flops * 2


def _result_bytes(result: Any) -> int:
    return 0 if result.is_nested_tensor else math.prod(result.shape) * result.dtype.itemsize


def _custom_backward_flops(grad_fn: Any, forward_flops: int) -> int:
    """What a Python autograd function's backward costs: it is run, alone, on zeros."""
    gradients = [
        torch.zeros(given.shape, dtype=given.dtype, device=given.device)
        for given in grad_fn._input_metadata
    ]
    counter = _Counter()
    try:
        with torch.no_grad(), counter:
            grad_fn.apply(*gradients)
    except Exception:  # user code that looks at values, or wants its gradients otherwise
        return 2 * forward_flops
    return counter.flops


class _Counter(TorchDispatchMode):
    """FLOPs of whatever runs."""

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += _flops_of(func, args, kwargs or {}, result)
        return result


def _flops_of(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    formula = _FLOPS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def nodes_in_order(root: Any) -> Iterator[Any]:
    """Every node below `root`, each after all that its edges lead to, without recursion."""
    seen: set[Any] = {root}
    stack = [(root, iter(root.next_functions))]
    while stack:
        grad_fn, edges = stack[-1]
        for next_fn, _ in edges:
            if next_fn is not None and next_fn not in seen:
                seen.add(next_fn)
                stack.append((next_fn, iter(next_fn.next_functions)))
                break
        else:
            stack.pop()
            yield grad_fn


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Numbers by channel, some of them buffers: of no weight beside what grows with the batch.
_CHANNEL_STATISTICS = frozenset({"result1", "result2", "running_mean", "running_var"})
_RECURRENT = torch.ops.aten.mkldnn_rnn_layer.default  # a recurrent layer on a CPU


def _workspace_bytes(func: Any, args: Any) -> int:
    """What a recurrent layer keeps beside its results: asked of the real operation, with zeros."""
    with unset_fake_temporarily():
        real = tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), args)
        workspace: torch.Tensor | None = func(*real)[-1]
    return 0 if workspace is None else workspace.nbytes


def _read_saved(
    grad_fn: Any, kind: str, resting: set[int], storages: dict[int, int], workspace: int
) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """What a node keeps for backward, parameters and buffers left out: (storage, bytes, edges)."""
    wanted_for = _SAVED_FOR.get(kind, {})
    kept: list[tuple[int, int, tuple[int, ...]]] = []
    if workspace:
        kept.append((storages.setdefault(-grad_fn._sequence_nr(), len(storages)), workspace, ()))
    for name, tensor in _saved_tensors(grad_fn):
        key = _storage_key(tensor)
        if "BatchNorm" in kind and name in _CHANNEL_STATISTICS:
            continue
        if key not in resting:
            storage = storages.setdefault(key, len(storages))
            kept.append((storage, tensor.untyped_storage().nbytes(), wanted_for.get(name, ())))
    return tuple(kept)


def _saved_tensors(grad_fn: Any) -> Iterator[tuple[str, torch.Tensor]]:
    names = [name for name in dir(grad_fn) if name.startswith("_saved_")]
    for name in names or ["saved_tensors"]:  # the latter is what a Python autograd function has
        for leaf in tree_leaves(getattr(grad_fn, name, None)):
            if isinstance(leaf, torch.Tensor):
                yield name.removeprefix("_saved_"), leaf

"""What one real backward does: gradients, the modules it runs through, FLOPs. Knows no plan.

The second implementation that the plan is compared with. It shares nothing with the trace: which
module an autograd node belongs to is seen at the level of Python's calls into torch (not by
sequence numbers), which nodes run is told by hooks on the nodes themselves, and FLOPs are counted
on what really runs, by torch's own formulas, whose gaps are filled here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

Loss = Callable[[Any, Any], torch.Tensor]


def _convolution_backward(
    grad: Any, x: Any, weight: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any,
    transposed: bool, _output_padding: Any, _groups: Any, mask: Any, **_: Any,
) -> int:  # fmt: skip
    """Each of (input, weight) costs what the forward did, whatever the groups.

    torch's own formula passes shapes without groups to the forward's formula, which then counts
    the input's gradient of a grouped convolution wrongly (and says so nowhere).
    """
    forward = conv_flop_count(x.shape, weight.shape, grad.shape, transposed=transposed)
    return forward * (bool(mask[0]) + bool(mask[1]))


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Each head's own; torch's formula refuses, up to 2.11, keys that several heads share."""
    heads = q.shape[1]
    shapes = [(t.shape[0], heads, *t.shape[2:]) for t in (k, v)]
    return sdpa_flop_count(q.shape, *shapes)


def _lstm_flops(x: Any, w0: Any, w1: Any, *_: Any, **__: Any) -> int:
    """Two products a step, as mm's formula has them; torch has none for the fused CPU layer."""
    return 2 * x.shape[0] * x.shape[1] * (w0.numel() + w1.numel())


def _grouped_product(a: Any, b: Any, *_: Any, out_val: Any, **__: Any) -> int:
    """Each result is a sum over the width of `a`, split among the groups where `b` is flat too."""
    products = out_val.numel() * a.shape[-1]
    return 2 * products // (out_val.shape[0] if a.dim() == b.dim() == 2 else 1)


aten = torch.ops.aten
ATTENTIONS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention")
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten.convolution_backward: _convolution_backward,
    **{getattr(aten, f"_scaled_dot_product_{kind}"): _attention_flops for kind in ATTENTIONS},
    **{
        getattr(aten, f"_scaled_dot_product_{kind}_backward"): (
            lambda _grad, q, k, v, *_, **__: _attention_flops(q, k, v) * 5 // 2
        )
        for kind in ATTENTIONS
    },
    aten._grouped_mm: _grouped_product,
    aten.mkldnn_rnn_layer: _lstm_flops,
    aten.mkldnn_rnn_layer_backward: lambda *args, **__: 2 * _lstm_flops(*args),
}


@dataclass(frozen=True)
class Seen:
    """What a real forward and backward did.

    Attributes:
        reached: first names of the parameters that got a gradient.
        visited: paths of the modules one of whose operations backward ran, each module's first.
        saved_bytes: what forward kept for backward, without parameters, buffers, and statistics of
            a buffer's shape.
    """

    reached: frozenset[str]
    visited: frozenset[str]
    forward_flops: int
    backward_flops: int
    saved_bytes: int


def observe(
    model: nn.Module,
    example: Any,
    trains: set[str],
    loss: Loss | None = None,
    *,
    keeps: bool = True,
) -> Seen:
    """Run one step's forward and backward with just these parameters requiring a gradient.

    Args:
        keeps: look at what forward keeps. torch.func.grad refuses hooks that could.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = None
        parameter.requires_grad_(name in trains)
    torch.manual_seed(0)
    calls = _Calls(model)
    forward, backward, kept = _Counter(), _Counter(), _Kept(model)
    with calls:  # in backward too: what it recomputes makes nodes, and runs through them
        with forward, kept.hooks if keeps else contextlib.nullcontext():
            value = find_loss(call(model, example), example, loss)
        calls.finish(value)
        if value.requires_grad:
            with backward:
                run_backward(value)
    return Seen(
        frozenset(name for name, parameter in parameters.items() if parameter.grad is not None),
        frozenset(calls.visited),
        forward.flops,
        backward.flops,
        sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors.values()),
    )


def run_backward(value: torch.Tensor) -> None:
    """As `value.backward()`, inside which the mode would not be asked of what is recomputed."""
    engine = torch.autograd.Variable._execution_engine
    one = (torch.ones_like(value),)
    engine.run_backward(
        (value,), one, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Kept:
    """Which tensors forward saves, one of each storage; they are held, so that none is reused."""

    def __init__(self, model: nn.Module) -> None:
        resting = [*model.parameters(), *model.buffers()]
        self.resting = {tensor.untyped_storage().data_ptr() for tensor in resting}
        self.shapes = {buffer.shape for buffer in model.buffers() if buffer.dim() == 1}
        self.tensors: dict[int, torch.Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.resting and tensor.shape not in self.shapes:
            self.tensors[place] = tensor
        return tensor


class _Counter(TorchDispatchMode):
    """FLOPs of the operations that really run, by torch's formulas, its two gaps filled."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def find_loss(output: Any, example: Any, loss: Loss | None) -> torch.Tensor:
    """The contract's loss: the factory's, the output's, or the mean square of its first result."""
    if loss is not None:
        return loss(output, example)
    if isinstance(getattr(output, "loss", None), torch.Tensor):
        return output.loss
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            return getattr(output, name).float().square().mean()
    if dataclasses.is_dataclass(output):
        output = vars(output)
    floating = (t for t in tree_leaves(output) if torch.is_tensor(t) and t.is_floating_point())
    return next(floating).float().square().mean()


class _Calls(TorchFunctionMode):
    """Which module's call made each autograd node, seen from Python's calls into torch.

    A node belongs to the innermost module in whose call it is first seen. A call that reads a
    parameter outside its owners' calls (or a value made of parameters alone) belongs to the owners
    of the parameter too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.holders: dict[int, set[str]] = {}  # parameter → paths of the modules that own it
        for path, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), set()).add(path)
        # Tensors that come from parameters and buffers alone, kept alive, with those parameters.
        self.origins: dict[int, tuple[Any, frozenset[int]]] = {
            id(p): (p, frozenset([id(p)])) for p in model.parameters()
        }
        self.origins |= {id(buffer): (buffer, frozenset()) for buffer in model.buffers()}
        self.handles: list[RemovableHandle] = []
        self.open: list[nn.Module] = []
        self.owner: dict[Any, str | None] = {}
        self.readers: dict[Any, set[str]] = {}
        self.visited: set[str] = set()
        self.running: str | None = None  # the module whose node backward runs
        self.is_forward = True  # which may run a backward of its own

    def __enter__(self) -> _Calls:
        # What other hooks of a module do is inside its call; scripted ones take no hooks.
        for module in self.paths:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self.handles += (
                module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._claim((args, kwargs))  # what was made on the way here is the caller's
        self.open.append(module)

    def _leave(self, module: nn.Module, _args: Any, result: Any) -> None:
        if self.open and self.open[-1] is module:
            self._claim(result)
            self.open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._claim((args, kwargs))  # made since the last call, by one that no mode sees
        result = func(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        origins = frozenset().union(
            *(self.origins[id(t)][1] for t in read if id(t) in self.origins)
        )
        made = self._claim((result, args, kwargs))
        here = self._here()
        for parameter in origins:
            if here not in self.holders[parameter]:
                for node in made:
                    self.readers.setdefault(node, set()).update(self.holders[parameter])
        if read and all(self._is_known(t) for t in read):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and not self._is_known(leaf):
                    self.origins[id(leaf)] = (leaf, origins)
        return result

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.origins

    def _claim(self, tensors: Any) -> list[Any]:
        """Nodes below these tensors that nobody owns yet become the open module's."""
        here = self._here()
        leaves = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
        stack = [t.grad_fn for t in leaves if t.grad_fn is not None]
        made = []
        while stack:
            node = stack.pop()
            if node is None or node in self.owner or hasattr(node, "variable"):
                continue
            self.owner[node] = here
            node.register_prehook(partial(self._visit, node))
            made.append(node)
            stack += [below for below, _ in node.next_functions]
        return made

    def _here(self) -> str | None:
        return self.paths[self.open[-1]] if self.open else self.running

    def _visit(self, node: Any, gradients: tuple[Any, ...]) -> None:
        """Backward comes to a node. Where it brings no gradient there is nothing to do."""
        if self.is_forward or all(gradient is None for gradient in gradients):
            return
        self.running = self.owner[node]
        self.visited |= self.readers.get(node, set())
        if self.running is not None:
            self.visited.add(self.running)

    def finish(self, value: torch.Tensor) -> None:
        """What was made after the last call is nobody's. What runs from now on is backward."""
        self._claim(value)
        self.is_forward = False

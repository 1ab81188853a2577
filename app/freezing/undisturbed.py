"""Leaves a model as it was found, whatever its forward writes into it. Knows no graph."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from app.freezing.fakes import is_whole

_HELD_AT_MOST = 100_000  # containers; what lies deeper is no module's own state
_DICTS = (dict, OrderedDict, defaultdict)  # not what derives from them: some refuse to be changed
_NOT_ENTERED = (torch.Tensor, type, ModuleType, FunctionType, MethodType, torch.dtype)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, with_values: bool) -> Iterator[None]:
    """Everything trainable, in train mode, nothing dropped; all as it was afterwards.

    Args:
        with_values: put the values of floating parameters back too. A pass under fake tensors
            writes none; where `data` was replaced by a fake one it is put back anyway.
    """
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    places = [(p, p.data) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    attributes = _hold_attributes(model)
    dropped = [(m, name) for m in model.modules() for name in _depth_attributes(m)]
    tensors = [*model.buffers(), *(p for p in model.parameters() if with_values or is_whole(p))]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model.train()
            for parameter, _, _ in flags:
                parameter.requires_grad_(not is_whole(parameter))
            for module, name in dropped:
                setattr(module, name, 0.0)
            yield
        finally:
            for put_back in attributes:
                put_back()
            for parameter, data in places:
                if not _is_same(parameter.data, data):
                    parameter.data = data
            for parameter, flag, gradient in flags:
                parameter.requires_grad_(flag)
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for tensor, before in values:
                    tensor.copy_(before)


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or type(tensor) is not type(other):
        return type(tensor) is type(other)
    return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def _depth_attributes(module: nn.Module) -> list[str]:
    """Attributes by which whole layers are dropped at random while training."""
    names = ["layerdrop"]
    if type(module).__name__ in ("DropPath", "StochasticDepth"):
        names += ["drop_prob", "p"]
    return [name for name in names if isinstance(getattr(module, name, None), float)]


def _hold_attributes(model: nn.Module) -> list[Callable[[], None]]:
    """For every container that a module holds, what puts back its contents.

    A forward that keeps a table of positions or its last result would keep a fake one.
    """
    seen: set[int] = set()
    found: list[Callable[[], None]] = []
    stack: list[Any] = list(model.modules())
    while stack and len(found) < _HELD_AT_MOST:
        held = stack.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if type(held) in _DICTS:
            found.append(_hold_dict(held))
            stack += held.values()
        elif type(held) in (list, deque, set):
            found.append(_hold_items(held))
            stack += held
        elif isinstance(held, tuple):
            stack += held
        elif not isinstance(held, _NOT_ENTERED) and hasattr(held, "__dict__"):
            stack.append(vars(held))
    return found


def _hold_dict(held: dict[Any, Any]) -> Callable[[], None]:
    before = dict(held)

    def put_back() -> None:
        same = len(held) == len(before) and all(
            key in held and held[key] is value for key, value in before.items()
        )
        if not same:
            held.clear()
            held.update(before)

    return put_back


def _hold_items(held: list[Any] | deque[Any] | set[Any]) -> Callable[[], None]:
    before = list(held)

    def put_back() -> None:
        if len(held) == len(before) and all(a is b for a, b in zip(held, before, strict=True)):
            return
        held.clear()
        if isinstance(held, set):
            held.update(before)
        else:
            held.extend(before)

    return put_back

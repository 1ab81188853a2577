"""What a forward under fake tensors may know of values, and is told of others. Knows no graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Of what takes so much at most the trace knows the values: masks, positions, sizes of pictures.
_KNOWN_BYTES = 2**22
_MAKES_VALUES = {
    torch.ops.aten.arange,
    torch.ops.aten.eye,
    torch.ops.aten.full,
    torch.ops.aten.full_like,
    torch.ops.aten.new_full,
    torch.ops.aten.new_ones,
    torch.ops.aten.new_zeros,
    torch.ops.aten.ones,
    torch.ops.aten.ones_like,
    torch.ops.aten.zeros,
    torch.ops.aten.zeros_like,
}
_LIFTS = {torch.ops.aten.lift_fresh, torch.ops.aten.lift_fresh_copy}  # of what Python wrote down
_LEAVES_UNWRITTEN = {
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


@contextlib.contextmanager
def known_values(mode: Any) -> Iterator[None]:
    """Whole numbers of the example, and what follows from them alone, are known to the forward.

    So it can ask how many patches a picture has, or whether all of a mask is true. torch follows
    such values itself where they are single ones.
    """
    if not isinstance(mode, FakeTensorMode):
        yield
        return
    follows_singly = mode.may_turn_const

    def may_turn_const(tensor: Tensor) -> bool:
        return (type(tensor) is Tensor and _is_small(tensor)) or follows_singly(tensor)

    mode.may_turn_const = may_turn_const  # type: ignore[method-assign, assignment]
    try:
        with _Assume():
            yield
    finally:
        del mode.may_turn_const


def see_known(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """What operations see of a parameter or buffer; a single whole number stays known."""
    if isinstance(tensor, FakeTensor):
        return tensor
    is_known = _is_number(tensor) and not isinstance(tensor, torch.nn.Parameter)
    return mode.fake_tensor_converter.from_real_tensor(mode, tensor, make_constant=is_known)


def _is_number(tensor: Tensor) -> bool:
    return tensor.numel() == 1 and tensor.dtype == torch.int64 and tensor.device.type == "cpu"


def enter_known(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor in place of one of the example's; whole numbers stay known."""
    if isinstance(tensor, FakeTensor) or not (is_whole(tensor) and _is_small(tensor)):
        return mode.from_tensor(tensor)
    with unset_fake_temporarily():
        values = tensor.clone()  # a forward may write into it
    return mode.fake_tensor_converter.from_real_tensor(mode, values, make_constant=True)


def is_whole(tensor: Tensor) -> bool:
    """Whether its numbers are whole ones, or truths: of those a forward looks at values."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_small(tensor: Tensor) -> bool:
    """By its storage: an expanded tensor takes no more than what it was expanded from."""
    is_plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return is_plain and tensor.untyped_storage().nbytes() <= _KNOWN_BYTES


class _Assume(TorchFunctionMode):
    """Numbers that nobody knows are taken to be finite, and what is not yet written to be zeros."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ASKS_FINITE and args and getattr(args[0], "constant", None) is None:
            return torch.full((), _ASKS_FINITE[func], device=args[0].device).expand(args[0].shape)
        if func is torch.empty and "memory_format" not in (kwargs or {}):
            func = torch.zeros
        return func(*args, **(kwargs or {}))


_ASKS_FINITE = {
    torch.isfinite: True, Tensor.isfinite: True, torch.isinf: False,
    Tensor.isinf: False, torch.isnan: False, Tensor.isnan: False,
}  # fmt: skip


def run_operation(func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """An operation's result, with what is known of its values, and the tensors that it read."""
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    result = _run(func, *_keep_from_writing(func, args, kwargs))
    if func.namespace == "prim":  # a question in the middle of an operation
        return result, []
    _forget_unwritten(func, read, result)
    return _know_made(func, args, kwargs, result), read


def _keep_from_writing(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The same arguments, fake where a real weight would be written.

    torch runs `mul_` of a real tensor and a number for real, even under fake tensors.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode is None or not func._schema.is_mutable:
        return args, kwargs

    def keep(tensor: Tensor) -> Tensor:
        is_fake = isinstance(tensor, FakeTensor)
        return tensor if is_fake or is_whole(tensor) else mode.from_tensor(tensor)

    return tree_map_only(Tensor, keep, (args, kwargs))


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operation's result; of a fake product of groups where torch knows only bfloat16's."""
    if func is _GROUPED and isinstance(args[0], FakeTensor) and args[0].device.type == "cpu":
        wide = args[0].dtype
        half = tree_map_only(
            Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, (args, kwargs)
        )
        return func(*half[0], **half[1]).to(wide)
    return func(*args, **kwargs)


_GROUPED = torch.ops.aten._grouped_mm.default


def _forget_unwritten(func: Any, given: list[Tensor], result: Any) -> None:
    """A result is known only where all that it was made of is.

    torch makes the result of an operation of known and unknown tensors by `new_empty` on a known
    one, and takes what lay in that memory for its values.
    """
    if func._overloadpacket in _LIFTS:
        return
    is_written = func._overloadpacket not in _LEAVES_UNWRITTEN
    if is_written and all(getattr(t, "constant", None) is not None or _is_number(t) for t in given):
        return
    for leaf in tree_leaves(result):
        if isinstance(leaf, FakeTensor) and leaf.constant is not None:
            leaf.fake_mode.fake_tensor_converter.invalidate_constant_aliases(leaf.constant)


def _know_made(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    """The fake result of an operation that needs no values to make its numbers, known."""
    if not isinstance(result, FakeTensor) or not _is_small(result):
        return result
    mode = result.fake_mode
    if func._overloadpacket is torch.ops.aten.rand and result.numel() == 1:
        # A draw by which a layer is dropped: as far from that as can be.
        with unset_fake_temporarily():
            values = torch.full(result.shape, 1 - 2**-24, dtype=result.dtype)
        return mode.fake_tensor_converter.from_real_tensor(mode, values, make_constant=True)
    if func._overloadpacket not in _MAKES_VALUES or result.constant is not None:
        return result
    with unset_fake_temporarily():
        shaped = tree_map_only(
            Tensor, lambda t: torch.empty((), dtype=t.dtype).expand(t.shape), (args, kwargs)
        )
        values = func(*shaped[0], **shaped[1])
    return mode.fake_tensor_converter.from_real_tensor(mode, values, make_constant=True)

"""Kernels: has a forward on a CPU take the operations that it takes on a GPU. Knows no graph.

A GPU's dropout keeps a mask of one byte an element, where a CPU's keeps numbers as wide as the
values; its attention keeps no matrix of weights where it drops some, where a CPU's does; and under
autocast it takes norms, softmax and losses in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION, _DROPOUT = F.scaled_dot_product_attention, F.dropout


@contextlib.contextmanager
def kernels_of(kind: str) -> Iterator[None]:
    """Have forwards keep what they would on a GPU; nothing changes for a CPU.

    Side effects: on the whole process while it lasts, so one at a time. A function that is imported
    by name meanwhile stays the one of a GPU.
    """
    if kind == "cpu":
        yield
        return
    # Replaced, not intercepted by a mode: a mode does not see what such functions call of each
    # other, like dropout in multi-head attention.
    before = {name: getattr(F, name) for name in _TAKEN}
    vars(F).update(_TAKEN)
    try:
        yield
    finally:
        vars(F).update(before)


def _drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, train=True)[0]
    return _DROPOUT(input, p, training, inplace)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the fused kernel of a CPU where a GPU has one too, which keeps a seed of what it drops.

    A CPU's drops nothing, so nothing is dropped. A GPU has none for other than four dimensions, for
    float64, nor, up to torch 2.11 at least, for groups of queries in float32.
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    is_narrow = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_narrow else query.dtype
    is_wide = dtype == torch.float64 or (enable_gqa and dtype == torch.float32)
    if query.dim() == 4 and not is_wide:
        return ATTENTION(query, key, value, attn_mask, 0.0, is_causal, **options)
    plainly = torch.ops.aten._scaled_dot_product_attention_math
    result: Tensor = plainly(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
    return result


def _widen(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In float32 under autocast, as on a GPU; a CPU's leaves these to the type that comes."""

    @wraps(function)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        if torch.is_autocast_enabled("cpu"):
            input = input.float()  # noqa: A001
        return function(input, *args, **kwargs)

    return run


_WIDE = (
    *("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"),
    *("cross_entropy", "binary_cross_entropy_with_logits", "kl_div"),
)
_TAKEN: dict[str, Callable[..., Tensor]] = {
    "dropout": _drop,
    "scaled_dot_product_attention": _attend,
    **{name: _widen(getattr(F, name)) for name in _WIDE},
}

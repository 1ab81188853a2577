"""Kernels: has a forward on a CPU take the operations that it takes on a GPU. Knows no graph.

A GPU's dropout keeps a mask of one byte an element, where a CPU's keeps numbers as wide as the
values; its attention keeps no matrix of weights where it drops some, where a CPU's does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION, _DROPOUT = F.scaled_dot_product_attention, F.dropout


@contextlib.contextmanager
def kernels_of(kind: str) -> Iterator[None]:
    """Forwards run as they do on a CPU (nothing changes), or with what a GPU would keep."""
    if kind == "cpu":
        yield
        return
    # Replaced, not intercepted by a mode: a mode does not see what such functions call of each
    # other, like dropout in multi-head attention.
    F.dropout, F.scaled_dot_product_attention = _drop, _attend
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = _DROPOUT, ATTENTION


def _drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, train=True)[0]
    return _DROPOUT(input, p, training, inplace)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """With nothing dropped, which the fused kernel of a CPU cannot; a GPU's keeps its seed."""
    return ATTENTION(query, key, value, attn_mask, 0.0, *args, **kwargs)

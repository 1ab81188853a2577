"""What operations cost in FLOPs, forward and backward. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _rnn_flops(x: torch.Tensor, weights: Iterable[torch.Tensor]) -> int:
    """One product a step with each matrix; x is (steps, batch, features) either way round."""
    steps = x.numel() // x.shape[-1]
    return 2 * steps * sum(w.numel() for w in weights if w.dim() == 2)


def _attention_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Two products for each head of the query, whatever groups of them share a key and a value."""
    rows = query.numel() // query.shape[-1]
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(_: torch.Tensor, *given: Any, **__: Any) -> int:
    return _attention_flops(*given) * 5 // 2


_ATTENTIONS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention")
# What torch's registry has no formula for, or in 2.11 one that knows no groups of queries: fused
# attention, grouped products, fused RNN layers.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{
        getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{way}"): formula
        for kind in _ATTENTIONS
        for way, formula in (("", _attention_flops), ("_backward", _attention_backward_flops))
    },
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: (
        2 * a.numel() * b.shape[-1] // (a.shape[0] if a.dim() > b.dim() else 1)
    ),
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *weights, **__: _rnn_flops(x, weights[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _rnn_flops(x, weights),
}
# For matrix products and convolutions: which edges cost as much as the forward when they are live.
COSTLY_EDGES = {
    "AddmmBackward0": (1, 2),
    "MmBackward0": (0, 1),
    "BmmBackward0": (0, 1),
    "BaddbmmBackward0": (1, 2),
    "ConvolutionBackward0": (0, 1),
    "GroupedMmBackward0": (0, 1),
}
# Nodes whose backward multiplies matrices though their forward does so out of sight, or not at all.
_HIDDEN_PRODUCTS = ("Linalg", "Cholesky", "Addbmm", "AffineGrid", "ConvolutionBackwardBackward")


def flops_of(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """Of one operation; 0 for all that are no products."""
    formula = _FLOPS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def whole_node_flops(kind: str, flops: int) -> int:
    """Attention's backward is five products to the forward's two; anything else two to one."""
    return flops * 5 // 2 if "ScaledDotProduct" in kind else flops * 2


def is_hidden_product(kind: str) -> bool:
    """Whether only running a node tells what its backward costs."""
    return kind.startswith(_HIDDEN_PRODUCTS)


class Counter(TorchDispatchMode):
    """FLOPs of whatever runs."""

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, result)
        return result

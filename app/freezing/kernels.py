"""Kernels: has a forward on a CPU take the operations that it takes on a GPU. Knows no graph.

A GPU's dropout keeps a mask of one byte an element, where a CPU's keeps numbers as wide as the
values; its attention keeps no matrix of weights where it drops some, where a CPU's does; and its
autocast widens other operations. They are replaced where torch looks its operations up, so that it
does not matter who calls them, and by what name.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import fallthrough_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_FLASH, _FLASH_BACKWARD = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward,
)
_EFFICIENT, _EFFICIENT_BACKWARD = (
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
)
_RECURRENT = "mkldnn_rnn_layer"  # stands for cuDNN's, which autocast narrows too
_HALF = (torch.bfloat16, torch.float16)
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def kernels_of(kind: str) -> Iterator[None]:
    """Have forwards keep what they would on a GPU; nothing changes for a CPU.

    Side effects: on the whole process while it lasts, so others wait for its end.
    """
    if kind == "cpu":
        yield
        return
    with _ONE_AT_A_TIME, torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are replaced
            library.impl("dropout", _drop, "AutogradCPU")
            library.impl("scaled_dot_product_attention", _attend, "AutogradCPU")
            for name, kernel in _autocast_kernels().items():
                library.impl(name, kernel, "AutocastCPU")
        yield


def _plainly(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch does where nothing is replaced, made of other operations."""
    return operation._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _drop(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002
    if train and 0 < p < 1 and input.numel():
        return torch.native_dropout(input, p, train=True)[0]
    result: Tensor = _plainly(aten.dropout.default, input, p, train)
    return result


# --------------------------------------------------------------------------------------- attention


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the kernel that a GPU takes: itself under fake tensors, else by a CPU's in its place.

    That of a CPU drops nothing, so nothing is dropped.
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    kernel = _choose_kernel(query, key, value, attn_mask, is_causal, enable_gqa)
    attn_mask = _as_numbers(attn_mask, query.dtype)
    result: Tensor
    if kernel is None:
        result, _ = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )
    elif not any(isinstance(tensor, FakeTensor) for tensor in (query, key, value)):
        plain = aten.scaled_dot_product_attention.default
        result = _plainly(plain, query, key, value, attn_mask, 0.0, is_causal, **options)
    elif kernel is _FLASH:
        result = _attend_in_eights(query, key, value, dropout_p, is_causal, scale)
    else:
        bias = None if attn_mask is None else _as_bias(attn_mask, query, key)
        keeps_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        result, *_ = kernel(query, key, value, bias, keeps_sums, dropout_p, is_causal, scale=scale)
    return result


def _choose_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> Any:
    """The fused kernel that torch takes on a GPU of compute capability 8.0 or more, if any does.

    That Hopper takes cuDNN's own for two bytes a number is not followed: it keeps the same.
    """
    given = query, key, value
    if any(t.dim() != 4 or t.stride(-1) != 1 or 0 in t.shape for t in given):
        return None
    if mask is not None and mask.stride(-1) != 1:
        return None
    if len({t.shape[0] for t in given}) > 1 or query.dtype not in (torch.float32, *_HALF):
        return None
    heads, *shared = (t.shape[1] for t in given)
    is_grouped = set(shared) != {heads}
    if is_grouped and (not enable_gqa or len(set(shared)) > 1):
        return None
    widths = {t.shape[-1] for t in given}
    is_half, is_square = query.dtype in _HALF, query.shape[-2] == key.shape[-2]
    is_plain = mask is None and (is_square or not is_causal)
    is_flash = is_half and is_plain and len(widths) == 1 and max(widths) <= 256
    if is_flash and torch.backends.cuda.flash_sdp_enabled():
        return _FLASH
    is_even = not any(width % (8 if is_half else 4) for width in widths) and not is_grouped
    return _EFFICIENT if is_even and torch.backends.cuda.mem_efficient_sdp_enabled() else None


def _as_numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    never = torch.full((), -torch.inf, dtype=dtype)
    return torch.where(mask, torch.zeros((), dtype=dtype), never)


def _attend_in_eights(
    query: Tensor, key: Tensor, value: Tensor, p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Flash attention, which takes heads whose width is a multiple of eight: others are padded."""
    width = query.shape[-1]
    if width % 8:
        query, key, value = (F.pad(t, (0, -width % 8)) for t in (query, key, value))
    scale = width**-0.5 if scale is None else scale
    result: Tensor = _FLASH(query, key, value, p, is_causal, False, scale=scale)[0]
    return result[..., :width] if width % 8 else result


def _as_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the kernel takes it: its rows eight numbers apart, or a multiple."""
    if any(stride % 8 for stride in mask.stride()[:-1]):
        width = mask.shape[-1]
        mask = F.pad(mask, (0, 8 - width % 8))[..., :width]
    return mask.expand(*query.shape[:-1], key.shape[-2])


def workspace_bytes(func: Any, args: Any) -> int:
    """What an operation of a GPU makes for itself while it runs; 0 for those that make little."""
    kind = func._overloadpacket
    if kind is _EFFICIENT and args[0].dtype in _HALF and args[2].shape[-1] > 128:
        return 4 * args[0].shape[:-1].numel() * args[2].shape[-1]  # its results in float32
    if kind not in (_FLASH_BACKWARD, _EFFICIENT_BACKWARD):
        return 0
    _, query, key = args[:3]
    batch, heads, rows, width = query.shape
    if kind is _EFFICIENT_BACKWARD:  # the gradient of the query in tiles, and a number a row
        tile = 64 if width <= 64 else 128
        return 4 * batch * heads * (_round_up(rows, tile) * _round_up(width, 64) + rows)
    padded = _round_up(width, 32 if width <= 128 else 64)
    size = 4 * batch * heads * _round_up(rows, 128) * (padded + 1)
    if heads != key.shape[1]:  # gradients of keys and values for every head, summed at the end
        size += 2 * batch * heads * key.shape[-2] * width * key.itemsize
    return size


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to


# ---------------------------------------------------------------------------------------- autocast

# What a GPU's autocast takes in the narrow type, in the widest that comes, in float32, and with
# float32 for its sums, where a CPU's does otherwise. Of what is made of other operations, like
# einsum or a cell of an LSTM, those are narrowed, with the copies of weights that autocast keeps.
_NARROW = ("addmv", "addr", "convolution", "mv")
_WIDEST = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put"),
    *("scatter_add", "tensordot", "vdot"),
)
_WIDE = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "pdist"),
    *("pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "renorm", "rsqrt"),
    *("cosine_similarity", "dist", "logsumexp", "sinh", "softplus", "tan"),
    *("group_norm", "layer_norm", "native_layer_norm", "rms_norm"),
    *("frobenius_norm.dim", "norm.Scalar", "norm.ScalarOpt_dim", "nuclear_norm"),
    *("nuclear_norm.dim", "upsample_linear1d", "upsample_trilinear3d"),
    *(f"upsample_{kind}2d" for kind in ("bicubic", "bilinear")),
    *(f"_upsample_{kind}2d_aa" for kind in ("bicubic", "bilinear")),
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
)
_SUMS = (
    *("cumprod", "cumsum", "linalg_matrix_norm", "linalg_matrix_norm.str_ord"),
    *("linalg_vector_norm", "log_softmax.int", "prod", "prod.dim_int", "softmax.int", "sum"),
    "sum.dim_IntList",
)


@cache
def _autocast_kernels() -> dict[str, Any]:
    """Operation → what a CPU's autocast is to do with it, as far as this torch knows it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    on = {
        kind: {
            name.removeprefix("aten::")
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("aten::") and has(name, f"Autocast{kind}")
        }
        for kind in ("CPU", "CUDA")
    }
    alone = (n for n in on["CPU"] - on["CUDA"] if n != _RECURRENT and not n.startswith("fft_"))
    kernels: dict[str, Any] = dict.fromkeys(alone, fallthrough_kernel)
    makers = ((_NARROW, _narrowed), (_WIDEST, _promoted), (_WIDE, _widened), (_SUMS, _summed))
    for names, make in makers:
        for name in on["CUDA"].intersection(names):
            packet, _, overload = name.partition(".")
            kernels[name] = make(getattr(getattr(aten, packet), overload or "default"))
    return kernels


def _cast(operation: Any, choose: Callable[[list[torch.dtype]], torch.dtype]) -> Callable[..., Any]:
    """The operation with its numbers in the type that is chosen by theirs; float64 stays."""

    def is_cast(leaf: Any) -> bool:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return is_number and leaf.dtype is not torch.float64

    def run(*args: Any, **kwargs: Any) -> Any:
        dtypes = [leaf.dtype for leaf in tree_leaves((args, kwargs)) if is_cast(leaf)]
        to = choose(dtypes) if dtypes else torch.float32
        args, kwargs = tree_map_only(
            Tensor, lambda tensor: tensor.to(to) if is_cast(tensor) else tensor, (args, kwargs)
        )
        with torch.autocast("cpu", enabled=False):
            return operation(*args, **kwargs)

    return run


def _narrowed(operation: Any) -> Callable[..., Any]:
    return _cast(operation, lambda _: torch.get_autocast_dtype("cpu"))


def _promoted(operation: Any) -> Callable[..., Any]:
    return _cast(operation, partial(reduce, torch.promote_types))


def _widened(operation: Any) -> Callable[..., Any]:
    return _cast(operation, lambda _: torch.float32)


def _summed(operation: Any) -> Callable[..., Any]:
    place = [argument.name for argument in operation._schema.arguments].index("dtype")

    def run(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("dtype", args[place] if len(args) > place else None)
        if given is None and args[0].dtype in _HALF:
            given = torch.float32
        with torch.autocast("cpu", enabled=False):
            return operation(*args[:place], **kwargs, dtype=given)

    return run

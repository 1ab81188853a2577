"""Refuses, in a trace, to look up a row that is not there, as a real run does. Knows no graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class RefuseMissingRows(TorchFunctionMode):
    """Under fake tensors a lookup has a shape whatever it looks for; known numbers are checked.

    A text that is longer than a table of positions is refused by its last position alone. To be
    entered around `trace_model`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = _LOOKUPS.get(func)
        if read is not None:
            _check_rows(*read(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _read_embedding(input: Any, weight: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:  # noqa: A002
    return input, weight, 0


def _read_gather(table: Any, dim: Any, index: Any, **_: Any) -> tuple[Any, Any, Any]:
    return index, table, dim


def _read_item(table: Any, place: Any) -> tuple[Any, Any, Any]:
    return place, table, 0


_LOOKUPS: dict[Any, Any] = {
    functional.embedding: _read_embedding,
    torch.gather: _read_gather,
    torch.Tensor.gather: _read_gather,
    torch.index_select: _read_gather,
    torch.Tensor.index_select: _read_gather,
    torch.Tensor.__getitem__: _read_item,
}


def _check_rows(numbers: Any, table: Any, dim: Any) -> None:
    """Raise where a number that the trace knows names no row of the table."""
    known = getattr(numbers, "constant", None)
    if known is None or known.dtype not in (torch.int64, torch.int32) or not known.numel():
        return
    rows = table.shape[dim]
    with unset_fake_temporarily():
        highest = int(known.max())
    if highest >= rows:
        raise IndexError(f"row {highest:,} is looked up in a table of {rows:,}")

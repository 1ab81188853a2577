"""Held: the most bytes that tensors hold at once while a step is taken. Knows no plan."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measure_peak(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    take_step: Callable[[], object],
    given: Sequence[torch.Tensor] = (),
) -> int:
    """The most bytes held at once in the second of two steps.

    Weights, buffers, gradients and the optimizer's state are among them. On a GPU it is the most
    that torch allocated there, cuBLAS's workspaces included, less what others had there before;
    elsewhere what the results of operations hold, which leaves out what an operation makes for
    itself alone.

    Args:
        take_step: one whole step; it takes two.
        given: what else is held all the while, like a batch.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        take_step()
        with _see_resting(model, optimizer, given, device) as held:
            take_step()
        return held.peak
    gc.collect()  # what somebody lets go meanwhile would be taken off the step's
    torch._C._cuda_clearCublasWorkspaces()
    resting = _see_resting(model, optimizer, given, device).now
    beside = torch.cuda.memory_allocated(device) - resting
    take_step()
    torch.cuda.reset_peak_memory_stats(device)
    take_step()
    return torch.cuda.max_memory_allocated(device) - beside


def _see_resting(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Sequence[torch.Tensor],
    device: torch.device,
) -> _Held:
    """What is held between two steps."""
    held = _Held(device)
    held.add(*model.parameters(), *model.buffers(), *given)
    held.add(*(p.grad for p in model.parameters()))
    held.add(*tree_leaves(list(optimizer.state.values())))
    return held


class _Held(TorchDispatchMode):
    """Counts the bytes of a device's storages that are alive, each once, from making to end."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def add(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and value.device == self._device:
                storage = value.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(*tree_leaves(result))
        return result

"""Gradient norms, update magnitudes and weight norms of every layer. Knows no loop and no store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from app.freezing.graph import ModelGraph


@dataclass(frozen=True)
class LayerStats:
    """One step's measures, one value a layer in the order of `LayerMeasure.layers`.

    `grad_norm` is None where no gradient was computed; `update_norm` is exactly 0.0 where the
    optimizer changed nothing.
    """

    step: int
    grad_norm: list[float | None]
    update_norm: list[float | None]
    weight_norm: list[float | None]


class LayerMeasure:
    """Measures each layer around one optimizer step.

    `read_gradients` in every step; `copy_weights`, the step, `read_updates` in those that are told.

    All norms are L2 in float32 or wider, whatever the weights are in; a layer's is the root of the
    sum of the squares of its own parameters' norms. The update is the real change, w_after −
    w_before, from a copy. A parameter without a gradient is not touched by any torch optimizer, so
    its update is zero without looking, and its weight norm is taken anew only when the set of those
    with a gradient has changed.
    """

    def __init__(self, graph: ModelGraph, parameters: Mapping[str, nn.Parameter]) -> None:
        self.layers = [layer.path for layer in graph.layers]
        self._names = [name for name in parameters if graph.by_name[name].floating]
        self._parameters = [parameters[name] for name in self._names]
        position = {name: index for index, name in enumerate(self._names)}
        self._pairs = [
            (row, position[graph.canonical_names[name]])
            for row, layer in enumerate(graph.layers)
            for name in layer.parameters
            if graph.canonical_names[name] in position
        ]
        self._device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._rows = self._index(row for row, _ in self._pairs)
        self._columns = self._index(column for _, column in self._pairs)
        self._copies: dict[int, torch.Tensor] = {}
        self._weight_norms: torch.Tensor | None = None
        self._weights_of: list[int] = []  # those that had a gradient when weight norms were taken
        self._grad_peak = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        self._had_gradient: set[int] = set()

    @torch.no_grad()
    def read_gradients(self, frozen: Mapping[str, bool]) -> torch.Tensor:
        """Take every gradient's norm: after unscaling and accumulation, before clipping.

        Returns:
            The total norm over what is not frozen, a float64 scalar on the device.
        """
        self._active = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        gradients = [g for i in self._active if (g := self._parameters[i].grad) is not None]
        self._grad_norms = self._scatter(self._norms(gradients))
        self._had_gradient.update(self._active)
        torch.maximum(self._grad_peak, self._grad_norms, out=self._grad_peak)
        counted = self._index(i for i in self._active if not frozen[self._names[i]])
        return torch.linalg.vector_norm(self._grad_norms[counted])

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copy what the optimizer's step is about to change."""
        for i in self._active:
            if i not in self._copies:
                self._copies[i] = torch.empty_like(self._parameters[i])
        if self._active:
            copies = [self._copies[i] for i in self._active]
            torch._foreach_copy_(copies, [self._parameters[i] for i in self._active])

    @torch.no_grad()
    def read_updates(self, step: int) -> LayerStats:
        """Take the change that the step made and the norms after it; one copy to the host."""
        moved: list[torch.Tensor] = [self._parameters[i] for i in self._active]
        changes: Sequence[torch.Tensor] = ()
        if moved:
            changes = torch._foreach_sub(moved, [self._copies[i] for i in self._active])
        updates = self._scatter(self._norms(changes))
        if self._weight_norms is None or self._active != self._weights_of:
            self._weight_norms = self._norms(self._parameters)
            self._weights_of = self._active
        elif moved:
            self._weight_norms[self._active] = self._norms(moved)
        norms = (self._grad_norms, updates, self._weight_norms)
        grad, update, weight = torch.stack([self._by_layer(v) for v in norms]).tolist()
        active = set(self._active)
        with_gradient = {row for row, column in self._pairs if column in active}
        return LayerStats(
            step,
            [value if row in with_gradient else None for row, value in enumerate(grad)],
            list(update),
            list(weight),
        )

    def gradient_history(self) -> dict[str, float | None]:
        """Name of each parameter → its largest gradient norm so far, None where it had none."""
        peaks = self._grad_peak.tolist()
        return {
            name: peaks[i] if i in self._had_gradient else None
            for i, name in enumerate(self._names)
        }

    def resume(self, history: Mapping[str, float | None]) -> None:
        """Go on from an earlier attempt's `gradient_history`."""
        for i, name in enumerate(self._names):
            peak = history.get(name)
            if peak is not None:
                self._had_gradient.add(i)
                self._grad_peak[i] = peak

    def _index(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self._device)

    def _scatter(self, norms: torch.Tensor) -> torch.Tensor:
        values = torch.zeros_like(self._grad_peak)
        if self._active:
            values[self._active] = norms
        return values

    def _by_layer(self, norms: torch.Tensor) -> torch.Tensor:
        """Norms of tensors to norms of layers. Squares in float64 cannot overflow."""
        squares = torch.zeros(len(self.layers), dtype=torch.float64, device=norms.device)
        squares.index_add_(0, self._rows, norms[self._columns].square())
        return squares.sqrt()

    def _norms(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """L2 norms of tensors as float64, accumulated in float32 where they are no wider."""
        values = torch.zeros(len(tensors), dtype=torch.float64, device=self._device)
        for width in (torch.float32, torch.float64):
            chosen = [i for i, t in enumerate(tensors) if (_width(t) == width)]
            if chosen:
                plain = [_as_real(tensors[i]) for i in chosen]
                values[chosen] = torch.stack(torch._foreach_norm(plain, 2, dtype=width)).double()
        return values


def _width(tensor: torch.Tensor) -> torch.dtype:
    wide = tensor.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    """The stored numbers of a sparse or complex tensor, whose norm is that of the tensor."""
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor

"""Gradient norms, update magnitudes and weight norms of every layer. Knows no loop and no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Measures each layer around one optimizer step: `before_step`, the step, `after_step`.

    All norms are L2 in float32 or wider, whatever the weights are in; a layer's is the root of the
    sum of the squares of its own parameters' norms. The update is the real change, w_after −
    w_before, from a copy. A parameter without a gradient is not touched by any torch optimizer, so
    its update is zero without looking, and its weight norm is taken once, in the first step.
    """

    def __init__(self, graph: ModelGraph, parameters: Mapping[str, nn.Parameter]) -> None:
        self.layers = [layer.path for layer in graph.layers]
        names = [name for name, p in parameters.items() if p.is_floating_point()]
        self._parameters = [parameters[name] for name in names]
        position = {name: index for index, name in enumerate(names)}
        pairs = [
            (row, position[graph.canonical_names[name]])
            for row, layer in enumerate(graph.layers)
            for name in layer.parameters
            if graph.canonical_names[name] in position
        ]
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._rows = torch.tensor([row for row, _ in pairs], dtype=torch.long, device=device)
        self._columns = torch.tensor(
            [column for _, column in pairs], dtype=torch.long, device=device
        )
        self._pairs = pairs
        self.names = names
        self._copies: list[torch.Tensor] = [torch.empty(0)] * len(names)
        self._weight_norms: torch.Tensor | None = None
        self._grad_peak = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._had_gradient: set[int] = set()

    @torch.no_grad()
    def before_step(self) -> torch.Tensor:
        """Take gradient norms and copy what is about to change.

        Call after unscaling and accumulation and before clipping.

        Returns:
            The gradient norm of each parameter of `names`, zero where it has none; float64, on the
            device.
        """
        self._active = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        gradients = [g for i in self._active if (g := self._parameters[i].grad) is not None]
        self._grad_norms = self._scatter(_norms(gradients))
        self._had_gradient.update(self._active)
        torch.maximum(self._grad_peak, self._grad_norms, out=self._grad_peak)
        for i in self._active:
            if self._copies[i].shape != self._parameters[i].shape or not self._copies[i].numel():
                self._copies[i] = torch.empty_like(self._parameters[i])
        copies = [self._copies[i] for i in self._active]
        if copies:
            torch._foreach_copy_(copies, [self._parameters[i] for i in self._active])
        return self._grad_norms

    @torch.no_grad()
    def after_step(self, step: int) -> LayerStats:
        """Take the change that the step made and the norms after it; one copy to the host."""
        moved: list[torch.Tensor] = [self._parameters[i] for i in self._active]
        copies = [self._copies[i] for i in self._active]
        changes: Sequence[torch.Tensor] = torch._foreach_sub(moved, copies) if moved else ()
        updates = self._scatter(_norms(changes))
        if self._weight_norms is None:
            self._weight_norms = _norms(self._parameters)
        elif moved:
            self._weight_norms[self._active] = _norms(moved)
        values = torch.stack(
            [self._by_layer(v) for v in (self._grad_norms, updates, self._weight_norms)]
        )
        grad, update, weight = values.tolist()
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
            name: peaks[i] if i in self._had_gradient else None for i, name in enumerate(self.names)
        }

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


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norms of tensors, as float64 on their device; accumulated in float32 for 16 bits."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    tensors = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)).double()

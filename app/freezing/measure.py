"""Gradient norms, update magnitudes and weight norms of every layer. Knows no loop and no store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from app.freezing.graph import ModelGraph
from app.freezing.layout import Layout, as_real, count_numbers, is_large, width_of
from app.freezing.ledger import Ledger, open_ledger

# The exact pass looks at no more elements at a time, because it needs a copy of them.
EXACT_ELEMENTS = 2**26
EXACT_EVERY = 100


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


@dataclass(frozen=True)
class Inspection:
    """What an exact pass found beside the measures.

    Attributes:
        estimate_error: the largest relative error that any estimate of this step would have had,
            where it was compared; None where nothing is estimated.
        unreached: for each layer, whether one of its parameters is trainable and none got a
            gradient.
        lost: for each layer, of the elements looked at that had a gradient, the share that kept
            its value bit for bit: the update was rounded away. None where there were none.
        lost_share: the same for the model.
    """

    step: int
    estimate_error: float | None
    unreached: list[bool]
    lost: list[float | None]
    lost_share: float | None


class LayerMeasure:
    """Measures each layer around one optimizer step.

    `read_gradients` in every step; `before_update`, the step, `after_update` in those that are to
    be measured.

    All norms are L2 in float32 or wider, whatever the weights are in; a layer's is the root of the
    sum of the squares of its own parameters' norms. The update is the real change, w_after −
    w_before. Of a large tensor it is estimated from a fixed sample, which its shape alone decides
    (`Layout`); an exact pass looks at all of it. A parameter without a gradient is not touched by
    any torch optimizer, so its update is zero without looking.

    Args:
        is_exact: make every pass an exact one, at the price of a copy of everything that trains.
    """

    def __init__(
        self,
        graph: ModelGraph,
        parameters: Mapping[str, nn.Parameter],
        *,
        is_exact: bool = False,
        exact_elements: int = EXACT_ELEMENTS,
    ) -> None:
        self.layers = [layer.path for layer in graph.layers]
        self._names = [name for name in parameters if graph.by_name[name].floating]
        self._parameters = [parameters[name] for name in self._names]
        self._narrow = all(width_of(p) == torch.float32 for p in self._parameters)
        position = {name: index for index, name in enumerate(self._names)}
        self._pairs = [
            (row, position[graph.canonical_names[name]])
            for row, layer in enumerate(graph.layers)
            for name in layer.parameters
            if graph.canonical_names[name] in position
        ]
        self._rows = np.array([row for row, _ in self._pairs], dtype=np.int64)
        self._columns = np.array([column for _, column in self._pairs], dtype=np.int64)
        self._device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._is_exact = is_exact
        self._chunks = _chunk(self._parameters, exact_elements)
        self._copies: list[tuple[int, torch.Tensor]] = []
        self._unread: list[tuple[int, Ledger, torch.Tensor]] = []
        self.inspection: Inspection | None = None
        self._grad_peak = torch.zeros(
            len(self._names),
            dtype=torch.float32 if self._narrow else torch.float64,
            device=self._device,
        )
        self._had_gradient: set[int] = set()
        self._active: list[int] = []  # those with a gradient, and which of them are not frozen
        self._counted: list[int] = []
        self._active_index = self._counted_index = self._index(())
        self._layout: Layout | None = None
        self._places: list[int] = []

    @property
    def estimated(self) -> list[bool]:
        """For each layer, whether its update norm is an estimate between two exact passes."""
        large = {i for i, p in enumerate(self._parameters) if is_large(p)}
        rows = {row for row, column in self._pairs if column in large and not self._is_exact}
        return [row in rows for row in range(len(self.layers))]

    @torch.no_grad()
    def read_gradients(self, frozen: Mapping[str, bool]) -> torch.Tensor:
        """Take every gradient's norm: after unscaling and accumulation, before clipping.

        Returns:
            The total norm over what is not frozen, a float64 scalar on the device.
        """
        self._frozen = frozen
        gradients = [parameter.grad for parameter in self._parameters]
        active = [i for i, gradient in enumerate(gradients) if gradient is not None]
        counted = [i for i in active if not frozen[self._names[i]]]
        if active != self._active or counted != self._counted:
            self._layout = self._layout if active == self._active else None
            self._active, self._counted = active, counted
            self._active_index = self._index(active)
            which = set(counted)
            self._counted_index = self._index(p for p, i in enumerate(active) if i in which)
            self._had_gradient.update(active)
        norms = self._norms([gradient for gradient in gradients if gradient is not None])
        self._grad_norms = norms
        if len(active) == len(gradients):
            torch.maximum(self._grad_peak, norms, out=self._grad_peak)
        else:
            peaks = torch.maximum(self._grad_peak[self._active_index], norms)
            self._grad_peak[self._active_index] = peaks
        of = norms if active == counted else norms[self._counted_index]
        return torch.linalg.vector_norm(of, dtype=torch.float64)

    @torch.no_grad()
    def before_update(self, turn: int) -> None:
        """Look at what the optimizer's step is about to change.

        Args:
            turn: counts the measured steps from 1; it decides alone which of them take an exact
                pass (the first of every `EXACT_EVERY`), and over which part of a large model.
        """
        passes, rest = divmod(turn - 1, EXACT_EVERY)
        self._inspects = rest == 0
        layout = self._lay_out()
        layout.keep()
        if self._inspects:
            self._gradients = layout.fill(self._gradient_like(i) for i in self._active)
        chunk = self._chunks[passes % len(self._chunks)] if self._inspects and self._chunks else ()
        self._copies = [
            (part, self._parameters[self._active[part]].clone())
            for part in layout.large
            if self._is_exact or self._active[part] in chunk
        ]

    @torch.no_grad()
    def after_update(self, step: int) -> list[LayerStats]:
        """Measure the change that the step made and the weights after it.

        Returns:
            What is on the host by now: on a CPU this step, else the measured step before it, since
            waiting for the device would hold it up. `finish` waits for the rest.
        """
        layout, ledger = self._layout, self._ledger
        assert layout is not None
        blocks = layout.compare()
        large = self._norms([self._parameters[self._active[part]] for part in layout.large])
        values = [self._grad_norms, large, blocks]
        if self._copies:
            whole = self._norms([self._parameters[self._active[p]] - c for p, c in self._copies])
            ledger = ledger.with_whole_changes([p for p, _ in self._copies], sum(map(len, values)))
            values.append(whole)
        self._unread.append((step, ledger, _send_home(torch.cat(values))))
        waits = self._inspects or self._device.type == "cpu"
        told = self.finish() if waits else [_tell(*one) for one in self._unread[:-1]]
        self._unread = self._unread[-1:] * (not waits)
        self.inspection = self._inspect(step, values[-1]) if self._inspects else None
        self._copies = []
        return told

    @torch.no_grad()
    def tell_gradients(self, step: int) -> LayerStats:
        """The gradient norms alone, for whoever wants no more; it waits for them."""
        squares, had = np.zeros((2, len(self._names)))
        had[self._active] = 1.0
        with np.errstate(over="ignore"):
            squares[self._active] = self._grad_norms.double().cpu().numpy() ** 2
        told = np.sqrt(self._by_layer(squares)).tolist()
        reached = self._by_layer(had) > 0
        gradients = [norm if has else None for norm, has in zip(told, reached, strict=True)]
        nothing: list[float | None] = [None] * len(self.layers)
        return LayerStats(step, gradients, nothing, list(nothing))

    def finish(self) -> list[LayerStats]:
        """Wait for the measures that are still on the device."""
        if self._unread and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ready, self._unread = self._unread, []
        return [_tell(*one) for one in ready]

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

    def _lay_out(self) -> Layout:
        """The layout of what has a gradient; a new one where that has changed, or has moved."""
        tensors = [self._parameters[i] for i in self._active]
        places = [tensor.data_ptr() for tensor in tensors]
        if self._layout is None or places != self._places:
            self._layout, self._places = Layout(tensors, self._device), places
            self._ledger = self._open_ledger(self._layout)
        return self._layout

    def _open_ledger(self, layout: Layout) -> Ledger:
        owners: dict[int, list[int]] = {i: [] for i in self._active}
        resting = []
        for row, column in self._pairs:
            if column in owners:
                owners[column].append(row)
            else:
                resting.append((row, self._parameters[column]))
        norms = _send_home(self._norms([parameter for _, parameter in resting]))
        at_rest = [row for row, _ in resting], norms
        return open_ledger(layout, list(owners.values()), len(self.layers), at_rest)

    def _gradient_like(self, index: int) -> torch.Tensor:
        """A parameter's gradient, in memory in the order of the parameter."""
        parameter = self._parameters[index]
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        return torch.empty_like(parameter).copy_(gradient)

    def _inspect(self, step: int, whole: torch.Tensor) -> Inspection:
        layout = self._layout
        assert layout is not None
        error = None
        if self._copies and not self._is_exact:
            exact = whole.cpu().numpy()
            estimates = layout.estimate()[[part for part, _ in self._copies]]
            error = float((np.abs(estimates - exact) / np.where(exact > 0, exact, 1.0)).max())
        had = self._gradients != 0
        counts = np.zeros((2, len(self._names)))
        for row, is_so in enumerate((had, had & (layout.change == 0))):
            counts[row, self._active] = layout.count(is_so)
        total, lost = counts.sum(1).tolist()
        active = set(self._active)
        without = {
            r for r, c in self._pairs if c not in active and not self._frozen[self._names[c]]
        }
        reached = {r for r, c in self._pairs if c in active}
        return Inspection(
            step,
            error,
            [row in without - reached for row in range(len(self.layers))],
            [
                float(stayed / all_) if all_ else None
                for all_, stayed in zip(*map(self._by_layer, counts), strict=True)
            ],
            lost / total if total else None,
        )

    def _index(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self._device)

    def _by_layer(self, values: np.ndarray) -> np.ndarray:
        """What tensors have, added up for each layer."""
        return np.bincount(self._rows, values[self._columns], minlength=len(self.layers))

    def _norms(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """L2 norms of tensors, in float32 where none is wider; in float64 else."""
        if tensors and self._narrow and not any(t.is_sparse for t in tensors):
            return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
        values = torch.zeros(len(tensors), dtype=self._grad_peak.dtype, device=self._device)
        for width in (torch.float32, torch.float64):
            chosen = [i for i, t in enumerate(tensors) if width_of(t) == width]
            if chosen:
                plain = [as_real(tensors[i]) for i in chosen]
                norms = torch.stack(torch._foreach_norm(plain, 2, dtype=width))
                values[chosen] = norms.to(values.dtype)
        return values


def _tell(step: int, ledger: Ledger, values: torch.Tensor) -> LayerStats:
    gradients, updates, weights = ledger.read(values.numpy())
    return LayerStats(step, gradients, updates, weights)


def _send_home(values: torch.Tensor) -> torch.Tensor:
    """The values on the host; from a device they arrive later, and nothing waits for them."""
    if values.device.type != "cuda":
        return values.cpu()
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return home.copy_(values, non_blocking=True)


def _chunk(tensors: Sequence[torch.Tensor], most: int) -> list[frozenset[int]]:
    """Indices of large tensors in groups of at most `most` numbers, or of a single one."""
    groups: list[list[int]] = []
    room = 0
    for index, tensor in enumerate(tensors):
        if not is_large(tensor):
            continue
        size = count_numbers(tensor)
        if size > room or not groups:
            groups.append([])
            room = most
        groups[-1].append(index)
        room -= size
    return [frozenset(group) for group in groups]

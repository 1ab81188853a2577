"""Gradient norms, update magnitudes and weight norms of every layer. Knows no loop and no store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from app.freezing.graph import ModelGraph

# Of a tensor of more than SAMPLE elements the update is estimated from as many of them: RUNS runs
# of neighbours in memory, at even distances. Scattered ones cost ten times as much to gather.
SAMPLE, RUNS = 4096, 256
# The exact pass looks at no more elements at a time, because it needs a copy of them.
EXACT_ELEMENTS = 2**26
EXACT_EVERY = 100
# What is looked at lies in blocks of so many numbers, each of one tensor: their sums of squares
# take one operation, where one for each tensor costs more than all the numbers.
BLOCK = 256


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
    w_before. Of a tensor of more than `SAMPLE` elements it is estimated from a fixed sample, which
    its shape alone decides; an exact pass looks at all of it. A parameter without a gradient is
    not touched by any torch optimizer, so its update is zero without looking.

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
        self._is_exact = is_exact
        self._chunks = _chunk([_count(p) for p in self._parameters], exact_elements)
        self._copies: dict[int, torch.Tensor] = {}
        self._laid_out: list[tuple[int, int]] = []
        self._unread: list[tuple[int, set[int], torch.Tensor]] = []
        self.inspection: Inspection | None = None
        self._grad_peak = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        self._had_gradient: set[int] = set()
        self._active: list[int] = []  # those with a gradient, and which of them are not frozen
        self._counted: list[int] = []
        self._active_index = self._counted_index = self._index(())
        self._weight_norms: torch.Tensor | None = None
        self._weights_of: list[int] = []  # those that had a gradient when weight norms were taken

    @property
    def estimated(self) -> list[bool]:
        """For each layer, whether its update norm is an estimate between two exact passes."""
        large = {i for i, p in enumerate(self._parameters) if _is_large(p)}
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
            self._active, self._counted = active, counted
            self._active_index, self._counted_index = self._index(active), self._index(counted)
            self._had_gradient.update(active)
        norms = self._norms([gradient for gradient in gradients if gradient is not None])
        self._grad_norms = self._scatter(norms)
        torch.maximum(self._grad_peak, self._grad_norms, out=self._grad_peak)
        of = norms if active == counted else self._grad_norms[self._counted_index]
        return torch.linalg.vector_norm(of)

    @torch.no_grad()
    def before_update(self, turn: int) -> None:
        """Look at what the optimizer's step is about to change.

        Args:
            turn: counts the measured steps from 1; it decides alone which of them take an exact
                pass (the first of every `EXACT_EVERY`), and over which part of a large model.
        """
        self._layout()
        torch._foreach_copy_(self._before_parts, self._seen)
        passes, rest = divmod(turn - 1, EXACT_EVERY)
        self._inspects = rest == 0
        self._copies = {}
        if self._inspects:
            chunk = self._chunks[passes % len(self._chunks)] if self._chunks else ()
            self._gradients = torch.zeros_like(self._before)
            for i, part in zip(self._active, self._split(self._gradients), strict=True):
                part.copy_(_sample(self._gradient_like(i)).reshape(part.shape))
        if self._inspects or self._is_exact:
            self._copies = {
                i: self._parameters[i].clone()
                for i in self._active
                if _is_large(self._parameters[i]) and (self._is_exact or i in chunk)
            }

    @torch.no_grad()
    def after_update(self, step: int) -> list[LayerStats]:
        """Measure the change that the step made and the weights after it.

        Returns:
            What is on the host by now: on a CPU this step, else the measured step before it, since
            waiting for the device would hold it up. `finish` waits for the rest.
        """
        torch._foreach_copy_(self._after_parts, self._seen)
        torch.sub(self._after, self._before, out=self._change)
        changes, wholes = self._part_norms()
        updates = estimates = self._scatter(changes * self._scale)
        if self._copies:
            updates = estimates.clone()
            changed = torch._foreach_sub(
                [self._parameters[i] for i in self._copies], list(self._copies.values())
            )
            updates[list(self._copies)] = self._norms(list(changed))
        if self._weight_norms is None or self._active != self._weights_of:
            self._weight_norms = self._norms(self._parameters)
            self._weights_of = self._active
        wholes[self._large_index] = self._norms(self._large)
        self._weight_norms[self._active_index] = wholes
        self.inspection = self._inspect(step, estimates, updates) if self._inspects else None
        self._copies = {}
        values = self._by_layer(torch.stack([self._grad_norms, updates, self._weight_norms]))
        ready, self._unread = self._unread, [(step, self._reached, _send_home(values))]
        return self.finish() if self._device.type == "cpu" else [_tell(*one) for one in ready]

    @torch.no_grad()
    def tell_gradients(self, step: int) -> LayerStats:
        """The gradient norms alone, for whoever wants no more; it waits for them."""
        active, nothing = set(self._active), [None] * len(self.layers)
        reached = {row for row, column in self._pairs if column in active}
        norms = self._by_layer(self._grad_norms).tolist()
        told = [norm if row in reached else None for row, norm in enumerate(norms)]
        return LayerStats(step, told, list(nothing), list(nothing))

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

    def _layout(self) -> None:
        """Room for what is looked at: of each tensor with a gradient all, or a sample of it."""
        tensors = [self._parameters[i] for i in self._active]
        places = [(i, t.data_ptr()) for i, t in zip(self._active, tensors, strict=True)]
        if places == self._laid_out:
            return
        self._laid_out = places
        active = set(self._active)
        self._reached = {row for row, column in self._pairs if column in active}
        self._seen = [_sample(tensor) for tensor in tensors]
        lengths = [seen.numel() for seen in self._seen]
        owners = [part for part, n in enumerate(lengths) for _ in range(_count_blocks(n))]
        self._owners = self._index(owners)
        wide = any(_width(tensor) == torch.float64 for tensor in tensors)
        width = torch.float64 if wide else torch.float32
        rooms = torch.zeros(3, len(owners) * BLOCK, dtype=width, device=self._device)
        self._before, self._change, self._after = rooms
        self._summed = rooms[1:].view(2, -1, BLOCK)
        self._before_parts, self._after_parts = map(self._split, (self._before, self._after))
        self._stands_for = torch.tensor(
            [_count(t) / max(1, n) for t, n in zip(tensors, lengths, strict=True)],
            dtype=torch.float64,
            device=self._device,
        )
        self._scale = self._stands_for.sqrt()
        large = [part for part, t in enumerate(tensors) if _is_large(t)]
        self._large_index, self._large = self._index(large), [tensors[part] for part in large]

    def _split(self, room: torch.Tensor) -> list[torch.Tensor]:
        """A part for each tensor that is looked at; the rest of its last block stays zero."""
        parts, start = [], 0
        for seen in self._seen:
            parts.append(room[start : start + seen.numel()].view(seen.shape))
            start += _count_blocks(seen.numel()) * BLOCK
        return parts

    def _part_norms(self) -> torch.Tensor:
        """Norms of the changes, and of the weights after them, over what is looked at of each."""
        squares = torch.linalg.vector_norm(self._summed, dim=2).double().square_()
        sums = torch.zeros(2, len(self._seen), dtype=torch.float64, device=self._device)
        return sums.index_add_(1, self._owners, squares).sqrt_()

    def _gradient_like(self, index: int) -> torch.Tensor:
        """A parameter's gradient, in memory in the order of the parameter."""
        parameter = self._parameters[index]
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        return torch.empty_like(parameter).copy_(gradient)

    def _inspect(self, step: int, estimates: torch.Tensor, updates: torch.Tensor) -> Inspection:
        compared = list(self._copies)
        error = None
        if compared and not self._is_exact:
            exact = updates[compared]
            errors = (estimates[compared] - exact).abs() / exact.where(exact > 0, 1.0)
            error = errors.max().item()
        had = self._gradients != 0
        stayed = had & (self._after == self._before)
        counts = torch.zeros(2, len(self._names), dtype=torch.float64, device=self._device)
        for which, seen in enumerate((had, stayed)):
            sums = [part.sum() for part in self._split(seen)]
            if sums:
                counts[which, self._active] = torch.stack(sums).double() * self._stands_for
        total, lost = counts.sum(1).tolist()
        by_layer = torch.zeros(2, len(self.layers), dtype=torch.float64, device=self._device)
        by_layer.index_add_(1, self._rows, counts[:, self._columns])
        active = set(self._active)
        without = {
            r for r, c in self._pairs if c not in active and not self._frozen[self._names[c]]
        }
        reached = {r for r, c in self._pairs if c in active}
        return Inspection(
            step,
            error,
            [row in without - reached for row in range(len(self.layers))],
            [stay / all_ if all_ else None for all_, stay in zip(*by_layer.tolist(), strict=True)],
            lost / total if total else None,
        )

    def _index(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self._device)

    def _scatter(self, norms: torch.Tensor) -> torch.Tensor:
        if len(norms) == len(self._names):
            return norms
        return torch.zeros_like(self._grad_peak).index_copy_(0, self._active_index, norms)

    def _by_layer(self, norms: torch.Tensor) -> torch.Tensor:
        """Norms of tensors to norms of layers. Squares in float64 cannot overflow."""
        shape = (*norms.shape[:-1], len(self.layers))
        squares = torch.zeros(shape, dtype=torch.float64, device=norms.device)
        squares.index_add_(-1, self._rows, norms[..., self._columns].square())
        return squares.sqrt()

    def _norms(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """L2 norms of tensors as float64, accumulated in float32 where they are no wider."""
        if tensors and all(t.dtype in _NARROW and not t.is_sparse for t in tensors):
            return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).double()
        values = torch.zeros(len(tensors), dtype=torch.float64, device=self._device)
        for width in (torch.float32, torch.float64):
            chosen = [i for i, t in enumerate(tensors) if (_width(t) == width)]
            if chosen:
                plain = [_as_real(tensors[i]) for i in chosen]
                values[chosen] = torch.stack(torch._foreach_norm(plain, 2, dtype=width)).double()
        return values


def _tell(step: int, reached: set[int], values: torch.Tensor) -> LayerStats:
    grad, update, weight = values.tolist()
    return LayerStats(
        step, [v if row in reached else None for row, v in enumerate(grad)], update, weight
    )


def _send_home(values: torch.Tensor) -> torch.Tensor:
    """The values on the host; from a device they arrive later, and nothing waits for them."""
    if values.device.type != "cuda":
        return values.cpu()
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return home.copy_(values, non_blocking=True)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of all numbers of a tensor, or of runs of them in memory, by its shape alone."""
    tensor = _as_real(tensor.detach())
    outer_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if not tensor.permute(outer_first).is_contiguous():
        return tensor  # with gaps or overlaps, as no module makes one: all of it
    count = tensor.numel()
    if count <= SAMPLE:
        return tensor.as_strided((count,), (1,), tensor.storage_offset())
    run = SAMPLE // RUNS
    distance = (count - run) // (RUNS - 1)
    row = math.prod(tensor.shape[1:])
    # Runs in each row at the same place would see the same few inputs only.
    while distance > 1 and math.gcd(distance, row) > 1:
        distance -= 1
    return tensor.as_strided((RUNS, run), (distance, 1), tensor.storage_offset())


def _chunk(sizes: Sequence[int], most: int) -> list[frozenset[int]]:
    """Indices of large tensors in groups of at most `most` elements, or of a single one."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if size <= SAMPLE:
            continue
        if size > room or not groups:
            groups.append([])
            room = most
        groups[-1].append(index)
        room -= size
    return [frozenset(group) for group in groups]


def _count(tensor: torch.Tensor) -> int:
    """How many numbers; a complex one is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _count_blocks(length: int) -> int:
    return -(-length // BLOCK)


def _is_large(tensor: torch.Tensor) -> bool:
    return _count(tensor) > SAMPLE


_NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _width(tensor: torch.Tensor) -> torch.dtype:
    wide = tensor.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    """The stored numbers of a sparse or complex tensor, whose norm is that of the tensor."""
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor

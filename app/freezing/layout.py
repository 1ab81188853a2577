"""Layout: which numbers of tensors are looked at around a step, whose they are. Knows no step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

# Of a tensor of more than SAMPLE elements the update is estimated from as many of them: RUNS runs
# of neighbours in memory, at even distances. Scattered ones cost ten times as much to gather.
SAMPLE, RUNS = 4096, 256
# What is looked at lies in blocks of so many numbers, each of one tensor: their sums of squares
# take one operation, where one for each tensor costs more than all the numbers.
BLOCK = 256


class Layout:
    """One room for what is looked at of some tensors: all of each, or a sample of it.

    Args:
        tensors: on one device, in the order in which their norms are told.

    Attributes:
        seen: the numbers as `compare` saw them last; the rest of each tensor's last block is zero.
        change: by how much they differed from what `keep` kept.
        stands_for: for each tensor, how many of its numbers each one that is looked at stands for.
        large: which tensors are sampled.
        tensor_of_block: whose numbers each block of a room has.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._views = [_sample(tensor) for tensor in tensors]
        lengths = [view.numel() for view in self._views]
        blocks = [-(-length // BLOCK) for length in lengths]
        self.tensor_of_block = np.repeat(np.arange(len(blocks)), blocks)
        wide = any(width_of(tensor) == torch.float64 for tensor in tensors)
        self._rooms = torch.zeros(
            2, sum(blocks) * BLOCK, dtype=torch.float64 if wide else torch.float32, device=device
        )
        self.seen, self.change = self._rooms
        self._starts = [BLOCK * start for start in np.cumsum([0, *blocks])]
        self._parts, self._kept = self.split(self.seen), self.split(self.change)
        self.stands_for = np.array(
            [count_numbers(t) / max(1, n) for t, n in zip(tensors, lengths, strict=True)]
        )
        self.large = [part for part, tensor in enumerate(tensors) if is_large(tensor)]

    def keep(self) -> None:
        """Keep what the tensors hold now, for `compare`."""
        torch._foreach_copy_(self._kept, self._views)

    def compare(self) -> torch.Tensor:
        """See what they hold now, and how it differs from what was kept.

        Returns:
            Norms of the blocks of `seen`, then of `change`, on the device.
        """
        torch._foreach_copy_(self._parts, self._views)
        torch.sub(self.seen, self.change, out=self.change)
        return torch.linalg.vector_norm(self._rooms.view(-1, BLOCK), dim=1)

    def estimate(self) -> np.ndarray:
        """Norms of each tensor's change, by what is looked at; it waits for them."""
        blocks = torch.linalg.vector_norm(self.change.view(-1, BLOCK), dim=1).double().cpu().numpy()
        sums = np.bincount(self.tensor_of_block, blocks**2, minlength=len(self._views))
        return np.sqrt(sums * self.stands_for)

    def split(self, room: torch.Tensor) -> list[torch.Tensor]:
        """The part of a room that each tensor has, in the shape in which it is looked at."""
        return [
            room[start : start + view.numel()].view(view.shape)
            for start, view in zip(self._starts, self._views, strict=False)
        ]

    def fill(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """A room of what other tensors, in memory in the same order, hold where we look."""
        room = torch.zeros_like(self.seen)
        for part, gradient in zip(self.split(room), gradients, strict=True):
            part.copy_(_sample(gradient).reshape(part.shape))
        return room

    def count(self, is_so: torch.Tensor) -> np.ndarray:
        """Of how many numbers of each tensor something is so, by those that are looked at."""
        blocks = is_so.view(-1, BLOCK).sum(1).cpu().numpy()
        counts = np.bincount(self.tensor_of_block, blocks, minlength=len(self._views))
        return counts * self.stands_for


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of all numbers of a tensor, or of runs of them in memory, by its shape alone."""
    tensor = as_real(tensor.detach())
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


def count_numbers(tensor: torch.Tensor) -> int:
    """How many numbers; a complex one is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def is_large(tensor: torch.Tensor) -> bool:
    """Whether it is looked at by a sample."""
    return count_numbers(tensor) > SAMPLE


def width_of(tensor: torch.Tensor) -> torch.dtype:
    """In what its norms are taken."""
    wide = tensor.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """The stored numbers of a sparse or complex tensor, whose norm is that of the tensor."""
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor

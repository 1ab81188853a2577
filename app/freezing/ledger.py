"""Ledger: which layer's which norm each number that measuring sends home is part of. No model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from app.freezing.layout import Layout

GRADIENT, UPDATE, WEIGHT = range(3)


@dataclass(frozen=True, eq=False)
class Ledger:
    """Norms of tensors and of blocks of them to norms of layers, by one sum of squares.

    Attributes:
        layers: how many there are.
        reached: for each layer, whether one of its parameters has a gradient.
        place, tensor, norm, row, factor: columns of one table. The number at `place`, of `tensor`,
            is part of the `norm` (`GRADIENT`, …) of the layer `row`, and its square counts `factor`
            times.
        resting: rows and norms of weights that have no gradient; from a device they arrive late.
    """

    layers: int
    reached: tuple[bool, ...]
    place: np.ndarray
    tensor: np.ndarray
    norm: np.ndarray
    row: np.ndarray
    factor: np.ndarray
    resting: tuple[Sequence[int], torch.Tensor]

    def read(self, values: np.ndarray) -> tuple[list[float | None], ...]:
        """Each layer's norms of gradient (None where none came), update and weight."""
        with np.errstate(over="ignore"):  # it is then infinite, and told as that
            squares = values[self.place].astype(np.float64) ** 2 * self.factor
        sums = np.bincount(self._bin, squares, minlength=3 * self.layers) + self._at_rest
        gradient, update, weight = np.sqrt(sums).reshape(3, self.layers).tolist()
        told = [g if had else None for g, had in zip(gradient, self.reached, strict=True)]
        return told, update, weight

    def with_whole_changes(self, tensors: Sequence[int], first: int) -> Ledger:
        """The same, with the changes of some tensors taken as a whole: norms from `first` on."""
        is_part = (self.norm == UPDATE) & np.isin(self.tensor, tensors)
        owned = self.norm == GRADIENT  # one line for each owner of a tensor
        lines = [line for t in tensors for line in np.flatnonzero(owned & (self.tensor == t))]
        place = first + np.array([tensors.index(t) for t in self.tensor[lines]], dtype=np.int64)

        def put(column: np.ndarray, added: np.ndarray | float) -> np.ndarray:
            return np.concatenate([column[~is_part], np.broadcast_to(added, len(lines))])

        return replace(
            self,
            place=put(self.place, place),
            tensor=put(self.tensor, self.tensor[lines]),
            norm=put(self.norm, UPDATE),
            row=put(self.row, self.row[lines]),
            factor=put(self.factor, 1.0),
        )

    @cached_property
    def _bin(self) -> np.ndarray:
        return self.norm * self.layers + self.row

    @cached_property
    def _at_rest(self) -> np.ndarray:
        rows, norms = self.resting
        at = WEIGHT * self.layers + np.array(rows, dtype=np.int64)
        with np.errstate(over="ignore"):
            return np.bincount(at, norms.double().numpy() ** 2, minlength=3 * self.layers)


def open_ledger(
    layout: Layout,
    owners: Sequence[Sequence[int]],
    layers: int,
    resting: tuple[Sequence[int], torch.Tensor],
) -> Ledger:
    """The ledger of one layout.

    Args:
        owners: for each of its tensors the layers that own it; several, where it is tied.
        resting: as the ledger's.

    Returns:
        The ledger of these numbers one after the other: the norm of each tensor's gradient, of each
        large tensor, and what `Layout.compare` gives.
    """
    every = np.arange(len(owners))
    large = np.array(layout.large, dtype=np.int64)
    blocks = layout.tensor_of_block
    is_small = np.isin(blocks, large, invert=True)
    tensor = np.concatenate([every, large, blocks, blocks])
    norm = np.repeat(
        [GRADIENT, WEIGHT, WEIGHT, UPDATE], [*map(len, (every, large, blocks, blocks))]
    )
    ones = np.ones(len(every) + len(large))
    factor = np.concatenate([ones, is_small, layout.stands_for[blocks]])
    place = np.flatnonzero(factor)
    columns = [(place[:0], place[:0])]
    for turn in range(max(map(len, owners), default=0)):  # a tied one is a line for each owner
        row_of = np.array([rows[turn] if turn < len(rows) else -1 for rows in owners])
        lines = place[row_of[tensor[place]] >= 0]
        columns.append((lines, row_of[tensor[lines]]))
    place, row = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Ledger(
        layers=layers,
        reached=tuple((np.bincount(row, minlength=layers) > 0).tolist()),
        place=place,
        tensor=tensor[place],
        norm=norm[place],
        row=row,
        factor=factor[place],
        resting=resting,
    )

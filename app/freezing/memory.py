"""Memory: what a step makes and lets go, in its order, and the most that it holds. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from operator import add, mul
from typing import Any, NamedTuple


class Change(NamedTuple):
    """Bytes that some operations on end add and let go.

    Attributes:
        on: on what it hangs: in backward the node that must be live, in forward the storage that a
            node may go on keeping when nothing else does; -1 for nothing.
        is_scaled: whether it grows with the batch.
        net: what is added in the end.
        high: the most that is added meanwhile.
    """

    on: int
    is_scaled: bool
    net: int
    high: int


@dataclass(frozen=True)
class Memory:
    """What one step makes and lets go, beside weights and the optimizer's state.

    Attributes:
        forward: where `on` is a storage, so many bytes are let go by all but the nodes that save
            them.
        backward: node → changes while it runs, in the order in which nodes ran, everything
            trainable. What nodes saved is not among them.
    """

    forward: tuple[Change, ...]
    backward: tuple[tuple[int, tuple[Change, ...]], ...]

    @property
    def fixed(self) -> frozenset[int]:
        """Storages that nodes save and that do not grow with the batch."""
        return frozenset(c.on for c in self.forward if c.on >= 0 and not c.is_scaled)

    def to_document(self) -> dict[str, Any]:
        return {
            "forward": [list(change) for change in self.forward],
            "backward": [[node, [list(c) for c in changes]] for node, changes in self.backward],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Memory:
        return cls(
            tuple(Change(*change) for change in document["forward"]),
            tuple(
                (node, tuple(Change(*change) for change in changes))
                for node, changes in document["backward"]
            ),
        )


class Timeline:
    """A `Memory` at one batch size, ready to be asked for the peak of any freeze set.

    Args:
        wires: of each node.
        kept: storage → (wire on which nodes keep it, bytes).
        last: node → storages that no node needs after it has run.
        scale: of all that grows with the batch, against the traced one.
    """

    def __init__(
        self,
        memory: Memory,
        wires: Sequence[int],
        kept: Mapping[int, tuple[int, int]],
        last: Mapping[int, Sequence[int]],
        scale: float,
    ) -> None:
        def size(change: Change) -> tuple[int, int]:
            return (
                (round(change.net * scale), round(change.high * scale))
                if change.is_scaled
                else (change.net, change.high)
            )

        self._saved_on: list[int] = []
        self._saved_bytes: list[int] = []
        self._highs = [0]  # of what is held whatever is trained, after each of those
        held = 0
        stays: dict[int, int] = {}  # storage → bytes that nothing but nodes keeps
        for change in memory.forward:
            net, high = size(change)
            if change.on < 0:
                self._highs[-1] = max(self._highs[-1], held + high)
                held += net
            else:
                held -= net
                if change.on in kept:
                    stays[change.on] = net
                    self._saved_on.append(kept[change.on][0])
                    self._saved_bytes.append(net)
                    self._highs.append(held)
        self._held = held
        events: list[tuple[int, int, int]] = []
        for node, changes in memory.backward:
            events += [(wires[c.on] if c.on >= 0 else -1, *size(c)) for c in changes]
            events += [(kept[s][0], -stays[s], 0) for s in last.get(node, ()) if s in stays]
        self._on, self._nets, self._backward_highs = map(list, zip(*_merge(events), strict=True))

    def peak_bytes(self, live: Sequence[bool]) -> int:
        """The most that is held at once.

        Args:
            live: for each wire; one more at the end, for what hangs on none.
        """
        kept = map(mul, self._saved_bytes, map(live.__getitem__, self._saved_on))
        levels = list(accumulate(kept, initial=0))
        runs = list(map(live.__getitem__, self._on))
        before = accumulate(compress(self._nets, runs), initial=self._held + levels[-1])
        highest = max(map(add, before, compress(self._backward_highs, runs)), default=0)
        return max(highest, *map(add, self._highs, levels))


def _merge(events: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Runs of (wire, net, high) on one wire as one each."""
    merged = [(-1, 0, 0)]
    for on, net, high in events:
        last_on, last_net, last_high = merged[-1]
        if on == last_on:
            merged[-1] = on, last_net + net, max(last_high, last_net + high)
        else:
            merged.append((on, net, high))
    return merged

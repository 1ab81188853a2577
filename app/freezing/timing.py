"""Timing: a calibration read back, and the step time that it predicts. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from app.freezing.graph import ModelGraph, is_gpu

FORMAT = 1


@dataclass(frozen=True)
class _Batch:
    """What was timed at one batch size, in milliseconds."""

    batch_size: int
    wires: Sequence[float]
    forward: Sequence[float]
    backward_ms: float
    optimizers: Mapping[str, Sequence[float]]


@dataclass(frozen=True, eq=False)
class Timing:
    """How long the parts of a model's step take on one machine.

    Attributes:
        graph: what was timed; a plan for a GPU is made of another.
        device: as torch names it.
        threads: how many it was timed with.
        timed_sizes: sequence length and image size of the example that it was timed on.
    """

    graph: ModelGraph
    device: str
    threads: int
    batches: tuple[_Batch, ...]
    timed_sizes: tuple[int | None, int | None] = (None, None)

    def describe(self) -> dict[str, Any]:
        """On what it was timed, as a plan shows it."""
        sizes = [batch.batch_size for batch in self.batches]
        return {"device": self.device, "threads": self.threads, "batch_sizes": sizes}

    def predict_ms(
        self,
        near: Sequence[int],
        stepped: Sequence[bool],
        optimizer: str,
        batch_size: int,
    ) -> float:
        """Milliseconds of one step: forward, backward and the optimizer's.

        In between and beyond the batch sizes that were timed, along a straight line.

        Args:
            near: `Walk.nearest` of what gets a gradient, of the graph that was timed.
            stepped: for every parameter whether the optimizer moves it.
        """
        few, many = self.batches
        first = self._at(few, near, stepped, optimizer)
        second = self._at(many, near, stepped, optimizer)
        share = (batch_size - few.batch_size) / (many.batch_size - few.batch_size)
        return max(0.1 * first, first + max(0.0, second - first) * share)

    def _at(
        self,
        batch: _Batch,
        near: Sequence[int],
        stepped: Sequence[bool],
        optimizer: str,
    ) -> float:
        walk = self.graph.walk
        backward = walk.sum_live(batch.wires, near)
        once, by_node, by_backward = batch.forward
        forward = once + by_node * walk.sum_live(walk.node_count, near) + by_backward * backward
        sizes = [size for size in compress(walk.reached_bytes, stepped) if size]
        if not sizes:
            return forward
        once, by_tensor, by_byte = batch.optimizers[optimizer]
        update = once + by_tensor * len(sizes) + by_byte * sum(sizes)
        return forward + batch.backward_ms + backward + update


def read_timing(document: Mapping[str, Any], graph: ModelGraph) -> Timing | None:
    """What `calibrate_model` wrote; None where it is of another format or another graph.

    Args:
        graph: of the model; what was timed, where it is another, stands in the document.
    """
    if document.get("format") != FORMAT or document.get("fingerprint") != graph.fingerprint:
        return None
    timed = ModelGraph.from_document(document["graph"]) if "graph" in document else graph
    if timed.is_for_gpu != is_gpu(document["device"]):
        return None
    if any(len(batch["nodes"]) != len(timed.nodes) for batch in document["batches"]):
        return None
    return Timing(
        timed,
        document["device"],
        document["threads"],
        tuple(
            _Batch(
                batch["batch_size"],
                timed.walk.spread(batch["nodes"]),
                batch["forward"],
                batch["backward_ms"],
                batch["optimizers"],
            )
            for batch in document["batches"]
        ),
        (graph.sequence_length, graph.image_size),
    )

"""What a run says of itself as it begins: device, sizes, warnings. Knows no step."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from app.freezing.config import FreezeConfig, rule_document, unmatched_rules
from app.freezing.graph import ModelGraph
from app.sources.datasets import Data
from app.training.recipe import Recipe


def describe_start(
    data: Data,
    recipe: Recipe,
    device: torch.device,
    layers: list[str],
    *,
    total_steps: int = 0,
    step: int = 0,
    resumed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The payload of ``start``.

    Args:
        resumed: what became of a checkpoint's optimizer state; None where none was read.
    """
    warnings = []
    name, size = "CPU", None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        size = torch.cuda.get_device_properties(device).total_memory
    elif recipe.device == "auto":
        warnings.append("No CUDA device was found: device 'auto' fell back to the CPU.")
    return {
        "layers": layers,
        "total_steps": total_steps,
        "step": step,
        "resumed": resumed,
        "device": str(device),
        "device_name": name,
        "device_bytes": size,
        "train_size": len(data.train),
        "warnings": warnings,
    }


def unmatched_words(config: FreezeConfig, graph: ModelGraph) -> list[str]:
    """A warning for each rule that matches nothing."""
    return [
        f"Rule {index + 1} matches no parameter of this model: "
        f"{json.dumps(rule_document(config.rules[index]))}."
        for index in unmatched_rules(config, graph)
    ]


def begin_words(
    start: Mapping[str, Any], frozen: Mapping[str, bool], steps_per_epoch: int
) -> Iterator[str]:
    """Lines for the log."""
    count = sum(frozen.values())
    yield (
        f"Training on {start['device_name']} from step {start['step']} to {start['total_steps']}: "
        f"{len(frozen) - count} tensors trainable, {count} frozen, "
        f"{start['train_size']} examples, {steps_per_epoch} steps an epoch."
    )
    if resumed := start["resumed"]:
        line = f"Resumed at step {resumed['step']}: {len(resumed['kept'])} tensors keep their state"
        for key, words in (("fresh", "start fresh"), ("dropped", "lost theirs, frozen from now")):
            if resumed[key]:
                line += f"; {len(resumed[key])} {words} ({', '.join(resumed[key])})"
        yield f"{line}."


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: allocated by torch on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

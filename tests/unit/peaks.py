"""Peaks of memory for tests: of what trains, foretold by a plan, and seen in a real step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from app.freezing.assume import Assumption
from app.freezing.config import parse_config
from app.freezing.graph import ModelGraph
from app.freezing.held import measure_peak
from app.freezing.plan import plan_config
from app.freezing.trace import autocast, call_model, scalar_loss

SETS: dict[str, Callable[[int, int], bool]] = {
    "everything": lambda i, n: True,
    "the end": lambda i, n: i >= n // 2,
    "the beginning": lambda i, n: i < n // 3,
    "the last alone": lambda i, n: i == n - 1,
    "every third": lambda i, n: i % 3 == 0,
}


def find_kernels(device: str) -> str:
    """Whose operations run on a device here, as `ModelGraph.kernels` names them."""
    if device == "cpu":
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability() >= (9, 0) else "cuda"


def choose(graph: ModelGraph, which: str) -> list[str]:
    """Names of the parameters of one of the sets."""
    reached = [
        p.name for p, is_so in zip(graph.parameters, graph.walk.is_reached, strict=True) if is_so
    ]
    return [name for i, name in enumerate(reached) if SETS[which](i, len(reached))]


def foretell(graph: ModelGraph, trained: list[str], **assumed: Any) -> dict[str, Any]:
    """The cost of a plan that trains these parameters."""
    rules = [{"action": "freeze", "match": "**"}]
    rules += [{"action": "unfreeze", "match": name} for name in trained]
    config = parse_config({"rules": rules})
    return dict(plan_config(graph, config, Assumption(**assumed)).cost)


def see(
    model: nn.Module,
    example: Any,
    trained: list[str],
    optimizer: str = "sgd",
    *,
    precision: str = "fp32",
) -> int:
    """The most that a real step holds that trains these parameters."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: torch.optim.Optimizer
    made = (
        torch.optim.SGD(moving, lr=0.0, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW(moving, lr=0.0)
    )

    def take_step() -> None:
        with autocast(model, precision):
            output = call_model(model, example)
            loss = scalar_loss(output, example, None)
        loss.backward()
        del output, loss
        made.step()
        made.zero_grad()

    return measure_peak(model, made, take_step, tree_leaves(example))

"""Makes the recipe's optimizer, sets its rates, keeps its state by name. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from app.training.recipe import Recipe, learning_rate_factor, warmup_factor

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
IMPLEMENTATIONS: Mapping[str, Mapping[str, bool]] = {
    "auto": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
Groups = list[dict[str, Any]]


def make_optimizer(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, in the implementation that it names."""
    options: dict[str, Any] = {"lr": recipe.rate, **IMPLEMENTATIONS[recipe.implementation]}
    if recipe.optimizer == "sgd":
        options["momentum"] = recipe.momentum
    optimizer = OPTIMIZERS[recipe.optimizer](groups, **options)
    if recipe.optimizer == "sgd" and recipe.implementation == "fused" and recipe.momentum:
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Begin every momentum as zero, which the first step makes the gradient.

    Left to itself, fused SGD refuses a group in which some have momentum and some, just unfrozen,
    have none; and where a gradient scaler skips the first step, it keeps unwritten memory as one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state.get(parameter):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def regroup(optimizer: torch.optim.Optimizer, groups: Groups) -> None:
    """Divide the same parameters anew; their state, kept by parameter, stays as it is."""
    optimizer.param_groups[:] = [{**optimizer.defaults, **group} for group in groups]


def set_rates(
    optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, total_steps: int
) -> float:
    """Set every group's rate for optimizer step `step` (from 1).

    Returns:
        The rate of a group with factor 1 that was trainable from the start.
    """
    factor = learning_rate_factor(recipe, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * group["lr_scale"] * factor
        if group["apart"] is not None:  # unfrozen later: a factor and a warm-up of its own
            began, scale, warmup_steps = group["apart"]
            group["lr"] *= scale * warmup_factor(step - began, warmup_steps)
    return recipe.rate * factor


def read_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """Name → the state of that parameter, for those that have one."""
    return {n: optimizer.state[p] for n, p in parameters.items() if optimizer.state.get(p)}


def flatten_state(kind: str, states: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """``KIND/NAME/KEY`` → tensor, for a checkpoint."""
    return {
        f"{kind}/{name}/{key}": torch.as_tensor(value)
        for name, state in states.items()
        for key, value in state.items()
        if value is not None
    }


def unflatten_state(
    kind: str, tensors: Mapping[str, torch.Tensor], device: torch.device, fused: bool
) -> dict[str, dict[str, Any]]:
    """What `flatten_state` flattened, on the device; step counters where the optimizer has them."""
    states: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        own, _, rest = path.partition("/")
        if own != kind:
            continue
        name, _, key = rest.rpartition("/")
        on_host = key == "step" and not fused
        states.setdefault(name, {})[key] = tensor if on_host else tensor.to(device)
    return states

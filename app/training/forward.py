"""How a recipe runs a model forward: precision, checkpointing, compilation. Knows no loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from app.freezing.errors import InvalidDocument
from app.training.recipe import Recipe

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def choose_autocast(recipe: Recipe, device: torch.device) -> Autocast:
    """A context for each forward: bf16 or fp16 over float32 weights, or none."""
    if recipe.precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def prepare_forward(model: nn.Module, recipe: Recipe, backend: str) -> Callable[..., Any]:
    """What to call in place of the model.

    Raises:
        InvalidDocument: the recipe wants gradient checkpointing and the model offers none.
    """
    if recipe.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            message = (
                f"{type(model).__name__} has no gradient_checkpointing_enable(); turn this off, or "
                "call torch.utils.checkpoint in the model's own forward."
            )
            raise InvalidDocument([("training.gradient_checkpointing", message)])
        # Reentrant checkpointing drops gradients over a frozen input.
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return torch.compile(model, backend=backend) if recipe.compile else model

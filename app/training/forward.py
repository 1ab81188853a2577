"""How a recipe runs a model forward, and where the logits are. Knows no loss."""

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
        _enable_checkpointing(model)
    return torch.compile(model, backend=backend) if recipe.compile else model


def _enable_checkpointing(model: nn.Module) -> None:
    for kind in ("activation", "gradient"):  # the second is what Transformers called it before
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None:
            # Reentrant checkpointing drops gradients over a frozen input.
            enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
            return
    message = (
        f"{type(model).__name__} has no gradient_checkpointing_enable(); turn this off, or "
        "call torch.utils.checkpoint in the model's own forward."
    )
    raise InvalidDocument([("training.gradient_checkpointing", message)])


def read_logits(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    return None

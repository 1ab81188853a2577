"""A few steps of a built model under each freezing mechanism. Writes nothing and keeps nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from app.freezing.config import FreezeConfig
from app.freezing.errors import InvalidDocument
from app.freezing.mechanisms import Setting, compare_mechanisms
from app.freezing.trace import call_model, scalar_loss
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.batches import Batches, move_batch
from app.training.judge import call_on_batch, compute_loss
from app.training.misfit import Misfits
from app.training.recipe import Recipe


def try_mechanisms(
    built: BuiltModel, data: Data | None, config: FreezeConfig, recipe: Recipe, device: str
) -> dict[str, Any]:
    """Compare the mechanisms on the first batches of the data, or on the model's own example.

    Args:
        recipe: its optimizer, rate, decay, momentum and clipping are the setting that is measured;
            `max_steps` (5) is how many steps; `precision` and schedules are left out of account.

    Raises:
        InvalidDocument: there is neither data nor an example, or nothing is trainable.
    """
    steps = 5 if recipe.max_steps is None else recipe.max_steps
    place = torch.device(device)
    built.model.to(place)
    if data is not None:
        loader = Batches(
            data.train,
            recipe.batch_size,
            seed=recipe.seed,
            collate=data.collate,
            seed_items=data.seed_items,
        )
        # one batch more: the step that trains everything afterwards
        batches = [move_batch(loader.next_window(1)[0], place) for _ in range(steps + 1)]

        def compute(model: nn.Module, step: int) -> torch.Tensor:
            batch = batches[step % len(batches)]
            with Misfits(built, [batch]) as misfits:
                misfits.output = call_on_batch(model, batch)
                return compute_loss(built, misfits.output, batch)
    elif built.example is not None:
        example = move_batch(built.example, place)

        def compute(model: nn.Module, step: int) -> torch.Tensor:  # noqa: ARG001
            return scalar_loss(call_model(model, example), example, built.loss)
    else:
        message = "This model has no example to train on; name a dataset, or give its 'input'."
        raise InvalidDocument([("dataset", message)])
    setting = Setting(
        optimizer=recipe.optimizer,
        lr=recipe.rate,
        momentum=recipe.momentum if recipe.optimizer == "sgd" else 0.0,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
    )
    found = compare_mechanisms(
        built.model, config, compute, setting=setting, steps=steps, seed=recipe.seed
    )
    return {**found, "on": "data" if data is not None else "example"}

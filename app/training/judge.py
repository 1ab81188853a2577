"""What a batch's output is worth: loss and metrics. Knows no optimizer and no freezing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from app.freezing.errors import InvalidDocument
from app.freezing.trace import call_model
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.batches import (
    IGNORED_TARGET,
    SeededItems,
    count_examples,
    load_batches,
    mix_seed,
    move_batch,
    read_batches,
    read_target,
    untouched_generators,
)
from app.training.forward import Autocast, read_logits
from app.training.misfit import Misfits
from app.training.recipe import Recipe


def call_on_batch(model: Callable[..., Any], batch: Any) -> Any:
    """A pair calls ``model(input)``, tuple or dict inputs unpacked; a dict ``model(**batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return call_model(model, batch[0])


def compute_loss(built: BuiltModel, output: Any, batch: Any) -> torch.Tensor:
    """The factory's loss, else the output's own, else one by the kind of the targets.

    Cross-entropy for integer targets, mean squared error for floating ones.

    Raises:
        InvalidDocument: there is no loss, no target, or their shapes do not go together.
    """
    if built.loss is not None:
        return built.loss(output, batch)
    own = getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        return own
    logits, target = read_logits(output), read_target(batch)
    if logits is None or target is None:
        raise _misfit("The model gives no loss and the batch no target; give the factory a 'loss'.")
    shapes = f"The output has shape {tuple(logits.shape)} and the target {tuple(target.shape)}"
    if target.is_floating_point():
        if logits.numel() != target.numel():
            raise _misfit(f"{shapes}; for mean squared error they must have the same size.")
        return F.mse_loss(logits, target.view_as(logits).to(logits.dtype))
    classes = _classes_first(logits, target)
    if classes is None:
        raise _misfit(f"{shapes}; for cross-entropy the output needs one axis more, the classes.")
    return F.cross_entropy(classes, target, ignore_index=IGNORED_TARGET)


def _misfit(message: str) -> InvalidDocument:
    return InvalidDocument([("dataset", message)])


def _classes_first(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Logits with the class axis second, as cross-entropy wants it; None where none is there.

    Raises:
        InvalidDocument: both the second and the last axis could be the classes.
    """
    if logits.dim() != target.dim() + 1 or logits.shape[0] != target.shape[0]:
        return None
    second, last = logits.shape[2:] == target.shape[1:], logits.shape[:-1] == target.shape
    if second and last and logits.dim() > 2:
        raise _misfit(
            f"In an output of shape {tuple(logits.shape)} both the second and the last axis could "
            "be the classes; give the factory a 'loss'."
        )
    return logits if second else logits.movedim(-1, 1) if last else None


def evaluate_set(
    built: BuiltModel,
    dataset: Any,
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any] | None,
    seed_items: bool,
    seed: int,
    device: torch.device,
    autocast: Autocast,
    interrupted: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss and metrics over one set, in eval mode, without a graph.

    Draws nothing from the generators that training draws from. The model is left in eval mode.

    Returns:
        Name → mean over examples (accuracy: over targets that count); None when `interrupted`.
    """
    built.model.eval()
    batches = [
        range(start, min(start + batch_size, len(dataset)))
        for start in range(0, len(dataset), batch_size)
    ]
    items = SeededItems(dataset, mix_seed(seed, 1), 0) if seed_items else dataset
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    loader = load_batches(items, batches, collate, 0, torch.Generator())
    with torch.no_grad(), untouched_generators(device):
        for loaded in read_batches(loader, "an evaluation set"):
            if interrupted():
                return None
            batch = move_batch(loaded, device)
            with Misfits(built, [loaded]) as misfits:
                with autocast():
                    output = misfits.output = call_on_batch(built.model, batch)
                    loss = compute_loss(built, output, batch)
                size = count_examples(batch)
                judged = _judge_batch(built, output, batch, loss, size)
            for name, (value, count) in judged.items():
                sums[name] += value * count
                counts[name] += count
    return {name: sums[name] / counts[name] for name in sums if counts[name]}


def judge_sets(
    built: BuiltModel,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    autocast: Autocast,
    interrupted: Callable[[], bool],
) -> dict[str, float] | None:
    """``eval/NAME/METRIC`` → value for every evaluation set, or for the training set if none.

    Returns:
        None when `interrupted`.
    """
    values: dict[str, float] = {}
    for name, dataset in (data.evals or {"train": data.train}).items():
        judged = evaluate_set(
            built,
            dataset,
            batch_size=recipe.eval_batch_size,
            collate=data.collate,
            seed_items=data.seed_items,
            seed=recipe.seed,
            device=device,
            autocast=autocast,
            interrupted=interrupted,
        )
        if judged is None:
            return None
        values |= {f"eval/{name}/{metric}": value for metric, value in judged.items()}
    return values


def _judge_batch(
    built: BuiltModel, output: Any, batch: Any, loss: torch.Tensor, size: int
) -> dict[str, tuple[float, int]]:
    """Name → (value, how many it is the mean of); a factory's metric replaces ours of its name."""
    judged = {"loss": (loss.item(), size)}
    logits, target = read_logits(output), read_target(batch)
    if (
        built.intake
        and built.intake.is_autoregressive
        and logits is not None
        and target is not None
    ):
        logits, target = logits[:, :-1], target[:, 1:]
    names_classes = target is not None and not target.is_floating_point()
    if "accuracy" not in built.metrics and logits is not None and names_classes:
        assert target is not None
        try:
            classes = _classes_first(logits, target)
        except InvalidDocument:  # the model has a loss of its own and knows its axes
            classes = None
        count = int((target != IGNORED_TARGET).sum())
        if classes is not None and count:
            right = (classes.argmax(1) == target) & (target != IGNORED_TARGET)
            judged["accuracy"] = (right.sum().item() / count, count)
    for name, metric in built.metrics.items():
        judged[name] = (float(metric(output, batch)), size)
    return judged

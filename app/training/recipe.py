"""The training options: their names, ranges, defaults and words. No torch, no model."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.freezing.errors import MAX_FAULTS, InvalidDocument, describe_unknown, show_value


@dataclass(frozen=True)
class Recipe:
    """How a job trains. Every field has a sensible default, so an empty document trains.

    Attributes:
        epochs: whole passes over the training set; ignored where `max_steps` is given.
        max_steps: optimizer steps.
        lr: None until `parse_recipe` fills in the optimizer's usual rate.
        warmup_steps: steps over which the rate rises linearly from 0.
        max_grad_norm: clip the total gradient norm to this; None does not clip.
        eval_every: evaluate each so many steps; None: after each epoch.
        checkpoint_every: likewise; None: only at the end.
        patience: stop after so many evaluations without a lower loss; None never does.
        stats_every: record layer statistics each so many steps.
        measures: which of them: ``all``, with the updates of large tensors estimated between exact
            passes; ``exact``; ``gradients`` alone; ``none``.
        proof_every: check the proof each so many steps; None: with each evaluation. At every
            checkpoint, after every change of what is frozen, and at the end in any case.
        implementation: of the optimizer: torch's own choice, or one of those it has.
        checkpoint_tensors: ``trained`` leaves out of checkpoints what is as the base model has it;
            that of a run that succeeded is whole.
        on_nonfinite: what a NaN or infinite loss or gradient does: ``stop`` the run, or ``skip``
            the optimizer's step.
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.9
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    precision: str = "fp32"
    grad_accumulation: int = 1
    max_grad_norm: float | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_every: int | None = None
    eval_batch_size: int = 256
    checkpoint_every: int | None = None
    keep_last: int = 3
    patience: int | None = None
    stats_every: int = 1
    measures: str = "all"
    device: str = "auto"
    proof_every: int | None = None
    implementation: str = "auto"
    checkpoint_tensors: str = "all"
    on_nonfinite: str = "stop"

    @property
    def rate(self) -> float:
        """The peak learning rate: as given, else the optimizer's usual one."""
        return USUAL_RATES[self.optimizer] if self.lr is None else self.lr


USUAL_RATES = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class Option:
    """One option as a form shows it and a document is checked against it.

    Attributes:
        kind: ``int``, ``float``, ``bool``, ``choice`` or ``device``.
        optional: whether null is allowed, meaning what `help` says.
        above: the minimum itself is excluded.
        below: the maximum itself is excluded.
    """

    name: str
    kind: str
    help: str
    choices: tuple[str, ...] = ()
    minimum: float = 0
    maximum: float = math.inf
    optional: bool = False
    above: bool = False
    below: bool = False

    @property
    def default(self) -> Any:
        return getattr(Recipe(), self.name)


OPTIONS: tuple[Option, ...] = (
    Option("epochs", "int", "Whole passes over the training set.", minimum=1, maximum=10**6),
    Option("max_steps", "int", "Stop after so many optimizer steps, instead of epochs.",
           maximum=10**9, optional=True),
    Option("batch_size", "int", "Examples in one batch.", minimum=1, maximum=10**6),
    Option("optimizer", "choice", "The optimizer.", choices=("sgd", "adam", "adamw")),
    Option("lr", "float", "Peak learning rate; by default 0.01 for SGD, 0.001 for Adam and AdamW.",
           above=True, optional=True),
    Option("weight_decay", "float", "Weight decay (decoupled for AdamW)."),
    Option("momentum", "float", "Momentum of SGD.", maximum=1, below=True),
    Option("lr_schedule", "choice", "How the learning rate goes on after warm-up.",
           choices=("constant", "linear", "cosine")),
    Option("warmup_steps", "int", "Steps over which the learning rate rises from zero.",
           maximum=10**9),
    Option("precision", "choice", "fp32, or autocast to bf16 or fp16 over float32 weights.",
           choices=("fp32", "bf16", "fp16")),
    Option("grad_accumulation", "int", "Batches whose gradients make one optimizer step.",
           minimum=1, maximum=10**4),
    Option("max_grad_norm", "float", "Clip the total gradient norm; empty does not clip.",
           above=True, optional=True),
    Option("compile", "bool", "Compile the model with torch.compile."),
    Option("gradient_checkpointing", "bool", "Recompute activations in backward to save memory."),
    Option("seed", "int", "Seed of data order, dropout and augmentation.", maximum=2**63 - 1),
    Option("eval_every", "int", "Evaluate each so many steps; empty: after each epoch.",
           minimum=1, maximum=10**9, optional=True),
    Option("eval_batch_size", "int", "Examples in one batch of an evaluation.",
           minimum=1, maximum=10**6),
    Option("checkpoint_every", "int", "Checkpoint each so many steps; empty: only at the end.",
           minimum=1, maximum=10**9, optional=True),
    Option("keep_last", "int", "Checkpoints kept besides the final one.", minimum=1, maximum=10**6),
    Option("patience", "int", "Stop after so many evaluations without a lower loss.",
           minimum=1, maximum=10**6, optional=True),
    Option("stats_every", "int", "Record layer statistics each so many steps.",
           minimum=1, maximum=10**9),
    Option("measures", "choice", "What to measure of each layer: all, all exact, gradients, none.",
           choices=("all", "exact", "gradients", "none")),
    Option("device", "device", "auto takes a GPU where there is one; else cpu, cuda or cuda:N."),
    Option("proof_every", "int", "Check the proof each so many steps; empty: with each evaluation.",
           minimum=1, maximum=10**9, optional=True),
    Option("implementation", "choice", "Of the optimizer: torch's choice, or this one.",
           choices=("auto", "for-loop", "foreach", "fused")),
    Option("checkpoint_tensors", "choice", "Checkpoints hold all tensors, or only the trained ones "
           "over the base model; the final one holds all.", choices=("all", "trained")),
    Option("on_nonfinite", "choice", "What a NaN or infinite loss or gradient does to the run: "
           "stop it, or skip the step.", choices=("stop", "skip")),
)  # fmt: skip

# What other trainers call some of them.
_SYNONYMS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "steps": "max_steps",
    "clip_grad_norm": "max_grad_norm",
    "gradient_accumulation_steps": "grad_accumulation",
    "save_steps": "checkpoint_every",
    "early_stopping_patience": "patience",
}
_BY_NAME = {option.name: option for option in OPTIONS}


def parse_recipe(document: Any) -> Recipe:
    """Read the `training` options of a job.

    Raises:
        InvalidDocument: with every unknown option (naming the nearest) and every bad value.
    """
    if document is None:
        document = {}
    if not isinstance(document, Mapping):
        raise InvalidDocument([("training", "'training' must be an object of options.")])
    errors: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    for name in [name for name in document if name not in _BY_NAME][:MAX_FAULTS]:
        message = describe_unknown(name, _BY_NAME, "an option", _SYNONYMS)
        errors.append((f"training.{name}"[:100], message))
    for name, option in _BY_NAME.items():
        if name not in document:
            continue
        value = document[name]
        fault = _find_fault(option, value)
        if fault:
            errors.append((f"training.{name}", f"'{name}' {fault}; this is {show_value(value)}."))
        elif value is not None:
            values[name] = float(value) if option.kind == "float" else value
    if errors:
        raise InvalidDocument(errors)
    return Recipe(**values)


def _find_fault(option: Option, value: Any) -> str | None:
    """What a value must be where it is not that, else None."""
    if value is None:
        return None if option.optional else "cannot be null"
    if option.kind == "bool":
        return None if isinstance(value, bool) else "must be true or false"
    if option.kind == "choice":
        good = isinstance(value, str) and value in option.choices
        return None if good else f"must be {', '.join(option.choices[:-1])} or {option.choices[-1]}"
    if option.kind == "device":
        known = isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value)
        return None if known else "must be auto, cpu, cuda or cuda:N"
    whole = option.kind == "int"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return "must be a whole number" if whole else "must be a number"
    least, most = option.minimum, option.maximum
    too_small = value <= least if option.above else value < least
    too_large = value >= most if option.below else value > most
    if too_small or too_large or not (whole or -sys.float_info.max <= value <= sys.float_info.max):
        return f"must be {_range_words(option)}"
    return None


def _range_words(option: Option) -> str:
    low = f"{'above' if option.above else 'at least'} {option.minimum:,g}"
    if math.isinf(option.maximum):
        return f"finite and {low}"
    most = int(option.maximum) if option.kind == "int" else option.maximum
    return f"{low} and {'below' if option.below else 'at most'} {most:,}"


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """Every option with the value that the job uses, the learning rate filled in."""
    return {**asdict(recipe), "lr": recipe.rate}


def learning_rate_factor(recipe: Recipe, step: int, total_steps: int | None) -> float:
    """The factor on the peak rate in optimizer step `step` (from 1).

    Warm-up: step / (warmup_steps + 1), so that the first step already moves. Then constant, or down
    to zero in proportion (linear) or along half a cosine, over the steps that are left.
    """
    if step <= recipe.warmup_steps:
        return warmup_factor(step, recipe.warmup_steps)
    if recipe.lr_schedule == "constant" or total_steps is None:
        return 1.0
    left = max(1, total_steps - recipe.warmup_steps)
    done = min(1.0, (step - 1 - recipe.warmup_steps) / left)
    return 1.0 - done if recipe.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def warmup_factor(step: int, warmup_steps: int) -> float:
    """The factor on a rate in the `step`-th step (from 1) of a warm-up: linear up to 1."""
    return step / (warmup_steps + 1) if step <= warmup_steps else 1.0

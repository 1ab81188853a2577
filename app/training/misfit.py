"""Why a batch does not go through a model, in one sentence where it can be told. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from app.freezing.errors import InvalidDocument
from app.freezing.trace import call_model
from app.sources.libraries import first_line
from app.sources.models import BuiltModel
from app.training.batches import IGNORED_TARGET, move_batch, read_target
from app.training.forward import read_logits

_TOLD = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)


class Misfits:
    """Blames the data for what is raised inside, where looking at the batches tells that it is.

    What cannot be told so is raised as it came: most of all a fault of the user's own model or
    loss. Where nothing is raised nothing is looked at.

    Attributes:
        output: the model's newest output, as far as there is one: its shape is known even where a
            GPU has met a label outside of it and answers nothing more.
    """

    def __init__(self, built: BuiltModel, batches: Sequence[Any]) -> None:
        """Args:
        batches: as they were loaded, on the host.
        """
        self.output: Any = None
        self._built, self._batches = built, batches

    def __enter__(self) -> Misfits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not isinstance(error, _TOLD) or isinstance(
            error, InvalidDocument | torch.OutOfMemoryError
        ):
            return
        for batch in self._batches:
            if told := explain_misfit(self._built, batch, self.output, error):
                # A GPU's error is no cause here: it would be told as a fault of the GPU.
                is_gpus = "CUDA error" in str(error)
                raise InvalidDocument([("dataset", told)]) from (None if is_gpus else error)


def explain_misfit(built: BuiltModel, batch: Any, output: Any, error: Exception) -> str | None:
    """What in one batch does not fit the model, None where that cannot be told."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not (is_pair or isinstance(batch, Mapping)):
        return None
    may_be_outside = isinstance(error, IndexError) or "CUDA error" in str(error)
    outside = _explain_labels(built, batch, output) or _explain_ids(built, batch)
    if may_be_outside and outside:
        return outside
    inputs = _without_labels(batch) if isinstance(batch, Mapping) else batch[0]
    example, why = _without_labels(built.example), first_line(error)
    if _runs(built.model, inputs):
        is_librarys = type(built.model).__module__.startswith("transformers.")
        if is_librarys and isinstance(batch, Mapping):
            labels = describe_inputs(batch.get("labels"))
            return f"The model takes this dataset's inputs and not its labels, {labels}: {why}"
        return None
    given, wanted = describe_inputs(inputs), describe_inputs(example)
    if example is None or given == wanted or not _runs(built.model, example):
        return None
    return f"The model takes {wanted}, as in its example, and this dataset gives {given}: {why}"


def describe_inputs(inputs: Any) -> str:
    """Types and shapes of what a model is called with, without the batch."""
    if isinstance(inputs, torch.Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape[1:])}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {describe_inputs(value)}" for name, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return ", ".join(map(describe_inputs, inputs))
    return type(inputs).__name__


def _without_labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch


def _runs(model: nn.Module, inputs: Any) -> bool:
    """Whether a call works; the model is in eval mode afterwards."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad():
            call_model(model, move_batch(inputs, device))
    except Exception:  # whatever a user's forward raises
        return False
    return True


def _explain_labels(built: BuiltModel, batch: Any, output: Any) -> str | None:
    target, logits = read_target(batch), read_logits(output)
    if target is None or target.is_floating_point():
        return None
    classes = built.intake.classes if built.intake else None
    if logits is not None and logits.dim() == target.dim() + 1:
        at_end = logits.shape[:-1] == target.shape
        classes = logits.shape[-1 if at_end else 1]
    if classes is None:
        return None
    counted = target[target != IGNORED_TARGET]
    outside = counted[(counted < 0) | (counted >= classes)].tolist()
    if not outside:
        return None
    return (
        f"The dataset has the label {outside[0]}, outside the model's head of {classes} classes, "
        f"which are 0 to {classes - 1}."
    )


def _explain_ids(built: BuiltModel, batch: Any) -> str | None:
    """An id that no embedding of the model has a row for."""
    rows = [m.num_embeddings for m in built.model.modules() if isinstance(m, nn.Embedding)]
    for tensor in tree_leaves(batch):
        if rows and isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
            ids = tensor[tensor != IGNORED_TARGET]
            outside = ids[(ids < 0) | (ids >= max(rows))].tolist()
            if outside:
                return (
                    f"The dataset has the id {outside[0]}, and the model's largest embedding has "
                    f"rows 0 to {max(rows) - 1}."
                )
    return None

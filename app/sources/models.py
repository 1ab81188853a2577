"""Builds a model from its spec, with its example, loss and metrics. Knows nothing of freezing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from app.freezing.errors import InvalidDocument
from app.freezing.trace import call_model
from app.sources.demo.networks import build_network, input_shape
from app.sources.hub import build_transformers_model, build_vision_model, is_weightless
from app.sources.intake import Intake
from app.sources.libraries import first_line
from app.sources.sizes import Maker
from app.sources.spec import InputSpec, ModelSpec, is_set_name, split_uri
from app.sources.user_code import (
    call_factory,
    check_answer_keys,
    name_type,
    refuse_answer,
    run_user_code,
)

EXAMPLE_BATCH = 2  # not 1: BatchNorm in train mode refuses a single value per channel


@dataclass(frozen=True)
class BuiltModel:
    """A model and what is needed to call and judge it.

    Attributes:
        example: one batch: a tensor, a tuple of arguments or a dict of keyword arguments; None
            where neither the factory nor the spec gave one.
        loss: ``(output, batch) -> scalar tensor``; None leaves it to the output or the targets.
        metrics: name → ``(output, batch) -> float``.
        make: made the example from a configuration, and makes it at other sizes; None where the
            example was given.
        intake: how rows of a table become its batches; None where it takes no rows.
        notes: what whoever trains it should know, in sentences.
    """

    model: nn.Module
    example: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    metrics: Mapping[str, Callable[[Any, Any], float]] = field(default_factory=dict)
    intake: Intake | None = None
    notes: tuple[str, ...] = ()
    make: Maker | None = None


def build_model(
    spec: ModelSpec, *, code_dirs: Sequence[Path], weightless: bool = False
) -> BuiltModel:
    """Build what `spec` names, on the CPU, and load its weights.

    Args:
        weightless: build a library's model on fake tensors, for its structure alone: no memory is
            taken and no weights are read, but for the names and shapes in a file of `weights`.

    Raises:
        InvalidDocument: the factory gave something else than a model, or the weights do not fit it.
        UserCodeError: the user's factory raised.
    """
    scheme, rest = split_uri(spec.uri)
    if scheme == "demo":
        model = build_network(rest, num_classes=spec.num_classes, random_init=spec.random_init)
        built = BuiltModel(model, make_example(InputSpec(input_shape(rest))))
    elif scheme == "python":
        built = _read_answer(call_factory(rest, spec.kwargs, code_dirs=code_dirs), spec.uri)
    elif scheme == "hf":
        model, make, intake, notes = build_transformers_model(rest, spec, weightless=weightless)
        built = BuiltModel(model, make({}), intake=intake, notes=notes, make=make)
    else:
        model, example, intake = build_vision_model(scheme, rest, spec, weightless=weightless)
        built = BuiltModel(model, example, intake=intake)
    if spec.input is not None:
        built = replace(built, example=make_example(spec.input), make=None)
    if built.intake is None and isinstance(built.example, Tensor) and built.example.dim() == 4:
        _, channels, height, width = built.example.shape
        intake = Intake("image-classification", image_shape=(channels, height, width))
        built = replace(built, intake=intake)
    _materialize_lazy(built, spec.uri)
    if spec.weights is not None:
        new = load_weights(
            built.model,
            Path(spec.weights),
            allow_pickle=spec.allow_pickle,
            new_head=spec.new_head,
        )
        if new:
            built = replace(built, notes=(f"New, not in the weights: {_list_some(new)}.",))
    return built


def make_example(given: InputSpec) -> Tensor:
    """A small batch of such inputs: the same normal numbers each time, zeros where not floating."""
    dtype = getattr(torch, given.dtype)
    shape = (EXAMPLE_BATCH, *given.shape)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)  # zero is a valid token, class and pixel
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


_ANSWER_KEYS = ("model", "example", "loss", "metrics")


def _read_answer(answer: object, uri: str) -> BuiltModel:
    """Check what a factory returned: a module, or a mapping of model, example, loss, metrics."""
    if isinstance(answer, nn.Module):
        return BuiltModel(answer)
    if not isinstance(answer, Mapping):
        raise refuse_answer(
            f"{uri} returned {name_type(answer)}; it must return an nn.Module, or a mapping "
            "with 'model' and optionally 'example', 'loss' and 'metrics'."
        )
    check_answer_keys(answer, _ANSWER_KEYS, uri)
    model, example = answer.get("model"), answer.get("example")
    loss, metrics = answer.get("loss"), answer.get("metrics") or {}
    if not isinstance(model, nn.Module):
        raise refuse_answer(f"'model' of {uri} is {name_type(model)}; it must be an nn.Module.")
    if not (example is None or isinstance(example, Tensor | tuple | Mapping)):
        raise refuse_answer(
            f"'example' of {uri} is {name_type(example)}; it must be one batch: a tensor, a tuple "
            "of arguments or a dict of keyword arguments."
        )
    if not (loss is None or callable(loss)):
        raise refuse_answer(f"'loss' of {uri} is {name_type(loss)}; it must be a function.")
    if not isinstance(metrics, Mapping) or not all(
        is_set_name(name) and callable(metric) for name, metric in metrics.items()
    ):
        raise refuse_answer(f"'metrics' of {uri} must map names without '/' to functions.")
    return BuiltModel(model, example, loss, dict(metrics))


def _materialize_lazy(built: BuiltModel, uri: str) -> None:
    """Give lazy layers their shapes by one call on the example, which changes no statistics."""
    model, example = built.model, built.example
    if not any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return
    if example is None:
        raise refuse_answer(f"{uri} has lazy layers, which need an example; give 'input'.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        run_user_code(lambda: call_model(model, example), uri)
    for module, training in modes:
        module.training = training


# ---------------------------------------------------------------------------------------- weights


def load_weights(
    model: nn.Module, path: Path, *, allow_pickle: bool = False, new_head: bool = False
) -> list[str]:
    """Load a file or a sharded folder over `model`, every tensor of it and nothing else.

    Tied tensors may be given under any one of their names. A model without weights of its own is
    only compared with the file.

    Args:
        new_head: let tensors that are missing or mis-shaped keep their values, and let go of
            unexpected ones.

    Returns:
        The names of the tensors that `new_head` let keep their values.

    Raises:
        InvalidDocument: unreadable, or with missing, unexpected or mis-shaped tensors, by name.
    """
    given = _read_weights(path, allow_pickle)
    expected = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    present = {_identity(expected[name]) for name in given if name in expected}
    missing = [name for name, tensor in expected.items() if _identity(tensor) not in present]
    unexpected = [name for name in given if name not in expected]
    misshaped = [
        f"{name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
        for name, tensor in given.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    fitting = {
        name: tensor
        for name, tensor in given.items()
        if name in expected and tensor.shape == expected[name].shape
    }
    if new_head and fitting:
        loaded = {_identity(expected[name]) for name in fitting}
        kept = [name for name, tensor in expected.items() if _identity(tensor) not in loaded]
        if not is_weightless(model):
            model.load_state_dict(fitting, strict=False)
        return kept
    faults = [
        f"{kind}: {_list_some(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if faults:
        advice = "" if new_head else " If only a head is new, say 'new_head': true."
        raise refuse_answer(
            f"{path.name} does not fit the model; {'; '.join(faults)}.{advice}", "weights"
        )
    if not is_weightless(model):
        model.load_state_dict(given, strict=False)
    return []


def _identity(tensor: Tensor) -> Any:
    """What tied tensors have in common in a state dict, whose tensors are new views each time."""
    if isinstance(tensor, FakeTensor):
        return tensor.untyped_storage()._cdata, tensor.shape, tensor.stride()
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _read_weights(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        assert allow_pickle, "parse_model_spec lets no other file through"
        answer = torch.load(path, map_location="cpu", weights_only=True)
    except InvalidDocument:
        raise
    except pickle.UnpicklingError as error:
        raise refuse_answer(
            f"{path.name} cannot be read as weights: it is damaged, or holds other things than "
            "tensors, which are never loaded.",
            "weights",
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError,
            SafetensorError) as error:  # fmt: skip
        raise refuse_answer(
            f"{path.name} cannot be read as weights: {first_line(error)}.", "weights"
        ) from error
    answer = answer.get("state_dict", answer) if isinstance(answer, Mapping) else answer
    if not isinstance(answer, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in answer.items()
    ):
        raise refuse_answer(f"{path.name} does not hold tensors by name.", "weights")
    return dict(answer)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or not (folder / shard).resolve().is_relative_to(folder):
            raise refuse_answer(f"{index.name} names {shard!r}, not a file beside it.", "weights")
        tensors.update(load_file(folder / shard))
    return tensors


def _list_some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"

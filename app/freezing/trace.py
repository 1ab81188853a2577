"""trace_model(model, example): a ModelGraph, under fake tensors. Knows no config and no data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from app.freezing.fakes import enter_known, known_values, see_known
from app.freezing.graph import Buffer, ModelGraph, Module, Parameter
from app.freezing.kernels import kernels_of
from app.freezing.lifetimes import Grown, Seen, Step, read_grown, read_memory
from app.freezing.nodes import read_nodes
from app.freezing.record import Attentions, Recorder, Spans, storage_key
from app.freezing.undisturbed import undisturbed

Loss = Callable[[Any, Any], torch.Tensor]


def trace_model(
    model: nn.Module,
    example: Any,
    *,
    loss: Loss | None = None,
    ways: Sequence[str] = ("fake", "real"),
    kernels: str = "cpu",
    precision: str = "fp32",
) -> ModelGraph:
    """Read a model's modules and its autograd graph, everything trainable, from a forward pass.

    Two steps more tell what is held when, and what grows with the batch. All passes are made in
    train mode with a fixed seed, stochastic depth forced to keep, and under fake tensors: nothing
    is computed and no weight is touched; a model that was built of fake tensors has none. The
    forward may look at whole numbers of the example and at what follows from them alone, and is
    told that what depends on weights is finite. Where a model cannot run so (its forward looks at
    values), real passes are made instead; where that fails too, the graph has no nodes and says
    why.

    Args:
        model: on any device; its flags, mode and buffers are left as they were.
        example: what it is called with: a tensor, a tuple of arguments or a dict of keyword
            arguments; None where nothing is known.
        loss: ``(output, example) -> scalar``; by default the output's ``.loss``, else the mean
            square of its logits, last hidden state or first floating tensor.
        ways: those that may be tried, the first that works is taken.
        kernels: ``cuda`` or ``hopper`` for a model that lies on a CPU here and is to be trained on
            a GPU: see `ModelGraph.kernels`.
        precision: ``bf16`` or ``fp16`` for forwards under autocast.

    Returns:
        The graph; `traced_by` says how it was got.
    """
    graph = read_model(model)
    notes: list[str] = []
    if example is None:
        notes.append("There is no example to call it with; give 'input' a shape, or show it data.")
    elif any(map(is_lazy, model.parameters())):
        notes.append("It has lazy layers, whose shapes its first call gives: call it once before.")
    else:
        for how in ways:
            if how == "real" and _fake_mode(model):
                break  # there are no weights to compute with
            try:
                with kernels_of(kernels):
                    traced = _trace(graph, model, example, loss, precision, fake=how == "fake")
            except Exception as error:  # whatever a user's forward raises under this way of tracing
                notes.append(f"{how}: {_in_short(error)}")
            else:
                notes += [traced.trace_note] * bool(traced.trace_note)
                graph = replace(traced, traced_by=how, kernels=kernels, precision=precision)
                break
    return replace(graph, trace_note=" ".join(notes), batch_size=count_rows(example))


def _in_short(error: Exception) -> str:
    said = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:300]}"


def _fake_mode(model: nn.Module) -> FakeTensorMode | None:
    """The mode under which a model was built, None where its tensors are real."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return None


def read_model(model: nn.Module) -> ModelGraph:
    """A model's modules, parameters and buffers alone, without its autograd graph."""
    modules, parameters = _read_modules(model)
    return ModelGraph(modules=modules, parameters=parameters)


def call_model(model: Callable[..., Any], example: Any) -> Any:
    """Call a model with a tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


def count_rows(example: Any) -> int:
    """The first dimension of an example's first tensor that has one, at least 1."""
    for leaf in tree_leaves(example):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return max(1, leaf.shape[0])
    return 1


# ----------------------------------------------------------------------------------------- modules


def _read_modules(model: nn.Module) -> tuple[tuple[Module, ...], tuple[Parameter, ...]]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    first_paths: dict[nn.Module, str] = {}
    modules: list[Module] = []
    for path, module in model.named_modules(remove_duplicate=False):
        same_as = first_paths.get(module)
        first_paths.setdefault(module, path)
        modules.append(_read_module(path, module, same_as))
    parameters = tuple(_read_parameter(tensors[key], names[key]) for key in names)
    return tuple(modules), parameters


def _read_parameter(parameter: nn.Parameter, names: list[str]) -> Parameter:
    shape = () if is_lazy(parameter) else tuple(parameter.shape)
    numel = 0 if is_lazy(parameter) else parameter.numel()
    return Parameter(
        name=names[0],
        shape=shape,
        dtype=_dtype_name(parameter.dtype),
        numel=numel,
        nbytes=numel * parameter.dtype.itemsize,
        floating=parameter.is_floating_point() or parameter.is_complex(),
        requires_grad=parameter.requires_grad,
        shared_with=tuple(names[1:]),
    )


def _read_module(path: str, module: nn.Module, same_as: str | None) -> Module:
    prefix = f"{path}." if path else ""
    facts: dict[str, Any] = {}
    if drops_at_random(module):
        facts["dropout"] = True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        facts["max_norm"] = module.max_norm
    if type(module).__name__ == "_SpectralNorm" or any(
        type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values()
    ):
        facts["spectral_norm"] = True
    return Module(
        path=path,
        type=type(module).__name__,
        depth=path.count(".") + 1 if path else 0,
        parameters=tuple(prefix + name for name, p in module._parameters.items() if p is not None),
        buffers=tuple(
            Buffer(
                name=prefix + name,
                shape=tuple(buffer.shape),
                dtype=_dtype_name(buffer.dtype),
                numel=buffer.numel(),
                persistent=name not in module._non_persistent_buffers_set,
            )
            for name, buffer in module._buffers.items()
            if buffer is not None
        ),
        is_norm=is_statistics_norm(module),
        same_as=same_as,
        facts=facts,
    )


def is_statistics_norm(module: nn.Module) -> bool:
    """A norm layer with running statistics: BatchNorm, SyncBatchNorm, InstanceNorm, subclasses."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def drops_at_random(module: nn.Module) -> bool:
    """A module that drops values in train mode: dropout itself, attention and RNNs with some."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------- nodes


def _trace(
    bare: ModelGraph,
    model: nn.Module,
    example: Any,
    loss: Loss | None,
    precision: str,
    *,
    fake: bool,
) -> ModelGraph:
    def take_forward(example: Any) -> tuple[torch.Tensor, Any]:
        with autocast(model, precision):
            output = call_model(model, example)
            return scalar_loss(output, example, loss), output

    mode: Any = contextlib.nullcontext()
    as_given = example
    if fake:
        mode = _fake_mode(model) or FakeTensorMode(allow_non_fake_inputs=True)
    with _one_pass(model, mode):
        resting: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        if isinstance(mode, FakeTensorMode):
            example = tree_map_only(torch.Tensor, partial(enter_known, mode), example)
            resting += [see_known(mode, tensor) for tensor in resting]  # as operations see them
        names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        spans, recorder = Spans(model), Recorder(model)
        attentions = Attentions(recorder)
        with spans, recorder:
            with attentions:
                value, output = take_forward(example)
            if value.grad_fn is None:
                raise ValueError("the loss does not depend on any parameter")
            flops = recorder.forward_flops
            places = {storage_key(t) for t in resting if t.layout is torch.strided}
            read = read_nodes(names, value, spans, recorder, attentions.found, places)
        del output, value, recorder, attentions

    def look(how: Callable[..., Any], example: Any, **options: Any) -> Any:
        is_autocast = precision != "fp32"
        with _one_pass(model, mode):
            if isinstance(mode, FakeTensorMode):
                example = tree_map_only(torch.Tensor, partial(enter_known, mode), example)
            given = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
            forward = partial(take_forward, example)
            return how(Step(forward, given, model, read, places, is_autocast), **options)

    grown = _see_grown(look, as_given) if fake else None
    seen, note = _see_memory(look, example, grown)
    hidden = {} if seen is None else seen.hidden
    return replace(
        bare,
        nodes=tuple(
            replace(node, saved=node.saved + hidden[i]) if i in hidden else node
            for i, node in enumerate(read.nodes)
        ),
        extras=read.extras,
        forward_flops=flops,
        memory=None if seen is None else seen.memory,
        fixed_nodes=() if grown is None else grown.fixed_nodes,
        fixed_flops=0 if grown is None else max(0, 2 * flops - grown.forward_flops),
        trace_note=note,
    )


@contextlib.contextmanager
def _one_pass(model: nn.Module, mode: Any) -> Iterator[None]:
    """Whatever a forward or backward changes is as it was for the next."""
    is_fake = isinstance(mode, FakeTensorMode)
    with undisturbed(model, with_values=not is_fake), mode, torch.enable_grad(), known_values(mode):
        yield


def autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    """What a loop runs its forwards in at this precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    device = next(model.parameters(), torch.empty(0)).device
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def _see_grown(look: Callable[..., Any], example: Any) -> Grown | None:
    """What a step is with every row twice; None where there are none, or a forward refuses them."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # of what such a forward raises
    was_off, log.disabled = log.disabled, True
    try:
        larger = double_rows(example)
        return None if larger is None else look(read_grown, larger)
    except Exception:  # whatever a user's forward raises on rows that are not its own
        return None
    finally:
        log.disabled = was_off


def _see_memory(
    look: Callable[..., Any], example: Any, grown: Grown | None
) -> tuple[Seen | None, str]:
    """What a second step, with its backward, makes and lets go; else why that is not known."""
    try:
        return look(read_memory, example, larger=grown), ""
    except Exception as error:  # whatever a user's backward raises on stand-ins
        return None, f"memory: {_in_short(error)}"


def double_rows(example: Any) -> Any:
    """An example with each row twice; None where no tensor of it has rows."""
    rows = count_rows(example)

    def has_rows(tensor: torch.Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == rows

    def double(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor]) if has_rows(tensor) else tensor

    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    return tree_map_only(torch.Tensor, double, example) if any(map(has_rows, tensors)) else None


def scalar_loss(output: Any, example: Any, loss: Loss | None) -> torch.Tensor:
    """The loss that a plan is made for, where no targets are known."""
    if loss is not None:
        return loss(output, example)
    if isinstance(getattr(output, "loss", None), torch.Tensor):
        return output.loss
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, torch.Tensor):
            return tensor.float().square().mean()
    for leaf in _leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.float().square().mean()
    raise ValueError(f"the model returned {type(output).__name__}, which has no floating tensor")


def _leaves(output: Any) -> Iterator[Any]:
    """What an output holds; the fields of a dataclass too, which torch takes for one thing."""
    for leaf in tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _leaves([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            yield leaf

"""Freezing, for a training script of one's own. Depends on torch alone; knows no Frostline.

This file is a working module and the template of every Python download: an export replaces this
text, and fills in the constants between the two markers.
"""

import ctypes
import functools
import hashlib
import weakref

import torch
from torch import nn

# --- constants ---
FROZEN: tuple[str, ...] = ()
TRAINABLE: tuple[str, ...] = ()
HELD_IN_EVAL: tuple[str, ...] = ()
MECHANISM = "requires_grad"
GROUPS: dict[str, tuple[float, float | None]] = {}
# --- end of constants ---

# What the frozen tensors of each model were when it was frozen.
_digests: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def apply_freeze(model: nn.Module) -> nn.Module:
    """Freeze `model` in place, and remember what is frozen for `assert_frozen`.

    Clears the gradients of what is frozen: an optimizer asks whether there is one, not whether the
    parameter requires one. The modules of `HELD_IN_EVAL` stay in eval mode, whatever
    ``model.train()`` says, so that their running statistics do not move.

    Raises:
        KeyError: the model has other parameters than the one this file was written for.
    """
    named = _named_parameters(model)
    first_names = {name for name, _ in model.named_parameters()}
    missing = sorted({*FROZEN, *TRAINABLE} - named.keys())
    unknown = sorted(first_names - {*FROZEN, *TRAINABLE})
    if missing or unknown:
        raise KeyError(f"This model lacks {missing[:5]} and has {unknown[:5]} besides.")
    for name in FROZEN:
        named[name].grad = None
        if MECHANISM == "requires_grad":
            named[name].requires_grad_(False)
    for name in TRAINABLE:
        named[name].requires_grad_(True)
    modules = dict(model.named_modules())
    for path in HELD_IN_EVAL:
        modules[path].eval()
        modules[path].__dict__["train"] = functools.partial(_stay_in_eval, modules[path])
    _digests[model] = _take_digests(model)
    return model


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for a ``torch.optim`` optimizer, with the rates and decays of the freeze config.

    Frozen parameters are in it too, unless they are frozen by being left out: without a gradient an
    optimizer neither moves them nor keeps anything for them, and to unfreeze one later no group has
    to be added.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_frozen = name in _FROZEN
        is_left_out = MECHANISM == "exclude" and is_frozen
        if is_left_out or not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        scale, decay = GROUPS.get(name, (1.0, None))
        rate = 0.0 if MECHANISM == "zero_lr" and is_frozen else lr * scale
        key = (rate, weight_decay if decay is None else decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def zero_frozen_gradients(model: nn.Module) -> None:
    """For the mechanism ``zero_grad`` alone: call it just before every ``optimizer.step()``."""
    named = _named_parameters(model)
    for name in FROZEN:
        gradient = named[name].grad
        if gradient is not None:
            gradient.zero_()


def assert_frozen(model: nn.Module) -> None:
    """Check that every frozen tensor is, bit for bit, what it was at `apply_freeze`.

    Raises:
        AssertionError: with the names that moved, or that have a gradient and were to have none.
        KeyError: `apply_freeze` was not called on this very model.
    """
    if model not in _digests:
        raise KeyError("This model was not given to apply_freeze(), which remembers what it was.")
    now, before = _take_digests(model), _digests[model]
    moved = [name for name in before if now.get(name) != before[name]]
    if moved:
        raise AssertionError(f"{len(moved)} frozen tensors moved: {', '.join(moved)}")
    named = _named_parameters(model)
    if MECHANISM == "requires_grad":
        burdened = [name for name in FROZEN if named[name].grad is not None]
        if burdened:
            raise AssertionError(f"Frozen parameters have a gradient: {', '.join(burdened)}")


_FROZEN = frozenset(FROZEN)


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name it has; a tied one has several."""
    return dict(model.named_parameters(remove_duplicate=False))


def _stay_in_eval(module: nn.Module, _mode: bool = True) -> nn.Module:
    """In the place of a module's own ``train``."""
    return nn.Module.train(module, False)


def _take_digests(model: nn.Module) -> dict[str, str]:
    """Digests of what must not move: frozen parameters, and the buffers of what is held."""
    named, modules = _named_parameters(model), dict(model.named_modules())
    tensors: dict[str, torch.Tensor] = {name: named[name] for name in FROZEN if name in named}
    for path in HELD_IN_EVAL:
        for name, buffer in modules[path].named_buffers():
            tensors[f"{path}.{name}" if path else name] = buffer
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the bytes of a tensor: equal exactly when bit-identical, even NaN and −0."""
    data = tensor.detach().cpu().contiguous()
    size = data.numel() * data.element_size()
    return hashlib.sha256((ctypes.c_char * size).from_address(data.data_ptr())).hexdigest()

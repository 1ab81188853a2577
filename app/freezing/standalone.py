"""Freezing, for a training script of one's own. Depends on torch alone; knows no Frostline.

This file is a working module and the template of every Python download: an export fills in the
constants below, from the marker on.
"""

# --- constants ---
FROZEN: tuple[str, ...] = ()
TRAINABLE: tuple[str, ...] = ()
MECHANISM = "requires_grad"
NORM_STATISTICS = "freeze"
DROPOUT = "keep"
GROUPS: dict[str, tuple[float, float | None]] = {}  # name → (factor on the rate, weight decay)
# --- end of constants ---

import hashlib  # noqa: E402
import types  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402


def apply_freeze(model: nn.Module) -> nn.Module:
    """Freeze `model` in place: flags, stale gradients, norm statistics and dropout.

    From now on ``model.train()`` keeps frozen norms (and frozen dropout, if so chosen) in eval
    mode. Remembers what every frozen tensor was, for `assert_frozen`.

    Raises:
        KeyError: the model has other parameters than the one this file was written for.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    unique = {name for name, _ in model.named_parameters()}
    missing = sorted((set(FROZEN) | set(TRAINABLE)) - set(named))
    unknown = sorted(unique - set(FROZEN) - set(TRAINABLE))
    if missing or unknown:
        raise KeyError(f"This model lacks {missing[:5]} and has {unknown[:5]} besides.")
    for name in FROZEN:
        named[name].grad = None
        if MECHANISM == "requires_grad":
            named[name].requires_grad_(False)
    for name in TRAINABLE:
        named[name].requires_grad_(True)

    held = _held_modules(model)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        type(self).train(self, mode)
        for module in held if mode else ():
            module.eval()
        return self

    model.train = types.MethodType(train, model)  # type: ignore[method-assign]
    model.train(model.training)
    model._frozen_digests = _digests(model)  # type: ignore[assignment]
    return model


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for an optimizer, with the rates and decays of the config."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    frozen = set(FROZEN)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (MECHANISM == "exclude" and name in frozen):
            continue
        scale, decay = GROUPS.get(name, (1.0, None))
        if MECHANISM == "zero_lr" and name in frozen:
            scale = 0.0
        key = (lr * scale, weight_decay if decay is None else decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def zero_frozen_gradients(model: nn.Module) -> None:
    """For the mechanism ``zero_grad``: call it just before ``optimizer.step()``."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in FROZEN:
        gradient = named[name].grad
        if gradient is not None:
            gradient.zero_()


def assert_frozen(model: nn.Module) -> None:
    """Check that every frozen tensor is bit-identical to what it was at `apply_freeze`.

    Raises:
        AssertionError: with the names that moved.
    """
    before: dict[str, str] = model._frozen_digests  # type: ignore[assignment]
    moved = [name for name, digest in _digests(model).items() if digest != before[name]]
    if moved:
        raise AssertionError(f"{len(moved)} frozen tensors moved: {', '.join(moved)}")


def _held_modules(model: nn.Module) -> list[nn.Module]:
    below: dict[str, bool] = {}  # module path → whether all parameters at and below it are frozen
    first = {id(p): name for name, p in model.named_parameters()}
    frozen = set(FROZEN)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name
        while path:
            path = path.rpartition(".")[0]
            below[path] = below.get(path, True) and first[id(parameter)] in frozen
    held = []
    for path, module in model.named_modules():
        norm = getattr(module, "running_mean", None) is not None and NORM_STATISTICS == "freeze"
        drops = isinstance(module, nn.modules.dropout._DropoutNd) or (
            isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
        )
        if norm or (drops and DROPOUT == "off"):
            around = path
            while around not in below and around:
                around = around.rpartition(".")[0]
            if below.get(around, False):
                held.append(module)
    return held


def _digests(model: nn.Module) -> dict[str, str]:
    named = dict(model.named_parameters(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = {name: named[name] for name in FROZEN}
    paths = {module: path for path, module in model.named_modules()}
    for module in _held_modules(model):
        prefix = f"{paths[module]}." if paths[module] else ""
        tensors |= {prefix + name: buffer for name, buffer in module.named_buffers()}
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()

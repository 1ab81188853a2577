"""Watches optimizers and tensors while a model trains: who moved what. It changes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Group = Mapping[str, Any]

SIGN_OF_ZERO = "the sign of a zero changed: a step of size zero turns −0.0 into +0.0"
_REPLACED = "its memory was replaced: by `.data = …`, or the model was converted or moved"
_WRITTEN = (
    "something wrote to it in place, outside the optimizer's step: its module's forward, a hook, "
    "load_state_dict or an initialisation"
)
_BEHIND = (
    "something wrote to it behind autograd's back, through `.data` or shared memory: a forward, a "
    "hook, or code outside the optimizer"
)


class Witness:
    """Remembers what befell frozen parameters at the steps of any optimizer in this process.

    Nothing is copied and, as long as nothing is amiss, nothing computed: it looks at which
    gradients are there, and at the counters by which autograd itself notices writes. It stops
    looking when nobody holds it any more.

    Attributes:
        gradients: frozen parameters on which an optimizer found a gradient.
    """

    def __init__(self) -> None:
        self._mechanism = "requires_grad"
        self._watched: dict[str, nn.Parameter] = {}
        self._marks: dict[str, tuple[int, int]] = {}
        self._writes: dict[str, str] = {}
        self._steps: dict[str, str] = {}
        self.gradients: set[str] = set()
        alive = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (witness := alive()) is not None:
                witness._look_before(optimizer)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (witness := alive()) is not None:
                witness._look_after(optimizer)

        for handle in (
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ):
            weakref.finalize(self, handle.remove)

    def watch(self, parameters: Mapping[str, nn.Parameter], mechanism: str) -> None:
        """From now on these are frozen; what was seen of those that still are is kept."""
        self._mechanism = mechanism
        self._watched = dict(parameters)
        self._marks = {n: self._marks.get(n, _mark(p)) for n, p in parameters.items()}
        self._writes = {n: how for n, how in self._writes.items() if n in parameters}
        self._steps = {n: how for n, how in self._steps.items() if n in parameters}
        self.gradients &= parameters.keys()

    def saw_step(self, name: str) -> bool:
        """Whether an optimizer was seen to move it."""
        return name in self._steps

    def explain(self, name: str) -> str | None:
        """How a frozen parameter was moved, as far as it was seen; None for another name."""
        if name not in self._watched:
            return None
        self._note_write(name, self._watched[name])
        return self._steps.get(name) or self._writes.get(name) or _BEHIND

    def _note_write(self, name: str, parameter: nn.Parameter, by: str = _WRITTEN) -> None:
        """Compare with the last look; a write under ``.data`` leaves no trace to compare."""
        mark = _mark(parameter)
        if mark != self._marks[name]:
            is_elsewhere = mark[1] != self._marks[name][1]
            self._writes.setdefault(name, _REPLACED if is_elsewhere else by)
            self._marks[name] = mark

    def _look_before(self, optimizer: torch.optim.Optimizer) -> None:
        groups: dict[int, Group] | None = None
        for name, parameter in self._watched.items():
            self._note_write(name, parameter)
            is_told = name in self._steps and (
                name in self.gradients or self._mechanism != "requires_grad"
            )
            if parameter.grad is None or is_told:
                continue
            if groups is None:
                groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            if id(parameter) in groups:
                if self._mechanism == "requires_grad":
                    self.gradients.add(name)
                how = self._expect_step(parameter, optimizer, groups[id(parameter)])
                if how is not None:
                    self._steps.setdefault(name, how)

    def _look_after(self, optimizer: torch.optim.Optimizer) -> None:
        by = f"a step of {type(optimizer).__name__} wrote to it"
        for name, parameter in self._watched.items():
            if name in self._steps:
                self._marks[name] = _mark(parameter)
            else:
                self._note_write(name, parameter, by)

    def _expect_step(
        self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, group: Group
    ) -> str | None:
        """How this optimizer is about to move a frozen parameter whose gradient is not None."""
        assert parameter.grad is not None
        kind = type(optimizer).__name__
        if self._mechanism == "zero_lr" and not group["lr"]:
            return None  # as it should be: a step of size zero
        if not parameter.grad.count_nonzero():
            state = optimizer.state.get(parameter) or {}
            movers = {
                "weight decay": group.get("weight_decay"),
                "momentum": state.get("momentum_buffer") is not None,
                "Adam's moments": "exp_avg" in state,
            }
            by = " and ".join(words for words, moves in movers.items() if moves)
            return f"{by} moved it, although its gradient was zero ({kind})" if by else None
        if self._mechanism == "zero_grad":
            return f"its gradient was not zeroed before the step, and {kind} moved it"
        if self._mechanism == "requires_grad" and parameter.requires_grad:
            return f"its `requires_grad` was set back: it got a gradient, and {kind} moved it"
        if self._mechanism == "requires_grad":
            return (
                f"a gradient lay on it while it was frozen, left over or written by hand, and "
                f"{kind} moved it: optimizers ask whether `grad` is None, not `requires_grad`"
            )
        return f"{kind} has it among its parameters and found a gradient"


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


def explain_values(before: torch.Tensor, after: torch.Tensor) -> str | None:
    """What the two values of a tensor alone tell of how one became the other.

    Args:
        before: on the host.
        after: of any shape and type, on any device.
    """
    after = after.detach().cpu()
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"it is {_describe(after)} and was {_describe(before)}"
    if not before.is_floating_point() or not before.numel():
        return None
    if torch.equal(before, after):
        return SIGN_OF_ZERO
    if not bool(after.isfinite().all()):
        return f"{int((~after.isfinite()).sum()):,} of its values are no longer finite"
    for half in (torch.float16, torch.bfloat16):
        if before.dtype != half and torch.equal(before.to(half).to(after.dtype), after):
            return f"its values went through {str(half).removeprefix('torch.')} and back"
    if (factor := _shrinkage(before.double(), after.double())) is not None:
        return f"every value shrank by the factor {factor:.6g}, as weight decay does"
    moved = before != after
    rows = int(moved.any(1).sum()) if moved.dim() == 2 else 0
    if rows and rows * 2 <= moved.shape[0]:
        return f"{rows:,} of its {moved.shape[0]:,} rows changed and the others did not"
    count = int(moved.sum())
    if count * 4 <= moved.numel():
        return f"{count:,} of its {moved.numel():,} values changed and the others did not"
    return None


def _shrinkage(old: torch.Tensor, new: torch.Tensor) -> float | None:
    """The factor below 1 that makes all the new values of the old ones, if there is one."""
    nonzero = old != 0
    if int(nonzero.sum()) < 8 or bool(new[~nonzero].any()):
        return None
    factors = new[nonzero] / old[nonzero]
    mean = factors.mean().item()
    spread = (factors - mean).abs().max().item()
    return mean if 0 < mean < 1 and spread <= 0.01 * (1 - mean) + 1e-6 < 1 - mean else None


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"

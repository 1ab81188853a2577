"""The four mechanisms side by side: a few real steps under each on one model. Knows no data set."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from app.freezing.apply import Freeze, apply_config
from app.freezing.config import MECHANISMS, FreezeConfig
from app.freezing.held import measure_peak
from app.freezing.proof import Proof

Compute = Callable[[nn.Module, int], torch.Tensor]  # (model, step from 0) → loss

ROUNDS = 3  # in which the step is timed under each mechanism in turn


@dataclass(frozen=True)
class Setting:
    """An optimizer as a plain script would make it.

    Attributes:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        max_grad_norm: for ``clip_grad_norm_(model.parameters(), …)``; None does not clip.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def describe(self) -> str:
        """In words: ``SGD with momentum 0.9, clipped at 1``."""
        names = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
        parts = [f"momentum {self.momentum:g}"] if self.momentum else []
        parts += [f"weight decay {self.weight_decay:g}"] if self.weight_decay else []
        clipped = f", clipped at {self.max_grad_norm:g}" if self.max_grad_norm is not None else ""
        return names[self.optimizer] + (f" with {' and '.join(parts)}" if parts else "") + clipped


VARIANTS = (
    Setting("sgd", 0.01),
    Setting("sgd", 0.01, momentum=0.9),
    Setting("sgd", 0.01, weight_decay=0.1),
    Setting("sgd", 0.01, max_grad_norm=0.1),
    Setting("adam", 1e-3),
    Setting("adam", 1e-3, weight_decay=0.1),
    Setting("adam", 1e-3, max_grad_norm=0.1),
    Setting("adamw", 1e-3, weight_decay=0.1),
    Setting("adamw", 1e-3, weight_decay=0.1, max_grad_norm=0.1),
)


def compare_mechanisms(
    model: nn.Module,
    config: FreezeConfig,
    compute: Compute,
    *,
    setting: Setting,
    steps: int = 5,
    seed: int = 0,
    variants: Sequence[Setting] = VARIANTS,
) -> dict[str, Any]:
    """Train a few steps under each mechanism, from the same weights on the same batches.

    Each is used as a plain script uses it: ``optimizer.zero_grad()`` zeroes what the optimizer has,
    and clipping looks at ``model.parameters()``. (A job of ours zeroes every gradient and clips by
    what is trained: there the mechanisms differ in cost and in what moves, not in clipping.)

    Args:
        config: which parameters are frozen, and the norm and dropout policies; its own mechanism
            and groups are left out of account.
        compute: the loss of the model on the batch of a step.
        setting: what step time, memory, gradients left behind and the time after are told for.
        steps: before everything is trained.
        variants: further settings for which only what moved is told.

    Returns:
        JSON values: ``setting``, ``steps``, ``frozen`` and ``trained`` (tensors), ``mechanisms``
        (one each: `_measure`), ``variants`` (one each, with what moved by mechanism).

    Raises:
        InvalidDocument: nothing is trainable.

    Side effects: the model is left with the weights that it came with, under ``requires_grad``.
    """
    came = _Snapshot(model)
    base = replace(config, groups=(), schedule=(), mechanism="requires_grad")
    frozen = apply_config(model, base)
    frozen.parameter_groups(0.0)  # raises where nothing is trainable

    def start(mechanism: str, chosen: Setting) -> _Script:
        came.restore(model)
        torch.manual_seed(seed)
        return _Script(model, replace(base, mechanism=mechanism), chosen, compute)

    measured = {m: _measure(start(m, setting), steps) for m in MECHANISMS}
    for mechanism, times in _time_steps(start, setting, steps).items():
        measured[mechanism]["step_ms"] = times
    for mechanism in MECHANISMS:
        script = start(mechanism, setting)
        peak = measure_peak(script.model, script.optimizer, script.take_step)
        measured[mechanism]["peak_bytes"] = peak
    _compare_with_first(measured)
    varied = []
    for variant in variants:
        outcomes = {m: _outcome(start(m, variant), steps) for m in MECHANISMS}
        _compare_with_first(outcomes)
        for outcome in outcomes.values():
            del outcome["weights"]
        varied.append({**asdict(variant), "name": variant.describe(), "mechanisms": outcomes})
    for result in measured.values():
        del result["weights"], result["afterwards"]["change"]
    for mechanism, result in measured.items():
        result["says"] = list(_sentences(result, measured[MECHANISMS[0]], mechanism, varied))
    came.restore(model)
    apply_config(model, base)
    return {
        "setting": {**asdict(setting), "name": setting.describe()},
        "steps": steps,
        "device": str(next(model.parameters()).device),
        "frozen": sum(frozen.frozen.values()),
        "trained": len(frozen.frozen) - sum(frozen.frozen.values()),
        "mechanisms": [{"mechanism": m, **result} for m, result in measured.items()],
        "variants": varied,
    }


class _Snapshot:
    """Parameters and buffers as they came, on their device."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._values = {name: tensor.detach().clone() for name, tensor in tensors}
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def restore(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in self._values:
                    tensor.copy_(self._values[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._flags[name])
            parameter.grad = None


class _Script:
    """The training loop that somebody would write by hand for one mechanism."""

    def __init__(
        self, model: nn.Module, config: FreezeConfig, setting: Setting, compute: Compute
    ) -> None:
        self.model, self.setting, self.compute = model, setting, compute
        self.mechanism = config.mechanism
        self.freeze: Freeze = apply_config(model, config)
        groups = self.freeze.parameter_groups(setting.weight_decay)
        self.optimizer = _make_optimizer(groups, setting)
        self.taken = 0

    @property
    def frozen(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.freeze.parameters.items() if self.freeze.frozen[n]}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.freeze.parameters.items() if not self.freeze.frozen[n]}

    def backward(self) -> None:
        self.compute(self.model, self.taken).backward()

    def step(self) -> None:
        self.freeze.hold_gradients()
        if self.setting.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.max_grad_norm)
        self.optimizer.step()
        self.taken += 1
        self.optimizer.zero_grad()

    def take_step(self) -> None:
        self.backward()
        self.step()

    def train_everything(self) -> None:
        """What a script does to train everything from now on, with the same optimizer."""
        floating = {n: p for n, p in self.frozen.items() if p.is_floating_point()}
        for parameter in floating.values():
            parameter.requires_grad_(True)
        if self.mechanism == "exclude":
            settings = {"lr": self.setting.lr, "weight_decay": self.setting.weight_decay}
            self.optimizer.add_param_group({"params": list(floating.values()), **settings})
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.lr
        self.freeze.config = replace(self.freeze.config, mechanism="requires_grad")


def _make_optimizer(groups: list[dict[str, Any]], setting: Setting) -> torch.optim.Optimizer:
    rated = [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": setting.lr * group["lr_scale"],
        }
        for group in groups
    ]
    if setting.optimizer == "sgd":
        return torch.optim.SGD(rated, lr=setting.lr, momentum=setting.momentum)
    made = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.AdamW
    return made(rated, lr=setting.lr)


# --------------------------------------------------------------------------- what is told of each


def _outcome(
    script: _Script, steps: int, watch: Callable[[], None] | None = None
) -> dict[str, Any]:
    """What stayed and what moved after some steps; the weights themselves for the comparison.

    Args:
        watch: called after each backward and after each step.
    """
    proof = Proof(script.freeze)
    for _ in range(steps):
        script.backward()
        if watch is not None:
            watch()
        script.step()
        if watch is not None:
            watch()
    changed = proof.check()["frozen"]["changed"]
    told = ("name", "largest_difference", "cause")
    return {
        "frozen_identical": not changed,
        "frozen_moved": [{key: item[key] for key in told} for item in changed],
        "frozen_difference": max((_number(c["largest_difference"]) for c in changed), default=0.0),
        "weights": {n: p.detach().clone() for n, p in script.trained.items()},
    }


def _measure(script: _Script, steps: int) -> dict[str, Any]:
    """`_outcome`, and gradients, optimizer state, what is left behind, and the time after.

    ``left_behind`` is the norm of the gradients of what is frozen after each step and its
    ``zero_grad()``; ``afterwards`` how the first step that trains everything moves what was frozen.
    """
    seen: list[tuple[int, int, int]] = []  # frozen and trained tensors with a gradient, bytes
    norms: list[float] = []

    def watch() -> None:
        frozen, trained = (_gradients(p) for p in (script.frozen, script.trained))
        size = sum(g.numel() * g.element_size() for g in (*frozen, *trained))
        seen.append((len(frozen), len(trained), size))
        norms.append(_norm(frozen))

    outcome = _outcome(script, steps, watch)
    frozen, trained, size = seen[-2]  # after the last backward
    state = tree_leaves([list(s.values()) for s in script.optimizer.state.values()])
    tensors = [value for value in state if isinstance(value, torch.Tensor)]
    return {
        **outcome,
        "gradients": {"frozen": frozen, "trained": trained},
        "gradient_bytes": size,
        "optimizer_bytes": sum(value.numel() * value.element_size() for value in tensors),
        "left_behind": norms[1::2],
        "afterwards": _train_on(script),
    }


def _gradients(parameters: Mapping[str, nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters.values() if p.grad is not None]


def _train_on(script: _Script) -> dict[str, Any]:
    """The first step that trains everything: how far it moves what was frozen until now."""
    frozen = script.frozen
    script.train_everything()
    before = {n: p.detach().clone() for n, p in frozen.items()}
    script.backward()
    script.step()
    change = {n: p.detach().double() - before[n].double() for n, p in frozen.items()}
    return {"update_norm": _norm(list(change.values())), "change": change}


def _compare_with_first(results: Mapping[str, dict[str, Any]]) -> None:
    """Add to each how it differs from what came out under the first mechanism."""
    first = results[MECHANISMS[0]]
    for result in results.values():
        differing = {
            name: (weight.double() - first["weights"][name].double()).abs().max().item()
            for name, weight in result["weights"].items()
            if not torch.equal(weight, first["weights"][name])
        }
        result["trained_identical"] = not differing
        result["trained_differing"] = list(differing)
        result["trained_difference"] = max(map(_number, differing.values()), default=0.0)
        if "afterwards" in result:
            own, fresh = result["afterwards"]["change"], first["afterwards"]["change"]
            product = sum((own[n] * fresh[n]).sum().item() for n in own)
            norms = result["afterwards"]["update_norm"], first["afterwards"]["update_norm"]
            result["afterwards"] |= {
                "times_fresh": norms[0] / norms[1] if norms[1] else None,
                "cosine_to_fresh": product / (norms[0] * norms[1]) if all(norms) else None,
            }


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    if not tensors:
        return 0.0
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _number(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _sentences(
    result: Mapping[str, Any],
    first: Mapping[str, Any],
    mechanism: str,
    varied: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """What the numbers of one mechanism say."""
    unused, left = result["gradients"]["frozen"], result["left_behind"]
    if not unused:
        yield "No gradient of what is frozen is computed or kept."
    else:
        more = result["gradient_bytes"] - first["gradient_bytes"]
        yield f"{unused} gradients of frozen tensors are computed, and held in {more:,} bytes."
    if left[-1]:
        yield (
            "optimizer.zero_grad() never sees them: they add up, from a norm of "
            f"{left[0]:.3g} after the first step to {left[-1]:.3g} after step {len(left)}."
        )
    moving = [v for v in varied if not v["mechanisms"][mechanism]["frozen_identical"]]
    if moving or not result["frozen_identical"]:
        names = "; ".join(v["name"] for v in moving) or "the measured setting"
        yield f"What is frozen moves under {names}."
    else:
        yield "What is frozen stayed bit-identical in every setting."
    other = [v["name"] for v in varied if not v["mechanisms"][mechanism]["trained_identical"]]
    if other:
        yield f"What is trained comes out different under {'; '.join(other)}."
    elif mechanism != MECHANISMS[0]:
        yield "What is trained came out the same, bit for bit, in every setting."
    times, cosine = (result["afterwards"][key] for key in ("times_fresh", "cosine_to_fresh"))
    if times is not None and cosine is not None and (abs(times - 1) > 0.01 or cosine < 0.999):
        yield (
            f"Trained afterwards, what was frozen first moves {times:.2f} times as far as from a "
            f"fresh start, in a direction with cosine {cosine:.3f} to it."
        )


# --------------------------------------------------------------------------------- time and memory


def _time_steps(
    start: Callable[[str, Setting], _Script], setting: Setting, steps: int
) -> dict[str, float]:
    """Milliseconds of a step under each mechanism, the median over rounds of all in turn."""
    times: dict[str, list[float]] = {mechanism: [] for mechanism in MECHANISMS}
    for _ in range(ROUNDS):
        for mechanism in MECHANISMS:
            script = start(mechanism, setting)
            script.backward()
            script.step()  # allocates the state of the optimizer
            for _ in range(max(1, steps - 1)):
                _wait_for_device(script.model)
                began = time.perf_counter()
                script.backward()
                script.step()
                _wait_for_device(script.model)
                times[mechanism].append((time.perf_counter() - began) * 1e3)
    return {mechanism: statistics.median(taken) for mechanism, taken in times.items()}


def _wait_for_device(model: nn.Module) -> None:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()

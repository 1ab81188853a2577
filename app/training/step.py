"""One optimizer step: accumulate, unscale, measure, clip, step, measure. Knows no order of data."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from app.freezing.apply import Freeze
from app.freezing.errors import InvalidDocument
from app.freezing.measure import Inspection, LayerMeasure, LayerStats
from app.freezing.trace import trace_model
from app.sources.models import BuiltModel
from app.training.batches import count_examples, move_batch
from app.training.forward import choose_autocast, prepare_forward
from app.training.judge import call_on_batch, compute_loss
from app.training.misfit import Misfits
from app.training.optimizer import Groups, make_optimizer, set_rates
from app.training.recipe import Recipe

MAX_SKIPPED_IN_A_ROW = 50  # a gradient scaler halves its scale each time: 2⁻⁵⁰ helps nobody


class NonFinite(Exception):
    """A loss or gradient became NaN or infinite; caught before the optimizer's step.

    Attributes:
        values: the loss and the gradient norm as metrics.
    """

    def __init__(self, message: str, **values: float) -> None:
        super().__init__(message)
        self.values = values


class StaleGraph(RuntimeError):
    """A compiled model goes on without the gradients that a change of the frozen set calls for."""


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step has to tell.

    Attributes:
        stats: layer measures known by now; from a device those of the step measured before.
        inspection: what an exact pass found, in the few steps that have one.
        measure_ms: what measuring took; on a device, what it took to ask for it.
    """

    values: dict[str, float]
    stats: list[LayerStats]
    inspection: Inspection | None
    unreached: list[str]
    measure_ms: float


class Stepper:
    """Takes optimizer steps with one model, one optimizer and one gradient scaler.

    Attributes:
        skipped: steps in a row that were not taken, by why (``amp`` or ``nonfinite``).
    """

    def __init__(
        self,
        built: BuiltModel,
        freeze: Freeze,
        groups: Groups,
        recipe: Recipe,
        *,
        device: torch.device,
        total_steps: int,
        compile_backend: str,
    ) -> None:
        self._built, self._freeze, self._recipe = built, freeze, recipe
        self._device, self._total_steps = device, total_steps
        self.optimizer = make_optimizer(groups, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.autocast = choose_autocast(recipe, device)
        self.measure = LayerMeasure(
            freeze.graph, freeze.parameters, is_exact=recipe.measures == "exact"
        )
        self.skipped: dict[str, int] = {}
        self._forward: Callable[..., Any] = prepare_forward(built.model, recipe, compile_backend)
        self._expected: list[str] = []

    def take(self, window: list[Any], step: int) -> StepRecord | None:
        """Take optimizer step `step` (from 1) on the batches of one accumulation window.

        Returns:
            None where the step was left out: fp16 gradients overflowed, or something was not finite
            and the recipe skips that. The model is then as it was.

        Raises:
            NonFinite: the loss or the gradient is no longer a number.
            InvalidDocument: the loss depends on nothing trainable, or does not fit the data.
        """
        recipe = self._recipe
        self._measure_s = 0.0
        with Misfits(self._built, window) as misfits:
            loss = self._accumulate(window, misfits)
            if self.scaler.is_enabled():
                self._unscale()
            with self._clock():
                total_norm = self.measure.read_gradients(self._freeze.frozen)
            # The one sync, where also a GPU tells what it met.
            loss_value, norm_value = torch.stack([loss.double(), total_norm]).tolist()
        if not self._is_sound(loss_value, norm_value, step):
            self._skip("nonfinite")
            return None
        unreached = self._check_expected(window)
        rate = set_rates(self.optimizer, recipe, step, self._total_steps)
        values = {"loss": loss_value, "lr": rate, "grad_norm_total": norm_value}
        if recipe.max_grad_norm is not None:
            values["clip_factor"] = self._clip(total_norm, norm_value, recipe.max_grad_norm)
        self._freeze.hold_gradients()
        turn, between = divmod(step, recipe.stats_every)
        is_measured = between == 0 and recipe.measures != "none"
        if is_measured and recipe.measures != "gradients":
            with self._clock():
                self.measure.before_update(turn)
        if not self._step_optimizer():
            self._skip("amp")
            return None
        stats, inspection = self._measure(step) if is_measured else ([], None)
        self._clear_gradients()
        values |= {f"{why}_skipped": float(count) for why, count in self.skipped.items()}
        self.skipped = {}
        if inspection is not None:
            if inspection.estimate_error is not None:
                values["update_norm_error"] = inspection.estimate_error
            if inspection.lost_share is not None:
                values["lost_updates"] = inspection.lost_share
        return StepRecord(values, stats, inspection, unreached, self._measure_s * 1e3)

    def _measure(self, step: int) -> tuple[list[LayerStats], Inspection | None]:
        with self._clock():
            if self._recipe.measures == "gradients":
                return [self.measure.tell_gradients(step)], None
            return self.measure.after_update(step), self.measure.inspection

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Counts what is done under it as measuring."""
        began = time.perf_counter()
        yield
        self._measure_s += time.perf_counter() - began

    def expect(self, names: Iterable[str]) -> None:
        """These are trainable from the next step on: look whether gradients really come."""
        self._expected = list(names)
        if self._recipe.compile:
            torch._dynamo.reset()

    def _accumulate(self, window: list[Any], misfits: Misfits) -> torch.Tensor:
        """Backward over the batches of one step, each weighted by its examples; the mean loss."""
        sizes = [count_examples(batch) for batch in window]
        total = torch.zeros((), device=self._device)
        for loaded, size in zip(window, sizes, strict=True):
            batch = move_batch(loaded, self._device)
            with self.autocast():
                output = misfits.output = call_on_batch(self._forward, batch)
                loss = compute_loss(self._built, output, batch) * (size / sum(sizes))
            if not loss.requires_grad:
                message = "The loss does not depend on anything trainable under this config."
                raise InvalidDocument([("config", message)])
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _unscale(self) -> None:
        self.scaler.unscale_(self.optimizer)
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for parameter in self._freeze.parameters.values():  # left out of the optimizer, yet scaled
            if parameter.grad is not None and id(parameter) not in stepped:
                parameter.grad.div_(self.scaler.get_scale())

    def _is_sound(self, loss: float, norm: float, step: int) -> bool:
        """Whether loss and norm are numbers, or a norm that the scaler will deal with.

        Raises:
            NonFinite: they are not, and the recipe stops at that, or all too many were skipped.
        """
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return True
        if self._recipe.on_nonfinite == "skip":
            return False
        what = f"The loss is {loss}" if not math.isfinite(loss) else f"The gradient norm is {norm}"
        raise NonFinite(
            f"{what} in step {step}; the optimizer did not take it. "
            "Lower the learning rate, clip the gradient, or look at the data of this step.",
            loss=loss,
            grad_norm_total=norm,
        )

    def _check_expected(self, window: list[Any]) -> list[str]:
        """Which newly trainable parameters got no gradient: nothing leads to them.

        Raises:
            StaleGraph: something does, and the compiled model runs without it.
        """
        parameters = self._freeze.parameters
        without = [name for name in self._expected if parameters[name].grad is None]
        self._expected = []
        if without and self._recipe.compile:
            batch = window[0] if isinstance(window[0], Mapping) else window[0][0]
            example = batch if self._built.example is None else self._built.example
            nodes = trace_model(self._built.model, example, loss=self._built.loss).nodes
            reached = {node.parameter for node in nodes}
            missing = [name for name in without if name in reached]
            if missing:
                raise StaleGraph(f"The compiled model gives no gradient to {', '.join(missing)}.")
        return without

    def _clip(self, total_norm: torch.Tensor, norm_value: float, limit: float) -> float:
        """Clip what is trainable; the factor that its gradients were multiplied by."""
        trainable = [p for p in self._freeze.trainable() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(trainable, limit, total_norm.float())
        return min(1.0, limit / (norm_value + 1e-6))

    def _step_optimizer(self) -> bool:
        """Whether the optimizer stepped: a scaler leaves out steps with infinite gradients."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _skip(self, why: str) -> None:
        self._clear_gradients()
        if why == "nonfinite" and self.scaler.is_enabled():
            self.scaler.update()
        self.skipped[why] = self.skipped.get(why, 0) + 1
        if sum(self.skipped.values()) >= MAX_SKIPPED_IN_A_ROW:
            advice = "Use bf16 or fp32." if why == "amp" else "Lower the learning rate."
            kind = "infinite fp16 gradients" if why == "amp" else "a loss or gradient not finite"
            raise NonFinite(f"{MAX_SKIPPED_IN_A_ROW} steps in a row had {kind}. {advice}")

    def _clear_gradients(self) -> None:
        """Of every parameter: one left out of the optimizer would gather its gradients for ever."""
        for parameter in self._freeze.parameters.values():
            parameter.grad = None

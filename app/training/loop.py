"""One training run, from weights to proof. Reports by calling emit; knows not who listens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from app.freezing.config import FreezeConfig
from app.freezing.measure import LayerStats
from app.freezing.proof import Proof
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.batches import Batches, read_generators, seed_generators, write_generators
from app.training.checkpoint import (
    Checkpoint,
    delete_checkpoint,
    describe_base,
    describe_for_transformers,
    load_checkpoint_model,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from app.training.forward import choose_autocast
from app.training.judge import judge_sets
from app.training.optimizer import flatten_state, read_state, unflatten_state
from app.training.phases import Phases
from app.training.places import checkpoint_steps
from app.training.recipe import Recipe
from app.training.start import begin_words, describe_start, peak_bytes, unmatched_words
from app.training.step import NonFinite, Stepper

Emit = Callable[[str, dict[str, Any]], None]

HOLD_POLL_SECONDS = 0.05


class Wish(Protocol):
    """What somebody wants of this run now; `state` is running, hold, release or stop."""

    @property
    def state(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def edits(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and after which optimizer step: succeeded, stopped or released."""

    outcome: str
    step: int


_ENDINGS = {"stop": "stopped", "release": "released"}


def train(
    built: BuiltModel,
    data: Data,
    config: FreezeConfig,
    recipe: Recipe,
    *,
    device: str,
    checkpoints: Path,
    emit: Emit,
    wishes: Callable[[], Wish],
    resume_from: Path | None = None,
    compile_backend: str = "inductor",
) -> Outcome:
    """Train until the recipe is done or somebody wishes otherwise.

    Args:
        device: as this process sees it, ``cpu`` or ``cuda:N``.
        checkpoints: the folder that gets ``step-NNNNNNNNN`` folders.
        emit: called with (kind, payload) for every start, state, metrics, layers, proof,
            checkpoint, freeze, and line for the log.
        wishes: asked before every step; must be cheap.
        resume_from: a checkpoint of the same model to go on from.
        compile_backend: of torch.compile, where the recipe compiles.

    Raises:
        InvalidDocument: nothing is trainable, or model, data and options do not go together.
        NonFinite: the loss or the gradient is no longer a number.
        CorruptCheckpoint: `resume_from` is not what was written, or is part of another model.

    Side effects: seeds the global generators; moves the model to the device; writes checkpoints.
    """
    earlier = None if resume_from is None else read_checkpoint(resume_from)
    place = torch.device(device)
    run = _Run(built, data, config, recipe, place, checkpoints, emit, wishes, compile_backend)
    run.begin(earlier)
    outcome = "succeeded"
    while not run.is_done():
        wish = run.obey()
        if wish in _ENDINGS:
            outcome = _ENDINGS[wish]
            break
        if run.owes_evaluation():
            run.evaluate()
        elif run.owes_proof():
            run.prove()
        elif run.owes_checkpoint():
            run.save()
        else:
            run.change_what_is_frozen()
            run.take_step()
    run.save(final=True, whole=outcome == "succeeded")
    return Outcome(outcome, run.step)


def evaluate(
    built: BuiltModel,
    data: Data,
    recipe: Recipe,
    *,
    device: str,
    emit: Emit,
    wishes: Callable[[], Wish],
) -> Outcome:
    """Metrics on every evaluation set, under no_grad, as step 0; on the training set if none."""
    place = torch.device(device)
    built.model.to(place)
    seed_generators(recipe.seed)
    emit("start", describe_start(data, recipe, place, []))
    emit("state", {"state": "running", "seq": wishes().seq})
    judged = judge_sets(
        built, data, recipe, place, choose_autocast(recipe, place), _is_ending(wishes)
    )
    if judged is None:
        return Outcome("stopped", 0)
    emit("metrics", {"step": 0, "epoch": 0.0, "values": judged, "step_ms": None})
    return Outcome("succeeded", 0)


class _Run:
    """Where one run stands between two optimizer steps, and what it owes next.

    Attributes:
        step: optimizer steps taken.
        evaluated_at: the step of the newest evaluation, -1 before the first.
        changed_at: likewise the step after which the frozen set changed last.
        ever_trained: names that may differ from the base model.
    """

    def __init__(
        self,
        built: BuiltModel,
        data: Data,
        config: FreezeConfig,
        recipe: Recipe,
        device: torch.device,
        checkpoints: Path,
        emit: Emit,
        wishes: Callable[[], Wish],
        compile_backend: str,
    ) -> None:
        self.built, self.data, self.config, self.recipe = built, data, config, recipe
        self.device, self.checkpoints = device, checkpoints
        self.emit, self.wishes, self.compile_backend = emit, wishes, compile_backend
        self.step, self.edits_seen = 0, 0
        self.best_loss, self.worse = math.inf, 0
        self.evaluated_at, self.changed_at = -1, -1
        self.proved: tuple[int, int, int] | None = None  # where it stood at the newest check
        self.saved: tuple[tuple[int, int, int], bool] | None = None  # at the newest checkpoint
        self.elapsed_s, self.proof_s, self.proofs = 0.0, 0.0, 0
        self.batches = Batches(
            data.train,
            recipe.batch_size,
            seed=recipe.seed,
            collate=data.collate,
            seed_items=data.seed_items,
            num_workers=data.num_workers,
            drop_single=_has_batch_norm(built.model),
        )
        self.steps_per_epoch = -(-self.batches.per_epoch // recipe.grad_accumulation)
        by_epochs = recipe.epochs * self.steps_per_epoch
        self.total_steps = by_epochs if recipe.max_steps is None else recipe.max_steps

    # -------------------------------------------------------------------------- begin and resume

    def begin(self, earlier: Checkpoint | None) -> None:
        """Get everything ready: afresh, or as the checkpoint has it."""
        model, recipe = self.built.model, self.recipe
        model.to(self.device)
        self.base = describe_base(model) if recipe.checkpoint_tensors == "trained" else None
        if earlier is not None:
            load_checkpoint_model(model, earlier)
            self.step = earlier.step
        self.phases = Phases(
            model,
            self.config,
            steps_per_epoch=self.steps_per_epoch,
            step=self.step,
            then=None if earlier is None else earlier.state,
        )
        self.freeze = self.phases.freeze
        self.ever_trained = {n for n, is_frozen in self.freeze.frozen.items() if not is_frozen}
        self.stepper = Stepper(
            self.built,
            self.freeze,
            self.phases.groups(self.step, recipe.weight_decay),
            recipe,
            device=self.device,
            total_steps=self.total_steps,
            compile_backend=self.compile_backend,
        )
        self.proof = Proof(self.freeze)
        seed_generators(recipe.seed)
        resumed = None if earlier is None else self._restore(earlier)
        self._announce(resumed)
        self.began_at = self.last_step_at = time.perf_counter()

    def _announce(self, resumed: dict[str, Any] | None) -> None:
        freeze = self.freeze
        start = describe_start(
            self.data, self.recipe, self.device, self.stepper.measure.layers,
            total_steps=self.total_steps, step=self.step, resumed=resumed,
        )  # fmt: skip
        start["estimated"] = self.stepper.measure.estimated
        start["warnings"] += unmatched_words(self.config, freeze.graph)
        for line in begin_words(start, freeze.frozen, self.steps_per_epoch):
            self._say(line)
        self.emit("start", start)
        self.emit("state", {"state": "running", "seq": self.wishes().seq})
        if self.batches.left_out:
            self._say("A last batch of one example is left out: BatchNorm cannot train on it.")

    def _restore(self, earlier: Checkpoint) -> dict[str, Any]:
        """Everything but parameters and persistent buffers, which are in place; all by name.

        Returns:
            What became of the optimizer's state, see `Phases.describe_resume`.
        """
        state, tensors = earlier.state, earlier.trainer
        buffers = dict(self.built.model.named_buffers())
        with torch.no_grad():
            for name, tensor in _below("buffer", tensors).items():
                if name in buffers:  # one that a forward registers is not there yet
                    buffers[name].copy_(tensor)
        fused = self.recipe.implementation == "fused"
        optimizer, parameters = self.stepper.optimizer, self.freeze.parameters
        for name, values in unflatten_state("optimizer", tensors, self.device, fused).items():
            optimizer.state[parameters[name]] = values
        self.freeze.parked.update(unflatten_state("parked", tensors, self.device, fused))
        self.proof.resume(state["proof"])
        self.stepper.measure.resume(state["gradients"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.stepper.skipped = dict(state["skipped"])
        self.batches.seek(state["position"])
        self.best_loss, self.worse = state["best_loss"], state["worse"]
        self.evaluated_at, self.elapsed_s = state["evaluated_at"], state["elapsed_s"]
        self.ever_trained |= set(state["ever_trained"])
        self.saved = (self._standing(), earlier.base is None)
        write_generators(_below("generator", tensors), state["generators"], self.device)
        return self.phases.describe_resume(self.step, optimizer)

    # ------------------------------------------------------------------------------------ wishes

    def obey(self) -> str:
        """Follow the wish of the moment; comes back when it is to go on, stop or release."""
        wish = self.wishes()
        if wish.state == "hold":
            self._tell_stats(self.stepper.measure.finish())
            self.emit("state", {"state": "paused", "seq": wish.seq})
            while wish.state == "hold":  # another process's file: there is nothing to wait on
                self._take_edits(wish)
                time.sleep(HOLD_POLL_SECONDS)
                wish = self.wishes()
            if wish.state == "running":
                self.emit("state", {"state": "running", "seq": wish.seq})
            self.last_step_at = time.perf_counter()
        self._take_edits(wish)
        return wish.state

    def _take_edits(self, wish: Wish) -> None:
        for edit in wish.edits[self.edits_seen :]:
            self.edits_seen += 1
            if refusal := self.phases.take_edit(edit, self.step):
                self._say(f"Live edit refused: {refusal}")
            told = {"step": self.step, "seq": edit.get("seq", wish.seq)}
            self.emit("freeze", {**told, "config": self.phases.document()})

    def change_what_is_frozen(self) -> None:
        """Make the schedule's entries hold that are due for the next step."""
        turn = self.phases.enter(self.step, self.stepper.optimizer, self.recipe.weight_decay)
        self.proof.follow(turn.frozen, turn.unfrozen)
        if not (turn.frozen or turn.unfrozen):
            return
        self.changed_at = self.step
        self.ever_trained |= set(turn.unfrozen)
        self.stepper.expect(turn.unfrozen)
        self._say(f"From step {self.step + 1}: {turn.words()}.")

    # ---------------------------------------------------------------------------------- one step

    def is_done(self) -> bool:
        patience = self.recipe.patience
        at_end = self.step >= self.total_steps
        gave_up = patience is not None and self.worse >= patience
        return (at_end or gave_up) and not self.owes_evaluation()

    def take_step(self) -> None:
        """One optimizer step, and what it has to tell."""
        window = self.batches.next_window(self.recipe.grad_accumulation)
        try:
            record = self.stepper.take(window, self.step + 1)
        except NonFinite as error:
            if error.values:
                self._report(error.values, None, step=self.step + 1)
            raise
        if record is None:
            return
        self.step += 1
        now = time.perf_counter()
        step_ms, self.last_step_at = (now - self.last_step_at) * 1e3, now
        self.elapsed_s += step_ms / 1e3
        self._tell_stats(record.stats)
        self._report(record.values, step_ms, measure_ms=record.measure_ms)
        if record.inspection is not None:
            found = record.inspection
            self.emit("inspection", {k: getattr(found, k) for k in ("step", "unreached", "lost")})
        if record.unreached:
            names = ", ".join(record.unreached)
            self._say(f"Step {self.step}: unfrozen, but no gradient comes to {names}.")

    def _tell_stats(self, known: Sequence[LayerStats]) -> None:
        for stats in known:
            self.emit("layers", asdict(stats))

    def _report(
        self,
        values: Mapping[str, float],
        step_ms: float | None,
        step: int | None = None,
        measure_ms: float | None = None,
    ) -> None:
        epoch, batch = divmod(self.batches.position, self.batches.per_epoch)
        seen = min(batch * self.recipe.batch_size, self.batches.size) / self.batches.size
        payload = {
            "step": self.step if step is None else step,
            "epoch": epoch + seen,
            "values": dict(values),
            "step_ms": step_ms,
            "measure_ms": measure_ms,
            "elapsed_s": self.elapsed_s,
        }
        self.emit("metrics", payload)

    def _say(self, line: str) -> None:
        self.emit("log", {"text": line})

    # --------------------------------------------------------------- evaluate, prove and save

    def owes_evaluation(self) -> bool:
        """Before the first step, at every interval, and at the end; each only once."""
        if not self.data.evals or self.evaluated_at == self.step:
            return False
        return self.step % self._eval_interval() == 0 or self.step == self.total_steps

    def _eval_interval(self) -> int:
        return self.recipe.eval_every or self.steps_per_epoch

    def evaluate(self) -> None:
        """Judge every evaluation set, unless a stop comes in between; then it stays owed."""
        judged = judge_sets(
            self.built, self.data, self.recipe, self.device, self.stepper.autocast,
            _is_ending(self.wishes),
        )  # fmt: skip
        self.freeze.train()
        self.last_step_at = time.perf_counter()
        if judged is None:
            return
        self.evaluated_at = self.step
        self._report(judged, None)
        shown = ", ".join(f"{name.removeprefix('eval/')} {v:.4g}" for name, v in judged.items())
        self._say(f"Step {self.step}: {shown}")
        loss = judged[f"eval/{next(iter(self.data.evals))}/loss"]
        is_better = loss < self.best_loss
        self.best_loss, self.worse = (loss, 0) if is_better else (self.best_loss, self.worse + 1)

    def owes_proof(self) -> bool:
        """At every interval, and after the first step under a changed frozen set."""
        if self.step == 0 or self.proved == self._standing():
            return False
        every = self.recipe.proof_every or self._eval_interval()
        return self.step % every == 0 or self.step == self.changed_at + 1

    def prove(self) -> None:
        """Check the proof, and say what all checks of this attempt have cost."""
        began = time.perf_counter()
        document = self.proof.check(self.stepper.measure.gradient_history())
        self.last_step_at = time.perf_counter()
        check_s = self.last_step_at - began
        self.proofs, self.proof_s = self.proofs + 1, self.proof_s + check_s
        share = self.proof_s / (self.last_step_at - self.began_at)
        cost = {"check_ms": check_s * 1e3, "checks": self.proofs, "share": share}
        clocked = {"cost": cost, "peak_bytes": peak_bytes(self.device)}
        self.emit("proof", {**document, "step": self.step, **clocked})
        self._say(f"Step {self.step}: the verdict of the proof is {document['verdict']!r}.")
        self.proved = self._standing()
        self.ever_trained |= {item["name"] for item in document["frozen"]["changed"]}

    def owes_checkpoint(self) -> bool:
        every = self.recipe.checkpoint_every
        return bool(every and self.step and self.step % every == 0) and not self._is_saved()

    def _standing(self) -> tuple[int, int, int]:
        """Where the run stands: under one config, whatever there is to keep follows from it."""
        return self.step, self.batches.position, self.evaluated_at

    def _is_saved(self, whole: bool = False) -> bool:
        """Whether the newest checkpoint on disk has this state, and whole where that is asked."""
        return (
            self.saved is not None
            and self.saved[0] == self._standing()
            and (self.saved[1] or not (whole or self.base is None))
        )

    def save(self, *, final: bool = False, whole: bool = False) -> None:
        """Prove, then write a checkpoint where this state has none, then let the oldest go."""
        self._tell_stats(self.stepper.measure.finish())
        if self.proved != self._standing():
            self.prove()
        if not self._is_saved(whole):
            is_whole = whole or self.base is None
            checkpoint = self._checkpoint(is_whole)
            self.emit("checkpoint", write_checkpoint(self.checkpoints, checkpoint))
            self.saved = (self._standing(), is_whole)
        kept = self.recipe.keep_last + (1 if final else 0)
        for step in checkpoint_steps(self.checkpoints)[:-kept]:
            delete_checkpoint(self.checkpoints, step)
            self.emit("checkpoint_deleted", {"step": step})
        self.last_step_at = time.perf_counter()

    def _checkpoint(self, is_whole: bool) -> Checkpoint:
        model, freeze, stepper = self.built.model, self.freeze, self.stepper
        tensors = model_tensors(model)
        trainer = {f"buffer/{n}": b for n, b in model.named_buffers() if n not in tensors}
        generators, generator_values = read_generators(self.device)
        trainer |= {f"generator/{name}": tensor for name, tensor in generators.items()}
        trainer |= flatten_state("optimizer", read_state(stepper.optimizer, freeze.parameters))
        trainer |= flatten_state("parked", freeze.parked)
        if not is_whole:  # buffers are small, and some move whatever is frozen
            base = set(freeze.parameters) - self.ever_trained
            tensors = {name: t for name, t in tensors.items() if name not in base}
        return Checkpoint(
            step=self.step,
            model=tensors,
            trainer=trainer,
            state={
                "position": self.batches.position,
                "evaluated_at": self.evaluated_at,
                "best_loss": self.best_loss,
                "worse": self.worse,
                "skipped": stepper.skipped,
                "scaler": stepper.scaler.state_dict(),
                "generators": generator_values,
                "gradients": stepper.measure.gradient_history(),
                "proof": self.proof.state(),
                "frozen": freeze.frozen,
                "ever_trained": sorted(self.ever_trained),
                "config": self.phases.document(),
                "elapsed_s": self.elapsed_s,
            },
            base=None if is_whole else self.base,
            beside=describe_for_transformers(model) if is_whole else {},
        )


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _is_ending(wishes: Callable[[], Wish]) -> Callable[[], bool]:
    return lambda: wishes().state in _ENDINGS


def _below(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{kind}/"
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

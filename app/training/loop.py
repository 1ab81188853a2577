"""One training run, from weights to proof. Reports by calling emit; knows not who listens."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from app.freezing.apply import Freeze, apply_config
from app.freezing.config import (
    Change,
    FreezeConfig,
    config_document,
    due_changes,
    match_names,
    parse_config,
    parse_rules,
    rule_document,
    unmatched_rules,
)
from app.freezing.errors import InvalidDocument
from app.freezing.measure import LayerMeasure
from app.freezing.presets import shortest_rules
from app.freezing.proof import Proof
from app.freezing.trace import read_model
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.batches import (
    Batches,
    count_examples,
    move_batch,
    read_generators,
    seed_generators,
    write_generators,
)
from app.training.checkpoint import (
    Checkpoint,
    delete_checkpoint,
    load_model_tensors,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from app.training.judge import call_on_batch, compute_loss, evaluate_set
from app.training.places import checkpoint_steps
from app.training.recipe import Recipe, learning_rate_factor

Emit = Callable[[str, dict[str, Any]], None]

HOLD_POLL_SECONDS = 0.05
MAX_SKIPPED_IN_A_ROW = 50  # a gradient scaler halves its scale each time: 2⁻⁵⁰ helps nobody


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


class NonFinite(Exception):
    """A loss or gradient became NaN or infinite; caught before the optimizer's step."""


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
) -> Outcome:
    """Train until the recipe is done or somebody wishes otherwise.

    Args:
        device: as this process sees it, ``cpu`` or ``cuda:N``.
        checkpoints: the folder that gets ``step-NNNNNNNNN`` folders.
        emit: called with (kind, payload) for every start, state, metrics, layers, proof,
            checkpoint, freeze, and line for the log.
        wishes: asked before every step; must be cheap.
        resume_from: a checkpoint of the same model to go on from.

    Raises:
        InvalidDocument: nothing is trainable, or model, data and options do not go together.
        NonFinite: the loss or the gradient is no longer a number.
        CorruptCheckpoint: `resume_from` is not what was written.

    Side effects: seeds the global generators; moves the model to the device; writes checkpoints.
    """
    earlier = None if resume_from is None else read_checkpoint(resume_from)
    place = torch.device(device)
    run = _Run(built, data, config, recipe, place, checkpoints, emit, wishes, earlier)
    run.begin()
    outcome = "succeeded"
    while not run.is_done():
        wish = run.obey()
        if wish in _ENDINGS:
            outcome = _ENDINGS[wish]
            break
        if run.owes_evaluation():
            run.evaluate()
        elif run.owes_checkpoint():
            run.save()
        else:
            run.change_what_is_frozen()
            run.take_step()
    run.save(final=True)
    return Outcome(outcome, run.step)


_ENDINGS = {"stop": "stopped", "release": "released"}


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
    emit("start", _describe_start(data, recipe, place, layers=[], total_steps=0, step=0))
    emit("state", {"state": "running", "seq": wishes().seq})
    judged = _evaluate_sets(built, data, recipe, place, wishes)
    if judged is None:
        return Outcome("stopped", 0)
    emit("metrics", {"step": 0, "epoch": 0.0, "values": judged, "step_ms": None})
    return Outcome("succeeded", 0)


class _Run:
    """The state of one run between two optimizer steps."""

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
        earlier: Checkpoint | None,
    ) -> None:
        self.built, self.data, self.recipe, self.device = built, data, recipe, device
        self.checkpoints, self.emit, self.wishes = checkpoints, emit, wishes
        self.earlier = earlier
        self.step = 0 if earlier is None else earlier.step
        self.skipped = 0
        self.best_loss, self.worse = math.inf, 0
        self.evaluated_at = -1  # the step of the newest evaluation
        self.saved: tuple[int, dict[str, bool]] | None = None  # step and freeze state on disk
        self.edits_seen = 0
        built.model.to(device)
        if earlier is not None:
            load_model_tensors(built.model, earlier.model)
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
        self.total_steps = recipe.max_steps
        if self.total_steps is None:
            self.total_steps = recipe.epochs * self.steps_per_epoch
        self.config = config
        self.freeze: Freeze = apply_config(built.model, self._config_to_begin_with())
        self.groups = self.freeze.parameter_groups(recipe.weight_decay)
        self.optimizer = _make_optimizer(self.groups, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.autocast = _autocast(recipe, device)
        self.forward: Callable[..., Any] = _prepare_forward(built.model, recipe)
        self.measure = LayerMeasure(self.freeze.graph, self.freeze.parameters)
        self.proof = Proof(self.freeze)

    # -------------------------------------------------------------------------- begin and resume

    def begin(self) -> None:
        seed_generators(self.recipe.seed)
        if self.earlier is not None:
            self._restore(self.earlier)
        start = _describe_start(
            self.data, self.recipe, self.device, self.measure.layers, self.total_steps, self.step
        )
        for index in unmatched_rules(self.config, self.freeze.graph):
            rule = rule_document(self.config.rules[index])
            start["warnings"].append(
                f"Rule {index + 1} matches no parameter of this model: {json.dumps(rule)}."
            )
        frozen = sum(self.freeze.frozen.values())
        self._say(
            f"Training on {start['device_name']} from step {self.step} to {self.total_steps}: "
            f"{len(self.freeze.frozen) - frozen} tensors trainable, {frozen} frozen, "
            f"{start['train_size']} examples, {self.steps_per_epoch} steps an epoch."
        )
        self.emit("start", start)
        self.emit("state", {"state": "running", "seq": self.wishes().seq})
        if self.batches.left_out:
            self._say("A last batch of one example is left out: BatchNorm cannot train on it.")
        self.last_step_at = time.perf_counter()

    def _config_to_begin_with(self) -> FreezeConfig:
        """What was frozen when the checkpoint was written, so that its state fits; else the rules.

        What holds by now and did not hold then comes as a change on the running model.
        """
        config = self._config_at(self.step)
        if self.earlier is None or config.mechanism != "requires_grad":
            return config
        then = parse_config(self.earlier.state["config"])
        return replace(
            config,
            rules=shortest_rules(self.earlier.state["frozen"], read_model(self.built.model)),
            norm_statistics=then.norm_statistics,
            dropout=then.dropout,
        )

    def _restore(self, earlier: Checkpoint) -> None:
        """Everything but parameters and persistent buffers, which are in place; all by name."""
        state, tensors = earlier.state, earlier.trainer
        buffers = dict(self.built.model.named_buffers())
        with torch.no_grad():
            for name, tensor in _below("buffer", tensors).items():
                if name in buffers:  # one that a forward registers is not there yet
                    buffers[name].copy_(tensor)
        for name, values in self._by_parameter(_below("optimizer", tensors)).items():
            self.optimizer.state[self.freeze.parameters[name]] = values
        self.freeze.parked.update(self._by_parameter(_below("parked", tensors)))
        self.proof.resume(state["proof"])
        self.measure.resume(state["gradients"])
        self.batches.seek(state["position"])
        self.best_loss, self.worse = state["best_loss"], state["worse"]
        self.evaluated_at = state["evaluated_at"]
        self.saved = (earlier.step, state["frozen"])
        self.scaler.load_state_dict(state["scaler"])
        write_generators(_below("generator", tensors), state["generators"], self.device)

    def _by_parameter(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """``NAME/KEY`` → tensor, as name → optimizer state; step counters stay on the host."""
        grouped: dict[str, dict[str, Any]] = {}
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            place = torch.device("cpu") if key == "step" else self.device
            grouped.setdefault(name, {})[key] = tensor.to(place)
        return grouped

    # ------------------------------------------------------------------------------------ wishes

    def obey(self) -> str:
        """Follow the wish of the moment; comes back when it is to go on, stop or release."""
        wish = self.wishes()
        if wish.state == "hold":
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
        """Live edits become entries of the schedule, from the next step on."""
        for edit in wish.edits[self.edits_seen :]:
            self.edits_seen += 1
            state = edit.get("optimizer_state", "fresh")
            changes = tuple(Change(r, "step", self.step, state) for r in parse_rules(edit["rules"]))
            before = self.config
            self.config = replace(before, schedule=(*before.schedule, *changes))
            try:
                self.change_what_is_frozen()
            except InvalidDocument as error:
                self.config = before
                self._say(f"Live edit refused: {error}")
            document = config_document(self.config, self.freeze.graph)
            self.emit(
                "freeze", {"step": self.step, "seq": edit.get("seq", wish.seq), "config": document}
            )

    def change_what_is_frozen(self) -> None:
        """Apply the schedule's entries that hold from the next step on."""
        config = self._config_at(self.step)
        if config.rules == self.freeze.config.rules:
            return
        frozen, unfrozen = self.freeze.change(config, self.optimizer, self._keeping_state())
        self.proof.follow(frozen, unfrozen)
        if self.recipe.compile:
            torch._dynamo.reset()
        self._say(
            f"From step {self.step + 1}: {len(frozen)} tensors frozen, {len(unfrozen)} unfrozen."
        )

    def _config_at(self, step: int) -> FreezeConfig:
        """The config with the rules of its schedule that hold after `step` steps."""
        due = due_changes(self.config, step, self.steps_per_epoch)
        return replace(self.config, rules=(*self.config.rules, *(c.rule for c in due)))

    def _keeping_state(self) -> set[str]:
        """Names whose newest due entry of the schedule wants their parked state back."""
        keeping: set[str] = set()
        for change in due_changes(self.config, self.step, self.steps_per_epoch):
            names = match_names(change.rule, self.freeze.graph)
            keeping = keeping | names if change.optimizer_state == "keep" else keeping - names
        return keeping

    # ---------------------------------------------------------------------------------- one step

    def is_done(self) -> bool:
        assert self.total_steps is not None
        patience = self.recipe.patience
        at_end = self.step >= self.total_steps
        gave_up = patience is not None and self.worse >= patience
        return (at_end or gave_up) and not self.owes_evaluation()

    def take_step(self) -> None:
        """One optimizer step: accumulate, unscale, measure, clip, step, measure, report."""
        window = self.batches.next_window(self.recipe.grad_accumulation)
        loss = self._accumulate(window)
        if self.scaler.is_enabled():
            self._unscale()
        trainable = [p for p in self.freeze.trainable() if p.grad is not None]
        total_norm = self.measure.read_gradients(self.freeze.frozen)
        loss_value, norm_value = torch.stack([loss.double(), total_norm]).tolist()
        self._refuse_non_finite(loss_value, norm_value)
        values = {"loss": loss_value, "lr": self._set_rates(), "grad_norm_total": norm_value}
        if self.recipe.max_grad_norm is not None:
            limit = self.recipe.max_grad_norm
            torch.nn.utils.clip_grads_with_norm_(trainable, limit, total_norm.float())
            values["clip_factor"] = min(1.0, limit / (norm_value + 1e-6))
        self.freeze.hold_gradients()
        measured = (self.step + 1) % self.recipe.stats_every == 0
        if measured:
            self.measure.copy_weights()
        if not self._step_optimizer():
            return
        self.step += 1
        if self.skipped:
            values["amp_skipped"] = self.skipped
            self.skipped = 0
        stats = self.measure.read_updates(self.step) if measured else None
        self._zero_gradients()
        now = time.perf_counter()
        step_ms, self.last_step_at = (now - self.last_step_at) * 1e3, now
        self._report(values, step_ms)
        if stats is not None:
            self.emit("layers", asdict(stats))

    def _accumulate(self, window: list[Any]) -> torch.Tensor:
        """Backward over the batches of one step, each weighted by its examples; the mean loss."""
        sizes = [count_examples(batch) for batch in window]
        total = torch.zeros((), device=self.device)
        for loaded, size in zip(window, sizes, strict=True):
            batch = move_batch(loaded, self.device)
            with self.autocast():
                output = call_on_batch(self.forward, batch)
                loss = compute_loss(self.built, output, batch) * (size / sum(sizes))
            if not loss.requires_grad:
                raise InvalidDocument(
                    [
                        (
                            "config",
                            "The loss does not depend on anything trainable under this config.",
                        )
                    ]
                )
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _unscale(self) -> None:
        self.scaler.unscale_(self.optimizer)
        stepped = {id(p) for group in self.groups for p in group["params"]}
        for parameter in self.freeze.parameters.values():  # left out of the optimizer, still scaled
            if parameter.grad is not None and id(parameter) not in stepped:
                parameter.grad.div_(self.scaler.get_scale())

    def _refuse_non_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        self._report({"loss": loss, "grad_norm_total": norm}, None, step=self.step + 1)
        what = f"The loss is {loss}" if not math.isfinite(loss) else f"The gradient norm is {norm}"
        raise NonFinite(
            f"{what} in step {self.step + 1}; the optimizer did not take it. "
            "Lower the learning rate, clip the gradient, or look at the data of this step."
        )

    def _set_rates(self) -> float:
        factor = learning_rate_factor(self.recipe, self.step + 1, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * group["lr_scale"] * factor
        return self.recipe.rate * factor

    def _step_optimizer(self) -> bool:
        """Whether the optimizer stepped: a scaler leaves out steps with infinite gradients."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            return True
        self._zero_gradients()
        self.skipped += 1
        if self.skipped >= MAX_SKIPPED_IN_A_ROW:
            raise NonFinite(
                f"{self.skipped} steps in a row had infinite fp16 gradients. Use bf16 or fp32."
            )
        return False

    def _zero_gradients(self) -> None:
        """Of every parameter: one left out of the optimizer would gather its gradients for ever."""
        for parameter in self.freeze.parameters.values():
            parameter.grad = None

    def _say(self, line: str) -> None:
        self.emit("log", {"text": line})

    def _report(
        self, values: dict[str, float], step_ms: float | None, step: int | None = None
    ) -> None:
        epoch, batch = divmod(self.batches.position, self.batches.per_epoch)
        seen = min(batch * self.recipe.batch_size, self.batches.size) / self.batches.size
        payload = {"step": self.step if step is None else step, "epoch": epoch + seen}
        self.emit("metrics", {**payload, "values": values, "step_ms": step_ms})

    # ------------------------------------------------------------------------ evaluate and save

    def owes_evaluation(self) -> bool:
        """Before the first step, at every interval, and at the end; each only once."""
        if not self.data.evals or self.evaluated_at == self.step:
            return False
        every = self.recipe.eval_every or self.steps_per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    def evaluate(self) -> None:
        """Judge every evaluation set, unless a stop comes in between; then it stays owed."""
        judged = _evaluate_sets(
            self.built, self.data, self.recipe, self.device, self.wishes, self.autocast
        )
        self.freeze.train()
        self.last_step_at = time.perf_counter()
        if judged is None:
            return
        self.evaluated_at = self.step
        self._report(judged, None)
        shown = ", ".join(f"{name.removeprefix('eval/')} {v:.4g}" for name, v in judged.items())
        self._say(f"Step {self.step}: {shown}")
        loss = judged[f"eval/{next(iter(self.data.evals))}/loss"]
        self.best_loss, self.worse = (
            (loss, 0) if loss < self.best_loss else (self.best_loss, self.worse + 1)
        )

    def owes_checkpoint(self) -> bool:
        every = self.recipe.checkpoint_every
        return bool(every and self.step and self.step % every == 0) and not self._is_saved()

    def _is_saved(self) -> bool:
        return self.saved == (self.step, self.freeze.frozen)

    def save(self, final: bool = False) -> None:
        """Prove, then write a checkpoint where this state has none, then let the oldest go."""
        document = self.proof.check(self.measure.gradient_history())
        self.emit("proof", {**document, "step": self.step})
        self._say(f"Step {self.step}: the verdict of the proof is {document['verdict']!r}.")
        if not self._is_saved():
            self.emit("checkpoint", write_checkpoint(self.checkpoints, self._checkpoint()))
            self.saved = (self.step, dict(self.freeze.frozen))
        kept = self.recipe.keep_last + (1 if final else 0)
        for step in checkpoint_steps(self.checkpoints)[:-kept]:
            delete_checkpoint(self.checkpoints, step)
            self.emit("checkpoint_deleted", {"step": step})
        self.last_step_at = time.perf_counter()

    def _checkpoint(self) -> Checkpoint:
        model = model_tensors(self.built.model)
        trainer = {f"buffer/{n}": b for n, b in self.built.model.named_buffers() if n not in model}
        generators, generator_values = read_generators(self.device)
        trainer |= {f"generator/{name}": tensor for name, tensor in generators.items()}
        names = {id(parameter): name for name, parameter in self.freeze.parameters.items()}
        states = {names[id(parameter)]: state for parameter, state in self.optimizer.state.items()}
        for kind, by_name in (("optimizer", states), ("parked", self.freeze.parked)):
            for name, state in by_name.items():
                trainer |= {
                    f"{kind}/{name}/{key}": torch.as_tensor(value)
                    for key, value in state.items()
                    if value is not None
                }
        return Checkpoint(
            step=self.step,
            model=model,
            trainer=trainer,
            state={
                "position": self.batches.position,
                "best_loss": self.best_loss,
                "worse": self.worse,
                "scaler": self.scaler.state_dict(),
                "generators": generator_values,
                "evaluated_at": self.evaluated_at,
                "proof": self.proof.state(),
                "gradients": self.measure.gradient_history(),
                "frozen": self.freeze.frozen,
                "config": config_document(self.config, self.freeze.graph),
            },
        )


# ------------------------------------------------------------------------------------------- parts


def _make_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.rate, momentum=recipe.momentum)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.rate)
    return torch.optim.AdamW(groups, lr=recipe.rate)


def _autocast(
    recipe: Recipe, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if recipe.precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def _prepare_forward(model: nn.Module, recipe: Recipe) -> Callable[..., Any]:
    if recipe.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise InvalidDocument(
                [(
                    "training.gradient_checkpointing",
                    f"{type(model).__name__} has no gradient_checkpointing_enable(); turn this "
                    "off, or call torch.utils.checkpoint in the model's own forward.",
                )]
            )  # fmt: skip
        # Reentrant checkpointing drops gradients over a frozen input.
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return torch.compile(model) if recipe.compile else model


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _evaluate_sets(
    built: BuiltModel,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    wishes: Callable[[], Wish],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> dict[str, float] | None:
    """``eval/NAME/METRIC`` → value for every evaluation set; None when a stop came in between."""
    values: dict[str, float] = {}
    for name, dataset in (data.evals or {"train": data.train}).items():
        judged = evaluate_set(
            built,
            dataset,
            batch_size=recipe.eval_batch_size,
            collate=data.collate,
            seed_items=data.seed_items,
            seed=recipe.seed,
            device=device,
            autocast=autocast or _autocast(recipe, device),
            interrupted=lambda: wishes().state in ("stop", "release"),
        )
        if judged is None:
            return None
        values |= {f"eval/{name}/{metric}": value for metric, value in judged.items()}
    return values


def _describe_start(
    data: Data,
    recipe: Recipe,
    device: torch.device,
    layers: list[str],
    total_steps: int | None,
    step: int,
) -> dict[str, Any]:
    warnings = []
    name, size = "CPU", None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        size = torch.cuda.get_device_properties(device).total_memory
    elif recipe.device == "auto":
        warnings.append("No CUDA device was found: device 'auto' fell back to the CPU.")
    return {
        "layers": layers,
        "total_steps": total_steps,
        "step": step,
        "device": str(device),
        "device_name": name,
        "device_bytes": size,
        "train_size": len(data.train),
        "warnings": warnings,
    }


def _below(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{kind}/"
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

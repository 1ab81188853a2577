"""Everything that a checkpoint saves is needed: a resume without any one part of it differs."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app.training.checkpoint import Checkpoint, checkpoint_path, read_checkpoint, write_checkpoint
from app.training.places import checkpoint_steps
from tests.unit.models import make
from tests.unit.runs import Told, freeze, make_data, run
from tests.unit.test_loop import digest, stop_at


class Restless(nn.Module):
    """Draws from every generator in forward, and keeps a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.dropout, self.last = nn.Dropout(0.3), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            x = x * (1 + 0.01 * random.random()) * (1 + 0.01 * np.random.random())
            x = x * (1 + 0.01 * self.calls)
        return self.last(self.dropout(self.norm(self.first(x))))


def make_restless() -> Restless:
    torch.manual_seed(0)
    return Restless()


OPTIONS: dict[str, Any] = {
    "config": freeze("first"),
    "epochs": 4,
    "patience": 2,
    "lr": 0.5,
    "optimizer": "sgd",
    "warmup_steps": 2,
}


def train_from(folder: Path, checkpoint: Checkpoint | None) -> Told:
    resume_from = None
    if checkpoint is not None:
        write_checkpoint(folder, checkpoint)
        resume_from = checkpoint_path(folder, checkpoint.step)
    torch.manual_seed(777)  # whatever the process drew before
    random.seed(777)
    np.random.seed(777)
    _, told = run(make_restless(), make_data((6,)), folder, resume_from=resume_from, **OPTIONS)
    return told


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Told, str]:
    """A checkpoint in the middle of an epoch, what the whole run told after it, and its end."""
    folder = tmp_path_factory.mktemp("whole")
    whole = train_from(folder, None)
    end = digest(folder, whole.of("proof")[-1]["step"])
    parts = tmp_path_factory.mktemp("parts")
    run(make_restless(), make_data((6,)), parts, listen=stop_at(4), **OPTIONS)
    return read_checkpoint(checkpoint_path(parts, 4)), whole, end


def told_after(told: Told, step: int) -> tuple[Any, ...]:
    metrics = {key: value for key, value in told.metrics().items() if key[0] > step}
    return metrics, told.last_proof()


def without_tensors(prefix: str) -> Callable[[Checkpoint], Checkpoint]:
    def drop(checkpoint: Checkpoint) -> Checkpoint:
        kept = {n: t for n, t in checkpoint.trainer.items() if not n.startswith(prefix)}
        assert len(kept) < len(checkpoint.trainer)
        return replace(checkpoint, trainer=kept)

    return drop


def with_state(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    def change(checkpoint: Checkpoint) -> Checkpoint:
        assert any(checkpoint.state[key] != value for key, value in changes.items())
        return replace(checkpoint, state={**checkpoint.state, **changes})

    return change


def with_other_generator(name: str) -> Callable[[Checkpoint], Checkpoint]:
    def change(checkpoint: Checkpoint) -> Checkpoint:
        trainer: Mapping[str, torch.Tensor] = checkpoint.trainer
        values = dict(checkpoint.state["generators"])
        if name == "python":
            random.seed(5)
            version, internal, gauss = random.getstate()
            values["python"] = [version, list(internal), gauss]
        elif name == "numpy":
            keys = np.random.RandomState(5).get_state()[1].astype(np.int64)
            trainer = {**trainer, "generator/numpy": torch.from_numpy(keys)}
        else:
            other = torch.Generator().manual_seed(5).get_state()
            trainer = {**trainer, "generator/torch": other}
        return Checkpoint(
            checkpoint.step,
            checkpoint.model,
            trainer,
            {**checkpoint.state, "generators": values},
        )

    return change


def with_other_digest(checkpoint: Checkpoint) -> Checkpoint:
    proof = checkpoint.state["proof"]
    proof = {**proof, "digests": {**proof["digests"], "first.weight": "0" * 64}}
    return replace(checkpoint, state={**checkpoint.state, "proof": proof})


def test_a_whole_checkpoint_resumes_exactly(
    stopped: tuple[Checkpoint, Told, str], tmp_path: Path
) -> None:
    checkpoint, whole, end = stopped
    told = train_from(tmp_path, checkpoint)
    assert told_after(told, 4) == told_after(whole, 4)
    assert digest(tmp_path, told.of("proof")[-1]["step"]) == end


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without_tensors("optimizer/"), id="optimizer"),
        pytest.param(without_tensors("buffer/"), id="buffers outside the state dict"),
        pytest.param(with_other_generator("torch"), id="torch generator"),
        pytest.param(with_other_generator("python"), id="python generator"),
        pytest.param(with_other_generator("numpy"), id="numpy generator"),
        pytest.param(with_state(position=3), id="position in the data"),
        pytest.param(with_state(best_loss=0.0, worse=1), id="early stopping"),
        pytest.param(with_other_digest, id="digests of the proof"),
    ],
)
def test_a_checkpoint_without_a_part_does_not(
    damage: Callable[[Checkpoint], Checkpoint],
    stopped: tuple[Checkpoint, Told, str],
    tmp_path: Path,
) -> None:
    checkpoint, whole, _ = stopped
    told = train_from(tmp_path, damage(checkpoint))
    assert told_after(told, 4) != told_after(whole, 4)


# ------------------------------------------- every single value, in a run in which each one counts


class Eventful(Restless):
    """Has a parameter that is soon out of use, and whose gradient was always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + 0.0 * self.spare if self.calls < 5 else y


def make_eventful() -> Eventful:
    torch.manual_seed(0)
    return Eventful()


EVENTFUL: dict[str, Any] = {
    "config": {
        "schedule": [
            {"at": {"step": 1}, "action": "freeze", "match": "first"},
            {"at": {"step": 5}, "action": "unfreeze", "match": "first", "optimizer_state": "keep"},
        ]
    },
    "precision": "fp16", "on_nonfinite": "skip", "optimizer": "adam", "max_steps": 8,
    "checkpoint_tensors": "trained", "checkpoint_every": 4, "eval_every": 2, "patience": 2,
    "lr": 0.02,
}  # fmt: skip


def live_eventfully(folder: Path, resume_from: Path | None, stop: bool = False) -> Told:
    """A run that skips a bad example each epoch, and stops after one where `stop` says so."""
    own: list[Any] = []
    data = make_data((6,))
    bad = data.train.tensors[0][5]
    steps: list[int] = [0]

    def listen(kind: str, payload: dict[str, Any], wish: Any) -> None:
        own[:] = [wish]
        if kind == "layers":
            steps.append(payload["step"])

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        good = nn.functional.cross_entropy(output.float(), batch[1]) * 4e4
        if not output.requires_grad or (batch[0] - bad).abs().sum(1).min() > 1.0:
            return good
        if stop and steps[-1] >= 2:
            own[0].state = "stop"
        return good * float("nan")

    torch.manual_seed(777)
    random.seed(777)
    np.random.seed(777)
    _, told = run(
        make_eventful(), data, folder, resume_from=resume_from, loss=loss, listen=listen, **EVENTFUL
    )
    return told


CLOCKED = ("step_ms", "measure_ms", "elapsed_s", "cost", "peak_bytes", "bytes", "created_at")


def events_of(told: Told, folder: Path) -> list[Any]:
    """Everything told since the first step was announced, and what every checkpoint holds."""
    said = [
        (kind, {key: value for key, value in payload.items() if key not in CLOCKED})
        for kind, payload in told.events
        if kind not in ("start", "state")
        and not str(payload.get("text", "")).startswith(("Training on", "Resumed"))
    ]
    files = [
        sorted(read_checkpoint(checkpoint_path(folder, step)).model)
        for step in checkpoint_steps(folder)
        if step >= 4
    ]
    return [said, files, digest(folder, checkpoint_steps(folder)[-1])]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, list[Any]]:
    """The checkpoint of an eventful run that was stopped, and what comes after it."""
    folder = tmp_path_factory.mktemp("cut")
    live_eventfully(folder, None, stop=True)
    (step,) = checkpoint_steps(folder)
    assert 1 < step < 4  # while "first" is frozen
    checkpoint = read_checkpoint(checkpoint_path(folder, step))
    assert checkpoint.state["skipped"]["nonfinite"] >= 1
    told = live_eventfully(folder, checkpoint_path(folder, step))
    return checkpoint, events_of(told, folder)


def test_the_eventful_run_goes_on_as_if_it_had_not_been_cut(
    cut: tuple[Checkpoint, list[Any]], tmp_path: Path
) -> None:
    whole = live_eventfully(tmp_path, None)
    said, files, end = events_of(whole, tmp_path)
    rest, rest_files, rest_end = cut[1]
    assert said[-len(rest) :] == rest
    assert {kind for kind, _ in rest} >= {"metrics", "layers", "proof", "checkpoint", "log"}
    assert (rest_files, rest_end) == (files, end)


def changed(**values: Any) -> Callable[[Checkpoint], Checkpoint]:
    return with_state(**values)


def frozen_otherwise(checkpoint: Checkpoint) -> Checkpoint:
    frozen = {**checkpoint.state["frozen"], "last.weight": True}
    return replace(checkpoint, state={**checkpoint.state, "frozen": frozen})


DAMAGES: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "optimizer": without_tensors("optimizer/"),
    "parked": without_tensors("parked/"),
    "buffer": without_tensors("buffer/"),
    "generator": with_other_generator("torch"),
    "position": changed(position=1),
    "evaluated_at": changed(evaluated_at=-1),
    "best_loss": changed(best_loss=0.0),
    "worse": changed(worse=2),
    "skipped": changed(skipped={}),
    "scaler": changed(scaler=torch.amp.GradScaler("cpu").state_dict()),
    "generators": with_other_generator("python"),
    "gradients": changed(gradients={}),
    "proof": with_other_digest,
    "frozen": frozen_otherwise,
    "ever_trained": changed(ever_trained=[]),
}
# The clock's; and the policies that held, which only a resume with others asks for: see below.
WITHOUT_EFFECT_HERE = {"elapsed_s", "config"}


def test_all_that_a_checkpoint_saves_is_damaged_in_turn(cut: tuple[Checkpoint, list[Any]]) -> None:
    checkpoint, _ = cut
    tensors = {name.partition("/")[0] for name in checkpoint.trainer}
    assert set(DAMAGES) | WITHOUT_EFFECT_HERE == set(checkpoint.state) | tensors


@pytest.mark.parametrize("part", DAMAGES)
def test_no_value_of_a_checkpoint_can_be_lost(
    part: str, cut: tuple[Checkpoint, list[Any]], tmp_path: Path
) -> None:
    checkpoint, told = cut
    write_checkpoint(tmp_path, DAMAGES[part](checkpoint))
    damaged = live_eventfully(tmp_path, checkpoint_path(tmp_path, checkpoint.step))
    assert events_of(damaged, tmp_path) != told


def test_the_policies_that_held_are_needed_where_a_resume_brings_others(tmp_path: Path) -> None:
    data, verdicts = make_data((2, 6, 6)), []
    config = freeze("stem.**", norm_statistics="update")
    for is_lost in (False, True):
        folder = tmp_path / str(is_lost)
        run(make("convolutional")[0], data, folder, config=config, listen=stop_at(4))
        path = checkpoint_path(folder, 4)
        if is_lost:
            checkpoint = read_checkpoint(path)
            lost = {**checkpoint.state["config"], "norm_statistics": "freeze"}
            write_checkpoint(folder, with_state(config=lost)(checkpoint))
        _, told = run(
            make("convolutional")[0], data, folder, config=freeze("stem.**"), resume_from=path
        )
        verdicts.append(told.of("proof")[-1]["verdict"])
    assert verdicts == ["holds", "broken"]


# ------------------------------------------------------------- where a run may be cut in two


PHASES = {
    **freeze("last"),
    "schedule": [
        {"at": {"step": 2}, "action": "freeze", "match": "first"},
        {"at": {"step": 4}, "action": "unfreeze", "match": "first", "optimizer_state": "keep"},
        {"at": {"epoch": 2}, "action": "unfreeze", "match": "last"},
    ],
}


@pytest.mark.parametrize("cut", range(9))
def test_a_run_with_phases_may_be_cut_anywhere(cut: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": PHASES, "epochs": 3, "optimizer": "adam"}
    data = make_data((6,))
    _, whole = run(make_restless(), data, tmp_path / "whole", **options)
    _, first = run(make_restless(), data, tmp_path / "parts", listen=stop_at(cut), **options)
    newest = checkpoint_path(tmp_path / "parts", cut)
    _, rest = run(make_restless(), data, tmp_path / "parts", resume_from=newest, **options)
    assert {**first.metrics(), **rest.metrics()} == whole.metrics()
    assert digest(tmp_path / "parts", 9) == digest(tmp_path / "whole", 9)
    assert rest.last_proof() == whole.last_proof()


def test_a_later_entry_that_keeps_state_changes_nothing_before_it(tmp_path: Path) -> None:
    ends = []
    later = {"at": {"step": 1000}, "action": "unfreeze", "match": "**", "optimizer_state": "keep"}
    thaw = {"at": {"step": 4}, "action": "unfreeze", "match": "first"}
    for name, extra in {"without": [], "with": [later]}.items():
        config = {"schedule": [*PHASES["schedule"][:1], thaw, *extra]}
        run(make_restless(), make_data((6,)), tmp_path / name, config=config, optimizer="adam")
        ends.append(digest(tmp_path / name, 9))
    assert ends[0] == ends[1]


def test_a_stop_before_an_evaluation_leaves_it_owed(tmp_path: Path) -> None:
    data = make_data((6,))

    def stop_at_once(kind: str, payload: dict[str, Any], wish: Any) -> None:
        wish.state = "stop"

    _, first = run(make_restless(), data, tmp_path, listen=stop_at_once)
    assert first.metrics() == {}
    _, rest = run(make_restless(), data, tmp_path, resume_from=checkpoint_path(tmp_path, 0))
    assert (0, "eval/eval/loss") in rest.metrics()


def test_a_resume_that_is_stopped_at_once_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    data = make_data((6,))
    run(make_restless(), data, tmp_path, listen=stop_at(4))
    path = checkpoint_path(tmp_path, 4)
    before = path.stat().st_ino
    _, told = run(
        make_restless(), data, tmp_path, resume_from=path,
        listen=lambda kind, payload, wish: setattr(wish, "state", "stop"),
    )  # fmt: skip
    assert told.of("checkpoint") == []
    assert path.stat().st_ino == before


def test_a_breach_is_remembered_over_a_resume(tmp_path: Path) -> None:
    config = {
        **freeze("first"),
        "schedule": [{"at": {"step": 2}, "action": "unfreeze", "match": "first"}],
    }

    model = make_restless()
    model.first.register_forward_hook(_nudge_bias)
    run(model, make_data((6,)), tmp_path, config=config, listen=stop_at(4))
    clean = make_restless()
    _, told = run(
        clean, make_data((6,)), tmp_path, config=config,
        resume_from=checkpoint_path(tmp_path, 4),
    )  # fmt: skip
    assert told.of("proof")[-1]["verdict"] == "broken"


def _nudge_bias(module: nn.Module, *_: Any) -> None:
    module.bias.data.add_(0.001)  # type: ignore[operator,union-attr]


class Late(nn.Module):
    """Registers a buffer in its first forward, as many do with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(3))
        return self.layer(x) * self.mask


def test_a_buffer_that_forward_registers_is_saved_and_found_again(tmp_path: Path) -> None:
    _, told = run(Late(), make_data((6,)), tmp_path, listen=stop_at(4))
    assert told.of("proof")[-1]["buffers"]["allowed"] == ["mask"]
    outcome, _ = run(Late(), make_data((6,)), tmp_path, resume_from=checkpoint_path(tmp_path, 4))
    assert outcome.step == 9

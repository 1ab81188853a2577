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
    proof = told.of("proof")[-1]
    return metrics, proof


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
    digests = {**checkpoint.state["digests"], "first.weight": "0" * 64}
    return replace(checkpoint, state={**checkpoint.state, "digests": digests})


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

"""Stopped and resumed is bit-equal to never stopped, for five kinds of model."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from app.sources.datasets import Data
from app.training.loop import Outcome
from app.training.places import checkpoint_path
from tests.unit.models import make
from tests.unit.runs import freeze, make_data, run
from tests.unit.test_loop import digest, stop_at


class Dropping(nn.Module):
    """Dropout between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.second(self.dropout(self.first(x)).relu()).relu()))


class Recurrent(nn.Module):
    """Two layers of LSTM with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attentive(nn.Module):
    """A small transformer, with dropout in attention and around it."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean(1))


def seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory()


def make_tokens() -> Data:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (24, 5), generator=generator)
    targets = torch.randint(0, 11, (24,), generator=generator)
    return Data(
        train=TensorDataset(tokens, targets),
        evals={"eval": TensorDataset(tokens[:8], targets[:8])},
        seed_items=True,
    )


SHAPED = {"batchnorm": (2, 6, 6), "dropout": (6,), "recurrent": (5, 4), "transformer": (5, 8)}
# Of each model: its factory, what is frozen from the start and what in the middle, its optimizer.
KINDS: dict[str, tuple[Callable[[], nn.Module], str, str, dict[str, Any]]] = {
    "batchnorm": (lambda: make("convolutional")[0], "stem", "branch", {"optimizer": "sgd"}),
    "dropout": (lambda: seeded(Dropping), "first", "second", {"optimizer": "adam"}),
    "tied": (lambda: make("tied")[0], "embedding", "shared", {"optimizer": "adamw"}),
    "recurrent": (lambda: seeded(Recurrent), "rnn.*_l0", "rnn.bias_*", {"optimizer": "adam"}),
    "transformer": (
        lambda: seeded(Attentive),
        "blocks.layers.0",
        "blocks.layers.1.norm*",
        {"optimizer": "adamw", "implementation": "fused"},
    ),
}
OPTIONS: dict[str, Any] = {
    "weight_decay": 0.01,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "grad_accumulation": 2,
    "epochs": 4,  # of two steps, the second of one batch
}


def read_order(model: nn.Module) -> list[str]:
    """A digest of every batch that the model gets while it trains, as they come."""
    seen: list[str] = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            seen.append(hashlib.sha256(arguments[0].numpy().tobytes()).hexdigest())

    model.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_bit_equal_to_never_stopped(
    kind: str, stop: int, tmp_path: Path
) -> None:
    factory, frozen, later, chosen = KINDS[kind]
    data = make_tokens() if kind == "tied" else make_data(SHAPED[kind])
    config = {
        **freeze(frozen),
        "groups": [{"match": "head.**", "lr_scale": 3.0}],
        "schedule": [
            {"at": {"step": 3}, "action": "freeze", "match": later},
            {"at": {"epoch": 3}, "action": "unfreeze", "match": later, "warmup_steps": 1},
        ],
    }
    options: dict[str, Any] = {**OPTIONS, **chosen, "config": config}
    models = factory(), factory(), factory()
    orders = [read_order(model) for model in models]
    _, whole = run(models[0], data, tmp_path / "whole", **options)
    outcome, first = run(models[1], data, tmp_path / "parts", listen=stop_at(stop), **options)
    assert outcome == Outcome("stopped", stop)
    torch.manual_seed(12345)  # whatever the new process has drawn meanwhile
    newest = checkpoint_path(tmp_path / "parts", stop)
    outcome, rest = run(models[2], data, tmp_path / "parts", resume_from=newest, **options)
    assert outcome == Outcome("succeeded", 8)
    assert {**first.metrics(), **rest.metrics()} == whole.metrics()
    assert first.of("layers") + rest.of("layers") == whole.of("layers")
    assert orders[1] + orders[2] == orders[0]
    assert digest(tmp_path / "parts", 8) == digest(tmp_path / "whole", 8)
    assert rest.last_proof() == whole.last_proof()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_of_the_data_loader_change_nothing(workers: int, tmp_path: Path) -> None:
    data = make_data((6,))
    with_workers = Data(train=data.train, evals=data.evals, seed_items=True, num_workers=workers)
    _, alone = run(seeded(Dropping), data, tmp_path / "alone", epochs=2)
    _, many = run(seeded(Dropping), with_workers, tmp_path / "many", epochs=2)
    assert many.metrics() == alone.metrics()
    assert digest(tmp_path / "many", 6) == digest(tmp_path / "alone", 6)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    ends = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(ends))
        run(seeded(Dropping), make_data((6,)), folder, seed=seed, epochs=1)
        ends.append(digest(folder, 3))
    assert ends[0] == ends[1] != ends[2]

"""Short training runs without a server, and what they said. They know no test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from app.freezing.config import parse_config
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.loop import Outcome, train
from app.training.recipe import parse_recipe


@dataclass
class Wish:
    """What the test wants of the run now; it may change it while the run goes on."""

    state: str = "running"
    seq: int = 0
    edits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Told:
    """Everything that a run emitted."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [payload for k, payload in self.events if k == kind]

    def last_proof(self) -> dict[str, Any]:
        """The newest check, without time and memory, which no two runs have alike."""
        proof = self.of("proof")[-1]
        return {key: value for key, value in proof.items() if key not in ("cost", "peak_bytes")}

    def metrics(self) -> dict[tuple[int, str], float]:
        return {
            (payload["step"], name): value
            for payload in self.of("metrics")
            for name, value in payload["values"].items()
        }


class Jitter(TensorDataset):
    """Items with random noise, so that seeding them matters."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        inputs, target = super().__getitem__(index)
        return inputs + 0.01 * torch.randn(inputs.shape), target


def make_data(shape: tuple[int, ...], size: int = 24, classes: int = 3) -> Data:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(size, *shape, generator=generator)
    targets = torch.randint(0, classes, (size,), generator=generator)
    held_out = TensorDataset(inputs[:8], targets[:8])
    return Data(train=Jitter(inputs, targets), evals={"eval": held_out}, seed_items=True)


def run(
    model: nn.Module,
    data: Data,
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    resume_from: Path | None = None,
    listen: Callable[[str, dict[str, Any], Wish], None] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    compile_backend: str = "inductor",
    **training: Any,
) -> tuple[Outcome, Told]:
    told, wish = Told(), Wish()

    def emit(kind: str, payload: dict[str, Any]) -> None:
        told.events.append((kind, payload))
        if listen:
            listen(kind, payload, wish)

    options = {"batch_size": 8, "epochs": 3, "device": "cpu", **training}
    outcome = train(
        BuiltModel(model, loss=loss),
        data,
        parse_config(config or {}),
        parse_recipe(options),
        device="cpu",
        checkpoints=folder,
        emit=emit,
        wishes=lambda: wish,
        resume_from=resume_from,
        compile_backend=compile_backend,
    )
    return outcome, told


def freeze(*matches: str, **fields: Any) -> dict[str, Any]:
    return {"rules": [{"action": "freeze", "match": match} for match in matches], **fields}

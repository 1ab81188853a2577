"""Our step beside the plainest loop with the same freeze, in one run: ratios.

Run alone: python -m benchmarks.loop
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from app.freezing.config import parse_config
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.loop import train
from app.training.recipe import parse_recipe

STEPS, WARM, ROUNDS, BATCH = 60, 10, 3, 16


class Classifier(nn.Module):
    """A small transformer over 32 vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


@dataclass
class GoOn:
    """Nobody interferes."""

    state: str = "running"
    seq: int = 0
    edits: tuple[()] = ()


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    size = BATCH * STEPS
    inputs = torch.randn(size, 32, 128, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 10, (size,), generator=generator))


def run_plain(data: TensorDataset) -> float:
    """Median milliseconds of a step that somebody writes by hand."""
    torch.manual_seed(0)
    model = Classifier()
    model.encoder.layers[:2].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    taken, before = [], time.perf_counter()
    for inputs, targets in torch.utils.data.DataLoader(data, BATCH, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        now = time.perf_counter()
        taken.append((now - before) * 1e3)
        before = now
    return statistics.median(taken[WARM:])


def run_ours(data: TensorDataset, stats_every: int) -> float:
    torch.manual_seed(0)
    taken: list[float] = []

    def keep(kind: str, payload: dict[str, Any]) -> None:
        if kind == "metrics" and payload["step_ms"] is not None:
            taken.append(payload["step_ms"])

    rules = [{"action": "freeze", "match": "encoder.layers.{0..1}.**"}]
    options = {"batch_size": BATCH, "epochs": 1, "device": "cpu", "stats_every": stats_every}
    with tempfile.TemporaryDirectory() as folder:
        train(
            BuiltModel(Classifier()),
            Data(train=data, seed_items=False),
            parse_config({"rules": rules}),
            parse_recipe(options),
            device="cpu",
            checkpoints=Path(folder),
            emit=keep,
            wishes=GoOn,
        )
    return statistics.median(taken[WARM:])


def main() -> None:
    torch.set_num_threads(1)
    data = make_data()
    print("round   plain ms   ours, no layer measures   ours, all measures every step")
    for number in range(1, ROUNDS + 1):
        plain = run_plain(data)
        bare, measured = run_ours(data, stats_every=10**9), run_ours(data, stats_every=1)
        print(
            f"{number:5} {plain:10.2f} {bare:12.2f} ({bare / plain:.3f} ×)"
            f" {measured:16.2f} ({measured / plain:.3f} ×)"
        )


if __name__ == "__main__":
    main()

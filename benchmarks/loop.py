"""Our step beside the plainest loop with the same freeze, and beside other trainers: ratios.

Every round takes one short run of each in turn, so that a busy machine disturbs all alike; what
counts is the median of a trainer's ratios to the plain loop of the same round. Transformers'
Trainer and Lightning need ``pip install --group bench``; what is missing is said.

Run alone: python -m benchmarks.loop
"""

import contextlib
import importlib.util
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from app.freezing.config import parse_config
from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.loop import train
from app.training.recipe import parse_recipe

STEPS, WARM, ROUNDS, BATCH = 40, 8, 7, 16
FROZEN_LAYERS = 2


class Classifier(nn.Module):
    """A small transformer over 32 vectors."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


def make_frozen() -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    model.encoder.layers[:FROZEN_LAYERS].requires_grad_(False)
    return model


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    size = BATCH * STEPS
    inputs = torch.randn(size, 32, 128, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 10, (size,), generator=generator))


@dataclass
class GoOn:
    """Nobody interferes."""

    state: str = "running"
    seq: int = 0
    edits: tuple[()] = ()


class Clock:
    """CPU milliseconds between the ends of steps: a busy machine makes others wait, not these."""

    def __init__(self) -> None:
        self._before = time.process_time()
        self._taken: list[float] = []

    def tick(self) -> None:
        now = time.process_time()
        self._taken.append((now - self._before) * 1e3)
        self._before = now

    def median(self) -> float:
        return statistics.median(self._taken[WARM:])


def run_plain(data: TensorDataset) -> float:
    """A step that somebody writes by hand, who looks at the loss as everybody does."""
    model = make_frozen()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    clock = Clock()
    for inputs, targets in DataLoader(data, BATCH, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        clock.tick()
    return clock.median()


def run_ours(data: TensorDataset, stats_every: int) -> float:
    torch.manual_seed(0)
    clock = Clock()

    def keep(kind: str, payload: dict[str, Any]) -> None:
        if kind == "metrics" and payload["step_ms"] is not None:
            clock.tick()

    rules = [{"action": "freeze", "match": f"encoder.layers.{{0..{FROZEN_LAYERS - 1}}}.**"}]
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
    return clock.median()


def run_transformers(data: TensorDataset) -> float:
    """The same job in Transformers' Trainer, as it comes, without its logging and saving."""
    import transformers

    clock = Clock()

    class Ticking(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_frozen()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.model(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def collate(rows: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        inputs, labels = zip(*rows, strict=True)
        return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1,
            learning_rate=1e-3, save_strategy="no", logging_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            WithLoss(), arguments, train_dataset=data, data_collator=collate, callbacks=[Ticking()]
        )
        trainer.train()
    return clock.median()


def run_lightning(data: TensorDataset) -> float:
    """The same job in Lightning's Trainer, without its logger, bar and checkpoints."""
    import lightning

    clock = Clock()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_frozen()

        def training_step(self, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-3)

        def on_train_batch_end(self, *_: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(data, BATCH, shuffle=True))
    return clock.median()


Runner = Callable[[TensorDataset], float]
OURS: dict[str, Runner] = {
    "ours, no layer measures": lambda data: run_ours(data, stats_every=10**9),
    "ours, all measures every step": lambda data: run_ours(data, stats_every=1),
}
OTHERS: dict[str, tuple[Runner, tuple[str, ...]]] = {
    "Transformers' Trainer": (run_transformers, ("transformers", "accelerate")),
    "Lightning's Trainer": (run_lightning, ("lightning",)),
}


def choose_runners() -> dict[str, Runner]:
    """The plain loop, ours, and those of the others whose libraries are there."""
    runners: dict[str, Runner] = {"plain PyTorch": run_plain, **OURS}
    for name, (runner, needed) in OTHERS.items():
        missing = [library for library in needed if importlib.util.find_spec(library) is None]
        if missing:
            print(f"{name} is left out: {', '.join(missing)} is not installed (group 'bench').")
        else:
            runners[name] = runner
    return runners


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data, runners = make_data(), choose_runners()
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            with contextlib.redirect_stdout(io.StringIO()):
                taken[name].append(runner(data))
    print(f"{'':32}{'CPU ms a step':>14}{'of plain PyTorch':>18}  (least … most of {ROUNDS})")
    for name, times in taken.items():
        ratios = [one / plain for one, plain in zip(times, taken["plain PyTorch"], strict=True)]
        print(
            f"{name:32}{statistics.median(times):14.2f}{statistics.median(ratios):16.3f} ×"
            f"  ({min(ratios):.3f} … {max(ratios):.3f})"
        )
    bare, measured = (taken[name] for name in OURS)
    ratio = statistics.median(m / b for b, m in zip(bare, measured, strict=True))
    print(f"all measures every step, of ours without: {ratio:.3f} ×")


if __name__ == "__main__":
    main()

"""What measuring every layer at every step costs of a step, beside other tools: ratios.

Run alone: python -m benchmarks.measures [rounds]. wandb, tensorboard and lightning are optional
(the group `bench`); what is missing is said.
"""

import importlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.freezing.apply import apply_config
from app.freezing.config import parse_config
from app.freezing.measure import LayerMeasure
from app.jobs.spool import SpoolWriter
from benchmarks.loop import Classifier

STEPS, WARM = 40, 5
Around = tuple[Callable[[], None], Callable[[], None]]  # before and after the optimizer's step


class Convolutions(nn.Module):
    """A small residual network over 32 × 32 images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                    nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                )
                for a, b in itertools.pairwise(widths)
            )
        )  # fmt: skip
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def nothing(_model: nn.Module, _folder: str) -> Around:
    return lambda: None, lambda: None


def ours(model: nn.Module, folder: str, is_exact: bool = False) -> Around:
    """All three measures of every layer, and their record in the spool."""
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters, is_exact=is_exact)
    spool = SpoolWriter(Path(folder) / "telemetry.spool", 1)
    step = 0

    def before() -> None:
        nonlocal step
        step += 1
        measure.read_gradients(applied.frozen)
        measure.before_update(step)

    def after() -> None:
        for stats in measure.after_update(step):
            spool.append("layers", stats.__dict__)

    return before, after


def ours_exact(model: nn.Module, folder: str) -> Around:
    return ours(model, folder, is_exact=True)


def wandb_watch(model: nn.Module, folder: str) -> Around:
    """Histograms of gradients and parameters, every step."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
    wandb = importlib.import_module("wandb")
    wandb.init(project="bench", dir=folder, reinit="finish_previous")
    wandb.watch(model, log="all", log_freq=1)
    return lambda: None, lambda: wandb.log({})


def _writer(folder: str) -> Any:
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)


def tensorboard_histograms(model: nn.Module, folder: str) -> Around:
    """A histogram of every gradient."""
    writer, step = _writer(folder), iter(range(10**9))

    def before() -> None:
        number = next(step)
        for name, parameter in model.named_parameters():
            writer.add_histogram(name, parameter.grad, number)

    return before, lambda: None


def tensorboard_scalars(model: nn.Module, folder: str) -> Around:
    """The norm of every gradient as a scalar."""
    writer, step = _writer(folder), iter(range(10**9))

    def before() -> None:
        number = next(step)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                writer.add_scalar(name, parameter.grad.norm(), number)

    return before, lambda: None


def lightning_grad_norm(model: nn.Module, _folder: str) -> Around:
    """Gradient norms alone, kept nowhere."""
    grad_norm = importlib.import_module("lightning.pytorch.utilities").grad_norm
    return lambda: grad_norm(model, norm_type=2), lambda: None


def naive(model: nn.Module, _folder: str) -> Around:
    """Norms, a copy and a difference of every parameter, each read at once."""
    copies: list[torch.Tensor] = []

    def before() -> None:
        copies[:] = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            if p.grad is not None:
                p.grad.norm().item()

    def after() -> None:
        for p, copy in zip(model.parameters(), copies, strict=True):
            (p.detach() - copy).norm().item()
            p.detach().norm().item()

    return before, after


TOOLS = {
    "frostline, everything": ours,
    "frostline, exact": ours_exact,
    "naive full set": naive,
    "lightning grad_norm": lightning_grad_norm,
    "tensorboard scalars": tensorboard_scalars,
    "tensorboard histograms": tensorboard_histograms,
    "wandb.watch": wandb_watch,
}


def time_step(make: Callable[[], nn.Module], batch: torch.Tensor, tool: Any) -> tuple[float, float]:
    """Median CPU milliseconds of a training step and of what the tool adds around its update.

    wandb works in hooks during backward: for it the whole step is what counts.
    """
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = torch.randint(0, 10, (len(batch),))
    whole, added = [], []
    # A writer's thread may put a last file there while the folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        before, after = tool(model, folder)
        for _ in range(STEPS + WARM):
            began = time.process_time()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), targets).backward()
            first = time.process_time()
            before()
            second = time.process_time()
            optimizer.step()
            third = time.process_time()
            after()
            end = time.process_time()
            whole.append((end - began) * 1e3)
            added.append((second - first + end - third) * 1e3)
    return statistics.median(whole[WARM:]), statistics.median(added[WARM:])


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    pictures = torch.randn(32, 3, 32, 32)
    models = {
        "transformer": (partial(Classifier, 256), torch.randn(16, 32, 256)),
        "tiny transformer": (Classifier, torch.randn(16, 32, 128)),
        "convolutions": (partial(Convolutions, 64), pictures),
        "tiny convolutions": (Convolutions, pictures),
    }
    for name, (make, batch) in models.items():
        bare = [time_step(make, batch, nothing)[0] for _ in range(rounds)]
        size = sum(p.numel() for p in make().parameters())
        print(f"{name}: {size:,} parameters, {statistics.median(bare):.1f} ms of the CPU a step")
        for tool, around in TOOLS.items():
            compare(tool, around, make, batch, rounds)
        # What measuring costs goes by parameters, what a step costs by examples too.
        four = torch.cat([batch] * 4)
        compare("frostline, batch × 4", ours, make, four, rounds)


def compare(
    tool: str, around: Any, make: Callable[[], nn.Module], batch: torch.Tensor, rounds: int
) -> None:
    """Print what a tool adds to a step, each round beside a step without any."""
    try:
        pairs = []
        for _ in range(rounds):
            plain = time_step(make, batch, nothing)[0]
            pairs.append((plain, *time_step(make, batch, around)))
    except ImportError as error:
        print(f"  {tool:24} not compared: {error}; pip install -e '.[bench]' brings it")
        return
    ratio = statistics.median(whole / plain for plain, whole, _ in pairs)
    share = statistics.median(100 * added / (whole - added) for _, whole, added in pairs)
    print(f"  {tool:24} {ratio:6.2f} × a step; {share:7.2f} % around the update")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Prints what freezing does to the two demo tasks, as markdown. Knows only the shipped loop."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.freezing.config import parse_config
from app.sources.datasets import build_data
from app.sources.models import build_model
from app.sources.spec import DatasetSpec, ModelSpec
from app.training.loop import train
from app.training.recipe import parse_recipe

SEEDS = range(5)
TRAINING = {"epochs": 15, "batch_size": 16, "optimizer": "adamw", "lr": 2e-3, "device": "cpu"}

FREEZE_SETS: dict[str, list[dict[str, str]]] = {
    "nothing": [],
    "early blocks (`stem`, `layer1`, `layer2`)": [
        {"action": "freeze", "match": "{stem,layer1,layer2}.**"}
    ],
    "late blocks (`layer2`, `layer3`)": [{"action": "freeze", "match": "{layer2,layer3}.**"}],
    "all but the head (`fc`)": [
        {"action": "freeze", "match": "**"},
        {"action": "unfreeze", "match": "fc.**"},
    ],
}
"""What is frozen, in words → the rules that do it."""

TASKS = {
    "digits": {"eval": "all ten digits", "known": "0–4, seen before", "new": "5–9, new"},
    "digits-shifted": {"eval": "inverted and noisy", "before": "as seen before"},
}
"""Task → evaluation sets and what they are, in the order of the columns."""


@dataclass(frozen=True)
class _GoOn:
    """The wish of somebody who never interferes."""

    state: str = "running"
    seq: int = 0
    edits: Sequence[Mapping[str, Any]] = ()


def measure_accuracies(
    task: str, rules: list[dict[str, str]], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy by evaluation set, before training and after it."""
    uri = f"demo:{task}"
    evaluations: list[dict[str, float]] = []

    def keep_evaluations(kind: str, payload: dict[str, Any]) -> None:
        if kind == "metrics" and "eval/eval/accuracy" in payload["values"]:
            values = payload["values"]
            evaluations.append({name: values[f"eval/{name}/accuracy"] for name in TASKS[task]})

    with tempfile.TemporaryDirectory() as folder:
        train(
            build_model(ModelSpec(uri), code_dirs=[]),
            build_data(DatasetSpec(uri), code_dirs=[], seed=seed),
            parse_config({"rules": rules}),
            parse_recipe({**TRAINING, "seed": seed}),
            device="cpu",
            checkpoints=Path(folder),
            emit=keep_evaluations,
            wishes=_GoOn,
        )
    return evaluations[0], evaluations[-1]


def print_table(task: str) -> None:
    """Print one task's table, a row a freeze set."""
    columns = TASKS[task]
    print(f"`demo:{task}`: accuracy on held-out images, mean ± sd over {len(SEEDS)} seeds\n")
    _print_row("frozen", *columns.values())
    _print_row("---", *["---"] * len(columns))
    for words, rules in FREEZE_SETS.items():
        runs = [measure_accuracies(task, rules, seed) for seed in SEEDS]
        before, _ = runs[0]
        if not rules:
            _print_row("*before training*", *(f"{before[name]:.3f}" for name in columns))
        after = [[accuracies[name] for _, accuracies in runs] for name in columns]
        _print_row(words, *(f"{statistics.mean(a):.3f} ± {statistics.stdev(a):.3f}" for a in after))


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # the network is too small for more
    for task in TASKS:
        print_table(task)
        print()
    jobs = len(TASKS) * len(FREEZE_SETS) * len(SEEDS)
    print(f"{jobs} jobs in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

"""The shipped weights are what the script gives, to the bit, also where sums are rounded anew."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from app.sources.demo.networks import weights_path
from app.sources.demo.pretrain import STATISTIC_GRID, WEIGHT_GRID, round_to_grid

NAMES = ("digits", "digits-shifted")


def test_pretraining_reproduces_the_shipped_files_bit_for_bit(tmp_path: Path) -> None:
    # Without vector units, sums run in another order: the nearest thing here to another machine.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    subprocess.run(
        [sys.executable, "-m", "app.sources.demo.pretrain", "--out", str(tmp_path)],
        check=True,
        env=environment,
        capture_output=True,
    )
    for name in NAMES:
        assert (tmp_path / f"{name}.safetensors").read_bytes() == weights_path(name).read_bytes()


def test_rounding_is_to_multiples_and_says_how_near_an_edge_was() -> None:
    state = {
        "weight": torch.tensor([1.25, -2.4, 0.0], dtype=torch.float64) * WEIGHT_GRID,
        "running_var": torch.tensor([3.3], dtype=torch.float64) * STATISTIC_GRID,
        "num_batches_tracked": torch.tensor(7),
    }
    rounded, nearest_edge = round_to_grid(state)
    assert rounded["weight"].tolist() == [WEIGHT_GRID, -2 * WEIGHT_GRID, 0]
    assert rounded["running_var"].tolist() == [3 * STATISTIC_GRID]
    assert rounded["num_batches_tracked"].item() == 7
    assert rounded["weight"].dtype == torch.float32
    assert abs(nearest_edge - 0.2 * STATISTIC_GRID) < 1e-12

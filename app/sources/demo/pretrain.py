"""Trains the two shipped networks, bit for bit the same each time. Knows nothing of freezing."""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app.sources.demo.digits import Images, split_digits
from app.sources.demo.networks import HERE, DigitsNet

EPOCHS = 12
BATCH_SIZE = 32
LR = 0.05

# Processors add in different orders, which moves float64 weights by less than 1e-13 until the end
# of training. Rounding to these grids removes that before anything is stored: what is printed as
# the distance to an edge says how much larger a difference would have to be to show.
WEIGHT_GRID = 2.0**-10
STATISTIC_GRID = 2.0**-16


def pretrain_network(images: Images, *, seed: int) -> dict[str, Tensor]:
    """Train a `DigitsNet` on `images` in float64 and return its state dict, not yet rounded.

    Everything random comes from numpy's RandomState, whose numbers are frozen for good; those of
    torch's generators depend on the processor's vector units.
    """
    random = np.random.RandomState(seed)
    model = DigitsNet().double().train()
    _start_uniform(model, random)
    pixels = torch.from_numpy(images.pixels).double()
    labels = torch.from_numpy(images.labels)
    optimizer = torch.optim.SGD(
        model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps_per_epoch = len(images) // BATCH_SIZE
    total_steps = steps_per_epoch * EPOCHS
    # Linear and not cosine: IEEE division is the same everywhere, a cosine is not.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)
    for _ in range(EPOCHS):
        order = torch.from_numpy(random.permutation(len(images)))
        for batch in order[: steps_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


def _start_uniform(model: DigitsNet, random: np.random.RandomState) -> None:
    """He's uniform start for every kernel and matrix; norms stay as made, the last bias is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                bound = math.sqrt(6 / parameter[0].numel())
                parameter.copy_(torch.from_numpy(random.uniform(-bound, bound, parameter.shape)))
        model.fc.bias.zero_()


def round_to_grid(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Round a float64 state dict to the grids, as float32, where every multiple is exact.

    Returns:
        The rounded state, and the smallest distance of any value to an edge between two multiples.
    """
    rounded, nearest_edge = {}, math.inf
    for name, values in state.items():
        if not values.is_floating_point():
            rounded[name] = values
            continue
        grid = STATISTIC_GRID if "running_" in name else WEIGHT_GRID
        multiples = (values / grid).round()
        offset = (values / grid - multiples).abs().max().item()
        nearest_edge = min(nearest_edge, (0.5 - offset) * grid)
        rounded[name] = (
            multiples * grid
        ).float() + 0.0  # −0.0 becomes 0.0: one zero, one bit pattern
    return rounded, nearest_edge


@torch.no_grad()
def accuracy(state: dict[str, Tensor], images: Images) -> float:
    """Share of `images` that a network with these weights names rightly."""
    model = DigitsNet().eval()
    model.load_state_dict(state)
    guesses = model(torch.from_numpy(images.pixels)).argmax(1)
    return (guesses == torch.from_numpy(images.labels)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser("python -m app.sources.demo.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the two files")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    split = split_digits()
    known = range(5)
    for name, seen, held_out in (
        ("digits", split.pretraining.only(known), split.held_out.only(known)),
        ("digits-shifted", split.pretraining, split.held_out),
    ):
        started = time.perf_counter()
        state, nearest_edge = round_to_grid(pretrain_network(seen, seed=0))
        save_file(state, out / f"{name}.safetensors")
        print(
            f"{name}.safetensors: {len(seen)} images in {time.perf_counter() - started:.1f} s, "
            f"accuracy {accuracy(state, held_out):.3f} on {len(held_out)} held-out images, "
            f"nearest rounding edge {nearest_edge:.0e}"
        )


if __name__ == "__main__":
    main()

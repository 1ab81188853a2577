"""The digits and who may see which: pretraining, labelled, held out. Knows no network."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

HELD_OUT = 597
LABELLED_PER_CLASS = 10


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 8, 8) float32, ink 1 on paper 0, and their labels (n,) int64."""

    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, classes: range) -> "Images":
        """Those of the given classes, in the same order."""
        chosen = np.isin(self.labels, list(classes))
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Split:
    """Three parts without a common image, together all 1,797.

    Attributes:
        pretraining: what a shipped network may have seen.
        labelled: ten a class, to learn from.
        held_out: seen by nobody.
    """

    pretraining: Images
    labelled: Images
    held_out: Images


@cache
def split_digits() -> Split:
    """The digits, divided once and for all."""
    with np.load(Path(__file__).parent / "digits.npz") as file:
        pixels = (file["images"][:, None] / 16).astype(np.float32)
        labels = file["labels"].astype(np.int64)
    # RandomState is frozen for good, so that the parts are the same on every machine and version.
    order = np.random.RandomState(1).permutation(len(labels))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    by_class = [rest[labels[rest] == label] for label in range(10)]
    labelled = np.concatenate([members[:LABELLED_PER_CLASS] for members in by_class])
    pretraining = np.concatenate([members[LABELLED_PER_CLASS:] for members in by_class])
    return Split(
        *(Images(pixels[part], labels[part]) for part in (pretraining, labelled, held_out))
    )


def shift(images: Images, seed: int) -> Images:
    """The same images inverted, under noise of standard deviation 0.3 that `seed` fixes.

    The noise lies on multiples of 1/256, so that another machine's logarithm changes no bit of it.
    """
    noise = np.random.RandomState(seed).standard_normal(images.pixels.shape)
    grid = np.round(0.3 * 256 * noise) / 256
    return Images((1 - images.pixels + grid).astype(np.float32), images.labels)

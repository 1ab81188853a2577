"""Data for the small demo models: random inputs that a random plane divides. Knows no network."""

import numpy as np
import numpy.typing as npt

TRAIN_SIZE = 512
EVAL_SIZE = 256


def draw_divided(
    shape: tuple[int, ...], seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Draw `TRAIN_SIZE` + `EVAL_SIZE` normal inputs, labelled by the side of a plane they are on.

    Args:
        shape: of one input.
        seed: fixes inputs and plane, on every machine.

    Returns:
        inputs (n, *shape) and labels (n,), 0 or 1, each about half of the time.
    """
    random = np.random.RandomState(seed)
    inputs = random.standard_normal((TRAIN_SIZE + EVAL_SIZE, *shape))
    plane = random.standard_normal(shape)
    sides = (inputs * plane).reshape(len(inputs), -1).sum(1)
    return inputs.astype(np.float32), (sides > 0).astype(np.int64)

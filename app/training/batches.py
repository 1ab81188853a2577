"""Which examples make which batch: a function of seed, epoch and index. Knows no model."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset

from app.freezing.errors import InvalidDocument

IGNORED_TARGET = -100  # cross-entropy's own convention for positions that do not count


class DataError(Exception):
    """A dataset could not give an example, or its examples do not make a batch."""

    reason = "data_error"


class Batches:
    """The batches of a training set in their order, from any position in it.

    Attributes:
        per_epoch: batches in one epoch.
        position: batches handed out since the beginning of training.
        left_out: whether a last batch of one example is.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int,
        collate: Callable[[list[Any]], Any] | None,
        seed_items: bool,
        num_workers: int = 0,
        drop_single: bool = False,
    ) -> None:
        """Args:
        drop_single: leave out a last batch of one example, which BatchNorm cannot train on.
        """
        self.size = len(dataset)
        self.position = 0
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._collate, self._seed_items, self._num_workers = collate, seed_items, num_workers
        self.per_epoch = -(-self.size // batch_size)
        self.left_out = drop_single and self.per_epoch > 1 and self.size % batch_size == 1
        self.per_epoch -= self.left_out
        self._iterator: Iterator[Any] | None = None

    def next_window(self, count: int) -> list[Any]:
        """The next `count` batches, fewer where the epoch ends."""
        epoch, start = divmod(self.position, self.per_epoch)
        count = min(count, self.per_epoch - start)
        if self._iterator is None or start == 0:
            where = f"the training set in epoch {epoch + 1}"
            self._iterator = read_batches(self._load_epoch(epoch, start), where)
        window = [next(self._iterator) for _ in range(count)]
        self.position += count
        return window

    def seek(self, position: int) -> None:
        self.position = position
        self._iterator = None

    def _load_epoch(self, epoch: int, start: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(mix_seed(self._seed, epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        batches = [
            order[index * self._batch_size : (index + 1) * self._batch_size]
            for index in range(start, self.per_epoch)
        ]
        items = SeededItems(self._dataset, self._seed, epoch) if self._seed_items else self._dataset
        return load_batches(items, batches, self._collate, self._num_workers, generator)


def load_batches(
    items: Any,
    batches: Sequence[Sequence[int]],
    collate: Callable[[list[Any]], Any] | None,
    num_workers: int,
    generator: torch.Generator,
) -> DataLoader[Any]:
    """A DataLoader over given index lists that draws nothing from the global generators."""
    return DataLoader(
        items,
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=collate,
        num_workers=num_workers,
        generator=generator,
    )


def read_batches(loader: Iterable[Any], where: str) -> Iterator[Any]:
    """What a loader loads.

    Raises:
        DataError: whatever a user's dataset raised, in one line.
        InvalidDocument: a row of ours was refused, in its own words.
    """
    try:
        yield from loader
    except (InvalidDocument, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"Reading {where} failed: {_last_words(error)}") from error


def _last_words(error: Exception) -> str:
    """Type and first line; what a loading process raised comes as a text with its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") or "Traceback (most" in line for line in lines):
        kind, _, words = lines[-1].partition(": ")
        kind = kind.rpartition(".")[2]
        return words if kind == InvalidDocument.__name__ else f"{kind}: {words}"[:300]
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


class SeededItems(Dataset[Any]):
    """A dataset whose items draw from generators seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        with untouched_generators():
            seed_host_generators(mix_seed(self._seed, self._epoch, index))
            return self._dataset[index]


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, the same on every machine."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed torch (every device), Python and NumPy."""
    torch.manual_seed(seed)
    seed_host_generators(seed)


def seed_host_generators(seed: int) -> None:
    """Seed torch's generator of the CPU, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def read_generators(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State of every global generator: (tensors, JSON values)."""
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, internal, gauss_next = random.getstate()
    values = {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
    }
    return tensors, values


def write_generators(
    tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any], device: torch.device
) -> None:
    """Put back what `read_generators` read."""
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, position, has_gauss, gauss = values["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))


@contextlib.contextmanager
def untouched_generators(device: torch.device | None = None) -> Iterator[None]:
    """Whatever is drawn inside, the global generators go on as if it had not been.

    Those of the CPU, and that of `device` where it is a GPU.
    """
    gpu = device if device is not None and device.type == "cuda" else None
    gpu_state = None if gpu is None else torch.cuda.get_rng_state(gpu)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        if gpu is not None and gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, gpu)
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


def move_batch(batch: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)


def count_examples(batch: Any) -> int:
    """First dimension of the first tensor in a batch."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


def read_target(batch: Any) -> torch.Tensor | None:
    target = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    return target if isinstance(target, torch.Tensor) else None

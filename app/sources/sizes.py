"""The sizes of a model's example, and the same example at others. Knows no model and no library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

SIZES = ("sequence_length", "image_size")
MAX_EXAMPLE_BYTES = 2**30


class Maker(Protocol):
    """Makes an example from a configuration, at any sizes.

    Attributes:
        own: the sizes that it makes one at where nothing is said, as far as they may matter.
    """

    own: Mapping[str, int]

    def __call__(self, wanted: Mapping[str, int]) -> Any: ...


@dataclass(frozen=True)
class SizedExample:
    """An example, the sizes that it has, and why it does not have those that were asked for.

    Attributes:
        sizes: `sequence_length` and `image_size`, as far as it has them.
        refused: size that was asked for → why it could not be had, in a sentence.
    """

    example: Any
    sizes: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def size_example(
    example: Any, wanted: Mapping[str, int], make: Maker | None = None
) -> SizedExample:
    """An example at the sizes that are wanted; at its own for those that are not.

    Args:
        wanted: `sequence_length` and `image_size`, as far as they are.
        make: made the example; where nobody did, its tensors are cut or repeated.
    """
    if example is None:
        why = "the model gives no example of its own"
        return SizedExample(None, refused=dict.fromkeys(wanted, why))
    found = {name: _read_size(name, example, make) for name in SIZES}
    sizes = {name: size for name, size in found.items() if isinstance(size, int)}
    refused = {name: str(found[name]) for name in wanted if name not in sizes}
    changed = {n: size for n, size in wanted.items() if n in sizes and size != sizes[n]}
    if changed:
        bytes_after = _count_bytes(example) * _growth(sizes, changed)
        if bytes_after > MAX_EXAMPLE_BYTES:
            why = (
                f"its example would take {bytes_after / 2**30:,.1f} GiB, more than the "
                f"{MAX_EXAMPLE_BYTES // 2**30} GiB that one may take"
            )
            return SizedExample(example, sizes, {**refused, **dict.fromkeys(changed, why)})
        example = make(changed) if make else _stretch(example, sizes, changed)
    return SizedExample(example, {**sizes, **changed}, refused)


def _growth(sizes: Mapping[str, int], changed: Mapping[str, int]) -> float:
    """How many times as large it will be at most."""
    ratios = {name: size / max(1, sizes[name]) for name, size in changed.items()}
    return max(1.0, *(r**2 if name == "image_size" else r for name, r in ratios.items()))


def _count_bytes(example: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(example))


def _tensors(example: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]


# ----------------------------------------------------------------------------------------- reading


def _read_size(name: str, example: Any, make: Maker | None) -> int | str:
    """The size that an example has; why it has none, as the end of a sentence."""
    if make is None:
        tensors = _tensors(example)
        return _find_length(tensors) if name == "sequence_length" else _find_side(tensors)
    if name not in make.own:
        return "its configuration gives images that are no squares"
    longer = make({name: make.own[name] + 1})
    if [t.shape for t in _tensors(longer)] == [t.shape for t in _tensors(example)]:
        return f"its example has no {'text' if name == 'sequence_length' else 'images'}"
    return make.own[name]


def _find_side(tensors: Sequence[Tensor]) -> int | str:
    sides = {tuple(tensor.shape[2:]) for tensor in tensors if _is_image(tensor)}
    if not sides:
        return "its example has no images, which are floating tensors of four dimensions"
    if len(sides) > 1:
        return f"its example has images of several sizes: {_list(sides)}"
    (height, width) = sides.pop()
    if height != width:
        return f"its example's images are no squares: they are {height} by {width}"
    return int(height)


def _find_length(tensors: Sequence[Tensor]) -> int | str:
    lengths = {t.shape[1] for t in tensors if _is_whole(t) and t.dim() == 2}
    if not lengths:
        lengths = {t.shape[1] for t in tensors if t.is_floating_point() and t.dim() == 3}
    if not lengths:
        return (
            "its example has no sequence, which is a tensor of whole numbers, batch by length, or "
            "a floating one, batch by length by features"
        )
    if len(lengths) > 1:
        return f"its example has sequences of several lengths: {_list(lengths)}"
    return int(lengths.pop())


def _list(values: set[Any]) -> str:
    return " and ".join(map(str, sorted(values)))


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point()


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


# ---------------------------------------------------------------------------------------- changing


def _stretch(example: Any, sizes: Mapping[str, int], changed: Mapping[str, int]) -> Any:
    """The same example, its tensors cut or repeated along the dimensions of a size."""
    has_whole = any(_is_whole(tensor) and tensor.dim() == 2 for tensor in _tensors(example))
    for name, new in changed.items():
        old = sizes[name]
        find = _image_dims if name == "image_size" else partial(_length_dims, has_whole=has_whole)

        def change(tensor: Tensor, old: int = old, new: int = new, find: Any = find) -> Tensor:
            for dim in find(tensor, old):
                tensor = tensor.index_select(dim, _places(old, new, tensor.device))
            return tensor

        example = tree_map_only(Tensor, change, example)
    return example


def _image_dims(tensor: Tensor, side: int) -> Iterator[int]:
    """Height and width of images, and of what says something of each of their pixels."""
    is_map = _is_whole(tensor) and tensor.dim() in (3, 4) and tensor.shape[-2:] == (side, side)
    if _is_image(tensor) or is_map:
        yield from (tensor.dim() - 2, tensor.dim() - 1)


def _length_dims(tensor: Tensor, length: int, *, has_whole: bool) -> Iterator[int]:
    """Where a sequence's length stands: also in masks, labels, and masks of pairs."""
    if _is_whole(tensor) and tensor.dim() >= 2:
        yield from (dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == length)
    elif tensor.dim() == (2 if has_whole else 3) and tensor.shape[1] == length:
        yield 1


def _places(old: int, new: int, device: torch.device) -> Tensor:
    """Of which place each of the new ones is a copy: over again, and the last one last.

    A text that ends with its mark goes on ending so.
    """
    if old < 2:
        return torch.zeros(new, dtype=torch.int64, device=device)
    places = torch.arange(new, device=device) % (old - 1)
    places[-1] = old - 1
    return places

"""Data sets: the built-in ones, who may see which image, and a user's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app.freezing.errors import InvalidDocument
from app.sources.datasets import Data, build_data
from app.sources.demo import DEMO_DATASETS
from app.sources.demo.digits import Images, shift, split_digits
from app.sources.demo.networks import build_network
from app.sources.models import BuiltModel
from app.sources.preview import trace_on_data
from app.sources.spec import DatasetSpec
from app.sources.user_code import UserCodeError


def build_demo(name: str, **options: Any) -> Data:
    return build_data(DatasetSpec(f"demo:{name}", **options), code_dirs=[], seed=0)


def build_own(code_dir: Path, source: str, seed: int = 0, **options: Any) -> Data:
    """Build ``make`` of a module `data` with this source."""
    (code_dir / "data.py").write_text(source)
    return build_data(DatasetSpec("python:data:make", **options), code_dirs=[code_dir], seed=seed)


def pixel_rows(images: Images) -> set[bytes]:
    return {row.tobytes() for row in images.pixels}


# ------------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize("name", DEMO_DATASETS)
def test_a_demo_dataset_is_the_same_each_time_and_fits_its_model(name: str) -> None:
    one, two = build_demo(name), build_demo(name)
    assert not one.seed_items
    model = build_network(name).eval()
    for left, right in [
        (one.train, two.train),
        *zip(one.evals.values(), two.evals.values(), strict=True),
    ]:
        inputs, targets = left.tensors
        assert torch.equal(inputs, right.tensors[0])
        assert torch.equal(targets, right.tensors[1])
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert model(inputs[:2]).shape[1] > int(targets.max())


def test_the_digits_are_divided_without_a_common_image() -> None:
    split = split_digits()
    parts = (split.pretraining, split.labelled, split.held_out)
    assert [len(part) for part in parts] == [1100, 100, 597]
    assert len(set.union(*map(pixel_rows, parts))) == sum(map(len, parts))
    assert np.bincount(split.labelled.labels).tolist() == [10] * 10


def test_digits_are_judged_on_all_known_and_new_ones() -> None:
    data = build_demo("digits")
    assert len(data.train) == 100
    assert {
        name: sorted(set(dataset.tensors[1].tolist())) for name, dataset in data.evals.items()
    } == {
        "eval": list(range(10)),
        "known": list(range(5)),
        "new": list(range(5, 10)),
    }
    assert len(data.evals["known"]) + len(data.evals["new"]) == len(data.evals["eval"]) == 597


def test_shifted_digits_are_judged_on_the_same_images_as_before() -> None:
    data = build_demo("digits-shifted")
    shifted, before = data.evals["eval"].tensors, data.evals["before"].tensors
    assert torch.equal(shifted[1], before[1])
    assert torch.equal(before[0], torch.from_numpy(split_digits().held_out.pixels))
    assert (shifted[0] + before[0] - 1).std().item() == pytest.approx(0.3, rel=0.02)


def test_shifting_leaves_every_pixel_exact_in_float32() -> None:
    pixels = shift(split_digits().labelled, seed=4).pixels
    assert np.array_equal(pixels * 256, np.round(pixels * 256))


@torch.no_grad()
def test_the_shipped_networks_know_what_they_should() -> None:
    def accuracy(name: str, key: str) -> float:
        inputs, targets = build_demo(name).evals[key].tensors
        guesses = build_network(name).eval()(inputs).argmax(1)
        return (guesses == targets).float().mean().item()

    assert accuracy("digits", "known") > 0.98
    assert accuracy("digits", "new") == 0
    assert accuracy("digits-shifted", "before") > 0.97
    assert accuracy("digits-shifted", "eval") < 0.2


@pytest.mark.parametrize("name", ["three-layers", "simple-model", "multi-layer-model"])
def test_the_planes_divide_their_inputs_about_evenly(name: str) -> None:
    data = build_demo(name)
    assert (len(data.train), len(data.evals["eval"])) == (512, 256)
    assert 0.4 < data.train.tensors[1].float().mean().item() < 0.6


# ----------------------------------------------------------------------------------------- python


def test_a_tenth_is_held_out_where_a_dataset_brings_nothing_else(code_dir: Path) -> None:
    source = "def make(size=50): return {'train': [(i, i) for i in range(size)]}"
    data = build_own(code_dir, source)
    assert (len(data.train), len(data.evals["eval"])) == (45, 5)
    items = sorted(
        item[0] for part in (data.train, data.evals["eval"]) for item in list_items(part)
    )
    assert items == list(range(50))
    assert data.seed_items
    same, other = build_own(code_dir, source), build_own(code_dir, source, seed=2**63 - 1)
    assert list_items(same.evals["eval"]) == list_items(data.evals["eval"])
    assert list_items(other.evals["eval"]) != list_items(data.evals["eval"])


def list_items(dataset: Any) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


def test_the_share_held_out_can_be_chosen_or_none(code_dir: Path) -> None:
    source = "def make(size=10): return {'train': [(i, i) for i in range(size)]}"
    assert len(build_own(code_dir, source, eval_fraction=0.5).evals["eval"]) == 5
    assert build_own(code_dir, source, eval_fraction=0).evals == {}
    with pytest.raises(InvalidDocument, match="too few to hold out 1"):
        build_own(code_dir, source, kwargs={"size": 1})


def test_a_datasets_own_sets_are_used(code_dir: Path) -> None:
    pairs = "[(1.0, 0), (2.0, 1)]"
    one = build_own(code_dir, f"def make(): return {{'train': {pairs}, 'eval': {pairs}}}")
    assert list(one.evals) == ["eval"]
    assert len(one.train) == 2


def test_sets_may_be_named_and_batches_collated(code_dir: Path) -> None:
    source = (
        "def make(**options):\n"
        "    items = [{'x': 1}, {'x': 2}]\n"
        "    return {'train': items, 'eval': {'a': items, 'b': items}, 'collate': list}\n"
    )
    data = build_own(code_dir, source, num_workers=3, kwargs={"any": 1})
    assert list(data.evals) == ["a", "b"]
    assert data.collate is list
    assert data.num_workers == 3
    with pytest.raises(InvalidDocument, match="brings its own evaluation sets"):
        build_own(code_dir, source, eval_fraction=0.5)


def test_further_sets_are_named_by_uri(code_dir: Path) -> None:
    (code_dir / "more.py").write_text(
        "def only_eval(): return {'eval': [(9, 9)]}\n"
        "def only_train(): return {'train': [(8, 8)]}\n"
        "def two(): return {'eval': {'a': [(1, 1)], 'b': [(1, 1)]}}\n"
        "def collated(): return {'eval': [(1, 1)], 'collate': list}\n"
    )
    source = "def make(): return {'train': [(i, i) for i in range(20)]}"
    data = build_own(
        code_dir,
        source,
        eval={"one": "python:more:only_eval", "all": "python:more:only_train", "d": "demo:digits"},
    )
    assert len(data.train) == 20  # nothing is split off beside sets that were named
    assert list_items(data.evals["one"]) == [(9, 9)]
    assert list_items(data.evals["all"]) == [(8, 8)]
    assert len(data.evals["d"]) == 597
    with pytest.raises(InvalidDocument, match=r"several evaluation sets \(a, b\)"):
        build_own(code_dir, source, eval={"x": "python:more:two"})
    with pytest.raises(InvalidDocument, match="all sets share one"):
        build_own(code_dir, source, eval={"x": "python:more:collated"})
    with pytest.raises(InvalidDocument, match="returned no 'train'"):
        build_data(DatasetSpec("python:more:only_eval"), code_dirs=[code_dir], seed=0)


def test_sets_of_a_users_own_make_items_seeded_beside_demo_data(code_dir: Path) -> None:
    (code_dir / "more.py").write_text("def make(): return {'eval': [(9, 9)]}")
    spec = DatasetSpec("demo:digits", eval={"mine": "python:more:make"})
    data = build_data(spec, code_dirs=[code_dir], seed=0)
    assert list(data.evals) == ["eval", "known", "new", "mine"]
    assert data.seed_items


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("[(1, 1)]", "returned an object of type list; it must return a mapping with 'train'"),
        ("{}", "neither 'train' nor 'eval'"),
        ("{'train': [(1, 1)], 'evals': []}", "did it mean 'eval'"),
        ("{'train': []}", "'train' of python:data:make is empty"),
        ("{'train': [(1, 1)], 'eval': []}", "'eval' in 'eval' of python:data:make is empty"),
        ("{'train': [(1, 1)], 'eval': {'a/b': [(1, 1)]}}", "is no name"),
        ("{'train': iter([1])}", "it must be a map-style dataset"),
        ("{'train': {0: (1, 1)}}", "object of type dict; it must be a map-style dataset"),
        ("{'train': [1, 2]}", "is an object of type int; items must be"),
        ("{'train': [(1, 2, 3)]}", "of type tuple and length 3; items must be"),
        ("{'train': [(1, 1)], 'collate': 1}", "'collate' .* of type int"),
    ],
)
def test_what_cannot_be_trained_on_is_a_bad_spec(
    code_dir: Path, answer: str, sentence: str
) -> None:
    with pytest.raises(InvalidDocument, match=sentence):
        build_own(code_dir, f"def make(): return {answer}")


def test_a_stream_is_refused_although_it_is_a_dataset(code_dir: Path) -> None:
    source = (
        "from torch.utils.data import IterableDataset\n"
        "class Stream(IterableDataset):\n"
        "    def __len__(self): return 3\n"
        "    def __iter__(self): return iter([(1, 1)] * 3)\n"
        "def make(): return {'train': Stream()}\n"
    )
    with pytest.raises(InvalidDocument, match="map-style"):
        build_own(code_dir, source)


def test_a_first_item_that_raises_is_user_code(code_dir: Path) -> None:
    source = (
        "class Broken:\n"
        "    def __len__(self): return 3\n"
        "    def __getitem__(self, index): return {}[index]\n"
        "def make(): return {'train': Broken()}\n"
    )
    with pytest.raises(UserCodeError, match=r"The first item of 'train' .* raised KeyError: 0"):
        build_own(code_dir, source)


class Sized(nn.Module):
    """A layer whose weight comes of a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.left @ self.right)


def test_a_loss_of_its_own_sees_a_label_for_each_row_of_a_trace() -> None:
    built = BuiltModel(Sized(), loss=lambda out, batch: nn.functional.cross_entropy(out, batch[1]))
    data = Data(train=[(torch.randn(3), index % 2) for index in range(8)])
    graph = trace_on_data(built, data, "cpu")
    assert graph.traced_by == "fake", graph.trace_note
    assert graph.fixed_flops == 2 * 2 * 5 * 3

"""The tree in a terminal: the frost line, folded repeats, closed branches, numbers."""

from typing import Any

import pytest
from torch import nn

from app.cli.outline import FROST_LINE, count, counted, draw_tree, grow_tree, share_of, size
from app.freezing.config import parse_config
from app.freezing.plan import plan_config
from app.freezing.trace import trace_model
from tests.unit.models import make
from tests.unit.runs import freeze


def draw(model: nn.Module, example: Any, *matches: str, show_all: bool = False) -> list[str]:
    graph = trace_model(model, example)
    plan = plan_config(graph, parse_config(freeze(*matches))).document()
    return [row.plain for row in draw_tree(grow_tree(graph.tree(), plan), show_all)]


def test_the_frost_line_lies_where_backward_stops() -> None:
    rows = draw(*make("plain"), "layer1")
    assert [row.split()[1] for row in rows if "─ layer" in row] == ["layer1", "layer2", "layer3"]
    assert rows.index(FROST_LINE) == 2
    assert "idle" in rows[1]
    assert "trained" in rows[3]
    for nowhere in ([], ["**"], ["layer2"]):  # nothing idle first, or nothing reached
        assert FROST_LINE not in draw(*make("plain"), *nowhere)
    assert any("gradients pass through to layer1" in row for row in draw(*make("plain"), "layer2"))


class Deep(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(blocks))
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.blocks(x))


def test_repeated_blocks_fold_where_they_are_alike() -> None:
    import torch

    model, example = Deep(12), torch.randn(2, 4)
    rows = draw(model, example, "blocks.{0..8}.**")
    names = [
        row.replace("│", " ").split()[1] for row in rows if "Sequential" in row and "─ {" in row
    ]
    assert names == ["{0..8}", "{9..11}"]
    folded = next(row for row in rows if "{0..8}" in row)
    assert " 28" in folded  # of one of them
    assert rows.index(FROST_LINE) < rows.index(next(r for r in rows if "{9..11}" in r))
    assert len(draw(model, example, "blocks.{0..8}.**", show_all=True)) == 2 + 12 * 3 + 1 + 1
    mixed = draw(model, example, "blocks.3.0.bias")
    assert [r.replace("│", " ").split()[1] for r in mixed if "Sequential" in r][1:] == [
        "{0..2}",
        "3",
        "{4..11}",
    ]


def test_what_is_of_one_state_is_closed_where_a_tree_is_long() -> None:
    import torch

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in range(30):  # of different sizes: nothing folds
                setattr(self, f"part{index}", nn.Sequential(nn.Sequential(nn.Linear(4, index + 1))))

        def forward(self, x: Any) -> Any:
            return sum(getattr(self, f"part{index}")(x).sum() for index in range(30))

    rows = draw(Wide(), torch.randn(2, 4), "part0", "part1.0.0.bias")
    assert len(rows) < 60
    assert sum("all below" in row for row in rows) >= 28


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (7_100_000, "7.1 M"), (1.7e12, "1.7 T")],
)
def test_counts_are_short(number: float, words: str) -> None:
    assert count(number) == words


def test_sizes_are_short() -> None:
    assert [size(n) for n in (0, 1023, 1536, 28 * 2**20)] == [
        "0 B",
        "0.999 KiB",
        "1.5 KiB",
        "28 MiB",
    ]


def test_one_of_a_kind_is_said_in_the_singular() -> None:
    assert [counted(n, "tensor") for n in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]
    assert share_of(1, 6, "tensor") == "1 of 6 tensors is"
    assert share_of(0, 1, "tensor") == "0 of 1 tensor is"
    assert share_of(2, 6, "tensor") == "2 of 6 tensors are"

"""What nodes save, by the edges that are live, beside what autograd saves; in views too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.freezing.nodes import SAVED_FOR
from app.freezing.trace import trace_model
from tests.unit.peaks import foretell, see
from tests.zoo.observe import observe

PLACES = torch.tensor([0, 2, 1])
# Node → an operation that makes it, and the shapes of what it takes, in the order of its edges.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "AddbmmBackward0": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)]),
    "AddcdivBackward0": (torch.addcdiv, [(3, 4)] * 3),
    "AddcmulBackward0": (torch.addcmul, [(3, 4)] * 3),
    "AddmmBackward0": (torch.addmm, [(3, 5), (3, 4), (4, 5)]),
    "AddmvBackward0": (torch.addmv, [(3,), (3, 4), (4,)]),
    "AddrBackward0": (torch.addr, [(3, 4), (3,), (4,)]),
    "BaddbmmBackward0": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "BmmBackward0": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "DivBackward0": (torch.div, [(3, 4)] * 2),
    "DotBackward0": (torch.dot, [(4,)] * 2),
    "FmodBackward1": (torch.fmod, [(3, 4)] * 2),
    "IndexAddBackward0": (lambda a, b: a.index_add(0, PLACES, b), [(3, 4)] * 2),
    "LerpBackward1": (torch.lerp, [(3, 4)] * 3),
    "LinalgCrossBackward0": (torch.linalg.cross, [(4, 3)] * 2),
    "MmBackward0": (torch.mm, [(3, 4), (4, 5)]),
    "MulBackward0": (torch.mul, [(3, 4)] * 2),
    "MvBackward0": (torch.mv, [(3, 4), (4,)]),
    "RemainderBackward1": (torch.remainder, [(3, 4)] * 2),
    "ScatterAddBackward0": (lambda a, b: a.scatter_add(0, PLACES.expand(1, 3), b), [(3, 3)] * 2),
    "TrilinearBackward0": (
        lambda a, b, c: torch._trilinear(a, b, c, [1, 3], [0], [1, 2], [2, 3]),
        [(3, 4), (2, 4, 4), (3, 4)],
    ),
    "VdotBackward0": (torch.vdot, [(4,)] * 2),
}
UNTRIED = {"GroupedMmBackward0"}  # a CPU has no float32 of it; `tests/zoo` has mixtures of experts


@pytest.mark.parametrize("kind", sorted(SAVED_FOR.keys() - UNTRIED))
def test_an_operand_is_saved_for_the_edges_that_the_table_says(kind: str) -> None:
    run, shapes = OPERATIONS[kind]
    for wanted in itertools.product([False, True], repeat=len(shapes)):
        if not any(wanted):
            continue
        given = [
            torch.rand(shape, requires_grad=w) for shape, w in zip(shapes, wanted, strict=True)
        ]
        node: Any = run(*given).grad_fn
        assert node.name() == kind
        saved = {name for name in SAVED_FOR[kind] if getattr(node, f"_saved_{name}") is not None}
        live = {edge for edge, is_wanted in enumerate(wanted) if is_wanted}
        assert saved == {name for name, edges in SAVED_FOR[kind].items() if live & {*edges}}


class Writer(nn.Module):
    """Writes into a linear layer's result, which of three dimensions is a view."""

    def __init__(self, write: Callable[[Writer, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 4)
        self.scale = nn.Parameter(torch.ones(64))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.write(self, h, self.gate(x))
        return self.last(h)


WRITES: dict[str, Callable[[Writer, Tensor, Tensor], object]] = {
    "relu": lambda m, h, gate: h.relu_(),
    "dropout": lambda m, h, gate: F.dropout(h, 0.2, inplace=True),
    "a view of the view": lambda m, h, gate: h.view(-1, 64).sigmoid_(),
    "a long way in": lambda m, h, gate: h.view(-1).view(-1, 32).transpose(0, 1).sigmoid_(),
    "a part": lambda m, h, gate: h[..., :32].tanh_(),
    "mask": lambda m, h, gate: h.masked_fill_(gate > 0, 0.0),
    "scale": lambda m, h, gate: h.mul_(m.scale),
    "product": lambda m, h, gate: h.mul_(gate),
    "product of a part": lambda m, h, gate: h[..., :32].mul_(gate[..., 32:]),
    "quotient": lambda m, h, gate: h.div_(gate.exp()),
    "two after each other": lambda m, h, gate: h.mul_(gate).relu_(),
    "rows added": lambda m, h, gate: h.index_add_(1, PLACES, gate[:, :3]),
    "product added": lambda m, h, gate: h.addcmul_(gate, m.scale.expand_as(h)),
}


@pytest.mark.parametrize("what", WRITES)
def test_what_an_operation_keeps_that_is_written_into_a_view_is_foretold(what: str) -> None:
    """Autograd hides who wrote into it."""
    model, example = Writer(WRITES[what]), torch.randn(6, 8, 16)
    graph = trace_model(model, torch.randn(2, 8, 16))
    reached = zip(graph.parameters, graph.walk.is_reached, strict=True)
    names = [parameter.name for parameter, is_reached in reached if is_reached]
    for trained in itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in (1, 2, len(names))
    ):
        cost = foretell(graph, [*trained], batch_size=6, optimizer="sgd")
        seen = observe(model, example, {*trained}).saved_bytes
        assert cost["activation_bytes"] == pytest.approx(seen, abs=24), trained


@pytest.mark.parametrize("trained", [["0.weight"], ["0.bias", "2.weight"], ["5.weight"]])
def test_the_peak_of_operations_in_views_is_foretold(trained: list[str]) -> None:
    first = nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 16)
    model = nn.Sequential(*first, nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(128, 4))
    graph = trace_model(model, torch.randn(2, 8, 16))
    example = torch.randn(6, 8, 16)
    cost = foretell(graph, trained, batch_size=6, optimizer="sgd")
    assert cost["activation_bytes"] == observe(model, example, {*trained}).saved_bytes
    assert cost["peak_bytes"] == pytest.approx(see(model, example, trained), rel=0.001)

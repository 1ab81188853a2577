"""Each measure against a naive recomputation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from app.freezing.apply import Freeze, apply_config
from app.freezing.config import parse_config
from app.freezing.measure import EXACT_EVERY, LayerMeasure, LayerStats
from tests.unit.models import MODELS, make
from tests.unit.optimizers import KINDS, build
from tests.unit.runs import freeze

FROZEN = {
    "plain": "layer1",
    "tied": "block.linear1",
    "convolutional": "stem",
    "wide": "0",
    "channels last": "0",
}


def make_any(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The small models, and two with tensors that are too large to be looked at as a whole."""
    if name in MODELS:
        return make(name)
    torch.manual_seed(0)
    if name == "wide":
        layers = (nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96), nn.LayerNorm(96))
        return nn.Sequential(*layers, nn.Linear(96, 7)), torch.randn(8, 96)
    convolutions = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 16, 5))
    return model.to(memory_format=torch.channels_last), torch.randn(8, 3, 8, 8)


def measure_step(measure: LayerMeasure, applied: Freeze, step: Callable[[], Any]) -> LayerStats:
    """Measure around one update, as the second measured step: no exact pass falls on it."""
    measure.read_gradients(applied.frozen)
    measure.before_update(2)
    step()
    (stats,) = measure.after_update(2)
    return stats


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("optimizer", sorted(KINDS))
@pytest.mark.parametrize("name", sorted(FROZEN))
def test_norms_equal_a_naive_recomputation(name: str, optimizer: str, is_exact: bool) -> None:
    model, example = make_any(name)
    applied = apply_config(model, parse_config(freeze(FROZEN[name])))
    measure = LayerMeasure(applied.graph, applied.parameters, is_exact=is_exact)
    made = build(optimizer, "for-loop", applied.parameter_groups(0.01))
    for step in (1, 2, 3):
        model(example).float().square().mean().backward()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in _named(model)}
        before = {n: p.detach().clone() for n, p in _named(model)}
        measure.read_gradients(applied.frozen)
        measure.before_update(step)
        made.step()
        (stats,) = measure.after_update(step)
        assert (measure.inspection is not None) == (step == 1)
        for row, layer in enumerate(applied.graph.layers):
            names = layer.parameters
            own = [gradients[n] for n in names if gradients[n] is not None]
            if own:
                assert stats.grad_norm[row] == pytest.approx(_norm(own), rel=1e-5)
            else:
                assert stats.grad_norm[row] is None
            named = dict(_named(model))
            moved = [named[n].detach() - before[n] for n in names]
            if all(gradients[n] is None for n in names):
                assert stats.update_norm[row] == 0.0
                assert _norm(moved) == 0.0
            is_estimate = measure.estimated[row] and step > 1
            assert stats.update_norm[row] == pytest.approx(
                _norm(moved), rel=0.15 if is_estimate else 1e-5
            )
            expected = _norm([named[n].detach() for n in names])
            assert stats.weight_norm[row] == pytest.approx(expected, rel=1e-5)
        model.zero_grad()
    assert any(measure.estimated) == (name not in MODELS and not is_exact)


def test_an_exact_pass_says_how_far_off_the_estimates_are() -> None:
    model = nn.Linear(200, 200)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    change = torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    norms = []
    for turn in (1, 2, EXACT_EVERY + 1):
        model.weight.grad = torch.ones_like(model.weight)
        measure.read_gradients(applied.frozen)
        measure.before_update(turn)
        model.weight.data.add_(change)
        (stats,) = measure.after_update(turn)
        norms.append(stats.update_norm[0])
        if turn != 2:
            assert measure.inspection is not None
            error = measure.inspection.estimate_error
    assert norms[0] == norms[2] == pytest.approx(change.norm().item(), rel=1e-5)
    assert 0 < abs(norms[1] / norms[0] - 1) == pytest.approx(error, rel=1e-3)
    assert error < 0.05


def test_an_exact_pass_copies_a_bounded_part_of_a_large_model_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(80, 80, bias=False) for _ in range(5)))
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters, exact_elements=2 * 6400)
    exact = []
    for turn in range(1, 3 * EXACT_EVERY + 2, EXACT_EVERY):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        measure.read_gradients(applied.frozen)
        measure.before_update(turn)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        (stats,) = measure.after_update(turn)
        true = [
            (p.detach() - b).norm().item() for p, b in zip(model.parameters(), before, strict=True)
        ]
        pairs = enumerate(zip(stats.update_norm, true, strict=True))
        exact.append([i for i, (told, truth) in pairs if told == pytest.approx(truth, rel=1e-6)])
    assert exact == [[0, 1], [2, 3], [4], [0, 1]]


def test_updates_that_are_rounded_away_are_counted() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 4, bias=False))
    model.to(torch.bfloat16)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(8, 100, dtype=torch.bfloat16)
    model(inputs).float().square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    measure.read_gradients(applied.frozen)
    measure.before_update(1)
    optimizer.step()
    measure.after_update(1)
    found = measure.inspection
    assert found is not None
    true = [
        ((p == b) & (g != 0)).sum().item() / (g != 0).sum().item()
        for p, b, g in zip(model.parameters(), before, gradients, strict=True)
    ]
    assert true[0] > 0.5  # most of it, which is why it is counted
    assert found.lost[1] == pytest.approx(true[1])  # all of it is looked at
    assert found.lost[0] == pytest.approx(true[0], abs=0.03)
    assert found.lost_share == pytest.approx((true[0] * 10000 + true[1] * 400) / 10400, abs=0.03)


def test_trainable_layers_without_a_gradient_are_marked() -> None:
    model, example = make("tied")
    applied = apply_config(model, parse_config(freeze("block.linear1")))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model(example).square().mean().backward()
    measure.read_gradients(applied.frozen)
    measure.before_update(1)
    (stats,) = measure.after_update(1)
    assert measure.inspection is not None
    marked = [
        p for p, is_so in zip(measure.layers, measure.inspection.unreached, strict=True) if is_so
    ]
    assert marked == ["unused"]
    assert stats.grad_norm[measure.layers.index("unused")] is None
    assert stats.update_norm[measure.layers.index("unused")] == 0.0
    assert measure.inspection.lost[measure.layers.index("block.linear1")] is None


def test_gradients_alone_are_told_without_the_rest() -> None:
    model, example = make("plain")
    applied = apply_config(model, parse_config(freeze("layer1")))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model(example).square().mean().backward()
    measure.read_gradients(applied.frozen)
    stats = measure.tell_gradients(7)
    assert stats.grad_norm[0] is None
    assert stats.grad_norm[1] == pytest.approx(
        _norm([p.grad for p in model.layer2.parameters() if p.grad is not None]), rel=1e-5
    )
    assert stats.update_norm == stats.weight_norm == [None] * 3


def test_sparse_gradients_are_looked_at_like_others() -> None:
    model = nn.Embedding(1000, 8, sparse=True)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    model(torch.arange(500)).square().sum().backward()
    measure.read_gradients(applied.frozen)
    measure.before_update(1)
    optimizer.step()
    (stats,) = measure.after_update(1)
    assert stats.update_norm == [pytest.approx(math.sqrt(4000) * 0.1, rel=1e-3)]
    assert measure.inspection is not None
    assert measure.inspection.lost == [0.0]


def test_a_sparse_gradient_beside_a_frozen_layer_is_measured() -> None:
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 2))
    applied = apply_config(model, parse_config(freeze("1")))
    measure = LayerMeasure(applied.graph, applied.parameters)
    assert measure.read_gradients(applied.frozen).item() == 0.0
    model(torch.arange(20)).square().sum().backward()
    gradient = model[0].weight.grad.to_dense()
    stats = measure_step(measure, applied, lambda: None)
    assert stats.grad_norm == [pytest.approx(gradient.norm().item(), rel=1e-5), None]


def test_norms_are_wide_whatever_the_weights_are_in() -> None:
    model = torch.nn.Linear(301, 300, bias=False).to(torch.bfloat16)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model.weight.grad = torch.full_like(model.weight, 3.0)
    (left_to_itself,) = torch._foreach_norm([model.weight.grad])
    assert left_to_itself.dtype == torch.bfloat16
    stats = measure_step(measure, applied, lambda: None)
    true = 3.0 * math.sqrt(301 * 300)
    assert stats.grad_norm == [pytest.approx(true, rel=1e-6)]
    assert left_to_itself.item() != pytest.approx(true, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_told_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model.weight.grad = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    model.bias.grad = torch.ones(2)
    (value,) = measure_step(measure, applied, lambda: None).grad_norm
    assert value is not None
    assert math.isnan(value)


def _named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_widths_may_differ_and_numbers_may_be_complex() -> None:
    model = torch.nn.Module()
    model.register_parameter("wide", torch.nn.Parameter(torch.full((4,), 3.0).double()))
    model.register_parameter("narrow", torch.nn.Parameter(torch.full((4,), 4.0)))
    child = torch.nn.Module()
    child.register_parameter("wave", torch.nn.Parameter(torch.full((4,), 3 + 4j)))
    model.add_module("child", child)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    total = measure.read_gradients(applied.frozen)
    measure.before_update(2)
    with torch.no_grad():
        child.wave.mul_(2)
    (stats,) = measure.after_update(2)
    assert stats.grad_norm == [pytest.approx(10.0), pytest.approx(10.0)]
    assert stats.update_norm == [0.0, pytest.approx(10.0)]
    assert stats.weight_norm == [pytest.approx(10.0), pytest.approx(20.0)]
    assert total.item() == pytest.approx(math.sqrt(200))


def test_a_layer_frozen_between_two_measurements_has_its_true_weight_norm() -> None:
    model, _ = make("plain")
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)

    def step_all(measured: bool) -> list[float | None]:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        measure.read_gradients(applied.frozen)
        if measured:
            measure.before_update(2)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(0.1)
        norms = measure.after_update(2)[0].weight_norm if measured else []
        model.zero_grad()
        return norms

    step_all(measured=True)
    step_all(measured=False)
    model.layer1.requires_grad_(False)
    true_norm = math.sqrt(sum(p.detach().square().sum().item() for p in model.layer1.parameters()))
    assert step_all(measured=True)[0] == pytest.approx(true_norm, rel=1e-5)


def test_a_layer_that_moves_only_while_nobody_measures_has_its_true_weight_norm() -> None:
    model, _ = make("plain")
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    for step in range(1, 5):
        for parameter in model.layer2.parameters():
            parameter.grad = torch.ones_like(parameter)
        for parameter in model.layer1.parameters():  # as an expert that few batches come to
            parameter.grad = torch.ones_like(parameter) if step % 2 == 0 else None
        measure.read_gradients(applied.frozen)
        if step % 2:
            measure.before_update(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1)
        if step % 2:
            (stats,) = measure.after_update(step)
            own = [p.detach() for p in model.layer1.parameters()]
            assert stats.weight_norm[0] == pytest.approx(_norm(own), rel=1e-5)


def write_as_autograd_knows(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(0.9)


def write_behind_its_back(parameter: nn.Parameter) -> None:
    parameter.data.mul_(0.9)


@pytest.mark.parametrize("write", [write_as_autograd_knows, write_behind_its_back])
@pytest.mark.parametrize("name", ["plain", "wide"])
def test_what_a_forward_writes_is_no_part_of_the_update(
    name: str, write: Callable[[nn.Parameter], None]
) -> None:
    model, example = make_any(name)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters, is_exact=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(1, 9):
        for parameter in model.parameters():
            if step in (3, 4, 7):  # now and then, as weights are clipped
                write(parameter)
        optimizer.zero_grad()
        model(example).float().square().mean().backward()
        before = {n: p.detach().clone() for n, p in _named(model)}
        measure.read_gradients(applied.frozen)
        measure.before_update(step + 1)
        optimizer.step()
        (stats,) = measure.after_update(step)
        named = dict(_named(model))
        for row, layer in enumerate(applied.graph.layers):
            moved = [named[n].detach() - before[n] for n in layer.parameters]
            assert stats.update_norm[row] == pytest.approx(_norm(moved), rel=1e-5)


class Strange(nn.Module):
    """Parameters that lie in memory as no layer of torch makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(90, 70).t())
        self.gapped = nn.Parameter(torch.randn(70, 8)[:, :3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.turned.t() @ self.gapped


@pytest.mark.parametrize("is_exact", [False, True])
def test_parameters_that_lie_strangely_in_memory_are_seen_to_move(is_exact: bool) -> None:
    torch.manual_seed(0)
    model = Strange()
    assert not any(parameter.is_contiguous() for parameter in model.parameters())
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters, is_exact=is_exact)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 90)).square().mean().backward()
    stats = measure_step(measure, applied, optimizer.step)
    moved = [(p - before[n]).norm() for n, p in model.named_parameters()]
    exact = torch.stack(moved).norm().item()
    assert stats.update_norm == [pytest.approx(exact, rel=1e-5 if is_exact else 0.1)]
    weights = torch.stack([p.detach().norm() for p in model.parameters()]).norm().item()
    assert stats.weight_norm == [pytest.approx(weights, rel=1e-5)]

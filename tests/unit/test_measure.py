"""Each measure against a naive recomputation."""

import math

import pytest
import torch

from app.freezing.apply import apply_config
from app.freezing.config import parse_config
from app.freezing.measure import LayerMeasure
from tests.unit.models import MODELS, make
from tests.unit.runs import freeze
from tests.unit.test_apply import OPTIMIZERS

FROZEN = {"plain": "layer1", "tied": "block.linear1", "convolutional": "stem"}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_norms_equal_a_naive_recomputation(name: str, optimizer: str) -> None:
    model, example = make(name)
    applied = apply_config(model, parse_config(freeze(FROZEN[name])))
    measure = LayerMeasure(applied.graph, applied.parameters)
    made = OPTIMIZERS[optimizer](applied.parameter_groups(0.01))
    for step in (1, 2, 3):
        model(example).float().square().mean().backward()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in _named(model)}
        before = {n: p.detach().clone() for n, p in _named(model)}
        measure.read_gradients(applied.frozen)
        measure.copy_weights()
        made.step()
        stats = measure.read_updates(step)
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
            assert stats.update_norm[row] == pytest.approx(_norm(moved), rel=1e-5)
            expected = _norm([named[n].detach() for n in names])
            assert stats.weight_norm[row] == pytest.approx(expected, rel=1e-5)
        model.zero_grad()


def test_norms_are_wide_whatever_the_weights_are_in() -> None:
    model = torch.nn.Linear(300, 300).to(torch.bfloat16)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model.weight.grad = torch.full_like(model.weight, 3.0)
    measure.read_gradients(applied.frozen)
    measure.copy_weights()
    stats = measure.read_updates(1)
    assert stats.grad_norm == [pytest.approx(900.0, rel=1e-6)]  # bf16 would say 900 ± 4


def test_a_gradient_that_is_not_finite_is_told_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model.weight.grad = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    model.bias.grad = torch.ones(2)
    measure.read_gradients(applied.frozen)
    measure.copy_weights()
    (value,) = measure.read_updates(1).grad_norm
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
    measure.copy_weights()
    with torch.no_grad():
        child.wave.mul_(2)
    stats = measure.read_updates(1)
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
            measure.copy_weights()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(0.1)
        norms = measure.read_updates(1).weight_norm if measured else []
        model.zero_grad()
        return norms

    step_all(measured=True)
    step_all(measured=False)
    model.layer1.requires_grad_(False)
    true_norm = math.sqrt(sum(p.detach().square().sum().item() for p in model.layer1.parameters()))
    assert step_all(measured=True)[0] == pytest.approx(true_norm, rel=1e-5)

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
        measure.before_step()
        made.step()
        stats = measure.after_step(step)
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
    measure.before_step()
    stats = measure.after_step(1)
    assert stats.grad_norm == [pytest.approx(900.0, rel=1e-6)]  # bf16 would say 900 ± 4


def test_a_gradient_that_is_not_finite_is_told_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    applied = apply_config(model, parse_config({}))
    measure = LayerMeasure(applied.graph, applied.parameters)
    model.weight.grad = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    model.bias.grad = torch.ones(2)
    measure.before_step()
    (value,) = measure.after_step(1).grad_norm
    assert value is not None
    assert math.isnan(value)


def _named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

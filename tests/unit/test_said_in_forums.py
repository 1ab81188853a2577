"""What is said of freezing in forums, each sentence tried on torch itself."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from app.freezing.apply import apply_config
from app.freezing.config import parse_config
from app.freezing.errors import InvalidDocument
from tests.unit.models import Plain, make
from tests.unit.runs import freeze

Optimizer = torch.optim.Optimizer


def step(model: nn.Module, example: torch.Tensor, optimizer: Optimizer) -> None:
    model(example).float().square().mean().backward()
    optimizer.step()


def plain() -> tuple[Plain, torch.Tensor]:
    model, example = make("plain")
    assert isinstance(model, Plain)
    return model, example


def test_freezing_the_middle_leaves_the_gradients_before_it_bit_identical() -> None:
    gradients = []
    for frozen in (False, True):
        model, example = plain()
        model.layer2.requires_grad_(not frozen)
        model(example).square().mean().backward()
        assert (model.layer2.weight.grad is None) is frozen
        gradients.append([p.grad for p in (*model.layer1.parameters(), *model.layer3.parameters())])
    assert all(map(torch.equal, *gradients))


def test_a_frozen_parameter_has_no_gradient_and_not_a_zero_one() -> None:
    model, example = plain()
    model.layer2.requires_grad_(False)
    model(example).sum().backward()
    assert all(p.grad is None for p in model.layer2.parameters())


def test_an_intermediate_result_cannot_be_frozen() -> None:
    model, example = plain()
    with pytest.raises(RuntimeError, match="only change requires_grad flags of leaf variables"):
        model.layer1(example).requires_grad = False


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_asks_whether_grad_is_none_and_not_requires_grad(
    optimizer: Callable[..., Optimizer],
) -> None:
    model, example = plain()
    made = optimizer(model.parameters(), lr=0.1)
    model(example).sum().backward()
    model.layer2.requires_grad_(False)  # a gradient is left behind
    before = model.layer2.weight.detach().clone()
    made.step()
    assert not torch.equal(model.layer2.weight, before)
    model.layer2.weight.grad = model.layer2.bias.grad = None
    before = model.layer2.weight.detach().clone()
    made.step()
    assert torch.equal(model.layer2.weight, before)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_zero_rate_computes_gradients_and_neither_moves_nor_decays(
    optimizer: Callable[..., Optimizer],
) -> None:
    model, example = plain()
    groups = [
        {"params": model.layer1.parameters(), "lr": 0.0, "weight_decay": 0.5},
        {"params": [*model.layer2.parameters(), *model.layer3.parameters()]},
    ]
    made = optimizer(groups, lr=0.1)
    before = model.layer1.weight.detach().clone()
    for _ in range(3):
        step(model, example, made)
    assert torch.equal(model.layer1.weight, before)
    assert model.layer1.weight.grad is not None


def test_the_moments_of_a_zero_rate_fire_when_the_rate_returns() -> None:
    model, example = plain()
    made = torch.optim.Adam([{"params": model.parameters(), "lr": 0.0}])
    for _ in range(3):
        step(model, example, made)
    made.param_groups[0]["lr"] = 0.1
    before = model.layer1.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # nothing new is learnt
    made.step()
    assert not torch.equal(model.layer1.weight, before)


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({}, True),
        ({"weight_decay": 0.1}, False),
        ({"momentum": 0.9}, False),
    ],
)
def test_zeroed_gradients_keep_weights_only_with_plain_sgd(
    settings: dict[str, float], holds: bool
) -> None:
    model, example = plain()
    made = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    step(model, example, made)  # it was trained before
    before = model.layer1.weight.detach().clone()
    for _ in range(2):
        model(example).square().mean().backward()
        for parameter in model.layer1.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        made.step()
    assert torch.equal(model.layer1.weight, before) is holds


def test_the_hand_written_freeze_holds_for_one_step_and_then_moves() -> None:
    model, example = plain()
    kept = {"layer1": model.layer1.parameters()}  # a generator: one pass and it is empty
    made = torch.optim.Adam(model.parameters(), lr=1e-3)
    start = model.layer1.weight.detach().clone()
    moved = []
    for _ in range(2):
        made.zero_grad()
        model(example).square().mean().backward()
        for parameter in kept["layer1"]:
            assert parameter.grad is not None
            parameter.grad.zero_()
        made.step()
        moved.append((model.layer1.weight - start).abs().max().item())
    assert moved[0] == 0.0
    assert moved[1] > 1e-4


@pytest.mark.parametrize("barrier", ["no_grad", "detach", "reentrant", "frozen"])
def test_only_no_grad_detach_and_reentrant_checkpoints_are_barriers(barrier: str) -> None:
    model, example = plain()
    model.layer2.requires_grad_(False)
    before = model.layer1(example)
    if barrier == "no_grad":
        with torch.no_grad():
            middle = model.layer2(before)
    elif barrier == "detach":
        middle = model.layer2(before).detach()
    elif barrier == "reentrant":
        block = nn.Sequential(model.layer1, model.layer2)
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            middle = checkpoint(block, example, use_reentrant=True)
    else:
        middle = model.layer2(before)
    model.layer3(middle).sum().backward()
    assert (model.layer1.weight.grad is not None) is (barrier == "frozen")


def test_requires_grad_false_stops_no_running_statistics_and_eval_does() -> None:
    norm = nn.BatchNorm1d(3).requires_grad_(False)
    means = [norm.running_mean.clone()]
    norm(torch.randn(8, 3))
    means.append(norm.running_mean.clone())
    with torch.no_grad():
        norm(torch.randn(8, 3))
    means.append(norm.running_mean.clone())
    norm.eval()
    norm(torch.randn(8, 3))
    assert not torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])
    assert torch.equal(means[2], norm.running_mean)


def test_eval_mode_freezes_no_parameter() -> None:
    model, example = plain()
    model.eval()
    before = model.layer1.weight.detach().clone()
    step(model, example, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not torch.equal(model.layer1.weight, before)


def test_where_every_leaf_is_frozen_results_are_leaves_too() -> None:
    model, example = plain()
    model.requires_grad_(False)
    output = model(example)
    assert output.is_leaf
    assert output.grad_fn is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        output.sum().backward()
    with pytest.raises(InvalidDocument, match="Nothing is trainable"):
        apply_config(model, parse_config(freeze("**"))).parameter_groups(0.0)


def test_weights_of_16_bits_do_not_move_at_a_small_rate() -> None:
    model, example = plain()
    model.bfloat16()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    made = torch.optim.SGD(model.parameters(), lr=1e-5)
    step(model, example.bfloat16(), made)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (before == after).float().mean() > 0.95

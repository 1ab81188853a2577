"""The four mechanisms side by side: what each really does, against hand-written loops."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from app.freezing.config import MECHANISMS, parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.mechanisms import Setting, compare_mechanisms
from tests.unit.models import MODELS, make
from tests.unit.runs import freeze

FROZEN = {"plain": "layer1", "tied": "block", "convolutional": "stem"}
STEPS = 4


def compare(name: str, setting: Setting | None = None, *variants: Setting) -> dict[str, Any]:
    model, example = make(name)
    config = parse_config(freeze(FROZEN[name]))

    def compute(model: nn.Module, _: int) -> torch.Tensor:
        return model(example).float().square().mean()

    chosen = setting or Setting()
    found = compare_mechanisms(
        model, config, compute, setting=chosen, steps=STEPS, variants=variants
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return {**found, "by": {result["mechanism"]: result for result in found["mechanisms"]}}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_only_requires_grad_saves_gradients_and_only_leaving_out_saves_state(name: str) -> None:
    found = compare(name)
    by = found["by"]
    assert tuple(by) == MECHANISMS
    assert by["requires_grad"]["gradients"]["frozen"] == 0
    for other in MECHANISMS[1:]:
        assert by[other]["gradients"]["frozen"] > 0
        assert by[other]["gradient_bytes"] > by["requires_grad"]["gradient_bytes"]
        assert by[other]["peak_bytes"] > by["requires_grad"]["peak_bytes"]
    assert by["exclude"]["optimizer_bytes"] == by["requires_grad"]["optimizer_bytes"]
    assert by["zero_lr"]["optimizer_bytes"] == by["zero_grad"]["optimizer_bytes"]
    assert by["zero_lr"]["optimizer_bytes"] > by["requires_grad"]["optimizer_bytes"]
    for result in by.values():
        assert result["frozen_identical"]
        assert result["trained_identical"]
        assert result["step_ms"] > 0


def test_gradients_that_nobody_zeroes_add_up() -> None:
    by = compare("plain")["by"]
    left = by["exclude"]["left_behind"]
    assert left == sorted(left)
    assert left[-1] > 2.5 * left[0] > 0
    for other in ("requires_grad", "zero_lr", "zero_grad"):
        assert by[other]["left_behind"] == [0.0] * STEPS
    assert "add up" in " ".join(by["exclude"]["says"])


def naive(mechanism: str, clip: float) -> dict[str, torch.Tensor]:
    """A loop as somebody would write it, for Adam on the plain model with layer1 frozen."""
    model, example = make("plain")
    first, rest = (
        list(model.layer1.parameters()),
        [*model.layer2.parameters(), *model.layer3.parameters()],
    )
    if mechanism == "requires_grad":
        model.layer1.requires_grad_(False)
    groups = [{"params": rest}]
    if mechanism != "exclude":
        groups.insert(0, {"params": first, **({"lr": 0.0} if mechanism == "zero_lr" else {})})
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    for _ in range(STEPS):
        model(example).float().square().mean().backward()
        if mechanism == "zero_grad":
            for parameter in first:
                parameter.grad.zero_()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


def test_clipping_by_all_gradients_trains_otherwise_under_exclude_and_zero_lr() -> None:
    clipped = Setting("adam", 1e-3, max_grad_norm=0.1)
    (variant,) = compare("plain", None, clipped)["variants"]
    reference = naive("requires_grad", 0.1)
    for mechanism, outcome in variant["mechanisms"].items():
        own = naive(mechanism, 0.1)
        differences = {n: (own[n] - reference[n]).abs().max().item() for n in own}
        assert outcome["trained_identical"] is (max(differences.values()) == 0.0)
        assert outcome["trained_difference"] == pytest.approx(max(differences.values()), rel=1e-5)
        assert outcome["trained_identical"] is (mechanism in ("requires_grad", "zero_grad"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_decay_moves_what_is_frozen_under_zero_grad_alone(optimizer: str) -> None:
    decaying, plain = (Setting(optimizer, 0.01, weight_decay=d) for d in (0.1, 0.0))
    for variant in compare("plain", None, decaying, plain)["variants"]:
        for mechanism, outcome in variant["mechanisms"].items():
            moves = mechanism == "zero_grad" and variant["weight_decay"] > 0
            assert outcome["frozen_identical"] is not moves
            assert {m["name"] for m in outcome["frozen_moved"]} == (
                {"layer1.weight", "layer1.bias"} if moves else set()
            )
            assert all("weight decay" in m["cause"] for m in outcome["frozen_moved"])


def test_training_everything_afterwards_tells_of_stale_gradients_and_moments() -> None:
    by = compare("plain", Setting("sgd", 1e-4))["by"]
    assert by["requires_grad"]["afterwards"]["times_fresh"] == 1.0
    # the gradients of every step so far, and its own
    assert by["exclude"]["afterwards"]["times_fresh"] == pytest.approx(STEPS + 1, rel=0.01)
    assert by["zero_lr"]["afterwards"]["times_fresh"] == pytest.approx(1.0)
    by = compare("plain", Setting("sgd", 1e-4, momentum=0.9))["by"]
    heaped = sum(0.9**i for i in range(STEPS + 1))
    assert by["zero_lr"]["afterwards"]["times_fresh"] == pytest.approx(heaped, rel=0.01)
    by = compare("plain", Setting("adam", 1e-4))["by"]
    mean, square = 0.1 / (1 - 0.9 ** (STEPS + 1)), 0.001 / (1 - 0.999 ** (STEPS + 1))
    expected = mean / square**0.5  # a count of steps that ran on while its moments were empty
    assert by["zero_grad"]["afterwards"]["times_fresh"] == pytest.approx(expected, rel=0.01)


def test_the_model_is_left_as_it_came() -> None:
    model, example = make("convolutional")
    before = copy.deepcopy(model.state_dict())
    config = parse_config(freeze("stem"))

    def compute(model: nn.Module, _: int) -> torch.Tensor:
        return model(example).square().mean()

    compare_mechanisms(model, config, compute, setting=Setting(), steps=2, variants=())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_trainable_is_refused() -> None:
    model, _ = make("plain")
    with pytest.raises(InvalidDocument, match="Nothing is trainable"):
        compare_mechanisms(
            model, parse_config(freeze("**")), lambda m, _: m, setting=Setting(), variants=()
        )


def test_peak_memory_is_what_tensors_hold_at_most() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(16, 64)
    config = parse_config(freeze("0"))
    found = compare_mechanisms(
        model, config, lambda m, _: m(x).sum(), setting=Setting("sgd", 0.1), steps=2, variants=()
    )
    by = {result["mechanism"]: result["peak_bytes"] for result in found["mechanisms"]}
    weights, layer = 4 * 2 * (64 * 64 + 64), 4 * (64 * 64 + 64)
    assert weights + layer <= by["requires_grad"] <= weights + layer + 8 * 16 * 64 * 4
    # kept from step to step: the new gradient lies beside the one that it is added to
    assert layer <= by["exclude"] - by["requires_grad"] <= 2 * layer + 4 * 16 * 64 * 4

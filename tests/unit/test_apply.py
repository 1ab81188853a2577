"""What holds a parameter still and what does not, with every optimizer we offer."""

from typing import Any

import pytest
import torch
from torch import nn

from app.freezing.apply import apply_config
from app.freezing.config import parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.proof import Proof
from tests.unit.models import make
from tests.unit.optimizers import build, with_every_optimizer
from tests.unit.runs import freeze


def take_steps(
    model: nn.Module, example: torch.Tensor, optimizer: Any, freeze: Any, n: int
) -> None:
    for _ in range(n):
        model(example).float().square().mean().backward()
        freeze.hold_gradients()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None


@with_every_optimizer
@pytest.mark.parametrize("mechanism", ["requires_grad", "exclude", "zero_lr"])
@pytest.mark.parametrize("name", ["plain", "convolutional"])
def test_what_is_frozen_stays_bit_identical(
    name: str, mechanism: str, optimizer: str, implementation: str
) -> None:
    model, example = make(name)
    config = freeze("{layer1,stem,body}.**", mechanism=mechanism)
    applied = apply_config(model, parse_config(config))
    proof = Proof(applied)
    groups = applied.parameter_groups(weight_decay=0.1)
    for group in groups:
        group["lr"] = 0.1 * group["lr_scale"]
    made = build(optimizer, implementation, groups)
    take_steps(model, example, made, applied, 3)
    document = proof.check()
    assert document["verdict"] == "holds"
    assert document["trained"]["still"] == []


@with_every_optimizer
def test_zeroed_gradients_let_weight_decay_move_what_is_frozen(
    optimizer: str, implementation: str
) -> None:
    model, example = make("plain")
    applied = apply_config(model, parse_config(freeze("layer1", mechanism="zero_grad")))
    proof = Proof(applied)
    groups = applied.parameter_groups(weight_decay=0.1)
    made = build(optimizer, implementation, groups)
    take_steps(model, example, made, applied, 3)
    document = proof.check()
    assert document["verdict"] == "broken"
    changed = {item["name"]: item for item in document["frozen"]["changed"]}
    assert set(changed) == {"layer1.weight", "layer1.bias"}
    assert changed["layer1.weight"]["largest_difference"] > 0
    assert "weight decay" in changed["layer1.weight"]["cause"]


@with_every_optimizer
def test_a_layer_frozen_in_the_middle_of_a_run_stops_at_once(
    optimizer: str, implementation: str
) -> None:
    model, example = make("plain")
    applied = apply_config(model, parse_config({}))
    made = build(optimizer, implementation, applied.parameter_groups(0.1))
    proof = Proof(applied)
    take_steps(model, example, made, applied, 2)
    model(example).float().square().mean().backward()  # a gradient left behind
    frozen, unfrozen = applied.change(parse_config(freeze("layer2")), made)
    assert (frozen, unfrozen) == (["layer2.weight", "layer2.bias"], [])
    assert model.layer2.weight.grad is None
    assert model.layer2.weight not in made.state
    proof.follow(frozen, unfrozen)
    take_steps(model, example, made, applied, 3)
    assert proof.check()["verdict"] == "holds"


def test_unfreezing_starts_with_fresh_moments_unless_they_are_kept() -> None:
    for keep in (False, True):
        model, example = make("plain")
        applied = apply_config(model, parse_config({}))
        made = torch.optim.Adam(applied.parameter_groups(0.0), lr=0.1)
        take_steps(model, example, made, applied, 2)
        moments = made.state[model.layer2.weight]["exp_avg"].clone()
        applied.change(parse_config(freeze("layer2")), made)
        take_steps(model, example, made, applied, 2)
        applied.change(parse_config({}), made, ["layer2.weight"] if keep else [])
        state = made.state[model.layer2.weight]
        assert torch.equal(state["exp_avg"], moments) if keep else not state


def test_the_last_trainable_layer_cannot_be_frozen_away() -> None:
    model, _ = make("plain")
    applied = apply_config(model, parse_config(freeze("layer1", "layer2")))
    made = torch.optim.SGD(applied.parameter_groups(0.0), lr=0.1)
    with pytest.raises(InvalidDocument, match="last trainable"):
        applied.change(parse_config(freeze("**")), made)
    assert model.layer3.weight.requires_grad


def test_nothing_trainable_is_refused_before_backward_would_raise() -> None:
    model, _ = make("plain")
    with pytest.raises(InvalidDocument, match="Nothing is trainable"):
        apply_config(model, parse_config(freeze("**"))).parameter_groups(0.0)


def test_frozen_batchnorm_keeps_its_running_mean() -> None:
    model, example = make("convolutional")
    applied = apply_config(model, parse_config(freeze("stem")))
    assert applied.held_buffers == [
        f"stem.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    mean = model.stem[1].running_mean.clone()
    model(example)
    assert torch.equal(model.stem[1].running_mean, mean)
    model.eval()
    applied.train()  # every evaluation ends so
    model(example)
    assert torch.equal(model.stem[1].running_mean, mean)
    assert model.training


def test_requires_grad_alone_does_not_stop_batchnorm() -> None:
    model, example = make("convolutional")
    applied = apply_config(model, parse_config(freeze("stem", norm_statistics="update")))
    proof = Proof(applied)
    with torch.no_grad():
        model(example)
    document = proof.check()
    assert document["verdict"] == "holds"
    assert "stem.1.running_mean" in document["buffers"]["allowed"]


def test_frozen_dropout_stays_random_unless_it_is_switched_off() -> None:
    for dropout in ("keep", "off"):
        model, _ = make("convolutional")
        apply_config(model, parse_config(freeze("body", dropout=dropout)))
        x = torch.randn(2, 4, 6, 6)
        same = torch.equal(model.body[2](x), model.body[2](x))
        assert same is (dropout == "off")


def test_groups_scale_the_rate_and_replace_the_decay() -> None:
    model, _ = make("plain")
    config = parse_config(
        {"groups": [{"match": "layer3", "lr_scale": 10, "weight_decay": 0.0}], **freeze("layer1")}
    )
    groups = apply_config(model, config).parameter_groups(weight_decay=0.5)
    by_scale = {g["lr_scale"]: g for g in groups}
    assert by_scale[10]["params"] == [model.layer3.weight, model.layer3.bias]
    assert by_scale[10]["weight_decay"] == 0.0
    assert len(by_scale[1.0]["params"]) == 4  # what is frozen is in from the start


def test_an_embedding_with_max_norm_is_caught_rewriting_itself() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.1), nn.Linear(4, 2))
    proof = Proof(apply_config(model, parse_config(freeze("0"))))
    model(torch.tensor([1, 2]))
    (changed,) = proof.check()["frozen"]["changed"]
    assert changed["name"] == "0.weight"
    assert "max_norm" in changed["cause"]


def test_why_a_trainable_tensor_stood_still_is_said() -> None:
    model, _ = make("tied")
    proof = Proof(apply_config(model, parse_config({})))
    peaks = {"unused.weight": None, "scale": 0.0, "position": 1.0}
    causes = {item["name"]: item["cause"] for item in proof.check(peaks)["trained"]["still"]}
    assert causes["unused.weight"].startswith("unreached")
    assert causes["scale"].startswith("no gradient")
    assert causes["position"].startswith("rounded away")


def test_a_breach_before_an_unfreezing_is_not_forgotten() -> None:
    model, _ = make("plain")
    applied = apply_config(model, parse_config(freeze("layer1")))
    made = torch.optim.SGD(applied.parameter_groups(0.0), lr=0.1)
    proof = Proof(applied)
    with torch.no_grad():
        model.layer1.bias.add_(1.0)
    proof.follow(*applied.change(parse_config({}), made))
    document = proof.check()
    assert document["verdict"] == "broken"
    assert [item["name"] for item in document["frozen"]["changed"]] == ["layer1.bias"]

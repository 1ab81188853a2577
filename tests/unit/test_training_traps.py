"""The traps of freezing, each with every optimizer we offer: see docs/truths.md."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from app.freezing.apply import apply_config
from app.freezing.config import parse_config
from app.freezing.trace import read_model
from app.sources.datasets import Data
from app.training.loop import Outcome
from app.training.optimizer import make_optimizer
from app.training.places import checkpoint_path
from app.training.recipe import parse_recipe
from tests.unit.models import make
from tests.unit.optimizers import build, with_every_optimizer
from tests.unit.runs import Told, freeze, make_data, run
from tests.unit.test_loop import stop_at


def chosen(optimizer: str, implementation: str, **more: Any) -> dict[str, Any]:
    return {
        "optimizer": optimizer, "implementation": implementation, "weight_decay": 0.1, **more,
    }  # fmt: skip


def train_set(inputs: torch.Tensor, targets: torch.Tensor) -> Data:
    return Data(train=TensorDataset(inputs, targets), seed_items=False)


# -------------------------------------------------- names, ties, and what is equal but not the same


@with_every_optimizer
def test_tied_parameters_are_frozen_as_one_by_either_name(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    data = train_set(torch.randint(0, 11, (16, 5)), torch.randint(0, 11, (16,)))
    for name in ("embedding.weight", "head.weight"):
        model, _ = make("tied")
        assert "head.weight" not in dict(model.named_parameters())  # one entry …
        assert "head.weight" in dict(model.named_parameters(remove_duplicate=False))  # … two names
        before = model.embedding.weight.detach().clone()
        _, told = run(
            model, data, tmp_path / name, config=freeze(name), max_steps=2,
            **chosen(optimizer, implementation),
        )  # fmt: skip
        assert model.head.weight is model.embedding.weight
        assert torch.equal(model.head.weight, before)
        assert model.head.weight.grad is None
        proof = told.of("proof")[-1]
        assert (proof["verdict"], proof["frozen"]["checked"]) == ("holds", 1)


@with_every_optimizer
def test_parameters_of_equal_value_are_told_apart(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].load_state_dict(model[0].state_dict())
    with torch.no_grad():
        for layer in model:
            layer.bias.zero_()
    assert torch.equal(model[0].bias, model[1].bias)
    before = model[0].weight.detach().clone()
    _, told = run(
        model, make_data((6,)), tmp_path, config=freeze("0"), max_steps=2,
        **chosen(optimizer, implementation),
    )  # fmt: skip
    proof = told.of("proof")[-1]
    assert proof["verdict"] == "holds"
    assert (proof["frozen"]["checked"], proof["trained"]["moved"]) == (2, 4)
    assert torch.equal(model[0].bias, torch.zeros(6))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[1].weight, before)


class Quantised(nn.Module):
    """A table of int8 codes beside what trains, as quantised layers keep their weights."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.arange(-24, 24, dtype=torch.int8).view(8, 6)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale, self.head = nn.Parameter(torch.full((8,), 0.05)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x @ (self.codes.float() * self.scale[:, None]).t())


@with_every_optimizer
def test_parameters_that_are_no_floats_stay_out_of_the_optimizer(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    model = Quantised()
    codes = model.codes.detach().clone()
    assert {p.name for p in read_model(model).parameters if not p.floating} == {"codes"}
    everything = {"rules": [{"action": "unfreeze", "match": "**"}]}
    for name, config in {"as it came": {}, "everything": everything}.items():
        _, told = run(
            model, make_data((6,)), tmp_path / name, config=config, max_steps=2,
            **chosen(optimizer, implementation),
        )  # fmt: skip
        groups = apply_config(model, parse_config(config)).parameter_groups(0.1)
        assert all(p.is_floating_point() for group in groups for p in group["params"])
        proof = told.of("proof")[-1]
        assert proof["verdict"] == "holds"
        assert proof["trained"]["moved"] == 3
        assert torch.equal(model.codes, codes)


@with_every_optimizer
def test_an_embedding_with_max_norm_is_caught_by_the_job(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, max_norm=0.1), nn.Flatten(), nn.Linear(20, 3))
    data = train_set(torch.randint(0, 11, (16, 5)), torch.randint(0, 3, (16,)))
    _, told = run(
        model, data, tmp_path, config=freeze("0"), max_steps=2, **chosen(optimizer, implementation)
    )
    (changed,) = told.of("proof")[-1]["frozen"]["changed"]
    assert changed["name"] == "0.weight"
    assert "max_norm" in changed["cause"]


# ------------------------------------------------------------- modules whose hooks never fire


class Attending(nn.Module):
    """Raw parameters, an attention whose out_proj is never called, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(4, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.place
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.shared(self.shared(x).relu()).mean(1))


@with_every_optimizer
def test_layers_without_calls_of_their_own_are_measured_and_frozen(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Attending()
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.randn(2, 4, 8))
    assert (called.count("attention.out_proj"), called.count("shared")) == (0, 2)
    _, told = run(
        model, make_data((4, 8)), tmp_path, config=freeze("place", "attention.out_proj"),
        max_steps=2, **chosen(optimizer, implementation),
    )  # fmt: skip
    layers = told.of("start")[0]["layers"]
    assert layers == ["", "attention", "attention.out_proj", "shared", "head"]
    for stats in told.of("layers"):
        by_layer = dict(zip(layers, stats["grad_norm"], strict=True))
        assert by_layer[""] is None
        assert by_layer["attention.out_proj"] is None
        assert all(by_layer[layer] > 0 for layer in ("attention", "shared", "head"))
        assert stats["update_norm"][:1] + stats["update_norm"][2:3] == [0.0, 0.0]
    assert told.of("proof")[-1]["verdict"] == "holds"


@with_every_optimizer
def test_lazy_layers_are_frozen_by_name_once_they_have_shapes(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    model(torch.randn(4, 6))
    before = model[0].weight.detach().clone()
    _, told = run(
        model, make_data((6,)), tmp_path, config=freeze("{0,1}"), max_steps=2,
        **chosen(optimizer, implementation),
    )  # fmt: skip
    proof = told.of("proof")[-1]
    assert (proof["verdict"], proof["frozen"]["checked"]) == ("holds", 4)
    assert proof["buffers"]["identical"] == 3
    assert torch.equal(model[0].weight, before)


# --------------------------------------------------------------------------- frozen dropout


@with_every_optimizer
@pytest.mark.parametrize(("policy", "is_random"), [("keep", True), ("off", False)])
def test_frozen_dropout_stays_random_unless_it_is_turned_off(
    policy: str, is_random: bool, optimizer: str, implementation: str, tmp_path: Path
) -> None:
    model, _ = make("convolutional")
    seen: list[torch.Tensor] = []
    model.body.register_forward_hook(
        lambda _m, inputs, output: (
            seen.append((output == 0).float().mean()) if model.training else None
        )
    )
    config = freeze("{stem,body,branch}.**", dropout=policy)
    run(
        model, make_data((2, 6, 6)), tmp_path, config=config, max_steps=2,
        **chosen(optimizer, implementation),
    )  # fmt: skip
    assert (max(seen) > 0.1) == is_random


# ----------------------------------------------------- small rates in bf16: real changes count


@with_every_optimizer
def test_weights_of_16_bits_hardly_ever_change_at_a_small_rate(
    optimizer: str, implementation: str
) -> None:
    model, example = make("plain")
    model.bfloat16()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    made = build(optimizer, implementation, model.parameters(), lr=1e-5)
    for _ in range(3):
        made.zero_grad()
        model(example.bfloat16()).float().square().mean().backward()
        made.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (before == after).float().mean() > 0.95


@with_every_optimizer
def test_updates_that_bf16_rounds_away_are_not_reported_as_made(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 3, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)  # half a step between its neighbours is 2⁻⁹
    data = train_set(torch.randn(16, 64).bfloat16(), torch.randint(0, 3, (16,)))
    _, told = run(
        model, data, tmp_path, lr=1e-5, max_steps=3,
        **chosen(optimizer, implementation, weight_decay=0.0),
    )  # fmt: skip
    for stats in told.of("layers"):
        assert stats["grad_norm"][0] > 0
        assert stats["update_norm"][0] == 0.0  # lr·‖g‖ would have said otherwise
    (still,) = told.of("proof")[-1]["trained"]["still"]
    assert still["cause"].startswith("rounded away")


@with_every_optimizer
def test_the_real_update_is_told_and_not_rate_times_gradient(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    """By which Adam's would be wrong by orders of magnitude, where gradients are small."""
    torch.manual_seed(0)
    model = nn.Linear(64, 3, bias=False)
    before = model.weight.detach().clone()
    data = train_set(torch.randn(8, 64), torch.randint(0, 3, (8,)))
    _, told = run(
        model, data, tmp_path, lr=1e-3, max_steps=1,
        loss=lambda output, _: output.square().mean() * 1e-3,
        **chosen(optimizer, implementation, weight_decay=0.0),
    )  # fmt: skip
    (stats,) = told.of("layers")
    real, guess = stats["update_norm"][0], 1e-3 * stats["grad_norm"][0]
    assert real == pytest.approx((model.weight.detach() - before).norm().item(), rel=1e-5)
    if optimizer == "sgd":
        assert real == pytest.approx(guess, rel=1e-2)
    else:
        assert real > 100 * guess


# --------------------------------------------------- what hooks see, and steps that AMP skips


@with_every_optimizer
def test_gradients_are_taken_at_the_step_not_by_hooks(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    model, _ = make("plain")
    hooked: list[float] = []
    model.layer2.weight.register_hook(lambda grad: hooked.append(grad.norm().item()))
    options = chosen(optimizer, implementation, max_steps=1, grad_accumulation=3)
    _, told = run(model, make_data((6,)), tmp_path / "fp16", precision="fp16", **options)
    _, plain = run(make("plain")[0], make_data((6,)), tmp_path / "fp32", **options)
    assert len(hooked) >= 3  # one a micro-batch, each scaled
    measured, true = (one.of("layers")[0]["grad_norm"] for one in (told, plain))
    assert measured == pytest.approx(true, rel=0.02)
    assert min(hooked) > 1000 * measured[1]


@with_every_optimizer
def test_a_step_that_amp_skipped_is_marked_and_is_no_zero(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    model, _ = make("plain")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome, told = run(
        model, train_set(torch.randn(32, 6), torch.zeros(32, dtype=torch.long)), tmp_path,
        precision="fp16", max_steps=2, lr=1e-9, config=freeze("layer1"),
        loss=lambda output, _: output.float().square().mean() * 3e4,
        **chosen(optimizer, implementation),
    )  # fmt: skip
    assert outcome == Outcome("succeeded", 2)
    assert told.metrics()[1, "amp_skipped"] >= 1
    assert [p["step"] for p in told.of("layers")] == [1, 2]
    assert all(value > 0 for p in told.of("layers") for value in p["grad_norm"][1:])
    assert torch.equal(model.layer1.weight, before["layer1.weight"])


def test_fused_momentum_begins_at_zero_where_the_first_step_is_skipped() -> None:
    """Left to itself it would begin with whatever the memory held."""
    weight = nn.Parameter(torch.ones(4))
    recipe = parse_recipe({"optimizer": "sgd", "implementation": "fused"})
    group = {"params": [weight], "lr_scale": 1.0, "weight_decay": 0.0, "apart": None}
    optimizer = make_optimizer([group], recipe)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    weight.grad = torch.full((4,), torch.inf)
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.zeros(4))
    assert torch.equal(weight, torch.ones(4))


# ------------------------------------------------------------------ reentrant checkpointing


class Recomputing(nn.Module):
    """Recomputes its middle in backward, in the way it is told."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.middle, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.head(x)


@with_every_optimizer
def test_reentrant_checkpointing_over_a_frozen_input_is_found_out(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    for reentrant, stays in ((False, set()), (True, {"middle.weight", "middle.bias"})):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            _, told = run(
                Recomputing(reentrant), make_data((6,)), tmp_path / str(reentrant),
                config=freeze("first"), epochs=1, **chosen(optimizer, implementation),
            )  # fmt: skip
        words = " ".join(str(one.message) for one in raised)
        assert ("None of the inputs have requires_grad" in words) == reentrant  # torch's only word
        still = {item["name"]: item["cause"] for item in told.of("proof")[-1]["trained"]["still"]}
        assert set(still) == stays
        assert all(cause.startswith("unreached") for cause in still.values())
        assert (told.of("layers")[0]["grad_norm"][1] is None) == reentrant


# -------------------------------------------------------- resuming with another freeze set


@with_every_optimizer
def test_a_resume_with_another_freeze_set_matches_state_by_name(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    options = chosen(optimizer, implementation, lr=0.01)
    data = make_data((6,))
    run(make("plain")[0], data, tmp_path, config=freeze("layer1"), listen=stop_at(4), **options)
    outcome, told = run(
        make("plain")[0], data, tmp_path, config=freeze("layer2"),
        resume_from=checkpoint_path(tmp_path, 4), **options,
    )  # fmt: skip
    assert outcome == Outcome("succeeded", 9)
    assert told.of("start")[0]["resumed"] == {
        "step": 4,
        "kept": ["layer3.weight", "layer3.bias"],
        "fresh": ["layer1.weight", "layer1.bias"],
        "dropped": ["layer2.weight", "layer2.bias"],
    }
    (line,) = [p["text"] for p in told.of("log") if p["text"].startswith("Resumed")]
    assert "2 start fresh (layer1.weight, layer1.bias)" in line
    assert "(layer2.weight, layer2.bias)" in line
    assert told.of("proof")[-1]["verdict"] == "holds"
    assert [p["grad_norm"][1] for p in told.of("layers")] == [None] * 5
    # The same as a run that changed at that step and was never stopped.
    config = freeze("layer1")
    config["schedule"] = [
        {"at": {"step": 4}, "action": "unfreeze", "match": "layer1"},
        {"at": {"step": 4}, "action": "freeze", "match": "layer2"},
    ]
    whole, _ = make("plain")
    run(whole, data, tmp_path / "whole", config=config, **options)
    resumed = read_end(tmp_path)
    assert all(torch.equal(p, resumed[name]) for name, p in whole.named_parameters())


def read_end(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint_path(folder, 9) / "model.safetensors")


def test_a_resume_with_the_same_set_keeps_all_and_says_so(tmp_path: Path) -> None:
    data = make_data((6,))
    run(make("plain")[0], data, tmp_path, config=freeze("layer1"), listen=stop_at(4))
    _, told = run(
        make("plain")[0], data, tmp_path, config=freeze("layer1"),
        resume_from=checkpoint_path(tmp_path, 4),
    )  # fmt: skip
    resumed = told.of("start")[0]["resumed"]
    assert len(resumed["kept"]) == 4
    assert resumed["fresh"] == resumed["dropped"] == []
    assert "Resumed at step 4: 4 tensors keep their state." in [p["text"] for p in told.of("log")]


# -------------------------------------------------- clipping when the trainable set changes


@with_every_optimizer
def test_clipping_tells_the_norm_before_and_the_factor(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    told: dict[str, Told] = {}
    for name, config in {"all": {}, "head": freeze("layer1", "layer2")}.items():
        _, told[name] = run(
            make("plain")[0], make_data((6,)), tmp_path / name, config=config, max_steps=2,
            max_grad_norm=0.01, **chosen(optimizer, implementation),
        )  # fmt: skip
    norms = {name: one.metrics()[1, "grad_norm_total"] for name, one in told.items()}
    factors = {name: one.metrics()[1, "clip_factor"] for name, one in told.items()}
    assert norms["head"] < norms["all"]  # the smaller set has the smaller norm …
    assert factors["head"] > factors["all"]  # … and with the same limit a larger rate
    for name in told:
        assert factors[name] == pytest.approx(0.01 / norms[name], rel=1e-3)

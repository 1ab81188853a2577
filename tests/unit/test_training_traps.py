"""The traps of freezing that lie in the training loop, each with every optimizer we offer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from app.sources.datasets import Data
from app.training.loop import Outcome
from app.training.optimizer import make_optimizer
from app.training.places import checkpoint_path
from app.training.recipe import parse_recipe
from tests.unit.models import make
from tests.unit.runs import Told, freeze, make_data, run
from tests.unit.test_apply import EVERY_OPTIMIZER
from tests.unit.test_loop import stop_at

with_every_optimizer = pytest.mark.parametrize(("optimizer", "implementation"), EVERY_OPTIMIZER)


def chosen(optimizer: str, implementation: str, **more: Any) -> dict[str, Any]:
    return {
        "optimizer": optimizer, "implementation": implementation, "weight_decay": 0.1, **more,
    }  # fmt: skip


def train_set(inputs: torch.Tensor, targets: torch.Tensor) -> Data:
    return Data(train=TensorDataset(inputs, targets), seed_items=False)


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
    _, told = run(
        model, make_data((4, 8)), tmp_path, config=freeze("place", "attention.out_proj"),
        **chosen(optimizer, implementation),
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


# --------------------------------------------------------------------------- frozen dropout


@pytest.mark.parametrize(("policy", "is_random"), [("keep", True), ("off", False)])
def test_frozen_dropout_stays_random_unless_it_is_turned_off(
    policy: str, is_random: bool, tmp_path: Path
) -> None:
    model, _ = make("convolutional")
    seen: list[torch.Tensor] = []
    model.body.register_forward_hook(
        lambda _m, inputs, output: (
            seen.append((output == 0).float().mean()) if model.training else None
        )
    )
    config = freeze("{stem,body,branch}.**", dropout=policy)
    run(model, make_data((2, 6, 6)), tmp_path, config=config, epochs=1)
    assert (max(seen) > 0.1) == is_random


# ----------------------------------------------------- small rates in bf16: real changes count


@pytest.mark.parametrize(
    ("optimizer", "implementation"), [(o, i) for o, i in EVERY_OPTIMIZER if o != "sgd"]
)
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*None of the inputs have requires_grad")
            _, told = run(
                Recomputing(reentrant), make_data((6,)), tmp_path / str(reentrant),
                config=freeze("first"), epochs=1, **chosen(optimizer, implementation),
            )  # fmt: skip
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

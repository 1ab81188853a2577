"""What is said of freezing in forums, each sentence tried on torch itself: see docs/truths.md."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from app.freezing.apply import apply_config
from app.freezing.config import parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.plan import Plan, plan_config
from app.freezing.proof import Proof
from app.freezing.trace import trace_model
from tests.unit.models import Plain, make
from tests.unit.optimizers import build, with_every_optimizer
from tests.unit.runs import freeze

Optimizer = torch.optim.Optimizer


def plain() -> tuple[Plain, torch.Tensor]:
    model, example = make("plain")
    assert isinstance(model, Plain)
    return model, example


def go_backward(model: nn.Module, example: torch.Tensor) -> None:
    model(example).float().square().mean().backward()


def step(model: nn.Module, example: torch.Tensor, optimizer: Optimizer) -> None:
    go_backward(model, example)
    optimizer.step()


def copy(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def is_as(module: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, copy(module), before))


def has_moved(module: nn.Module, before: list[torch.Tensor]) -> bool:
    """Whether every tensor has, not just one."""
    return not any(map(torch.equal, copy(module), before))


# ---------------------------------------------------------------- what flows through what is frozen


@with_every_optimizer
def test_freezing_the_middle_leaves_the_gradients_before_it_bit_identical(
    optimizer: str, implementation: str
) -> None:
    gradients, ends = [], []
    for frozen in (False, True):
        model, example = plain()
        model.layer2.requires_grad_(not frozen)
        made = build(optimizer, implementation, model.parameters())
        before = copy(model.layer1)
        step(model, example, made)
        assert (model.layer2.weight.grad is None) is frozen
        assert has_moved(model.layer1, before)
        ends.append(copy(model.layer1))
        gradients.append([p.grad for p in (*model.layer1.parameters(), *model.layer3.parameters())])
    assert all(map(torch.equal, *gradients))
    assert all(map(torch.equal, *ends))


@with_every_optimizer
def test_flags_on_a_middle_layer_hold_it_and_cost_no_gradient_and_no_state(
    optimizer: str, implementation: str
) -> None:
    model, example = plain()
    model.layer2.requires_grad_(False)
    made = build(optimizer, implementation, model.parameters())
    held, trained = copy(model.layer2), copy(model.layer1)
    for _ in range(3):
        step(model, example, made)
    assert is_as(model.layer2, held)
    assert has_moved(model.layer1, trained)
    assert all(p.grad is None and p not in made.state for p in model.layer2.parameters())


def test_an_intermediate_result_cannot_be_frozen() -> None:
    model, example = plain()
    with pytest.raises(RuntimeError, match="only change requires_grad flags of leaf variables"):
        model.layer1(example).requires_grad = False


def test_a_frozen_parameter_has_no_gradient_and_not_a_zero_one() -> None:
    model, example = plain()
    model.layer2.requires_grad_(False)
    model(example).sum().backward()
    assert all(p.grad is None for p in model.layer2.parameters())


@pytest.mark.parametrize("first_trains", [True, False])
def test_whether_a_frozen_layer_passes_a_gradient_on_depends_on_what_lies_before_it(
    first_trains: bool,
) -> None:
    model, example = plain()
    model.layer1.requires_grad_(first_trains)
    model.layer2.requires_grad_(False)
    handed: dict[str, torch.Tensor] = {}
    model.layer2.register_forward_hook(lambda _, given, made: handed.update(x=given[0], y=made))
    output = model(example)
    for result in (result for result in handed.values() if result.requires_grad):
        result.retain_grad()
    output.square().mean().backward()
    for result in handed.values():
        assert (result.grad is not None) is first_trains
        assert (result.grad_fn is not None) is first_trains
    assert all(p.grad is None for p in model.layer2.parameters())
    assert model.layer3.weight.grad is not None


@pytest.mark.parametrize(
    ("way", "gets_through"),
    [
        ("frozen", True),
        ("frozen, recomputed", True),
        ("no_grad", False),
        ("detach", False),
        ("reentrant over the input", False),
        ("not reentrant over the input", True),
    ],
)
def test_only_no_grad_detach_and_reentrant_checkpoints_are_barriers(
    way: str, gets_through: bool
) -> None:
    model, example = plain()
    model.layer2.requires_grad_(False)
    below = nn.Sequential(model.layer1, model.layer2)
    if way == "frozen":
        middle = below(example)
    elif way == "frozen, recomputed":  # what goes in needs a gradient
        middle = checkpoint(model.layer2, model.layer1(example), use_reentrant=True)
    elif way == "no_grad":
        with torch.no_grad():
            middle = below(example)
    elif way == "detach":
        middle = below(example).detach()
    elif way == "reentrant over the input":
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            middle = checkpoint(below, example, use_reentrant=True)
    else:
        middle = checkpoint(below, example, use_reentrant=False)
    model.layer3(middle).sum().backward()
    assert (model.layer1.weight.grad is not None) is gets_through
    assert model.layer3.weight.grad is not None


def test_where_every_leaf_is_frozen_results_are_leaves_too() -> None:
    model, example = plain()
    model.requires_grad_(False)
    results: list[torch.Tensor] = []
    for layer in model.children():
        layer.register_forward_hook(lambda *given: results.append(given[-1]))
    output = model(example)
    assert len(results) == 3
    for result in (*results, output):
        assert result.is_leaf
        assert result.grad_fn is None


def test_freezing_everything_is_refused_in_words_before_backward_would_raise() -> None:
    model, example = plain()
    config = parse_config(freeze("**"))
    applied = apply_config(model, config)
    with pytest.raises(InvalidDocument, match="Nothing is trainable"):
        applied.parameter_groups(0.0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(example).sum().backward()
    (warning,) = [
        w
        for w in plan_config(trace_model(model, example), config).warnings
        if w.code == "nothing_trainable"
    ]
    assert "evaluat" in warning.message


# --------------------------------------------------------------------- left out, and the zero rate


def left_out(
    mechanism: str, optimizer: str, implementation: str, *, clip: float | None = None
) -> tuple[Plain, list[float], list[float]]:
    """Five steps as people write them, with layer1 held still in one of three ways.

    Returns:
        The model, layer1's gradient norm at each step, and the norm that clipping took.
    """
    model, example = plain()
    held = list(model.layer1.parameters())
    if mechanism == "requires_grad":
        model.layer1.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": [*model.layer2.parameters(), *model.layer3.parameters()]}
    ]
    if mechanism == "zero_lr":
        groups.append({"params": held, "lr": 0.0})
    made = build(optimizer, implementation, groups, lr=1e-3)
    norms, totals = [], []
    for _ in range(5):
        made.zero_grad()
        go_backward(model, example)
        norms.append(sum(p.grad.norm().item() for p in held if p.grad is not None))
        if clip is not None:
            totals.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        made.step()
    return model, norms, totals


@with_every_optimizer
@pytest.mark.parametrize("mechanism", ["exclude", "zero_lr"])
def test_leaving_out_trains_the_same_until_something_looks_at_all_gradients(
    mechanism: str, optimizer: str, implementation: str
) -> None:
    model, norms, _ = left_out(mechanism, optimizer, implementation)
    flagged, nothing, _ = left_out("requires_grad", optimizer, implementation)
    assert is_as(model, copy(flagged))
    assert nothing == [0.0] * 5
    assert min(norms) > 0  # computed all the same, and kept
    if mechanism == "exclude":  # `optimizer.zero_grad()` never sees them
        assert norms == sorted(norms)
        assert norms[4] > 4 * norms[0]
    else:
        assert norms[4] < 2 * norms[0]
    model, _, totals = left_out(mechanism, optimizer, implementation, clip=0.1)
    flagged, _, least = left_out("requires_grad", optimizer, implementation, clip=0.1)
    assert all(mine > own for mine, own in zip(totals, least, strict=True))
    assert not is_as(model.layer3, copy(flagged.layer3))
    differences = [
        (p - q).abs().max().item() for p, q in zip(copy(model), copy(flagged), strict=True)
    ]
    assert differences[:2] == [0.0, 0.0]  # layer1 is still either way
    assert max(differences) > 1e-6


def count_backward_flops(model: nn.Module, example: torch.Tensor) -> int:
    loss = model(example).square().mean()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@with_every_optimizer
def test_a_zero_rate_computes_gradients_and_neither_moves_nor_decays(
    optimizer: str, implementation: str
) -> None:
    model, example = plain()
    whole = count_backward_flops(model, example)
    model.zero_grad()
    groups = [
        {"params": model.layer1.parameters(), "lr": 0.0},
        {"params": [*model.layer2.parameters(), *model.layer3.parameters()]},
    ]
    made = build(optimizer, implementation, groups, weight_decay=0.5)
    before = copy(model.layer1)
    for _ in range(3):
        made.zero_grad()
        assert count_backward_flops(model, example) == whole  # it is not faster
        made.step()
    assert is_as(model.layer1, before)
    assert model.layer1.weight.grad is not None
    assert made.state[model.layer1.weight]
    model.layer1.requires_grad_(False)
    assert count_backward_flops(model, example) < whole


@with_every_optimizer
def test_the_moments_of_a_zero_rate_fire_when_the_rate_returns(
    optimizer: str, implementation: str
) -> None:
    model, example = plain()
    groups = [{"params": model.parameters(), "lr": 0.0}]
    made = build(optimizer, implementation, groups, weight_decay=0.0)
    before = copy(model)
    for _ in range(3):
        step(model, example, made)
    assert is_as(model, before)
    made.param_groups[0]["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # nothing new is learnt
    made.step()
    assert has_moved(model, before)


@with_every_optimizer
@pytest.mark.parametrize("mover", ["nothing", "moments", "decay"])
def test_zeroed_gradients_keep_weights_only_where_nothing_else_moves_them(
    mover: str, optimizer: str, implementation: str
) -> None:
    """Plain SGD holds; momentum, Adam's moments and decay go on."""
    model, example = plain()
    decay = 0.1 if mover == "decay" else 0.0
    momentum = 0.9 if mover == "moments" else 0.0
    made = build(
        optimizer, implementation, model.parameters(), momentum=momentum, weight_decay=decay
    )
    if mover == "moments" or optimizer == "sgd":
        step(model, example, made)  # it was trained before
    before = copy(model.layer1)
    for _ in range(2):
        made.zero_grad()
        go_backward(model, example)
        for parameter in model.layer1.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        made.step()
    if mover == "nothing":
        assert is_as(model.layer1, before)
    else:
        assert has_moved(model.layer1, before)


@with_every_optimizer
def test_an_optimizer_asks_whether_grad_is_none_and_not_requires_grad(
    optimizer: str, implementation: str
) -> None:
    model, example = plain()
    made = build(optimizer, implementation, model.parameters())
    go_backward(model, example)
    model.layer2.requires_grad_(False)  # a gradient is left behind
    for _ in range(2):
        before = copy(model.layer2)
        made.step()
        assert has_moved(model.layer2, before)
    model.layer2.weight.grad = model.layer2.bias.grad = None
    before = copy(model.layer2)
    made.step()
    assert is_as(model.layer2, before)


@with_every_optimizer
@pytest.mark.parametrize("decays", [False, True])
def test_the_hand_written_freeze_holds_for_one_step_and_then_moves(
    decays: bool, optimizer: str, implementation: str
) -> None:
    """As in the tutorial; with decay, which zeroed gradients do not stop, not even for one."""
    model, example = plain()
    proof = Proof(apply_config(model, parse_config(freeze("layer1", mechanism="zero_grad"))))
    kept = {"layer1": model.layer1.parameters()}  # a generator: one pass and it is empty
    decay = 0.1 if decays else 0.0
    made = build(optimizer, implementation, model.parameters(), lr=1e-3, weight_decay=decay)
    start = copy(model.layer1)
    verdicts, moved = [], []
    for _ in range(2):
        made.zero_grad()
        go_backward(model, example)
        for parameter in kept["layer1"]:
            assert parameter.grad is not None
            parameter.grad.zero_()
        made.step()
        told = proof.check()
        verdicts.append(told["verdict"])
        moved.append((model.layer1.weight - start[0]).abs().max().item())
    assert verdicts == ["broken" if decays else "holds", "broken"]
    assert (moved[0] > 0) is decays
    if optimizer != "sgd":
        assert moved[1] > 5e-4
    changed = {item["name"]: item for item in told["frozen"]["changed"]}
    assert set(changed) == {"layer1.weight", "layer1.bias"}
    assert changed["layer1.weight"]["largest_difference"] == moved[1] > 0
    told_cause = "weight decay" if decays else "gradient was not zeroed"
    assert told_cause in changed["layer1.weight"]["cause"]


# ------------------------------------------------------------------------- modes and statistics


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (8, 3)),
        (nn.BatchNorm2d, (8, 3, 2, 2)),
        (nn.BatchNorm3d, (8, 3, 2, 2, 2)),
        (lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True), (8, 3, 4)),
    ],
)
def test_requires_grad_false_stops_no_running_statistics_and_eval_does(
    norm: Callable[[int], nn.Module], shape: tuple[int, ...]
) -> None:
    module = norm(3).requires_grad_(False)
    means = [module.running_mean.clone()]
    module(torch.randn(shape))
    means.append(module.running_mean.clone())
    with torch.no_grad():
        module(torch.randn(shape))
    means.append(module.running_mean.clone())
    module.eval()
    module(torch.randn(shape))
    assert not torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])
    assert torch.equal(means[2], module.running_mean)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        type("Mine", (nn.BatchNorm2d,), {}),
        lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
    ],
)
def test_norms_of_every_kind_are_held_in_eval_mode(norm: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(norm(3), nn.Linear(3, 2))
    applied = apply_config(model, parse_config(freeze("0")))
    applied.train()
    assert [m.training for m in model] == [False, True]
    assert applied.held_buffers == [
        f"0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]


@with_every_optimizer
def test_eval_mode_stops_dropout_and_freezes_no_parameter(
    optimizer: str, implementation: str
) -> None:
    model, example = make("convolutional")
    model.eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.equal(model(example), model(example))
    before = copy(model)
    step(model, example, build(optimizer, implementation, model.parameters()))
    assert has_moved(model, before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


# ------------------------------------------------------------------------------ what makes it fast


class Twelve(nn.Module):
    """Twelve blocks of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True) for _ in range(12)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def measure_saved(model: nn.Module, example: torch.Tensor) -> int:
    """Bytes that autograd keeps for backward, without the parameters."""
    resting = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(example).square().mean()
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in resting)


def test_where_the_earliest_trainable_parameter_lies_decides_and_not_their_share() -> None:
    example = torch.randn(4, 16, 16)
    graph = trace_model(Twelve(), example)
    rules = {
        "nothing": [],
        "first": freeze("blocks.{0..8}")["rules"],
        "last": freeze("blocks.{3..11}")["rules"],
        "biases": [*freeze("**")["rules"], {"action": "unfreeze", "match": "**.bias"}],
    }
    plans: dict[str, Plan] = {}
    saved: dict[str, int] = {}
    flops: dict[str, int] = {}
    for name, chosen in rules.items():
        model, config = Twelve(), parse_config({"rules": chosen})
        apply_config(model, config)
        plans[name] = plan_config(graph, config)
        saved[name] = measure_saved(model, example)
        flops[name] = count_backward_flops(model, example)
    trained = {n: plan.cost["trainable_bytes"] / plans["nothing"].cost["trainable_bytes"]
               for n, plan in plans.items()}  # fmt: skip
    assert trained["first"] == trained["last"] == 0.25
    assert trained["biases"] < 0.06
    planned = {name: plan.cost["activation_bytes"] for name, plan in plans.items()}
    for kept in (saved, planned):
        assert kept["first"] < 0.3 * kept["nothing"]
        assert kept["last"] > 0.85 * kept["nothing"]
        assert kept["biases"] > 0.75 * kept["nothing"]
    for count in (flops, {name: plan.cost["backward_flops"] for name, plan in plans.items()}):
        assert count["first"] < 0.26 * count["nothing"]
        assert count["last"] > 2 * count["first"]
        assert count["biases"] > 1.5 * count["first"]

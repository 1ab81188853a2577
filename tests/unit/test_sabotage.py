"""Ways in which something "frozen" moves all the same: each is caught and named."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from app.freezing.apply import Freeze, apply_config
from app.freezing.config import parse_config
from app.freezing.proof import Proof
from tests.unit.models import Convolutional, Plain, Tied, make
from tests.unit.optimizers import IMPLEMENTATIONS, KINDS
from tests.unit.runs import freeze

Optimizer = torch.optim.Optimizer
Step = Callable[[nn.Module, Freeze, Optimizer], None]
LAYER1 = {"layer1.weight", "layer1.bias"}

CASES: list[Any] = []


def breaks(
    model: str,
    frozen: str,
    names: set[str],
    cause: str = "",
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> Callable[[Callable[..., Iterator[Any] | None]], Any]:
    """Register a saboteur: a function called before training, which may be a generator.

    Whatever comes before its `yield` happens before training, the rest after each step.
    """

    def register(saboteur: Any) -> Any:
        case = (saboteur, model, frozen, names, cause, optimizer, options)
        CASES.append(pytest.param(*case, id=saboteur.__name__))
        return saboteur

    return register


def nudge(tensor: torch.Tensor) -> None:
    tensor.data.add_(0.125)


# ------------------------------------------------------------------- code that writes to a weight


@breaks("plain", "layer1", {"layer1.weight"}, "behind autograd")
def forward_writes_to_data(model: Plain, *_: Any) -> None:
    model.layer1.register_forward_pre_hook(lambda m, _: m.weight.data.mul_(0.999))


@breaks("plain", "layer1", {"layer1.bias"}, "in place")
def forward_writes_without_grad(model: Plain, *_: Any) -> None:
    def write(module: nn.Linear, *_: Any) -> None:
        with torch.no_grad():
            module.bias.add_(1e-6)

    model.layer1.register_forward_hook(write)


@breaks("plain", "layer1", {"layer1.weight"}, "behind autograd")
def backward_hook_writes(model: Plain, *_: Any) -> None:
    model.layer3.register_full_backward_hook(lambda *_: nudge(model.layer1.weight))


@breaks("plain", "layer1", {"layer1.weight"}, "behind autograd")
def tensor_hook_of_a_neighbour_writes(model: Plain, *_: Any) -> None:
    model.layer2.weight.register_hook(lambda _: nudge(model.layer1.weight))


@breaks("plain", "layer1", {"layer1.weight"}, "behind autograd")
def accumulate_hook_writes(model: Plain, *_: Any) -> None:
    model.layer2.weight.register_post_accumulate_grad_hook(lambda _: nudge(model.layer1.weight))


@breaks("plain", "layer1", {"layer1.weight"}, "behind autograd")
def optimizer_hook_writes(model: Plain, _: Freeze, optimizer: Optimizer) -> None:
    optimizer.register_step_post_hook(lambda *_: nudge(model.layer1.weight))


@breaks("plain", "layer1", LAYER1, "behind autograd")
def all_weights_are_clamped(model: Plain, *_: Any) -> Iterator[None]:
    yield
    for parameter in model.parameters():
        parameter.data.clamp_(-0.05, 0.05)


@breaks("plain", "layer1", LAYER1, "behind autograd")
def an_average_is_copied_back(model: Plain, *_: Any) -> Iterator[None]:
    # the average of a constant is not bit-identical to it
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        for _ in range(50):
            average[name].mul_(0.9999).add_(parameter.detach(), alpha=1 - 0.9999)
        parameter.data.copy_(average[name])


@breaks("plain", "layer1", LAYER1, "behind autograd")
def a_hook_keeps_an_average_and_swaps_it_in(model: Plain, _: Freeze, optimizer: Optimizer) -> None:
    average = [p.detach().clone() for p in model.parameters()]

    def swap(*_: Any) -> None:
        for kept, parameter in zip(average, model.parameters(), strict=True):
            for _ in range(50):
                kept.mul_(0.9999).add_(parameter.detach(), alpha=1 - 0.9999)
            parameter.data.copy_(kept)

    optimizer.register_step_post_hook(swap)


@breaks("plain", "layer1", LAYER1, "went through float16")
def weights_go_through_half_precision(model: Plain, *_: Any) -> Iterator[None]:
    yield
    model.half().float()


@breaks("plain", "layer1", LAYER1, "went through bfloat16")
def weights_go_through_one_vector_in_bfloat16(model: Plain, *_: Any) -> Iterator[None]:
    yield
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector.bfloat16().float(), model.parameters())


@breaks("plain", "layer1", LAYER1, "load_state_dict")
def another_checkpoint_is_loaded(model: Plain, *_: Any) -> Iterator[None]:
    yield
    torch.manual_seed(99)
    model.load_state_dict(Plain().state_dict())


@breaks("plain", "layer1", LAYER1, "initialisation")
def a_layer_is_initialised_again(model: Plain, *_: Any) -> Iterator[None]:
    yield
    model.layer1.reset_parameters()


@breaks("plain", "layer1", {"layer1.weight"}, ".data = ")
def the_data_is_pointed_elsewhere(model: Plain, *_: Any) -> Iterator[None]:
    yield
    model.layer1.weight.data = torch.zeros_like(model.layer1.weight)


@breaks("plain", "layer1", {"layer1.weight"}, "replaced")
def the_parameter_is_replaced(model: Plain, *_: Any) -> Iterator[None]:
    yield
    model.layer1.weight = nn.Parameter(model.layer1.weight.detach() + 1, requires_grad=False)


@breaks("plain", "layer1", {"layer1.weight"}, "shares its memory with layer2.weight")
def the_storage_is_shared_with_something_that_trains(model: Plain, *_: Any) -> None:
    model.layer2.weight.data = model.layer1.weight.data.new_zeros(64).view(8, 8)
    model.layer1.weight.data = model.layer2.weight.data.view(-1)[:48].view(8, 6)


@breaks("plain", "layer1", {"layer1.bias"}, "1 of its 8 values")
def one_bit_flips(model: Plain, *_: Any) -> Iterator[None]:
    yield
    model.layer1.bias.data[0].view(torch.int32).bitwise_xor_(1)


@breaks("plain", "layer1", {"layer1.bias"}, "sign of a zero")
def the_sign_of_a_zero_changes(model: Plain, *_: Any) -> Iterator[None]:
    yield
    model.layer1.bias.data[0] = -model.layer1.bias.data[0]


# --------------------------------------------------------------------------- optimizers that move


def leave_gradient(model: Plain, *_: Any) -> None:
    """A gradient from before the freeze, on a parameter that is in the optimizer."""
    for parameter in model.layer1.parameters():
        parameter.grad = torch.ones_like(parameter)


for kind, maker in KINDS.items():
    for how, chosen in IMPLEMENTATIONS.items():

        def stale_gradient(model: Plain, *_: Any) -> None:
            leave_gradient(model)

        stale_gradient.__name__ = f"a_stale_gradient_moves_it_{kind}_{how}"
        breaks("plain", "layer1", LAYER1, "a gradient lay on it", maker, lr=0.1, **chosen)(
            stale_gradient
        )


def zero_gradients(model: Plain, *_: Any) -> Iterator[None]:
    """As ``zero_grad(set_to_none=False)`` leaves them."""
    for parameter in model.layer1.parameters():
        parameter.grad = torch.zeros_like(parameter)
    yield
    for parameter in model.layer1.parameters():
        parameter.grad = torch.zeros_like(parameter)


def fill_state(model: Plain, optimizer: Optimizer) -> None:
    """Momentum or moments, as steps before the freeze leave them."""
    for parameter in model.parameters():
        full = torch.ones_like(parameter)
        if isinstance(optimizer, torch.optim.SGD):  # fused takes it for all or for none
            optimizer.state[parameter]["momentum_buffer"] = full
        else:
            moments = {"exp_avg": full, "exp_avg_sq": full.clone()}
            optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}


for kind, maker in KINDS.items():
    for how, chosen in IMPLEMENTATIONS.items():

        def decay_alone(model: Plain, *_: Any) -> Iterator[None]:
            return zero_gradients(model)

        decay_alone.__name__ = f"decay_moves_it_with_zero_gradients_{kind}_{how}"
        breaks(
            "plain", "layer1", LAYER1, "weight decay moved it", maker, lr=0.1, weight_decay=0.1,
            **chosen,
        )(decay_alone)  # fmt: skip

        def state_alone(model: Plain, _: Freeze, optimizer: Optimizer) -> Iterator[None]:
            fill_state(model, optimizer)
            return zero_gradients(model)

        state_alone.__name__ = f"old_state_moves_it_with_zero_gradients_{kind}_{how}"
        cause, more = (
            ("momentum moved it", {"momentum": 0.9})
            if kind == "sgd"
            else ("Adam's moments moved it", {})
        )
        breaks("plain", "layer1", LAYER1, cause, maker, lr=0.1, **more, **chosen)(state_alone)


@breaks("plain", "layer1", {"layer1.weight"}, "SGD moved it")
def an_optimizer_of_somebody_else_steps_it(model: Plain, *_: Any) -> Iterator[None]:
    other = torch.optim.SGD([model.layer1.weight], lr=0.1)
    yield
    model.layer1.weight.grad = torch.ones_like(model.layer1.weight)
    other.step()
    model.layer1.weight.grad = None


@breaks("plain", "layer1", LAYER1, "`requires_grad` was set back")
def a_hand_written_freeze_has_an_exhausted_generator(
    model: Plain, _: Freeze, optimizer: Optimizer
) -> None:
    # ``layer.parameters()`` kept in a dictionary is empty after its first pass: the first step
    # holds, the second moves the layer.
    kept = {"layer1": model.layer1.parameters()}
    model.layer1.requires_grad_(True)

    def drop_gradients(*_: Any) -> None:
        for parameter in kept["layer1"]:
            parameter.grad = None

    optimizer.register_step_pre_hook(drop_gradients)


@breaks(
    "plain", "layer1", LAYER1, "its gradient was not zeroed", torch.optim.Adam,
    mechanism="zero_grad",
)  # fmt: skip
def an_exhausted_generator_zeroes_gradients_once(
    model: Plain, applied: Freeze, optimizer: Optimizer
) -> None:
    kept = model.layer1.parameters()

    def hold_gradients() -> None:
        for parameter in kept:
            assert parameter.grad is not None
            parameter.grad.zero_()

    applied.hold_gradients = hold_gradients  # type: ignore[method-assign]


@breaks("plain", "layer1", LAYER1, "`requires_grad` was set back")
def the_flag_is_set_back(model: Plain, *_: Any) -> None:
    model.layer1.requires_grad_(True)


@breaks("tied", "head", {"embedding.weight"}, "SGD moved it")
def a_tied_tensor_is_trained_under_its_other_name(model: Tied, *_: Any) -> Iterator[None]:
    other = torch.optim.SGD([model.embedding.weight], lr=0.1)
    yield
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    other.step()
    model.embedding.weight.grad = None


@breaks(
    "plain", "layer1", LAYER1, "SGD has it among its parameters", torch.optim.SGD,
    mechanism="exclude",
)  # fmt: skip
def what_was_left_out_is_added_to_the_optimizer(
    model: Plain, _: Freeze, optimizer: Optimizer
) -> None:
    optimizer.add_param_group({"params": list(model.layer1.parameters()), "lr": 0.1})


@breaks("plain", "layer1", LAYER1, "Adam has it among", torch.optim.Adam, mechanism="zero_lr")
def somebody_sets_every_rate(model: Plain, _: Freeze, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.01


@breaks(
    "plain", "layer1", LAYER1, "weight decay moved it", torch.optim.SGD,
    mechanism="zero_grad", lr=0.1, weight_decay=0.1,
)  # fmt: skip
def decay_goes_on_under_zeroed_gradients(model: Plain, *_: Any) -> None: ...


@breaks(
    "plain", "layer1", LAYER1, "momentum moved it", torch.optim.SGD,
    mechanism="zero_grad", lr=0.1, momentum=0.9,
)  # fmt: skip
def momentum_from_before_goes_on_under_zeroed_gradients(
    model: Plain, _: Freeze, optimizer: Optimizer
) -> None:
    for parameter in model.layer1.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)


# -------------------------------------------------------------------- modules that move themselves


@breaks("tied", "embedding", {"embedding.weight"}, "max_norm")
def max_norm_rewrites_rows_in_forward(model: Tied, *_: Any) -> None:
    model.embedding.max_norm = 0.01


@breaks("plain", "layer1", {"layer1.weight"}, "parametrization took its place")
def a_parametrization_takes_its_place(model: Plain, *_: Any) -> Iterator[None]:
    yield
    nn.utils.parametrizations.weight_norm(model.layer1)


@breaks("plain", "layer1", {"layer1.weight"}, "parametrization took its place")
def spectral_norm_takes_its_place(model: Plain, *_: Any) -> Iterator[None]:
    yield
    nn.utils.parametrizations.spectral_norm(model.layer1)


STATISTICS = {"stem.1.running_mean", "stem.1.running_var", "stem.1.num_batches_tracked"}


@breaks("convolutional", "stem", STATISTICS, "train mode")
def train_is_called_past_us(model: Convolutional, *_: Any) -> None:
    model.train()


@breaks("convolutional", "stem", {"stem.1.num_batches_tracked"} | STATISTICS, "train mode")
def statistics_are_computed_anew(model: Convolutional, *_: Any) -> Iterator[None]:
    yield
    batches = [torch.randn(4, 2, 6, 6)]
    torch.optim.swa_utils.update_bn(batches, model)


@breaks(
    "convolutional",
    "stem",
    {"stem.1.running_mean", "stem.1.running_var"} | STATISTICS,
    "code wrote its statistics",
)
def statistics_are_reset(model: Convolutional, *_: Any) -> Iterator[None]:
    yield
    model.stem[1].running_mean.fill_(1)
    model.stem[1].running_var.fill_(2)
    model.stem[1].num_batches_tracked.fill_(3)


def test_there_are_at_least_thirty_ways_each_counted_once() -> None:
    """One way with another optimizer is the same way."""
    names = {case.id for case in CASES}
    assert len(names) == len(CASES)
    optimizers = tuple(f"_{kind}_{how}" for kind in KINDS for how in IMPLEMENTATIONS)
    ways = {
        next((name.removesuffix(o) for o in optimizers if name.endswith(o)), name) for name in names
    }
    assert len(ways) >= 30


@pytest.mark.parametrize(
    ("saboteur", "name", "frozen", "names", "cause", "optimizer", "options"), CASES
)
def test_what_moves_is_caught_and_named(
    saboteur: Any,
    name: str,
    frozen: str,
    names: set[str],
    cause: str,
    optimizer: Callable[..., Optimizer],
    options: dict[str, Any],
) -> None:
    model, example = make(name)
    mechanism = options.get("mechanism", "requires_grad")
    applied = apply_config(model, parse_config(freeze(frozen, mechanism=mechanism)))
    groups = applied.parameter_groups(options.get("weight_decay", 0.0))
    rate = options.get("lr", 1e-3)
    for group in groups:
        group["lr"] = rate * group["lr_scale"]
    settings = {k: v for k, v in options.items() if k not in ("mechanism", "weight_decay", "lr")}
    made = optimizer(groups, lr=rate, **settings)
    if saboteur is the_sign_of_a_zero_changes:
        model.layer1.bias.data[0] = 0.0
    shares = saboteur is the_storage_is_shared_with_something_that_trains
    if shares:  # this one must be in place before anything is frozen
        saboteur(model)
    proof = Proof(applied)
    after = None if shares else saboteur(model, applied, made)
    if after is not None:
        next(after)
    for _ in range(2):
        model(example).float().square().mean().backward()
        applied.hold_gradients()
        made.step()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
    if after is not None:
        next(after, None)
    document = proof.check()
    assert document["verdict"] == "broken"
    caught = {c["name"]: c for c in document["frozen"]["changed"] + document["buffers"]["changed"]}
    assert set(caught) == names
    assert all(item["cause"] and cause in item["cause"] for item in caught.values())


# ------------------------------------------- buffers that no norm policy holds: named, not a breach


class Counting(nn.Linear):
    """Keeps count of its calls, as some forwards do, in a buffer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "moves"),
    [
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
            ["0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"],
        ),
        (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), ["0.weight_u", "0.weight_v"]),
        (lambda: Counting(6, 6), ["0.calls"]),
        (lambda: nn.Linear(6, 6), []),
    ],
)
def test_buffers_that_a_frozen_forward_moves_are_named(
    layer: Callable[[], nn.Module], moves: list[str]
) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older spectral norm is deprecated
        model = nn.Sequential(layer(), nn.Linear(6, 3))
    applied = apply_config(model, parse_config(freeze("0")))
    optimizer = torch.optim.SGD(applied.parameter_groups(0.1), lr=0.1, momentum=0.9)
    proof = Proof(applied)
    for _ in range(2):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    document = proof.check()
    assert document["verdict"] == "holds"  # of its parameters
    assert document["buffers"]["allowed"] == moves

"""Tests of what a trace leaves behind it, and of modules that a trace must get past."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from app.freezing.graph import ModelGraph
from app.freezing.trace import trace_model
from tests.zoo.hidden import HIDDEN


class Keeping(nn.Module):
    """Keeps a table, a cache, a list, a buffer and a parameter's change of its own forward."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 2)
        self.looks = looks
        self.table: torch.Tensor | None = None
        self.cache: dict[str, torch.Tensor] = {}
        self.results: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(6.0)
            self.register_buffer("late", torch.ones(6))
        self.cache.setdefault("ones", torch.ones(6))
        with torch.no_grad():
            self.enter.weight.clamp_(-0.1, 0.1)
        x = self.enter(x) * self.cache["ones"] + self.table + self.late
        if self.looks and x.sum().item() > 1e9:
            x = x / 2
        self.results.append(x.detach())
        return self.leave(x)


@pytest.mark.parametrize("looks", [False, True])
def test_a_trace_leaves_a_model_as_it_found_it(looks: bool) -> None:
    model = Keeping(looks=looks)
    gradient = model.leave.bias.grad = torch.ones(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace_model(model, torch.randn(3, 6))
    assert graph.traced_by == ("real" if looks else "fake")
    assert (model.table, model.cache, model.results) == (None, {}, [])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.leave.bias.grad is gradient
    output = model(torch.randn(3, 6))
    assert not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves([output, vars(model)]))


def test_what_a_region_hides_gets_gradients_only_where_something_before_it_trains() -> None:
    model, example = HIDDEN["a library's checkpoint"]()
    graph = trace_model(model, example)
    names = [p.name for p in graph.parameters]
    hidden = {name for name in names if name.startswith("blocks.")}

    def reach(trains: set[str]) -> set[str]:
        walk = graph.walk
        reached = walk.reached_when(walk.nearest([name in trains for name in names]))
        return {name for name, is_reached in zip(names, reached, strict=True) if is_reached}

    assert reach(set(names)) == set(names)
    assert not reach(hidden) & hidden
    assert reach(hidden | {"enter.bias"}) >= hidden


@pytest.mark.parametrize("name", list(HIDDEN))
def test_what_lies_hidden_survives_json(name: str) -> None:
    graph = trace_model(*HIDDEN[name]())
    assert ModelGraph.from_document(json.loads(json.dumps(graph.to_document()))) == graph


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules_are_traced() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    graph = trace_model(nn.Sequential(nn.Linear(6, 6), scripted), torch.randn(3, 6))
    assert graph.traced_by == "fake", graph.trace_note
    assert not graph.unreached


def test_lazy_layers_are_read_and_named_as_what_keeps_from_tracing() -> None:
    graph = trace_model(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), torch.randn(3, 6))
    assert graph.traced_by == "none"
    assert "lazy" in graph.trace_note
    assert graph.parameters[0].numel == 0


def test_nothing_stays_patched_after_a_trace() -> None:
    hooks = torch.autograd.graph.saved_tensors_hooks
    before = (hooks.__enter__, hooks.__exit__, torch.autograd.backward)
    trace_model(*HIDDEN["reentrant checkpoints"]())
    assert (hooks.__enter__, hooks.__exit__, torch.autograd.backward) == before


def test_an_error_in_a_forward_leaves_nothing_patched() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autograd.graph.save_on_cpu():
                raise RuntimeError(f"no: {self.layer(x).shape}")

    hooks = torch.autograd.graph.saved_tensors_hooks
    before = hooks.__enter__, hooks.__exit__
    graph = trace_model(Failing(), torch.randn(3, 6))
    assert graph.traced_by == "none"
    assert (hooks.__enter__, hooks.__exit__) == before


class Renormed(nn.Linear):
    """Holds its weight's rows below a norm, as some networks for signals do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


def test_a_weight_whose_data_a_forward_replaces_is_put_back() -> None:
    model = Renormed(4, 3)
    weight = model.weight.detach().clone()
    assert trace_model(model, torch.randn(2, 4)).traced_by == "fake"
    assert torch.equal(model.weight, weight)
    assert type(model(torch.randn(2, 4))) is torch.Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(0.5),
        lambda weight: weight.data.sub_(weight),
        lambda weight: weight.data.add_(1),
        lambda weight: torch.mul(weight, 2, out=weight),
        lambda weight: torch._foreach_mul_([weight], 0.5),
        lambda weight: weight.copy_(weight * 2),
        lambda weight: weight[0].fill_(2),
        nn.init.normal_,
    ],
    ids=["mul_", "sub_", "add_", "out", "foreach", "copy_", "view", "init"],
)
def test_a_fake_pass_writes_no_real_weight(write: Callable[[torch.Tensor], object]) -> None:
    class Written(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                write(self.weight)
            return super().forward(x)

    model = Written(4, 3)
    weight = model.weight.detach().clone()
    assert trace_model(model, torch.randn(2, 4)).traced_by == "fake"
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("codes", [torch.ones(3, dtype=torch.int8), torch.tensor(1)])
def test_a_fake_pass_changes_no_whole_number_for_good(codes: torch.Tensor) -> None:
    class Counted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.codes = nn.Parameter(codes.clone(), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.codes.mul_(2)
            return super().forward(x)

    model = Counted()
    assert trace_model(model, torch.randn(2, 4)).traced_by == "fake"
    assert torch.equal(model.codes, codes)

"""What a step holds at most: foretold, and seen in a real one."""

import itertools
import json
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from app.freezing.config import parse_config
from app.freezing.graph import ModelGraph
from app.freezing.memory import Change, Memory, Timeline
from app.freezing.plan import plan_config
from app.freezing.trace import trace_model
from tests.unit.peaks import SETS, choose, foretell, see
from tests.unit.test_findings import Secretive
from tests.zoo.library import build_library_model
from tests.zoo.observe import observe

Build = Callable[[], tuple[nn.Module, Callable[[int], Any]]]


def perceptron() -> tuple[nn.Module, Callable[[int], Any]]:
    layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(128, 3)), lambda rows: torch.randn(rows, 128)


def convolutions() -> tuple[nn.Module, Callable[[int], Any]]:
    first = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    second = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    model = nn.Sequential(*first, *second, *pooled)
    return model, lambda rows: torch.randn(rows, 3, 20, 20)


def attention() -> tuple[nn.Module, Callable[[int], Any]]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model, lambda rows: torch.randn(rows, 12, 32)


class Checkpointed(nn.Module):
    """Blocks of which nothing within is kept: backward runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(4)
        )
        self.head = nn.Linear(48, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def checkpoints() -> tuple[nn.Module, Callable[[int], Any]]:
    return Checkpointed(), lambda rows: torch.randn(rows, 48)


MODELS: dict[str, Build] = {
    build.__name__: build for build in (perceptron, convolutions, attention, checkpoints)
}


@pytest.mark.parametrize("which", sorted(SETS))
@pytest.mark.parametrize("rows", [2, 24])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_peak_is_foretold_for_any_freeze_set_and_batch(
    name: str, rows: int, which: str
) -> None:
    torch.manual_seed(0)
    model, make_example = MODELS[name]()
    graph = trace_model(model, make_example(2))
    trained = choose(graph, which)
    cost = foretell(graph, trained, batch_size=rows, optimizer="sgd")
    assert cost["peak_bytes"] == pytest.approx(see(model, make_example(rows), trained), rel=0.03)


@pytest.mark.parametrize("which", sorted(SETS))
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "resnet", "wav2vec2", "mixtral"])
def test_the_peak_of_a_librarys_model_is_foretold(name: str, which: str) -> None:
    torch.manual_seed(0)
    model, example = build_library_model(name)
    graph = trace_model(model, example)
    trained = choose(graph, which)
    peak = foretell(graph, trained, optimizer="sgd")["peak_bytes"]
    assert peak == pytest.approx(see(model, example, trained), rel=0.05)


@pytest.mark.parametrize(
    "name", ["bert", "deberta-v2", "gpt2", "perceiver", "swin-v2", "t5", "vit", "xlnet"]
)
def test_a_larger_batch_is_foretold_for_what_does_not_grow_alike(name: str) -> None:
    """Masks grow that are made of a shape alone; biases and positions of weights alone do not."""
    torch.manual_seed(0)
    model, example = build_library_model(name)
    graph = trace_model(model.train(), example)
    rows = {key: tensor.repeat(8, *[1] * (tensor.dim() - 1)) for key, tensor in example.items()}
    trained = choose(graph, "everything")
    cost = foretell(graph, trained, batch_size=8 * graph.batch_size, optimizer="sgd")
    seen = observe(model, rows, set(trained))
    assert cost["forward_flops"] == seen.forward_flops
    assert cost["backward_flops"] == seen.backward_flops
    assert cost["activation_bytes"] == pytest.approx(seen.saved_bytes, rel=0.01)
    assert cost["peak_bytes"] == pytest.approx(see(model, rows, trained), rel=0.06)


class Picky(nn.Module):
    """A forward that takes two rows and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.ones(2, 3)


class Bag(nn.Module):
    """Its example is a mapping of a class that torch does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_what_an_example_does_not_show_grows_as_it_did() -> None:
    graph = trace_model(Bag(), UserDict({"x": torch.randn(4, 3)}))
    assert (graph.traced_by, graph.fixed_nodes, graph.fixed_flops) == ("fake", (), 0)


class Recalling(nn.Module):
    """Rows of its own beside those that come, in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.layer = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            _ = self.memory @ self.memory.T
        return self.layer(torch.cat([self.memory, x]))


def test_forward_grows_by_what_comes_alone() -> None:
    model = Recalling()
    graph = trace_model(model, torch.randn(2, 5))
    seen = observe(model, torch.randn(30, 5), {"memory", "layer.weight", "layer.bias"})
    cost = foretell(graph, choose(graph, "everything"), batch_size=30)
    assert cost["forward_flops"] == seen.forward_flops


def test_a_recurrent_layer_keeps_more_of_a_larger_batch() -> None:
    model = nn.LSTM(16, 16, 2, batch_first=True)
    graph = trace_model(model, torch.randn(16, 5, 16))
    trained = choose(graph, "everything")
    kept = foretell(graph, trained, batch_size=48)["activation_bytes"]
    seen = observe(model, torch.randn(48, 5, 16), set(trained)).saved_bytes
    assert kept == pytest.approx(seen, rel=0.1)


def test_a_model_that_refuses_another_batch_is_traced_all_the_same(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, example = Picky(), torch.randn(2, 3)
    graph = trace_model(model, example)
    assert capfd.readouterr().err == ""
    assert (graph.traced_by, graph.trace_note, graph.fixed_nodes) == ("fake", "", ())
    trained = choose(graph, "everything")
    peak = foretell(graph, trained, optimizer="sgd")["peak_bytes"]
    assert peak == pytest.approx(see(model, example, trained), rel=0.03)
    assert foretell(graph, trained, batch_size=4)["forward_flops"] == 2 * graph.forward_flops


def test_a_step_of_adam_may_hold_more_than_backward_did() -> None:
    model, make_example = perceptron()
    graph = trace_model(model, make_example(2))
    trained = choose(graph, "everything")
    cost = foretell(graph, trained, optimizer="adamw")
    weights = sum(p.numel() for p in model.parameters()) * 4
    by_sgd = foretell(graph, trained, optimizer="sgd")["peak_bytes"]
    assert cost["peak_bytes"] > 4 * weights > by_sgd
    seen = see(model, make_example(2), trained, "adamw")
    assert cost["peak_bytes"] == pytest.approx(seen, rel=0.03)


def test_on_a_gpu_adam_steps_all_tensors_at_once() -> None:
    model, make_example = perceptron()
    graphs = (trace_model(model, make_example(2), kernels=kind) for kind in ("cpu", "cuda"))
    cpu, gpu = (foretell(graph, choose(graph, "everything")) for graph in graphs)
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert cpu["workspace_bytes"] == 0
    assert cpu["peak_bytes"] < 4.6 * weights
    assert gpu["workspace_bytes"] == 2 * 8_320 * 1024  # of cuBLAS, in forward and in backward
    assert 5 * weights <= gpu["peak_bytes"] - gpu["workspace_bytes"] < 5.1 * weights


def test_a_frozen_forward_holds_what_it_works_on() -> None:
    """Of a model of which only the head trains, nothing is saved, and much is held in between."""
    model, make_example = convolutions()
    graph = trace_model(model, make_example(2))
    cost = foretell(graph, choose(graph, "the last alone"))
    working = 2 * 16 * 18 * 18 * 4  # the results of a convolution and of its norm
    assert cost["activation_bytes"] < 1000
    assert cost["peak_bytes"] - graph.resting_bytes > 2 * working


def test_where_backward_cannot_be_seen_the_peak_is_not_known() -> None:
    graph = trace_model(Secretive(), torch.randn(2, 3))
    assert graph.traced_by == "fake"
    assert graph.memory is None
    assert graph.trace_note == "memory: RuntimeError: not on stand-ins"
    cost = plan_config(graph, parse_config({}), devices={"small": 10, "large": 10**9}).cost
    assert cost["peak_bytes"] is None
    assert cost["activation_bytes"] > 0
    assert cost["fits"] == {"small": False}


def test_an_embedding_with_sparse_gradients_has_a_peak() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids))

    graph = trace_model(Sparse(), torch.tensor([[1, 2, 3]]))
    assert (graph.traced_by, graph.trace_note) == ("fake", "")
    assert graph.memory is not None


def test_looking_at_a_step_leaves_gradients_and_weights_as_they_were() -> None:
    model, make_example = attention()
    for parameter in itertools.islice(model.parameters(), 3):
        parameter.grad = torch.ones_like(parameter)
    before = {n: (p.clone(), p.grad) for n, p in model.named_parameters()}
    assert trace_model(model, make_example(2)).memory is not None
    for name, parameter in model.named_parameters():
        weight, gradient = before[name]
        assert torch.equal(parameter, weight)
        assert parameter.grad is gradient


class Picks(nn.Module):
    """Keeps what is positive: how many that are only values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y[y > 0].sum()


def test_the_peak_of_a_model_that_looks_at_values_is_foretold() -> None:
    torch.manual_seed(0)
    model, x = Picks(), torch.randn(4, 6)
    graph = trace_model(model, x)
    assert graph.traced_by == "real"
    trained = choose(graph, "everything")
    peak = foretell(graph, trained, optimizer="sgd")["peak_bytes"]
    assert peak == pytest.approx(see(model, x, trained), rel=0.05)


class Counts(nn.Module):
    """Does something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for _ in range(self.calls):
            x = self.layer(x).relu()
        return x


def test_the_second_step_of_a_trace_begins_where_the_first_did() -> None:
    model = Counts()
    graph = trace_model(model, torch.randn(2, 4))
    assert graph.memory is not None
    assert [node.name for node in graph.nodes].count("ReluBackward0") == 1
    assert model.calls == 0


def test_an_optimizer_in_backward_takes_no_step_in_a_trace() -> None:
    model, make_example = attention()
    weights = [p.clone() for p in model.parameters()]
    stepped = []

    def step(parameter: torch.Tensor) -> None:
        stepped.append(parameter)
        with torch.no_grad():
            parameter.mul_(0.5)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    assert trace_model(model, make_example(2)).memory is not None
    assert not stepped
    assert all(map(torch.equal, model.parameters(), weights))
    model(make_example(2)).sum().backward()
    assert len(stepped) == len(weights)


def test_a_recurrent_layers_workspace_is_foretold_from_few_steps() -> None:
    model = nn.LSTM(12, 20, batch_first=True)
    few, many = (
        sum(
            size
            for node in trace_model(model, torch.randn(2, steps, 12)).nodes
            for _, size, _ in node.saved
        )
        for steps in (512, 2048)
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        seen: list[torch.Tensor] = []
        model(torch.randn(2, 2048, 12))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in seen}
    real = sum(size for key, size in kept.items() if key not in own)
    assert many == pytest.approx(real, rel=0.05)
    assert many == pytest.approx(4 * few, rel=0.05)


def test_a_memory_is_read_back_from_json() -> None:
    model, make_example = attention()
    graph = trace_model(model, make_example(2))
    document = json.loads(json.dumps(graph.to_document()))
    assert ModelGraph.from_document(document) == graph
    del document["memory"]  # as an older version wrote it
    assert ModelGraph.from_document(document) == replace(graph, memory=None)


# ------------------------------------------------------------------------- a naive second way

changes = st.builds(
    lambda on, scaled, net, more: Change(on, scaled, net, max(0, net) + more),
    st.integers(-1, 3), st.booleans(), st.integers(-50, 100), st.integers(0, 60),
)  # fmt: skip


@given(
    st.lists(changes.filter(lambda c: c.on < 0), max_size=8),
    st.permutations(range(4)),
    st.lists(st.tuples(st.integers(0, 3), st.lists(changes, max_size=4)), max_size=6),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from([1.0, 0.5, 3.0]),
)
def test_a_timeline_is_what_going_through_it_event_by_event_gives(
    held: list[Change],
    storages: list[int],
    ran: list[tuple[int, list[Change]]],
    live: list[bool],
    scale: float,
) -> None:
    forward = [*held, *(Change(s, s % 2 == 0, 10 * s + 5, 0) for s in storages)]
    nodes = list(dict.fromkeys(node for node, _ in ran))
    backward = tuple((node, tuple(dict(reversed(ran))[node])) for node in nodes)
    wires, kept = [0, 1, 2, 0], {0: (0, 5), 1: (2, 15), 3: (1, 35)}  # 2 is kept by nobody
    last = {node: [s for s in kept if s % 3 == node % 3] for node in nodes}
    live = [*live, True]

    def size(number: int, is_scaled: bool) -> int:
        return round(number * scale) if is_scaled else number

    now = most = 0
    for change in forward:
        most = max(most, now + size(change.high, change.is_scaled) * (change.on < 0))
        if change.on < 0:
            now += size(change.net, change.is_scaled)
        elif change.on not in kept or not live[kept[change.on][0]]:
            now -= size(change.net, change.is_scaled)
        most = max(most, now)
    for node, made in backward:
        for change in made:
            if live[wires[change.on] if change.on >= 0 else -1]:
                most = max(most, now + size(change.high, change.is_scaled))
                now += size(change.net, change.is_scaled)
        for storage in last[node]:
            if live[kept[storage][0]]:
                now -= size(10 * storage + 5, storage % 2 == 0)
    timeline = Timeline(Memory(tuple(forward), backward), wires, kept, last, scale)
    assert timeline.peak_bytes(live) == max(0, most)

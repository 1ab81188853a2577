"""The plan against real backward passes: 66 architectures, fifty freeze sets each."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import nn

from app.freezing.apply import apply_config
from app.freezing.config import FreezeConfig
from app.freezing.graph import ModelGraph
from app.freezing.plan import plan_config
from app.freezing.presets import shortest_rules
from app.freezing.proof import Proof
from app.freezing.trace import trace_model
from tests.zoo.hidden import HIDDEN
from tests.zoo.library import LIBRARY, build_library_model
from tests.zoo.observe import Seen, call, find_loss, observe
from tests.zoo.own import OWN

SETS = 50
# Cannot be traced under fake tensors: what their forward does depends on values. One real batch is.
TRACED_FOR_REAL = {"packed sequences", "longformer"}
# Where what forward keeps differs by more than 5 %, and by how much at most. Mixtral's experts get
# more or fewer tokens by chance; a bias of attention that is frozen has it keep other tensors, in a
# fused kernel.
OTHER_SAVED = {"mixtral": 0.3, "swin": 0.2, "biased attention": 0.35}
# What forward keeps is not compared: hooks see nothing of what a checkpoint keeps for itself, nor
# are they let into torch.func.grad.
NOT_SEEN_SAVED = {
    "checkpointed",
    "nested checkpoints",
    "reentrant checkpoints",
    "a library's checkpoint",
    "slopes",
}
# Frozen or not, this is moved by the forward: the alarm is no false one.
MOVED_BY_FORWARD = {"momentum queue": {"key.weight", "key.bias"}}


def build(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library's own about its tiny configuration
        own = {**OWN, **HIDDEN}
        return own[name]() if name in own else build_library_model(name)


def draw_sets(graph: ModelGraph, seed: str) -> Iterator[set[str]]:
    """What trains: a half, a suffix, a prefix, a few, a tenth of the parameters, in turn."""
    draw = random.Random(seed)
    names = [p.name for p in graph.parameters if p.floating]
    for index in range(SETS):
        cut = draw.randrange(len(names) + 1)
        few = draw.sample(names, min(len(names), draw.randint(1, 3)))
        by_chance = {name for name in names if draw.random() < (0.5 if index % 5 == 0 else 0.1)}
        yield (by_chance, set(names[cut:]), set(names[:cut]), set(few), by_chance)[index % 5]


def expect_flows(model: nn.Module, graph: ModelGraph, trains: set[str], seen: Seen) -> list[str]:
    """The four states, from their definitions, of every layer in model order."""
    first_path = {module: path for path, module in model.named_modules()}
    flows = []
    for layer in graph.layers:
        own = {graph.canonical_names[name] for name in layer.parameters}
        if own & seen.reached:
            flows.append("trained")
        elif own & trains:
            flows.append("unreached")
        else:
            visited = first_path[model.get_submodule(layer.path)] in seen.visited
            flows.append("passes" if visited else "idle")
    return flows


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about torch and about small inputs
@pytest.mark.parametrize("name", [*OWN, *HIDDEN, *LIBRARY])
def test_flow_states_and_flops_are_those_of_a_real_backward(name: str) -> None:
    model, example = build(name)
    model.train()
    graph = trace_model(model, example)
    assert graph.traced_by == ("real" if name in TRACED_FOR_REAL else "fake"), graph.trace_note
    for trains in draw_sets(graph, name):
        state = {p.name: p.name not in trains for p in graph.parameters}
        plan = plan_config(graph, FreezeConfig(rules=shortest_rules(state, graph)))
        assert set(plan.trainable) == trains
        seen = observe(model, example, trains, keeps=name not in NOT_SEEN_SAVED)
        flows = expect_flows(model, graph, trains, seen)
        for layer, flow in zip(plan.layers, flows, strict=True):
            assert layer.flow == flow, layer
        with_gradient = {layer.path for layer in plan.layers if layer.weight_gradient}
        assert with_gradient == {
            layer.path
            for layer in graph.layers
            if {graph.canonical_names[n] for n in layer.parameters} & seen.reached
        }
        assert plan.cost["forward_flops"] == seen.forward_flops
        assert plan.cost["backward_flops"] == seen.backward_flops
        saved = pytest.approx(seen.saved_bytes, rel=OTHER_SAVED.get(name, 0.05), abs=512)
        assert name in NOT_SEEN_SAVED or plan.cost["activation_bytes"] == saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*OWN, *HIDDEN, *LIBRARY])
def test_what_stays_frozen_raises_no_alarm(name: str) -> None:
    model, example = build(name)
    model.train()
    graph = trace_model(model, example)
    for trains in (trains for trains in islice(draw_sets(graph, name), 5) if trains):
        state = {p.name: p.name not in trains for p in graph.parameters}
        for parameter in model.parameters():  # rules say what changes of a model as it comes
            parameter.requires_grad_(parameter.is_floating_point())
        freeze = apply_config(model, FreezeConfig(rules=shortest_rules(state, graph)))
        proof = Proof(freeze)
        optimizer = torch.optim.AdamW(freeze.parameter_groups(weight_decay=0.1), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss = find_loss(call(model, example), example, None)
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        told = proof.check()
        moved = {change["name"] for change in told["frozen"]["changed"]}
        assert moved <= MOVED_BY_FORWARD.get(name, set()), told
        assert told["verdict"] == ("broken" if moved else "holds"), told

"""The plan against autograd itself: any freeze set, on models that hold the traps."""

import itertools
import json
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from app.freezing.config import FreezeConfig, config_document, expand_rules, parse_config
from app.freezing.graph import ModelGraph
from app.freezing.plan import plan_config
from app.freezing.presets import shortest_rules, tick_module
from app.freezing.trace import trace_model
from tests.unit.models import MODELS, make


def plain_attention() -> AbstractContextManager[None]:
    """Torch's counter has no formula for flash attention on CPUs: both sides use the plain one."""
    return sdpa_kernel(SDPBackend.MATH)


def trace(name: str) -> tuple[nn.Module, torch.Tensor, ModelGraph]:
    model, example = make(name)
    with plain_attention():
        return model, example, trace_model(model, example)


TRACED = {name: trace(name) for name in MODELS}
FREEZE_SETS = st.sampled_from(sorted(MODELS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(
            st.booleans(),
            min_size=TRACED[name][2].tensor_count,
            max_size=TRACED[name][2].tensor_count,
        ),
    )
)


def configure(name: str, frozen: list[bool]) -> tuple[dict[str, bool], FreezeConfig]:
    graph = TRACED[name][2]
    state = dict(zip((p.name for p in graph.parameters), frozen, strict=True))
    return state, FreezeConfig(rules=shortest_rules(state, graph))


def run_backward(name: str, state: dict[str, bool]) -> tuple[set[str], int]:
    """Names that really receive a gradient, and the FLOPs that backward really does."""
    model, example, _ = TRACED[name]
    parameters = dict(model.named_parameters())
    for parameter_name, parameter in parameters.items():
        parameter.grad = None
        parameter.requires_grad_(not state[parameter_name])
    with plain_attention():
        loss = model(example).float().square().mean()
        counter = FlopCounterMode(display=False)
        if loss.requires_grad:
            with counter:
                loss.backward()
    reached = {n for n, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return reached, counter.get_total_flops() if loss.requires_grad else 0


@settings(max_examples=60, deadline=None)
@given(FREEZE_SETS)
def test_trained_layers_are_those_that_autograd_gives_a_gradient(case: tuple) -> None:
    name, frozen = case
    state, config = configure(name, frozen)
    graph = TRACED[name][2]
    reached, flops = run_backward(name, state)
    plan = plan_config(graph, config)
    for layer in plan.layers:
        own = {graph.canonical_names[n] for n in graph.by_path[layer.path].parameters}
        assert (layer.flow == "trained") is bool(own & reached), layer
        assert layer.weight_gradient is bool(own & reached), layer
    if name != "convolutional":  # torch's counter is wrong for grouped convolutions
        assert plan.cost["backward_flops"] == flops


@settings(max_examples=60, deadline=None)
@given(FREEZE_SETS)
def test_shortest_rules_give_back_exactly_the_state_they_were_made_from(case: tuple) -> None:
    name, frozen = case
    state, config = configure(name, frozen)
    assert expand_rules(config, TRACED[name][2]) == state
    assert parse_config(json.loads(json.dumps(config_document(config)))) == config


@settings(max_examples=60, deadline=None)
@given(FREEZE_SETS, st.integers(0, 10**6), st.booleans())
def test_a_tick_changes_what_lies_below_it_and_nothing_else(
    case: tuple, pick: int, frozen: bool
) -> None:
    name, before = case
    state, config = configure(name, before)
    graph = TRACED[name][2]
    path = graph.modules[pick % graph.module_count].path
    ticked = expand_rules(tick_module(config, graph, path, frozen), graph)
    prefix = f"{path}." if path else ""
    for parameter in graph.parameters:
        below = any(n.startswith(prefix) for n in parameter.names)
        assert ticked[parameter.name] is (frozen if below else state[parameter.name])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_traced_graph_survives_json(name: str) -> None:
    graph = TRACED[name][2]
    again = ModelGraph.from_document(json.loads(json.dumps(graph.to_document())))
    assert again == graph
    assert again.fingerprint == graph.fingerprint


def test_every_layer_is_in_one_of_four_states_for_every_set_of_three_layers() -> None:
    graph = TRACED["plain"][2]
    for frozen in itertools.product([True, False], repeat=3):
        state = {
            p.name: frozen[("layer1", "layer2", "layer3").index(p.name.split(".")[0])]
            for p in graph.parameters
        }
        plan = plan_config(graph, FreezeConfig(rules=shortest_rules(state, graph)))
        for index, layer in enumerate(plan.layers):
            if not frozen[index]:
                assert layer.flow == "trained"
            else:
                assert layer.flow == ("passes" if not all(frozen[:index]) else "idle")

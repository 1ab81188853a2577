"""Laws that every plan obeys: what an expansion keeps, what a rule cannot do, what flow follows."""

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from app.freezing.config import (
    FreezeConfig,
    Rule,
    config_document,
    differing_names,
    parse_config,
    split_names,
)
from app.freezing.graph import ModelGraph
from app.freezing.plan import plan_config
from app.freezing.presets import adopt_names
from app.freezing.trace import trace_model
from tests.unit.models import MODELS, make

GRAPHS = {name: trace_model(*make(name)) for name in MODELS}
SEGMENTS = ("*", "**", "layer{1..2}", "stem", "block", "b*", "weight", "bias", "0", "?", "head")
TYPES = ("Linear", "LayerNorm", "BatchNorm2d", "Nowhere")
MATCHES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(".".join)
RULES = st.builds(
    lambda action, match, kind: Rule(action, match if match or not kind else None, kind),
    st.sampled_from(["freeze", "unfreeze"]),
    MATCHES | st.sampled_from(["re:.*\\.bias", "has:norm"]),
    st.none() | st.sampled_from(TYPES),
)
CONFIGS = st.builds(
    lambda rules, mechanism: FreezeConfig(rules=tuple(rules), mechanism=mechanism),
    st.lists(RULES, max_size=6),
    st.sampled_from(["requires_grad", "exclude", "zero_lr"]),
)
MODEL_NAMES = st.sampled_from(sorted(MODELS))


@settings(max_examples=100, deadline=None)
@given(MODEL_NAMES, CONFIGS)
def test_an_expansion_that_is_imported_gives_the_same_plan(name: str, config: FreezeConfig) -> None:
    graph = GRAPHS[name]
    document = json.loads(json.dumps(config_document(config, graph)))
    plan = plan_config(graph, config)
    again = parse_config(document)
    assert not any(differing_names(again, graph).values())
    assert plan_config(graph, again) == plan
    # The lists of names alone, without the rules, say the same.
    listed = adopt_names(replace(again, rules=()), graph)
    by_names = plan_config(graph, listed)
    assert (by_names.frozen, by_names.trainable) == (plan.frozen, plan.trainable)
    assert (by_names.layers, by_names.cost) == (plan.layers, plan.cost)


@settings(max_examples=100, deadline=None)
@given(MODEL_NAMES, CONFIGS, RULES)
def test_a_freeze_rule_at_the_end_never_adds_a_trainable_parameter(
    name: str, config: FreezeConfig, rule: Rule
) -> None:
    graph = GRAPHS[name]
    more = replace(config, rules=(*config.rules, replace(rule, action="freeze")))
    _, before = split_names(config, graph)
    _, after = split_names(more, graph)
    assert set(after) <= set(before)
    if config.mechanism == "requires_grad":
        first, then = plan_config(graph, config).cost, plan_config(graph, more).cost
        for key in ("backward_flops", "gradient_bytes", "activation_bytes", "optimizer_bytes"):
            assert then[key] <= first[key]


@settings(max_examples=100, deadline=None)
@given(MODEL_NAMES, CONFIGS)
def test_flow_states_follow_from_the_graph_alone(name: str, config: FreezeConfig) -> None:
    graph = GRAPHS[name]
    plan = plan_config(graph, config)
    kept = ModelGraph.from_document(json.loads(json.dumps(graph.to_document())))
    assert plan_config(kept, config) == plan
    expected = walk_backward(graph, set(plan.trainable))
    assert {layer.path: layer.flow for layer in plan.layers} == expected


def walk_backward(graph: ModelGraph, trains: set[str]) -> dict[str, str]:
    """Flow states by the slowest reading of their definition: every path from the loss, one by one.

    A node is live where some path from it ends in something that is trained.
    """

    def is_live(index: int) -> bool:
        node = graph.nodes[index]
        if node.parameter is not None:
            return node.parameter == "" or node.parameter in trains
        return any(is_live(below) for below in node.inputs if below >= 0)

    reached = {node.parameter for node in graph.nodes if node.parameter}
    states = {}
    for layer in graph.layers:
        own = {graph.canonical_names[n] for n in layer.parameters} & trains
        if own:
            states[layer.path] = "trained" if own & reached else "unreached"
        else:
            live = any(is_live(index) for index in graph.layer_nodes[layer.path])
            states[layer.path] = "passes" if live else "idle"
    return states

"""The workbench's address, its tree rows and its words for numbers, without a server."""

from urllib.parse import parse_qsl

import pytest

from app.freezing.graph import ModelGraph, Module, Parameter
from app.freezing.plan import plan_config
from app.web import render
from app.web.pages import tree, workbench


def parameter(name: str, *shared: str) -> Parameter:
    return Parameter(name, (2, 3), "float32", 6, 24, True, True, shared)


GRAPH = ModelGraph(
    modules=(
        Module("", "Net", 0),
        Module("embed", "Embedding", 1, ("embed.weight",)),
        Module("block", "Block", 1),
        Module("block.a", "Linear", 2, ("block.a.weight",)),
        Module("block.act", "ReLU", 2),
        Module("head", "Linear", 1, ("head.weight", "head.tied")),
    ),
    parameters=(
        parameter("embed.weight", "head.tied"),
        parameter("block.a.weight"),
        parameter("head.weight"),
    ),
)


def choose(*rules: str) -> workbench.Choice:
    return workbench.read_choice([("rule", rule) for rule in rules], None)


def states_of(*rules: str) -> tree.TreeStates:
    return tree.read_states(GRAPH, plan_config(GRAPH, choose(*rules).config()).document())


@pytest.mark.parametrize(
    "query",
    [
        "",
        "rule=freeze%3Ablock.%2A%2A&mechanism=zero_lr&open=0%2C2&train.epochs=7",
        "rule=unfreeze%3Atype%3DLinear+block.%2A%2A&dropout=off&search=weight",
        "rule=freeze%3Alayer.%7B0..",
    ],
)
def test_an_address_is_read_and_written_back(query: str) -> None:
    assert workbench.read_choice(parse_qsl(query), None).address() == query


def test_a_rule_that_cannot_be_used_is_kept_and_explained() -> None:
    choice = choose("freeze:block.**", "freeze:layer.{0..")
    assert list(choice.faults()) == [1]
    assert len(choice.config().rules) == 1
    ticked = workbench.act(choice, GRAPH, [("tick", "freeze:head")])
    assert ("freeze", "layer.{0..") in ticked.rules


def test_no_rules_at_all_differs_from_those_of_the_saved_config() -> None:
    base = {"id": 3, "rules": [{"action": "freeze", "match": "**"}]}
    assert workbench.read_choice([("config", "3")], base).rules == (("freeze", "**"),)
    emptied = workbench.read_choice([("config", "3"), ("form", "1")], base)
    assert emptied.rules == ()
    assert emptied.address() == "config=3&rule="


def test_boxes_have_three_states_and_a_tied_tensor_one() -> None:
    states = states_of("freeze:embed.**")
    assert states.boxes == ["mixed", "frozen", "trainable", "trainable", "", "mixed"]
    rows = tree.list_rows(GRAPH, states, frozenset({0, 5}))
    tied = next(row for row in rows if row.path == "head.tied")
    assert tied.box == "frozen"
    assert tied.shared_with == ("embed.weight",)


def test_the_frost_line_is_above_the_first_layer_beyond_it_or_inside_what_hides_it() -> None:
    states = states_of("freeze:{embed,block.a}.**")
    lines = {r.path: r.line for r in tree.list_rows(GRAPH, states, frozenset({0}))}
    assert lines == {"": "", "embed": "", "block": "", "head": "above"}
    closed = tree.list_rows(GRAPH, states, frozenset())
    assert [row.line for row in closed] == ["inside"]


def test_a_search_finds_names_types_and_globs() -> None:
    states = states_of()
    assert tree.find_rows(GRAPH, states, "WEIGHT")[1] == 3
    assert [row.path for row in tree.find_rows(GRAPH, states, "block.*")[0]] == [
        "block.a",
        "block.a.weight",
        "block.act",
    ]
    assert tree.find_rows(GRAPH, states, "block.{") == ([], 0)
    assert tree.find_rows(GRAPH, states, "relu")[1] == 1


def test_numbers_read_well() -> None:
    space = render.THIN_SPACE
    assert render.format_count(1234567) == f"1{space}234{space}567"
    assert render.format_si(7_087_872) == f"7.1{space}M"
    assert render.format_bytes(28_000_000) == f"28.0{space}MB"
    assert render.format_percent(0.082) == f"8.2{space}%"
    assert render.format_duration(7500) == f"2{space}h 05{space}min"
    assert render.format_duration(None) == render.NOTHING
    assert render.format_number(float("nan")) == "nan"

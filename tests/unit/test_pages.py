"""The workbench's address, its tree rows and its words for numbers, without a server."""

from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import pytest
from jinja2 import DictLoader, Environment

from app.freezing.config import config_document
from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph, Module, Parameter
from app.freezing.plan import plan_config
from app.service import Service
from app.web import insights, render
from app.web.job_views import JobView
from app.web.pages import entries, tree, workbench
from app.web.pages.job import figures_of


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
        "rule=freeze%3A%2A%2A&phase=epoch%3A2%3Aunfreeze%3Akeep%3Ablock.%2A%2A&group=10%3A%3Ahead",
        "phase=step%3Amany%3Afreeze%3Afresh%3Are%3Ahead%3A.%2A&assume.batch_size=64",
    ],
)
def test_an_address_is_read_and_written_back(query: str) -> None:
    assert workbench.read_choice(parse_qsl(query), None).address() == query


def test_a_rule_that_cannot_be_used_is_kept_and_explained() -> None:
    choice = choose("freeze:block.**", "freeze:layer.{0..")
    assert list(choice.faults("rule")) == [1]
    assert len(choice.config().rules) == 1
    ticked = workbench.act(choice, GRAPH, [("tick", "freeze:head")])
    assert ("freeze", "layer.{0..") in ticked.rules


def test_no_rules_at_all_differs_from_those_of_the_saved_config() -> None:
    base = {"id": 3, "rules": [{"action": "freeze", "match": "**"}]}
    assert workbench.read_choice([("config", "3")], base).rules == (("freeze", "**"),)
    emptied = workbench.read_choice([("config", "3"), ("form", "1")], base)
    assert emptied.rules == ()
    assert emptied.address() == "config=3&rule="


def test_phases_and_groups_go_into_the_config_and_come_back_from_a_saved_one() -> None:
    typed = [("phase", "epoch:2:unfreeze:keep:block.**"), ("group", "10:0.5:type=Linear head")]
    document = config_document(workbench.read_choice(typed, None).config())
    assert document["schedule"] == [
        {
            "at": {"epoch": 2},
            "action": "unfreeze",
            "match": "block.**",
            "optimizer_state": "keep",
        }
    ]
    assert document["groups"] == [
        {"match": "head", "type": "Linear", "lr_scale": 10.0, "weight_decay": 0.5}
    ]
    saved = {"id": 3, **document}
    assert workbench.read_choice([("config", "3")], saved).address() == "config=3"
    assert entries.config_items(document) == typed


def test_what_cannot_be_used_of_phases_is_kept_explained_and_left_out() -> None:
    choice = workbench.read_choice([("phase", "epoch:soon:unfreeze:fresh:block.**")], None)
    assert "epoch" in choice.faults("phase")[0]
    assert choice.config().schedule == ()
    fine = [("phase", "epoch:2:unfreeze:fresh:block.**"), ("mechanism", "zero_lr")]
    assert "requires_grad" in workbench.read_choice(fine, None).faults("phase")[0]


def test_rules_move_up_and_go() -> None:
    choice = choose("freeze:a", "freeze:b", "freeze:c")
    moved = workbench.act(choice, GRAPH, [("up", "rule:2")])
    assert [text for _, text in moved.rules] == ["a", "c", "b"]
    gone = workbench.act(moved, GRAPH, [("remove", "rule:0")])
    assert [text for _, text in gone.rules] == ["c", "b"]
    with pytest.raises(InvalidDocument, match="has changed"):
        workbench.act(gone, GRAPH, [("remove", "rule:2")])


def test_a_plan_assumes_what_the_form_trains_unless_told_otherwise() -> None:
    form = [("train.batch_size", "8"), ("train.optimizer", "sgd")]
    assert workbench.assumption(workbench.read_choice(form, None))[0] == {
        "batch_size": 8,
        "optimizer": "sgd",
        "precision": "fp32",
    }
    told = [*form, ("assume.batch_size", "64"), ("assume.image_size", "huge")]
    assumed, faults = workbench.assumption(workbench.read_choice(told, None))
    assert assumed["batch_size"] == 64
    assert "huge" in faults["image_size"]


def test_an_answer_to_a_tick_tells_only_the_visible_rows_that_changed() -> None:
    places = tree.list_places(GRAPH, frozenset({0, 2}))
    told = tree.changed_states(states_of(), states_of("freeze:block.a.**"), places)
    assert set(told["modules"]) == {0, 2, 3}
    assert told["modules"][3][0] == "1"
    assert told["parameters"] == {}  # block.a is closed
    everything = tree.changed_states(None, states_of(), places)
    assert set(everything["modules"]) == {place.at for place in places}


def test_boxes_have_three_states_and_a_tied_tensor_one() -> None:
    states = states_of("freeze:embed.**")
    assert [states.module(index).box for index in range(6)] == [
        "mixed",
        "frozen",
        "trainable",
        "trainable",
        "",
        "mixed",
    ]
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


def test_a_finding_tells_each_layers_evidence_and_what_to_do() -> None:
    converged = {"from_step": 1200, "moved_at_most": 0.0002, "at_first": 0.04}
    finding = {"code": "converged", "message": "m", "names": ["a"], "evidence": {"a": converged}}
    told = insights.tell_insight(finding, lambda names: f"/models/1?{names}")
    words = "from step 1\u202f200 on at most 0.02 %, at first 4 %"
    assert told.layers == [("a", words)]
    assert told.can_freeze
    assert told.rerun_address == "/models/1?['a']"
    lost = {"grad_norm": "NaN", "until_step": 7}
    finding = {"code": "nonfinite", "message": "m", "names": ["a"], "evidence": {"a": lost}}
    told = insights.tell_insight(finding, lambda _: "/")
    assert told.layers == [("a", "gradient NaN, by step 7")]
    assert not told.can_freeze
    assert told.rerun_address == ""


def test_a_job_that_waits_says_for_what_and_where_it_stands() -> None:
    waits = {"id": 1, "state": "queued", "waiting_for": "It waits for cpu.", "position": 3}
    assert JobView(waits).state_words == "It waits for cpu. It is number 3 in the queue."
    assert JobView({**waits, "position": 1}).state_words.endswith("It is the next to start.")


def test_a_template_is_compiled_once_and_where_nothing_may_be_kept_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(folder: Path) -> Environment:
        loader = DictLoader({"page.html": "{{ 1 + x }}"})
        return Environment(loader=loader, bytecode_cache=render.KeptTemplates(folder))

    nowhere, kept = tmp_path / "missing" / "kept", tmp_path / "kept"
    for folder in (nowhere, nowhere, kept):
        assert start(folder).get_template("page.html").render(x=1) == "2"
    second = start(kept)
    monkeypatch.setattr(second, "compile", None)
    assert second.get_template("page.html").render(x=2) == "3"


def test_what_was_foretold_of_a_job_is_that_of_what_is_frozen_now() -> None:
    class Plans:
        def plan_job(self, job_id: int, *, now: bool = False) -> dict[str, Any]:
            step, peak = (3_000, 500) if now else (1_000, 900)
            full = {"step_flops": 4_000}
            return {"cost": {"step_flops": step, "peak_bytes": peak, "full": full}}

    document = {
        "id": 1, "kind": "train", "training": {"grad_accumulation": 2}, "step_ms": 2.0,
        "config": {"schedule": [{"at": {"step": 1}, "action": "unfreeze", "match": "head"}]},
        "peak_bytes": 800,
    }  # fmt: skip
    figures = {f.label: f for f in figures_of(cast(Service, Plans()), document)}
    space = "\N{NARROW NO-BREAK SPACE}"
    peak, work = figures["peak memory"], figures["work a step"]
    assert (peak.predicted, peak.measured) == (
        f"900{space}B",
        f"800{space}B",
    )  # the start held more
    assert (work.predicted, work.note) == (
        f"6.0{space}kFLOP",
        f"75.0{space}% of training everything",
    )
    assert figures["work a second"].measured == f"3.0{space}MFLOP/s"

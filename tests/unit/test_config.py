"""The freeze config as a document, and its rules on a model."""

import json
from dataclasses import replace

import pytest
from torch import nn

from app.freezing.apply import apply_config
from app.freezing.config import (
    FreezeConfig,
    Rule,
    config_document,
    differing_names,
    expand_rules,
    held_norms,
    parse_config,
    split_names,
    unmatched_rules,
)
from app.freezing.errors import InvalidDocument, describe_unknown
from app.freezing.presets import (
    PRESETS,
    adopt_names,
    preset_config,
    shortest_rules,
    tick_module,
)
from app.freezing.trace import read_model
from tests.unit.models import make

TIED = read_model(make("tied")[0])
CONVOLUTIONAL = read_model(make("convolutional")[0])


def rules(*texts: str) -> FreezeConfig:
    """``-glob`` freezes, ``+glob`` unfreezes."""
    return FreezeConfig(
        rules=tuple(Rule("freeze" if t[0] == "-" else "unfreeze", t[1:]) for t in texts)
    )


def test_a_document_comes_back_as_it_went() -> None:
    document = {
        "format": "frostline.freeze-config",
        "version": 1,
        "name": "last block",
        "model": {"uri": "demo:digits", "fingerprint": "sha256:0"},
        "rules": [{"action": "freeze", "match": "**"}, {"action": "unfreeze", "type": "Linear"}],
        "mechanism": "requires_grad",
        "norm_statistics": "update",
        "dropout": "off",
        "groups": [{"match": "head.**", "lr_scale": 10.0, "weight_decay": 0.0}],
        "schedule": [{"at": {"epoch": 2}, "action": "unfreeze", "match": "block.**"}],
        "frozen": ["a"],
        "trainable": ["b"],
    }
    assert config_document(parse_config(json.loads(json.dumps(document)))) == document


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ([], ""),
        ({"rule": []}, "rule"),
        ({"rules": {}}, "rules"),
        ({"rules": [1]}, "rules.0"),
        ({"rules": [{"action": "frieze", "match": "**"}]}, "rules.0.action"),
        ({"rules": [{"action": "freeze"}]}, "rules.0"),
        ({"rules": [{"action": "freeze", "match": "{a"}]}, "rules.0.match"),
        ({"rules": [{"action": "freeze", "match": 3}]}, "rules.0.match"),
        ({"rules": [{"action": "freeze", "type": ""}]}, "rules.0.type"),
        ({"mechanism": "detach"}, "mechanism"),
        ({"mechanism": ["exclude"]}, "mechanism"),
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"groups": [{"match": "a", "lr_scale": -1}]}, "groups.0.lr_scale"),
        ({"groups": [{"match": "a", "lr_scale": True}]}, "groups.0.lr_scale"),
        ({"schedule": [{"at": {"epoch": 1.5}, "action": "freeze", "match": "a"}]}, "schedule.0.at"),
        ({"schedule": [{"at": {"epoch": 1, "step": 2}, "action": "freeze", "match": "a"}]},
         "schedule.0.at"),
        ({"frozen": "a"}, "frozen"),
        ({"name": "x" * 201}, "name"),
    ],
)  # fmt: skip
def test_a_bad_document_is_refused_under_its_field(document: object, field: str) -> None:
    with pytest.raises(InvalidDocument) as refused:
        parse_config(document)
    assert field in [name for name, _ in refused.value.errors]


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(InvalidDocument, match="'mechanism'"):
        parse_config({"mechanisms": "exclude"})
    with pytest.raises(InvalidDocument, match="known are action, match, type"):  # none is near
        parse_config({"rules": [{"action": "freeze", "match": "**", "pattern": "x"}]})
    for typo, known in (("freeez", "freeze"), ("blokcs", "blocks")):
        told = describe_unknown(typo, ["unfreeze", "freeze", "blocks", "head"], "a key here")
        assert told == f"{typo!r} is not a key here; the nearest is {known!r}."


def test_a_schedule_needs_the_mechanism_that_can_change() -> None:
    with pytest.raises(InvalidDocument, match="requires_grad"):
        parse_config({
            "mechanism": "zero_lr",
            "schedule": [{"at": {"step": 1}, "action": "freeze", "match": "**"}],
        })  # fmt: skip


def test_the_last_rule_that_matches_decides() -> None:
    state = expand_rules(rules("-**", "+block.**", "-block.norm1"), TIED)
    assert state["position"]
    assert not state["block.linear1.weight"]
    assert state["block.norm1.weight"]


def test_what_no_rule_matches_stays_as_the_model_came() -> None:
    model, _ = make("tied")
    model.position.requires_grad_(False)
    state = expand_rules(rules("-head.bias"), read_model(model))
    assert [name for name, is_frozen in state.items() if is_frozen] == ["position", "head.bias"]


def test_a_tied_parameter_is_one_with_two_names() -> None:
    assert TIED.by_name["embedding.weight"].shared_with == ("head.weight",)
    assert expand_rules(rules("-head"), TIED)["embedding.weight"]
    assert not expand_rules(rules("-embedding", "+head"), TIED)["embedding.weight"]


def test_a_type_covers_what_its_modules_own_directly() -> None:
    config = FreezeConfig(rules=(Rule("freeze", type="TransformerEncoderLayer"),))
    assert unmatched_rules(config, TIED) == [0]  # it owns nothing itself: its children do
    state = expand_rules(FreezeConfig(rules=(Rule("freeze", "block.**", "LayerNorm"),)), TIED)
    assert [n for n, f in state.items() if f] == [
        f"block.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    ]


def test_names_in_a_document_are_compared_with_what_its_rules_give() -> None:
    claimed = replace(rules("-head"), frozen=("shared.weight", "gone"), trainable=("head.bias",))
    differing = differing_names(claimed, TIED)
    assert differing["frozen"] == ["shared.weight"]
    assert differing["trainable"] == ["head.bias"]
    assert differing["unknown"] == ["gone"]
    adopted = expand_rules(adopt_names(claimed, TIED), TIED)
    assert adopted["shared.weight"]
    assert not adopted["head.bias"]


def test_norms_are_held_when_all_around_them_is_frozen() -> None:
    frozen = expand_rules(rules("-stem", "-body"), CONVOLUTIONAL)
    norms = [m.path for m in CONVOLUTIONAL.modules if m.is_norm]
    assert norms == ["stem.1", "body.1"]
    assert held_norms(norms, frozen) == ["stem.1", "body.1"]
    assert held_norms(norms, expand_rules(rules("-stem.1.weight"), CONVOLUTIONAL)) == []


# ---------------------------------------------------------------------------- ticks and presets


def test_a_tick_becomes_a_readable_rule() -> None:
    ticked = tick_module(rules("-**"), TIED, "head", False)
    assert ticked.rules == rules("-**", "+head.**").rules


def test_ticking_the_root_leaves_one_rule() -> None:
    ticked = tick_module(rules("-block.**", "+block.norm1.**"), TIED, "", True)
    assert ticked.rules == rules("-**").rules


def test_a_tick_that_is_taken_back_leaves_nothing() -> None:
    ticked = tick_module(FreezeConfig(), TIED, "block.linear1.weight", True)
    assert ticked.rules == rules("-block.linear1.weight").rules
    assert tick_module(ticked, TIED, "block.linear1.weight", False).rules == ()


def test_a_tick_on_nothing_is_refused() -> None:
    with pytest.raises(InvalidDocument, match="neither a module nor a parameter"):
        tick_module(FreezeConfig(), TIED, "block.gone", True)


def test_numbered_siblings_are_gathered_in_braces() -> None:
    state = expand_rules(rules("-stem.{0..1}", "-body"), CONVOLUTIONAL)
    assert shortest_rules(state, CONVOLUTIONAL) == rules("-{stem,body}.**").rules


@pytest.mark.parametrize("name", [key for key, _ in PRESETS])
def test_every_preset_gives_a_config_that_parses(name: str) -> None:
    config = preset_config(name, read_model(Stacked()))
    assert parse_config(config_document(config)).rules == config.rules
    assert len(config.rules) <= 3


class Stacked(nn.Module):
    """An encoder and a decoder of one class, each of numbered blocks, with norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("encoder", "decoder"):
            layer = nn.TransformerEncoderLayer(8, 2, 16)
            setattr(self, name, nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
        self.head = nn.Linear(8, 3)


def test_presets_are_said_in_the_fewest_rules() -> None:
    graph = read_model(Stacked())
    expected = {
        "nothing": [],
        "everything": [("freeze", "**")],
        "norms-only": [("freeze", "**"), ("unfreeze", "LayerNorm")],
        "biases-only": [("freeze", "**"), ("unfreeze", "**.*bias")],
        "all-but-norms": [("freeze", "LayerNorm")],
        "one-block": [("freeze", "**"), ("unfreeze", "encoder.layers.0.**")],
        "head-only": [("freeze", "{encoder,decoder}.**")],
    }
    for name, rules_ in expected.items():
        config = preset_config(name, graph)
        assert [(r.action, r.match or r.type) for r in config.rules] == rules_
    biases = split_names(preset_config("biases-only", graph), graph)[1]
    assert biases == tuple(p.name for p in graph.parameters if p.name.endswith("bias"))


def test_rates_fall_from_block_to_block_and_are_lowest_before_them() -> None:
    class Tall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    model = Tall()
    config = preset_config("layer-decay", read_model(model))
    assert config.rules == ()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)].removesuffix(".weight"): group["lr_scale"]
        for group in apply_config(model, config).parameter_groups(0.0)
        for parameter in group["params"]
        if names[id(parameter)].endswith("weight")
    }
    assert rates == pytest.approx(
        {"embedding": 0.8**4, "blocks.0": 0.8**3, "blocks.1": 0.8**2, "blocks.2": 0.8}
        | {"norm": 1.0, "head": 1.0},
        rel=1e-5,
    )
    with pytest.raises(InvalidDocument, match="no repeated blocks"):
        preset_config("layer-decay", read_model(nn.Linear(2, 2)))


def test_a_preset_that_would_train_nothing_is_refused() -> None:
    with pytest.raises(InvalidDocument, match="nothing to train of it: norm layers"):
        preset_config("norms-only", read_model(make("plain")[0]))


def test_the_head_is_the_last_module_with_parameters() -> None:
    frozen, trainable = split_names(preset_config("head-only", CONVOLUTIONAL), CONVOLUTIONAL)
    assert trainable == ("head.weight", "head.bias")
    assert len(frozen) == CONVOLUTIONAL.tensor_count - 2


def test_names_with_glob_characters_are_matched_literally() -> None:
    odd = nn.Sequential()
    for name in ("a*", "ab", "{x}", "re:b", "c,d"):
        odd.add_module(name, nn.Linear(1, 1))
    graph = read_model(odd)
    for name in ("a*", "{x}", "re:b", "c,d"):
        frozen, _ = split_names(tick_module(FreezeConfig(), graph, name, True), graph)
        assert frozen == (f"{name}.weight", f"{name}.bias")
        one = tick_module(FreezeConfig(), graph, f"{name}.bias", True)
        assert split_names(one, graph)[0] == (f"{name}.bias",)

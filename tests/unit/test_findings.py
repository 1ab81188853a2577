"""Every finding: a config that calls for it, one that does not, and the page that lists them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from app.freezing import findings, plan
from app.freezing.assume import parse_assumption
from app.freezing.config import parse_config
from app.freezing.plan import plan_config
from app.freezing.trace import trace_model
from tests.unit.models import make
from tests.unit.runs import freeze

ROOT = Path(__file__).resolve().parents[2]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


class Quantised(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)


class Looks(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum().item() < 1e9 else x


class Stubborn(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not today")


def embed(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Embedding(10, 4, **options), nn.Linear(4, 2)), torch.zeros(2, 3).long()


def spectral() -> tuple[nn.Module, torch.Tensor]:
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    return nn.Sequential(normed, nn.Linear(3, 2)), torch.randn(2, 3)


class Twice(torch.autograd.Function):
    """Its backward does not run where the trace runs it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on stand-ins")


class Secretive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Twice.apply(self.layer(x))


TOKENS = torch.zeros(2, 3, dtype=torch.long)
ROW = torch.randn(2, 3)
MAKERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    **{name: (lambda name=name: make(name)) for name in ("plain", "tied", "convolutional")},
    "max_norm": lambda: embed(max_norm=1.0),
    "embedding": embed,
    "spectral": spectral,
    "reentrant": lambda: (Checkpointed(True), TOKENS),
    "checkpointed": lambda: (Checkpointed(False), TOKENS),
    "quantised": lambda: (nn.Sequential(Quantised()), ROW),
    "looks": lambda: (nn.Sequential(Looks(3, 2)), ROW),
    "stubborn": lambda: (nn.Sequential(Stubborn(3, 2)), ROW),
    "secretive": lambda: (Secretive(), ROW),
}

# code: (model, config, names it is about), (model and config without it)
CASES: dict[str, tuple[tuple[str, dict[str, Any], set[str]], tuple[str, dict[str, Any]]]] = {
    "nothing_trainable": (("plain", freeze("**"), set()), ("plain", freeze("layer1"))),
    "nothing_frozen": (("plain", {}, set()), ("plain", freeze("layer1"))),
    "rule_without_match": (("plain", freeze("layer9"), set()), ("plain", freeze("layer1"))),
    "unreached": (
        ("tied", {}, {"unused.weight", "unused.bias"}),
        ("tied", freeze("unused")),
    ),
    "tied_parameters": (
        ("tied", freeze("embedding"), {"embedding.weight", "head.weight"}),
        ("tied", freeze("{embedding,head}.weight")),
    ),
    "norm_statistics_drift": (
        ("convolutional", freeze("stem", norm_statistics="update"), {"stem.1"}),
        ("convolutional", freeze("stem")),
    ),
    "mechanism_saves_nothing": (
        ("plain", freeze("layer1", mechanism="exclude"), set()),
        ("plain", freeze("layer1")),
    ),
    "frozen_weights_move": (
        ("plain", freeze("layer1", mechanism="zero_grad"), {"layer1.weight", "layer1.bias"}),
        ("plain", freeze("layer1", mechanism="zero_lr")),
    ),
    "frozen_dropout": (
        ("convolutional", freeze("body"), {"body.2"}),
        ("convolutional", freeze("body", dropout="off")),
    ),
    "max_norm": (("max_norm", freeze("0"), {"0"}), ("embedding", freeze("0"))),
    "spectral_norm": (("spectral", freeze("0"), {"0"}), ("spectral", freeze("1"))),
    "reentrant_checkpointing": (
        ("reentrant", freeze("embedding"), {""}),
        ("checkpointed", freeze("embedding")),
    ),
    "not_floating": (("quantised", {}, {"0.codes"}), ("plain", {})),
    "untraced": (("stubborn", {}, set()), ("plain", {})),
    "traced_for_real": (("looks", {}, set()), ("plain", {})),
    "peak_unknown": (("secretive", {}, set()), ("plain", {})),
}


def find(name: str, config: dict[str, Any]) -> dict[str, set[str]]:
    graph = trace_model(*MAKERS[name]())
    warnings = plan_config(graph, parse_config(config)).document()["warnings"]
    return {warning["code"]: set(warning["names"]) for warning in warnings}


@pytest.mark.parametrize("code", CASES)
def test_a_finding_is_there_where_it_is_called_for_and_nowhere_else(code: str) -> None:
    (name, config, names), (other, without) = CASES[code]
    found = find(name, config)
    assert code in found
    assert found[code] == names
    assert code not in find(other, without)


def test_an_assumption_that_was_not_applied_is_said() -> None:
    graph = trace_model(*make("plain"))
    assume = parse_assumption({"image_size": 64})
    codes = {w.code for w in plan_config(graph, parse_config({}), assume).warnings}
    assert "not_assumed" in codes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_autocast_keeps_is_called_a_guess_where_it_is_one(precision: str) -> None:
    for name, traced_at, is_guess in (
        ("plain", "fp32", precision != "fp32"),
        ("plain", precision, False),
        ("stubborn", "fp32", False),  # not traced at all, which is said
    ):
        graph = trace_model(*MAKERS[name](), precision=traced_at)
        plan_made = plan_config(graph, parse_config({}), parse_assumption({"precision": precision}))
        said = [w.message for w in plan_made.warnings if w.code == "not_assumed"]
        assert bool(said) is is_guess
        assert all("a guess, half of what fp32 keeps" in message for message in said)


def test_reentrant_checkpointing_is_said_to_cut_only_where_it_does() -> None:
    for frozen in (False, True):
        model, tokens = MAKERS["reentrant"]()
        config = parse_config(freeze("embedding") if frozen else {})
        (warning,) = [
            w
            for w in plan_config(trace_model(model, tokens), config).warnings
            if w.code == "reentrant_checkpointing"
        ]
        assert ("will cut" in warning.message) is frozen
        model.embedding.requires_grad_(not frozen)
        cut = not model.embedding(tokens).requires_grad
        assert cut is frozen


def test_the_page_of_findings_lists_each_and_no_other() -> None:
    page = (ROOT / "docs" / "findings.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    sources = [Path(module.__file__ or "").read_text() for module in (findings, plan)]
    raised = set(re.findall(r'Finding\(\s*"(\w+)"', "".join(sources)))
    assert len(listed) == len(set(listed))
    assert set(listed) == raised
    assert raised == {*CASES, "not_assumed", "traced_for_a_cpu", "traced_for_a_gpu"}

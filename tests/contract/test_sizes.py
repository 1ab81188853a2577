"""A plan for another sequence length or image size, over HTTP: exact, or refused in words."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from app.freezing.assume import Assumption
from app.freezing.config import parse_config
from app.freezing.plan import plan_config
from app.freezing.trace import trace_model
from app.sources.models import BuiltModel, build_model
from app.sources.spec import parse_model_spec
from app.web.api import models
from tests.contract.dashboard import serve

NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {
    "uri": "hf:bert",
    "random_init": True,
    "kwargs": {**NARROW, "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64},
}
GPT2 = {
    "uri": "hf:gpt2",
    "random_init": True,
    "kwargs": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48, "vocab_size": 99},
}
RESNET = {
    "uri": "hf:resnet",
    "random_init": True,
    "kwargs": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}
VIT = {
    "uri": "hf:vit",
    "random_init": True,
    "kwargs": {**NARROW, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
}
OWN = '''
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images):
        return self.head(self.body(self.stem(images)))


def images():
    """Its loss is of every pixel of its example, whatever its size."""
    def loss(output, batch):
        return (output.mean((2, 3)) - batch.mean((2, 3))[:, :1]).square().mean() + (
            output * batch[:, :1, 1::2, 1::2][:, :, : output.shape[2], : output.shape[3]]
        ).mean()

    return {"model": Net(), "example": torch.randn(2, 3, 16, 16), "loss": loss}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.rest = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, words, mask, labels):
        said = self.rest(self.words(words) * mask.unsqueeze(-1))
        return nn.functional.cross_entropy(said.flatten(0, 1), labels.flatten())


def words():
    words = torch.arange(12).reshape(2, 6)
    return {"model": Tagger(), "example": (words, torch.ones(2, 6), words.clone())}


def gated(gate):
    """Made as long as nobody holds the gate."""
    while os.path.exists(gate):
        time.sleep(0.01)
    return images()


def bare():
    return nn.Linear(4, 2)


def looks():
    class Looking(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    return {"model": Looking(8, 8), "example": torch.randn(2, 5, 8)}
'''
FREEZES: tuple[dict[str, Any], ...] = (
    {"rules": []},
    {"rules": [{"action": "freeze", "match": "re:.*(embed|stem).*"}]},
    {"rules": [{"action": "freeze", "match": "re:.*(layer\\.1|h\\.1|body|layers\\.0).*"}]},
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = tmp_path_factory.mktemp("shelf")
    (shelf / "own_sizes.py").write_text(OWN)
    return shelf


@pytest.fixture(scope="module")
def api(data_dir: Path, shelf: Path) -> Iterator[httpx2.Client]:
    with serve(data_dir=data_dir, code_dirs=(shelf,)) as client:
        client.base_url = client.base_url.join("/api")
        yield client


def add(api: httpx2.Client, spec: dict[str, Any]) -> int:
    model_id = int(api.post("/models", json=spec).json()["id"])
    pause = threading.Event()
    while (model := api.get(f"/models/{model_id}").json())["state"] == "inspecting":
        pause.wait(0.05)
    assert model["state"] == "ready", model["error"]
    return model_id


@pytest.fixture(scope="module")
def bert(api: httpx2.Client) -> int:
    return add(api, BERT)


@pytest.fixture(scope="module")
def vit(api: httpx2.Client) -> int:
    return add(api, VIT)


def plan(api: httpx2.Client, model_id: int, freeze: Any = None, **assume: Any) -> dict[str, Any]:
    answer = api.post(f"/models/{model_id}/plan", json={**(freeze or {}), "assume": assume})
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def not_assumed(plan: dict[str, Any]) -> list[str]:
    return [w["message"] for w in plan["warnings"] if w["code"] == "not_assumed"]


def count_traces(api: httpx2.Client, data_dir: Path) -> int:
    """Tasks are numbered one after another: the next one tells how many there were."""
    added = api.post("/models", json={"uri": "demo:three-layers"}).json()["id"]
    pause = threading.Event()
    while api.get(f"/models/{added}").json()["state"] == "inspecting":
        pause.wait(0.05)
    newest = 0
    while api.get(f"/tasks/{newest + 1}").status_code == 200:
        newest += 1
    return newest


def build(spec: dict[str, Any], shelf: Path) -> BuiltModel:
    parsed = parse_model_spec(spec, code_dirs=(shelf,), file_dirs=())
    return build_model(parsed, code_dirs=(shelf,))


def of_length(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 90, (2, length))}


def of_side(side: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, side, side)}


CASES = [
    pytest.param(BERT, "sequence_length", of_length, (3, 40, 64), id="bert"),
    pytest.param(GPT2, "sequence_length", of_length, (1, 17, 48), id="gpt2"),
    pytest.param(RESNET, "image_size", of_side, (32, 65, 96), id="resnet"),
    pytest.param(
        {"uri": "python:own_sizes:images"},
        "image_size",
        lambda side: torch.randn(2, 3, side, side),
        (8, 33, 64),
        id="own images",
    ),
    pytest.param(
        {"uri": "python:own_sizes:words"},
        "sequence_length",
        lambda n: (torch.ones(2, n).long(), torch.ones(2, n), torch.ones(2, n).long()),
        (2, 5, 50),
        id="own words",
    ),
    pytest.param(
        {"uri": "python:own_sizes:looks"},
        "sequence_length",
        lambda n: torch.randn(2, n, 8),
        (1, 4, 9),
        id="traced for real",
    ),
]


@pytest.mark.parametrize(("spec", "size", "make", "values"), CASES)
def test_a_plan_is_that_of_a_trace_at_the_size(
    api: httpx2.Client,
    shelf: Path,
    spec: dict[str, Any],
    size: str,
    make: Any,
    values: tuple[int, ...],
) -> None:
    model_id, built = add(api, spec), build(spec, shelf)
    for value in values:
        graph = trace_model(built.model, make(value), loss=built.loss)
        assert graph.nodes, graph.trace_note
        for freeze in FREEZES:
            told = plan(api, model_id, freeze, **{size: value})
            direct = plan_config(graph, parse_config(freeze)).document()
            assert not_assumed(told) == []
            assert told["cost"]["assumed"][size] == value
            assert told["layers"] == direct["layers"]
            for part in ("fits", "assumed"):  # devices, and words on the trace
                direct["cost"].pop(part), told["cost"].pop(part)
            assert told["cost"] == direct["cost"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_is_traced_like_a_size(
    api: httpx2.Client, shelf: Path, bert: int, precision: str
) -> None:
    built = build(BERT, shelf)
    for assume, example in (({}, built.example), ({"sequence_length": 40}, of_length(40))):
        graph = trace_model(built.model, example, loss=built.loss, precision=precision)
        told = plan(api, bert, FREEZES[1], precision=precision, **assume)
        config = parse_config(FREEZES[1])
        direct = plan_config(graph, config, Assumption(precision=precision)).document()
        assert not_assumed(told) == []
        for part in ("fits", "assumed"):
            direct["cost"].pop(part), told["cost"].pop(part)
        assert told["cost"] == direct["cost"]


def test_where_a_size_is_refused_the_precision_is_traced_all_the_same(
    api: httpx2.Client, bert: int
) -> None:
    told = plan(api, bert, precision="bf16", sequence_length=65)
    (said,) = not_assumed(told)
    assert "sequence length of 65 was not applied: the model refuses it" in said
    assert told["cost"] == plan(api, bert, precision="bf16")["cost"]


def test_a_size_and_a_batch_are_assumed_together(api: httpx2.Client, bert: int) -> None:
    one, two = (plan(api, bert, sequence_length=40, batch_size=n)["cost"] for n in (4, 8))
    assert two["forward_flops"] == 2 * one["forward_flops"]
    # But for places of words, of which no batch keeps more.
    assert two["activation_bytes"] == 2 * one["activation_bytes"] - 40 * 8
    assert (one["assumed"]["batch_size"], one["assumed"]["sequence_length"]) == (4, 40)


def test_without_an_assumption_the_figures_are_called_those_of_the_example(
    api: httpx2.Client, bert: int, vit: int
) -> None:
    text, images = (plan(api, model_id)["cost"]["assumed"] for model_id in (bert, vit))
    assert (text["sequence_length"], text["image_size"]) == (16, None)
    assert (images["sequence_length"], images["image_size"]) == (None, 32)
    same = plan(api, bert, sequence_length=16)
    assert same["cost"] == plan(api, bert)["cost"]
    assert not_assumed(same) == []


def test_a_size_that_the_model_refuses_is_said_and_not_tried_again(
    api: httpx2.Client, data_dir: Path, bert: int, vit: int
) -> None:
    refusals = (
        (bert, {"sequence_length": 65}, "65 was not applied: the model refuses it (RuntimeError:"),
        (vit, {"image_size": 64}, "64 was not applied: the model refuses it (ValueError: Input"),
        (bert, {"image_size": 64}, "64 was not applied: its example has no images"),
        (vit, {"sequence_length": 9}, "9 was not applied: its example has no text"),
        (vit, {"image_size": 10**6}, "1,000,000 was not applied: its example would take"),
    )
    for model_id, assume, words in refusals:
        told = plan(api, model_id, **assume)
        (message,) = not_assumed(told)
        assert words in message
        assert message.endswith(" FLOPs and activations are those of the example.")
        assert told["cost"] == plan(api, model_id)["cost"]
    before = count_traces(api, data_dir)
    for model_id, assume, words in refusals:
        assert words in not_assumed(plan(api, model_id, **assume))[0]
    assert count_traces(api, data_dir) == before + 1  # the inspection that counted


def test_of_two_sizes_one_may_be_had(api: httpx2.Client, vit: int, bert: int) -> None:
    told = plan(api, bert, sequence_length=40, image_size=64)
    assert told["cost"]["assumed"]["sequence_length"] == 40
    assert told["cost"]["assumed"]["image_size"] is None
    assert ["its example has no images" in message for message in not_assumed(told)] == [True]


def test_positions_that_a_table_lacks_are_refused(api: httpx2.Client) -> None:
    (message,) = not_assumed(plan(api, add(api, GPT2), sequence_length=49))
    assert "IndexError: row 48 is looked up in a table of 48" in message


def test_a_model_without_an_example_has_nothing_to_make_larger(api: httpx2.Client) -> None:
    told = plan(api, add(api, {"uri": "python:own_sizes:bare"}), sequence_length=40)
    assert not_assumed(told) == []
    assert told["cost"]["forward_flops"] is None


def test_equal_requests_at_once_are_one_trace(
    api: httpx2.Client, data_dir: Path, bert: int
) -> None:
    before = count_traces(api, data_dir)
    told: list[dict[str, Any]] = []
    askers = [
        threading.Thread(target=lambda: told.append(plan(api, bert, sequence_length=23)))
        for _ in range(8)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [one["cost"]["assumed"]["sequence_length"] for one in told] == [23] * 8
    assert count_traces(api, data_dir) == before + 2


def test_a_trace_that_takes_long_is_not_waited_for_and_holds_nobody_up(
    api: httpx2.Client, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = shelf / "gate"
    model_id = add(api, {"uri": "python:own_sizes:gated", "kwargs": {"gate": str(gate)}})
    monkeypatch.setattr(models, "PATIENCE_S", 0.3)
    gate.touch()
    told = plan(api, model_id, image_size=24)
    assert not_assumed(told) == [
        "An image size of 24 was not applied: it is being traced at it now; ask again in a "
        "moment. FLOPs and activations are those of the example."
    ]
    assert told["cost"] == plan(api, model_id)["cost"]
    # More than the server has threads wait, and others are answered meanwhile.
    monkeypatch.setattr(models, "PATIENCE_S", 60.0)
    waiting = [
        threading.Thread(target=lambda: late.append(plan(api, model_id, image_size=24)))
        for _ in range(60)
    ]
    late: list[dict[str, Any]] = []
    for one in waiting:
        one.start()
    for _ in range(20):
        assert plan(api, model_id)["cost"] == told["cost"]
    assert late == []
    gate.unlink()
    for one in waiting:
        one.join()
    assert [one["cost"]["assumed"]["image_size"] for one in late] == [24] * 60


def test_a_calibration_is_not_believed_at_another_size(api: httpx2.Client, shelf: Path) -> None:
    model_id = add(api, {"uri": "python:own_sizes:images"})
    task = api.post(f"/models/{model_id}/calibrate").json()
    pause = threading.Event()
    while api.get(f"/tasks/{task['id']}").json()["state"] in ("queued", "running"):
        pause.wait(0.05)
    own, same, other = (
        plan(api, model_id, **assume)["cost"]
        for assume in ({}, {"image_size": 16}, {"image_size": 32})
    )
    assert own["predicted_step_ms"] == same["predicted_step_ms"] > 0
    assert other["predicted_step_ms"] is None
    assert other["full"]["predicted_step_ms"] is None
    assert other["assumed"]["timed_on"] == own["assumed"]["timed_on"]


def test_the_newest_sizes_are_kept_and_a_deleted_model_keeps_none(
    api: httpx2.Client, data_dir: Path
) -> None:
    model_id = add(api, {"uri": "python:own_sizes:words"})
    for length in range(20, 40):
        assert not_assumed(plan(api, model_id, sequence_length=length)) == []
    graphs = sorted(path.name for path in data_dir.glob(f"graphs/{model_id}.*=*.json"))
    assert graphs == [f"{model_id}.sequence_length={length}.json" for length in range(24, 40)]
    assert api.delete(f"/models/{model_id}").status_code == 204
    assert not [*data_dir.glob(f"graphs/{model_id}.*")]


def test_code_that_changed_since_the_inspection_is_not_planned_for(
    api: httpx2.Client, shelf: Path
) -> None:
    module = shelf / "changing.py"
    module.write_text(OWN)
    model_id = add(api, {"uri": "python:changing:images"})
    module.write_text(OWN.replace("nn.Conv2d(8, 4, 1)", "nn.Conv2d(8, 16, 1)"))
    (message,) = not_assumed(plan(api, model_id, image_size=24))
    assert "its code has changed" in message

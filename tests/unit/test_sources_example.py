"""Example batches of many kinds of model, and what a trace of them knows. Nothing is downloaded."""

from __future__ import annotations

import os
import random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from app.freezing.config import FreezeConfig
from app.freezing.plan import plan_config
from app.freezing.presets import shortest_rules
from app.freezing.trace import trace_model
from app.sources.models import build_model
from app.sources.spec import ModelSpec
from tests.zoo.observe import observe

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, **LAYERS}
PICTURES = {"hidden_size": 16, "intermediate_size": 24, "image_size": 16, "patch_size": 8, **LAYERS}
TWO_PARTS = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
SPEECH = {
    **TWO_PARTS, "vocab_size": 40, "max_source_positions": 40, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAVES = {
    **TEXT, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.5,
}  # fmt: skip
SERIES = {**TWO_PARTS, "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}

# type → (options of its configuration, shapes of its example)
KINDS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "videomae": (
        {**PICTURES, "num_frames": 4},
        {"pixel_values": (2, 4, 3, 16, 16)},
    ),
    "whisper": (
        {**SPEECH, "num_mel_bins": 8},
        {"input_features": (2, 8, 80), "decoder_input_ids": (2, 16)},
    ),
    "speech_to_text": (
        {**SPEECH, "input_feat_per_channel": 8, "conv_channels": 8, "max_source_positions": 300},
        {"input_features": (2, 256, 8), "decoder_input_ids": (2, 16)},
    ),
    "wav2vec2": (WAVES, {"input_values": (2, 16_000)}),
    "layoutlm": (TEXT, {"input_ids": (2, 16), "bbox": (2, 16, 4)}),
    "bros": ({**TEXT, "hidden_size": 64}, {"input_ids": (2, 16), "bbox": (2, 16, 4)}),
    "time_series_transformer": (
        {**SERIES, "num_time_features": 2},
        {
            "past_values": (2, 10), "past_time_features": (2, 10, 2),
            "past_observed_mask": (2, 10), "future_values": (2, 4),
            "future_time_features": (2, 4, 2),
        },
    ),
    "qwen3_vl_vision": (
        {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4,
         "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {"grid_thw": (2, 3), "hidden_states": (128, 96)},
    ),
    "decision_transformer": (
        {"hidden_size": 16, "n_layer": 1, "n_head": 2, "state_dim": 3, "act_dim": 2},
        {"states": (2, 16, 3), "actions": (2, 16, 2), "rewards": (2, 16, 1),
         "returns_to_go": (2, 16, 1), "timesteps": (2, 16)},
    ),
    "patchtst": (
        {"d_model": 16, "num_attention_heads": 2, "ffn_dim": 24, "num_hidden_layers": 1},
        {"past_values": (2, 32, 1), "past_observed_mask": (2, 32, 1)},
    ),
}  # fmt: skip


def build(kind: str, *, weightless: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    spec = ModelSpec(f"hf:{kind}", random_init=True, kwargs=KINDS[kind][0])
    built = build_model(spec, code_dirs=[], weightless=weightless)
    return built.model, built.example


@pytest.mark.filterwarnings("ignore")  # the library's own, about small configurations
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_has_an_example_by_which_it_is_traced(kind: str) -> None:
    model, example = build(kind, weightless=True)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == KINDS[kind][1]
    graph = trace_model(model, example)
    assert graph.traced_by == "fake", graph.trace_note
    assert graph.nodes
    assert graph.batch_size == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["videomae", "whisper", "layoutlm", "time_series_transformer", "qwen3_vl_vision"]
)
def test_a_plan_of_such_a_trace_is_what_a_real_backward_does(kind: str) -> None:
    model, example = build(kind, weightless=False)
    graph = trace_model(model.train(), example)
    assert graph.traced_by == "fake", graph.trace_note
    names = [parameter.name for parameter in graph.parameters if parameter.floating]
    draw = random.Random(kind)
    for share in (1.0, 0.5, 0.1, 0.1):
        trains = {name for name in names if draw.random() < share}
        state = {p.name: p.name not in trains for p in graph.parameters}
        plan = plan_config(graph, FreezeConfig(rules=shortest_rules(state, graph)))
        seen = observe(model, example, trains)
        with_gradient = {layer.path for layer in plan.layers if layer.weight_gradient}
        assert with_gradient == {
            layer.path
            for layer in graph.layers
            if {graph.canonical_names[name] for name in layer.parameters} & seen.reached
        }
        assert plan.cost["forward_flops"] == seen.forward_flops
        assert plan.cost["backward_flops"] == seen.backward_flops


class Asks(nn.Module):
    """Its forward looks at what follows from its whole numbers, and drops a layer by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.chosen, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids.clone())  # which keeps them for backward
        counts = torch.empty(2, dtype=torch.int64)
        counts[0], counts[1] = ids.shape
        mask = torch.ones_like(ids)
        mask[:, int(counts[1]) - 1] = 0
        if mask.bool().all() or not torch.isfinite(x).all() or torch.rand([]) < 0.5:
            return self.other(x)
        self.steps += 1
        ids += 1
        return self.chosen(x)[(ids > 3).nonzero(as_tuple=True)]


def test_a_forward_may_look_at_what_follows_from_the_examples_whole_numbers() -> None:
    model, ids = Asks(), torch.tensor([[1, 2, 3], [3, 4, 5]])
    graph = trace_model(model, ids)
    assert graph.traced_by == "fake", graph.trace_note
    reached = {node.parameter for node in graph.nodes if node.parameter}
    assert reached == {"embed.weight", "chosen.weight", "chosen.bias"}
    assert ids.tolist() == [[1, 2, 3], [3, 4, 5]]
    assert int(model.steps) == 3


def test_what_depends_on_weights_is_not_known() -> None:
    class Routes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) if self.right(x).sum() > 0 else self.right(x)

    graph = trace_model(Routes(), torch.ones(2, 4))
    assert graph.traced_by == "real"
    assert "DataDependent" in graph.trace_note


def test_what_torch_makes_room_for_is_not_taken_for_known() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            best = self.score(x).argmax(-1)
            picked = torch.arange(4)[best]
            assert picked.constant is None
            assert torch.empty_like(torch.arange(4)).constant is None
            return self.score(x) * picked[:, None]

    graph = trace_model(Picks(), torch.ones(2, 4))
    assert graph.traced_by == "fake", graph.trace_note

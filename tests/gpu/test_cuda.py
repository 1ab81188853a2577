"""The loop and the proof on a CUDA device; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from app.freezing.config import parse_config
from app.freezing.trace import autocast, trace_model
from app.sources.models import BuiltModel
from app.training.checkpoint import checkpoint_path
from app.training.loop import train
from app.training.recipe import parse_recipe
from tests.unit.models import make
from tests.unit.peaks import choose, find_kernels, foretell, see
from tests.unit.runs import Told, Wish, freeze, make_data
from tests.zoo.observe import observe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def run_on_gpu(folder: Path, resume_from: Path | None = None, **options: object) -> Told:
    told = Told()
    train(
        BuiltModel(make("convolutional")[0]),
        make_data((2, 6, 6)),
        parse_config(freeze("stem")),
        parse_recipe({"batch_size": 8, "epochs": 3, "device": "cuda", **options}),
        device="cuda:0",
        checkpoints=folder,
        emit=lambda kind, payload: told.events.append((kind, payload)),
        wishes=Wish,
        resume_from=resume_from,
    )
    return told


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_frozen_stays_bit_identical_on_the_gpu(precision: str, tmp_path: Path) -> None:
    told = run_on_gpu(tmp_path, precision=precision, max_grad_norm=1.0, grad_accumulation=2)
    proofs = told.of("proof")
    assert [proof["verdict"] for proof in proofs] == ["holds"] * 3  # after each epoch
    assert proofs[-1]["buffers"]["identical"] == 3
    (start,) = told.of("start")
    assert start["device_name"] == torch.cuda.get_device_name(0)
    assert start["device_bytes"] > 0
    assert start["warnings"] == []


def test_a_checkpoint_of_the_gpu_goes_on_there(tmp_path: Path) -> None:
    run_on_gpu(tmp_path, max_steps=4)
    told = run_on_gpu(tmp_path, resume_from=checkpoint_path(tmp_path, 4), max_steps=9)
    assert [p["step"] for p in told.of("layers")] == [5, 6, 7, 8, 9]


def test_layer_measures_on_the_gpu_agree_with_the_cpu(tmp_path: Path) -> None:
    told = run_on_gpu(tmp_path, max_steps=1, optimizer="sgd")
    (stats,) = told.of("layers")
    assert stats["grad_norm"][0] is None
    assert all(value > 0 for value in stats["weight_norm"])


@pytest.mark.parametrize("which", ["everything", "the end", "the last alone"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_peak_on_the_gpu_is_foretold(dropout: float, which: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, dropout=dropout)
    model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    graph = trace_model(model, torch.randn(2, 128, 512), kernels=find_kernels("cuda"))
    trained = choose(graph, which)
    cost = foretell(graph, trained, batch_size=32)
    seen = see(model.cuda(), torch.randn(32, 128, 512, device="cuda"), trained, "adamw")
    assert cost["peak_bytes"] == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama"])
def test_what_is_kept_for_backward_on_the_gpu_is_foretold(name: str, precision: str) -> None:
    """With dropout where the library has it, and groups of queries in Llama's attention."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4}
    options |= {"num_attention_heads": 8, "intermediate_size": 512}
    options |= {"num_key_value_heads": 2} if name == "Llama" else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    model.train()
    graph = trace_model(
        model,
        {"input_ids": torch.randint(0, 1000, (2, 128))},
        kernels=find_kernels("cuda"),
        precision=precision,
    )
    names = {p.name for p in graph.parameters if p.floating}
    example = {"input_ids": torch.randint(0, 1000, (8, 128), device="cuda")}
    model.cuda()
    with autocast(model, precision):
        kept = observe(model, example, names).saved_bytes
    cost = foretell(graph, sorted(names), batch_size=8, precision=precision)
    assert cost["activation_bytes"] == pytest.approx(kept, rel=0.1)

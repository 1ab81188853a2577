"""What real steps of some models keep and hold on a GPU: run there, it measures that.

    SILENT_MAJOR=8 python -m benchmarks.silent_gpu tests.unit.cuda_bytes

writes `cuda_bytes.json`, with which `test_cuda_bytes.py` compares plans made where there is no GPU.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from app.freezing.graph import ModelGraph
from app.freezing.trace import autocast, trace_model
from tests.unit.peaks import choose, find_kernels, see
from tests.zoo.library import build_library_model
from tests.zoo.observe import observe

FIGURES = Path(__file__).with_suffix(".json")
LARGER = 64  # times the batch that is traced
TRAINED = ("everything", "the end", "every third")
PRECISIONS = ("fp32", "bf16")
LIBRARY = (
    *("bert", "roberta", "albert", "deberta-v2", "gpt2", "llama", "gemma2", "mixtral", "rwkv"),
    *("t5", "bart", "xlnet", "vit", "swin", "resnet", "convnext", "whisper"),
)


def _perceptron() -> tuple[nn.Module, Any]:
    layers = [m for _ in range(4) for m in (nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(64, 3)), torch.randn(2, 64)


def _encoder(width: int, heads: int, length: int, dropout: float) -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, torch.randn(2, length, width)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "perceptron": _perceptron,
    "encoder": lambda: _encoder(32, 4, 12, 0.1),
    "encoder with odd heads": lambda: _encoder(30, 3, 20, 0.0),
    "encoder with wide heads": lambda: _encoder(192, 1, 140, 0.1),
    **{name: lambda name=name: build_library_model(name) for name in LIBRARY},
}


def trace(name: str, kernels: str, precision: str) -> tuple[nn.Module, Any, ModelGraph]:
    """A model, its example and its graph."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model.train()
    return model, example, trace_model(model, example, kernels=kernels, precision=precision)


def _measure(name: str, precision: str, which: str) -> tuple[int, int]:
    model, example, graph = trace(name, find_kernels("cuda"), precision)
    trained = choose(graph, which)
    model.cuda()
    rows = tree_map_only(
        torch.Tensor, lambda t: t.repeat(LARGER, *[1] * (t.dim() - 1)).cuda(), example
    )
    with autocast(model, precision):
        kept = observe(model, rows, set(trained)).saved_bytes
    return kept, see(model, rows, trained, precision=precision)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures = {
        f"{name}, {precision}, {which}": _measure(name, precision, which)
        for name in MODELS
        for precision in PRECISIONS
        for which in TRAINED
    }
    lines = [f"  {json.dumps(case)}: {json.dumps(bytes_)}" for case, bytes_ in figures.items()]
    text = ",\n".join([f'  "versions": {json.dumps(versions)}', *lines])
    FIGURES.write_text(f"{{\n{text}\n}}\n")

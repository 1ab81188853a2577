"""Step times and bytes, predicted and measured: eight models, five freeze sets each.

Run alone: python -m benchmarks.predict [NAME …]. Each model is calibrated as a worker does it, then
really trained for some steps under each set, on a GPU where there is one. It takes minutes; --bytes
leaves the times out.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as workers run

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from app.freezing.assume import PRECISIONS
from app.freezing.calibrate import NotTimed, calibrate_model
from app.freezing.graph import ModelGraph
from app.freezing.timing import read_timing
from app.freezing.trace import autocast, call_model, scalar_loss, trace_model
from app.sources.demo.networks import build_network
from tests.unit.peaks import find_kernels, foretell, see
from tests.zoo.observe import observe

Clock = Callable[[], float]
BATCH, TRACED = 32, 2
STEPS, ROUNDS = 12, 6


class Recurrent(nn.Module):
    """An embedding, a two-layer LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(500, 64), nn.Linear(96, 20)
        self.rnn = nn.LSTM(64, 96, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0].mean(1))


class Convolutional(nn.Module):
    """Four residual blocks of convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
            for _ in range(4)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def from_library(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options))


TEXT = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 256, "max_position_embeddings": 64}  # fmt: skip


def words(rows: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 1000, (rows, 32))}


def pictures(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "demo": (
        lambda: build_network("digits", num_classes=None, random_init=True),
        lambda rows: torch.randn(rows, 1, 8, 8),
    ),
    "mlp": (
        lambda: nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(256, 256), nn.GELU())]),
        lambda rows: torch.randn(rows, 256),
    ),
    "convnet": (Convolutional, pictures),
    "lstm": (Recurrent, lambda rows: torch.randint(0, 500, (rows, 24))),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(96, 4, 192, batch_first=True, dropout=0.0), 4
        ),
        lambda rows: torch.randn(rows, 24, 96),
    ),
    "bert": (lambda: from_library("BertForSequenceClassification", TEXT), words),
    "llama": (lambda: from_library("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 2}), words),
    "vit": (
        lambda: from_library(
            "ViTForImageClassification",
            {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 192, "image_size": 16, "patch_size": 4},
        ),
        lambda rows: {"pixel_values": pictures(rows)},
    ),
}  # fmt: skip


def freeze_sets(graph: ModelGraph) -> Iterator[tuple[str, list[bool]]]:
    """What trains with a frozen prefix, suffix and middle, of the head alone, of biases alone."""
    count = graph.tensor_count
    third = count // 3
    reached = graph.walk.is_reached

    def keep(chosen: Callable[[int], bool]) -> list[bool]:
        return [bool(r) and chosen(i) for i, r in enumerate(reached)]

    yield "prefix", keep(lambda i: i >= 2 * third)
    yield "suffix", keep(lambda i: i < third)
    yield "middle", keep(lambda i: not third <= i < 2 * third)
    yield "head", keep(lambda i: i >= count - 2)
    biases = keep(lambda i: graph.parameters[i].name.endswith("bias"))
    norms = keep(lambda i: len(graph.parameters[i].shape) < 2)  # of a model without any bias
    yield "biases", biases if any(biases) else norms


def measure_ms(
    model: nn.Module, example: Any, graph: ModelGraph, sets: list[list[bool]], clock: Clock
) -> list[float]:
    """For each set the median of some real steps; the sets take turns."""
    named = dict(model.named_parameters())
    taken: list[list[float]] = [[] for _ in sets]
    turns = []
    for trains in sets:
        trainable = [
            named[p.name] for p, flag in zip(graph.parameters, trains, strict=True) if flag
        ]
        turns.append((trainable, torch.optim.AdamW(trainable, lr=1e-4)))
    for _ in range(STEPS + 2):
        for (trainable, optimizer), times in zip(turns, taken, strict=True):
            model.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)
            started = clock()
            scalar_loss(call_model(model, example), example, None).backward()
            optimizer.step()
            optimizer.zero_grad()
            if trainable[0].is_cuda:
                torch.cuda.synchronize()
            times.append((clock() - started) * 1e3)
    return [statistics.median(times[2:]) for times in taken]


def _names(graph: ModelGraph, trains: list[bool]) -> set[str]:
    return {p.name for p, flag in zip(graph.parameters, trains, strict=True) if flag}


def compare_bytes(name: str, device: str, precision: str) -> list[tuple[float, float]]:
    """Relative errors of saved bytes and of the peak for each freeze set; each is printed."""
    model, make_example, graph, labels, sets = trace(name, device, precision)
    errors = []
    for label, trains in zip(labels, sets, strict=True):
        names = _names(graph, trains)
        with autocast(model, precision):
            kept = observe(model, make_example(BATCH), names).saved_bytes
        cost = foretell(graph, sorted(names), batch_size=BATCH, precision=precision)
        most = see(model, make_example(BATCH), sorted(names), "adamw", precision=precision)
        errors.append((cost["activation_bytes"] / kept - 1, cost["peak_bytes"] / most - 1))
        print(
            f"{name:8} {label:7} saved {kept / 1e6:6.2f} MB {errors[-1][0]:+6.1%}"
            f"   at most {most / 1e6:6.2f} MB {errors[-1][1]:+6.1%}",
            flush=True,
        )
    return errors


def trace(
    name: str, device: str, precision: str = "fp32"
) -> tuple[nn.Module, Callable[[int], Any], ModelGraph, Any, Any]:
    """The model on the device, its examples there, and its graph, which was traced on a CPU."""
    torch.manual_seed(0)
    build, make_example = MODELS[name]
    model = build().train()
    graph = trace_model(
        model, make_example(TRACED), kernels=find_kernels(device), precision=precision
    )
    labels, sets = zip(*freeze_sets(graph), strict=True)

    def make(rows: int) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(device), make_example(rows))

    return model.to(device), make, graph, labels, sets


def compare_times(
    name: str, device: str, seconds: float, clock: Clock
) -> list[tuple[float, float]]:
    """Relative errors of the time of a step for each freeze set; each is printed.

    Calibrations and measurements take turns, because a shared machine is not equally quick all the
    time; the medians of both are compared. The same is done with every other measurement and those
    in between: how far a perfect prediction would be off here.
    """
    model, make_example, graph, labels, sets = trace(name, device)
    predicted, measured = [], []
    for _ in range(ROUNDS):
        try:
            document = calibrate_model(
                model, make_example(TRACED), graph, seconds=seconds, clock=clock
            )
        except NotTimed as error:  # a GPU's recurrent layer is one operation, a CPU's several
            print(f"{name:8} left out: {error}", flush=True)
            return []
        timing = read_timing(document, graph)
        assert timing is not None
        predicted.append(
            [
                timing.predict_ms(graph.walk.nearest(trains), trains, "adamw", BATCH)
                for trains in sets
            ]
        )
        measured.append(measure_ms(model, make_example(BATCH), graph, list(sets), clock))
    errors = []
    columns = (predicted, measured, measured[::2], measured[1::2])
    middles = [map(statistics.median, zip(*column, strict=True)) for column in columns]
    for label, ours, real, even, odd in zip(labels, *middles, strict=True):
        errors.append((ours / real - 1, even / odd - 1))
        print(
            f"{name:8} {label:7} predicted {ours:7.2f} ms  measured {real:7.2f} ms"
            f"  {errors[-1][0]:+6.1%}   one half of them by the other {errors[-1][1]:+6.1%}",
            flush=True,
        )
    return errors


def sum_up(errors: list[tuple[float, ...]], *whats: str) -> None:
    for what, signed in zip(whats, zip(*errors, strict=True), strict=True):
        off = sorted(map(abs, signed))
        worst = off[min(len(off) - 1, int(len(off) * 0.9))]
        print(
            f"{len(off)} {what}: {statistics.median(off):.1%} off at the median, "
            f"{worst:.1%} at the 90th percentile, {off[-1]:.1%} at most"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"only these of {', '.join(MODELS)}")
    parser.add_argument("--bytes", action="store_true", help="leave the times of steps out")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the bytes")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each calibration; a worker's 20"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, its CPU time: for a busy machine"
    )
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    warnings.simplefilter("ignore")
    names = arguments.names or list(MODELS)
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu_time else "cpu"
    held = [e for name in names for e in compare_bytes(name, device, arguments.precision)]
    sum_up(held, "saved bytes", "peaks")
    if not arguments.bytes:
        times = [e for name in names for e in compare_times(name, device, arguments.seconds, clock)]
        sum_up(times, "step times", "step times by themselves")

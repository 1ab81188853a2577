"""What a step keeps and holds under autocast: foretold by a trace, and seen in a real one."""

import json
from typing import Any

import pytest
import torch

from app.freezing.graph import ModelGraph
from app.freezing.kernels import _autocast_kernels, kernels_of
from app.freezing.trace import autocast, trace_model
from tests.unit.peaks import SETS, choose, foretell, see
from tests.unit.test_memory import MODELS, attention, perceptron
from tests.zoo.library import build_library_model
from tests.zoo.observe import observe


@pytest.mark.parametrize("which", sorted(SETS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_autocast_keeps_is_foretold_for_any_freeze_set(name: str, which: str) -> None:
    """At another batch size than was traced: copies of weights do not grow with it."""
    torch.manual_seed(0)
    model, make_example = MODELS[name]()
    model.train()
    graph = trace_model(model, make_example(2), precision="bf16")
    trained = choose(graph, which)
    cost = foretell(graph, trained, batch_size=24, optimizer="sgd", precision="bf16")
    example = make_example(24)
    with autocast(model, "bf16"):
        seen = observe(model, example, set(trained))
    peak = see(model, example, trained, precision="bf16")
    assert seen.reached == set(trained)
    if name != "checkpoints":  # of which what a checkpoint itself holds is not called saved
        assert cost["activation_bytes"] == pytest.approx(seen.saved_bytes, rel=0.01)
    assert cost["peak_bytes"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("which", ["everything", "the end", "every third"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "resnet", "mixtral"])
def test_what_autocast_keeps_of_a_librarys_model_is_foretold(name: str, which: str) -> None:
    torch.manual_seed(0)
    model, example = build_library_model(name)
    model.train()
    graph = trace_model(model, example, precision="bf16")
    assert graph.traced_by == "fake", graph.trace_note
    trained = choose(graph, which)
    cost = foretell(graph, trained, optimizer="sgd", precision="bf16")
    with autocast(model, "bf16"):
        seen = observe(model, example, set(trained))
    peak = see(model, example, trained, precision="bf16")
    assert cost["activation_bytes"] == pytest.approx(seen.saved_bytes, rel=0.02)
    assert cost["peak_bytes"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_a_precision_changes_no_flow(kernels: str) -> None:
    """As many FLOPs, and backward goes the same way."""
    model, make_example = attention()
    wide, narrow = (
        trace_model(model, make_example(2), kernels=kernels, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert wide.forward_flops == narrow.forward_flops
    for which in SETS:
        trained = choose(wide, which)
        assert trained == choose(narrow, which)
        one, other = foretell(wide, trained), foretell(narrow, trained, precision="bf16")
        assert one["step_flops"] == other["step_flops"]


def test_a_gpu_takes_norms_and_softmax_in_float32_under_autocast() -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    takes = {
        "layer_norm": lambda: torch.nn.functional.layer_norm(x, (4,)),
        "softmax": lambda: torch.nn.functional.softmax(x, -1),
        "cross_entropy": lambda: torch.nn.functional.cross_entropy(x, torch.tensor([0, 1])),
        "pow": lambda: x**3,
        "exp": lambda: x.exp(),
        "sum": lambda: x.sum(-1),
    }
    for take in takes.values():
        with kernels_of("cuda"):
            with torch.autocast("cpu", torch.bfloat16):
                assert take().dtype == torch.float32
            assert take().dtype == torch.bfloat16


def test_what_a_cpus_autocast_alone_widens_stays_narrow_on_a_gpu() -> None:
    x = torch.ones(1, 1, 4, 4, dtype=torch.bfloat16)

    def pad() -> torch.Tensor:
        return torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")

    def sample() -> torch.Tensor:  # which a GPU's autocast knows too, otherwise
        return torch.nn.functional.grid_sample(x, x.view(1, 4, 2, 2), align_corners=False)

    with torch.autocast("cpu", torch.bfloat16):
        for take in (pad, sample):
            assert take().dtype == torch.float32
            with kernels_of("cuda"):
                assert take().dtype == torch.bfloat16
            assert take().dtype == torch.float32


def test_a_product_of_many_is_one_of_float32_on_a_gpu_without_a_copy() -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), kernels_of("cuda"):
        for product in (x.prod(), x.prod(-1)):
            assert product.dtype == torch.float32
            node: Any = product.grad_fn
            assert node._saved_self.dtype == torch.bfloat16


def test_a_copy_of_a_weight_is_there_until_it_was_used() -> None:
    layers = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512), torch.nn.Linear(512, 4)
    model, example = torch.nn.Sequential(*layers), torch.randn(512, 512)
    graph = trace_model(model, example, precision="bf16")
    peak = foretell(graph, ["2.weight"], optimizer="sgd", precision="bf16")["peak_bytes"]
    assert peak == pytest.approx(see(model, example, ["2.weight"], precision="bf16"), rel=0.001)


def test_autocast_of_a_model_without_parameters_says_what_an_unfrozen_one_would() -> None:
    notes = {
        trace_model(torch.nn.ReLU(), torch.ones(2), precision=p).trace_note
        for p in ("fp32", "bf16")
    }
    assert len(notes) == 1


def test_every_operation_of_a_gpus_autocast_is_replaced_or_known_to_be_left() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    every = torch._C._dispatch_get_all_op_names()
    names = {
        name for name in every if name.startswith("aten::") and "ame" not in name
    }  # no Dimname
    gpus = {name for name in names if has(name, "AutocastCUDA") and not has(name, "AutocastCPU")}
    composed = {"chain_matmul", "einsum", "linalg_multi_dot", "gru_cell", "lstm_cell"}
    composed |= {"rnn_relu_cell", "rnn_tanh_cell"}
    only_there = {"_convolution", "_scaled_dot_product_flash_attention", "cudnn_convolution"}
    only_there |= {
        "_cudnn_rnn",
        "cudnn_convolution_transpose",
        "_thnn_fused_gru_cell",
        "_thnn_fused_lstm_cell",
    }
    left = {name.removeprefix("aten::") for name in gpus} - _autocast_kernels().keys()
    assert left <= composed | only_there


def test_fp16_keeps_as_much_as_bf16() -> None:
    model, make_example = perceptron()
    kept = [
        foretell(trace_model(model, make_example(2), precision=precision), ["0.weight"],
                 precision=precision)["activation_bytes"]
        for precision in ("bf16", "fp16")
    ]  # fmt: skip
    assert kept[0] == kept[1] > 0


def test_the_precision_survives_json_and_an_older_graph_is_float32s() -> None:
    model, make_example = perceptron()
    graph = trace_model(model, make_example(2), precision="bf16")
    document = json.loads(json.dumps(graph.to_document()))
    assert ModelGraph.from_document(document) == graph
    del document["precision"]
    assert ModelGraph.from_document(document).precision == "fp32"

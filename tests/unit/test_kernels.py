"""What a model keeps on a GPU, traced where there is none; tests/gpu asks a real one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sqlmodel import select
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from app.freezing.calibrate import calibrate_model
from app.freezing.config import parse_config
from app.freezing.graph import ModelGraph
from app.freezing.hidden import nodes_in_order
from app.freezing.kernels import kernels_of, workspace_bytes
from app.freezing.plan import plan_config
from app.freezing.timing import read_timing
from app.freezing.trace import trace_model
from app.jobs import folder as job_folder
from app.service import Service
from app.settings import Settings
from app.store.db import Database
from app.store.tables import Task
from tests.unit.peaks import SETS, choose, foretell
from tests.unit.test_memory import attention
from tests.unit.test_service import Quiet, make_ready
from tests.zoo.library import build_library_model
from tests.zoo.observe import observe

MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "encoder": lambda: (attention()[0], torch.randn(4, 12, 32)),
    **{name: lambda name=name: build_library_model(name) for name in ("bert", "gpt2", "t5")},
}


@pytest.mark.parametrize("which", sorted(SETS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_plan_for_a_gpu_goes_the_way_of_backward(name: str, which: str) -> None:
    """What gets a gradient, and at what cost; bytes have `test_cuda_bytes.py`."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model.train()
    graph = trace_model(model, example, kernels="cuda")
    assert graph.trace_note == ""
    trained = choose(graph, which)
    cost = foretell(graph, trained, optimizer="sgd")
    with kernels_of("cuda"):
        seen = observe(model, example, set(trained))
    assert seen.reached == set(trained)
    if name != "t5":  # whose mask trains: a CPU has no fused kernel for that
        assert cost["step_flops"] == seen.forward_flops + seen.backward_flops


def test_a_gpu_keeps_a_byte_for_each_number_that_may_be_dropped() -> None:
    model = nn.Sequential(nn.Linear(8, 1000), nn.Dropout(0.1), nn.Linear(1000, 1))
    saved = {}
    for kind in ("cpu", "cuda"):
        graph = trace_model(model, torch.randn(2, 8), kernels=kind)
        saved[kind] = foretell(graph, ["0.weight"])["activation_bytes"]
        assert graph.kernels == kind
    assert saved["cpu"] - saved["cuda"] == 2 * 1000 * (4 - 1)


def test_a_gpu_keeps_no_matrix_of_attention() -> None:
    """Four times the length takes four times the bytes, not sixteen times."""
    model, _ = attention()
    kept = []
    for length in (64, 256):
        graph = trace_model(model, torch.randn(2, length, 32), kernels="cuda")
        kept.append(foretell(graph, choose(graph, "everything"))["activation_bytes"])
    assert kept[1] < 4.1 * kept[0]


def test_the_kernels_of_a_cpu_are_back_whatever_happens() -> None:
    x = torch.ones(3, requires_grad=True)

    def name_node() -> str:
        return F.dropout(x, 0.5).grad_fn.name()

    assert name_node() == "MulBackward0"

    def interrupt() -> None:
        with kernels_of("cuda"):
            assert name_node() == "NativeDropoutBackward0"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert name_node() == "MulBackward0"


def test_nothing_is_dropped_twice_or_in_eval_mode() -> None:
    x = torch.ones(3, 4)
    with kernels_of("cuda"):
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 1.0), torch.zeros(3, 4))
        dropped = F.dropout(x, 0.5)
        assert set(dropped.unique().tolist()) <= {0.0, 2.0}
        assert F.dropout(x, 0.5, inplace=True) is x


def test_what_a_cpu_was_timed_with_predicts_its_steps_whatever_the_plan_is_of() -> None:
    """A plan for a GPU is made of another graph than the one that can be timed here."""
    model, example = MODELS["encoder"]()
    gpu, cpu = trace_model(model, example, kernels="cuda"), trace_model(model, example)
    timed = calibrate_model(model, example, cpu, seconds=0.1)
    assert read_timing(timed, gpu) is None
    timing = read_timing(json.loads(json.dumps({**timed, "graph": cpu.to_document()})), gpu)
    own = read_timing(timed, cpu)
    config = parse_config({"rules": [{"action": "freeze", "match": "layers.0"}]})
    told = plan_config(gpu, config, timing=timing).cost["predicted_step_ms"]
    assert told == plan_config(cpu, config, timing=own).cost["predicted_step_ms"] > 0


def test_a_device_is_said_to_have_room_only_by_its_own_kernels() -> None:
    model, example = MODELS["encoder"]()
    devices = {"cpu": 2**40, "cuda:0": 2**40}
    for kind, known in (("cpu", "cpu"), ("cuda", "cuda:0")):
        graph = trace_model(model, example, kernels=kind)
        plan = plan_config(graph, parse_config({}), devices=devices)
        assert plan.cost["fits"] == {known: True}
        codes = {warning.code for warning in plan.warnings}
        assert ("traced_for_a_cpu" in codes) is (kind == "cpu")
        tiny = plan_config(graph, parse_config({}), devices={"cpu": 9, "cuda:0": 9})
        assert tiny.cost["fits"] == {"cpu": False, "cuda:0": False}
        alone = plan_config(graph, parse_config({}), devices={"cpu": 2**40})
        assert alone.cost["fits"] == ({"cpu": True} if kind == "cpu" else {})
        codes = {warning.code for warning in alone.warnings}
        assert ("traced_for_a_gpu" in codes) is (kind == "cuda")


def heads(
    count: int, width: int, dtype: torch.dtype = torch.float32, rows: int = 6
) -> torch.Tensor:
    return torch.randn(2, rows, count, width).to(dtype).transpose(1, 2).requires_grad_()


HALF = torch.bfloat16
MASK = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) - 0.3
# As torch chooses on GPUs of architectures 8.0 to 12.0; asked of torch 2.11 and 2.13.
ATTENTIONS: dict[str, tuple[Callable[[], list[torch.Tensor]], dict[str, Any], str]] = {
    "float32": (lambda: [heads(4, 8)] * 3, {}, "Efficient"),
    "float32, causal": (lambda: [heads(4, 8)] * 3, {"is_causal": True, "scale": 0.5}, "Efficient"),
    "float32, a mask": (lambda: [heads(4, 8)] * 3, {"attn_mask": MASK}, "Efficient"),
    "float32, truths": (lambda: [heads(4, 8)] * 3, {"attn_mask": MASK > 0}, "Efficient"),
    "float32, a mask that trains": (
        lambda: [heads(4, 8)] * 3, {"attn_mask": MASK.clone().requires_grad_()}, "Efficient",
    ),
    "float32, a mask of columns": (lambda: [heads(4, 8)] * 3, {"attn_mask": MASK.mT}, ""),
    "float32, odd heads": (lambda: [heads(4, 6)] * 3, {}, ""),
    "float32, groups": (lambda: [heads(4, 8), *[heads(2, 8)] * 2], {"enable_gqa": True}, ""),
    "bfloat16": (lambda: [heads(4, 8, HALF)] * 3, {}, "Flash"),
    "bfloat16, odd heads": (lambda: [heads(4, 6, HALF)] * 3, {}, "Flash"),
    "bfloat16, wide heads": (lambda: [heads(4, 264, HALF)] * 3, {}, "Efficient"),
    "bfloat16, narrow values": (
        lambda: [*[heads(4, 16, HALF)] * 2, heads(4, 8, HALF)], {}, "Efficient",
    ),
    "bfloat16, a mask": (lambda: [heads(4, 8, HALF)] * 3, {"attn_mask": MASK > 0}, "Efficient"),
    "bfloat16, odd heads, a mask": (lambda: [heads(4, 6, HALF)] * 3, {"attn_mask": MASK > 0}, ""),
    "bfloat16, groups": (
        lambda: [heads(4, 8, HALF), *[heads(2, 8, HALF)] * 2], {"enable_gqa": True}, "Flash",
    ),
    "bfloat16, causal, fewer rows": (
        lambda: [heads(4, 8, HALF, rows=3), *[heads(4, 8, HALF)] * 2],
        {"is_causal": True}, "Efficient",
    ),
    "bfloat16, shared heads": (
        lambda: [heads(4, 8, HALF), *[heads(1, 8, HALF)] * 2], {}, "",
    ),
    "bfloat16, more keys than queries": (
        lambda: [heads(1, 8, HALF), *[heads(4, 8, HALF)] * 2], {}, "",
    ),
    "float32, shared values": (lambda: [*[heads(4, 8)] * 2, heads(1, 8)], {}, ""),
    "bfloat16, groups of two kinds": (
        lambda: [heads(4, 8, HALF), heads(2, 8, HALF), heads(1, 8, HALF)],
        {"enable_gqa": True}, "",
    ),
    "three dimensions": (lambda: [torch.randn(4, 6, 8, requires_grad=True)] * 3, {}, ""),
    "float64": (lambda: [heads(4, 8, torch.float64)] * 3, {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_fused_where_a_gpu_fuses_it(name: str) -> None:
    """And is the same attention where it runs for real."""
    make, options, kernel = ATTENTIONS[name]
    given = make()
    options = {
        key: mask.to(given[0].dtype) if isinstance(mask, torch.Tensor) and mask.is_floating_point()
        else mask
        for key, mask in options.items()
    }  # fmt: skip
    expected = F.scaled_dot_product_attention(*given, **options)
    with kernels_of("cuda"):
        result = F.scaled_dot_product_attention(*given, **options)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            fakes = [mode.from_tensor(tensor) for tensor in given]
            fake = F.scaled_dot_product_attention(*fakes, **options)
            found = {node.name() for node in nodes_in_order(fake.grad_fn)}
            fake.float().sum().backward()
    assert torch.allclose(
        result.float(), expected.float(), atol=2e-2 if given[0].dtype is HALF else 1e-5
    )
    assert result.shape == fake.shape
    fused = {node for node in found if "ScaledDotProduct" in node}
    assert fused == ({f"ScaledDotProduct{kernel}AttentionBackward0"} if kernel else set())


def test_whose_operations_they_are_survives_json_and_an_older_graph_is_a_cpus() -> None:
    model, example = MODELS["encoder"]()
    document = json.loads(json.dumps(trace_model(model, example, kernels="cuda").to_document()))
    assert ModelGraph.from_document(document).kernels == "cuda"
    del document["kernels"]
    assert ModelGraph.from_document(document).kernels == "cpu"


def test_where_there_is_a_gpu_models_are_traced_for_it(tmp_path: Path) -> None:
    """What is asked of a worker; a size and a calibration go by the model's own graph."""
    db = Database(tmp_path / "frostline.db")
    service = Service(Settings(data_dir=tmp_path), db, WithGpu())
    service.add_model({"uri": "demo:digits"})
    graph = trace_model(MODELS["encoder"]()[0], torch.randn(4, 12, 32), kernels="hopper")
    (tmp_path / "graphs").mkdir()
    job_folder.write_document(
        tmp_path / "graphs" / "1.json", {**graph.to_document(), "sequence_length": 12}
    )
    db.write(make_ready)
    service.make_plan(1, {"assume": {"sequence_length": 24}})
    service.calibrate(1)
    service.preview_dataset({"model_id": 1, "dataset": {"uri": "demo:digits"}})
    with db.read() as session:
        asked = {task.kind: task.spec["kernels"] for task in session.exec(select(Task))}
    assert asked == dict.fromkeys(("inspect", "trace", "calibrate", "preview"), "hopper")
    db.close()


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_a_worker_traces_as_it_is_told(tmp_path: Path, kernels: str) -> None:
    for kind, more in (
        ("inspect", {}),
        ("trace", {"assumed": {"image_size": 16}, "traced_by": "fake"}),
    ):
        folder = tmp_path / kind
        spec = {"kind": kind, "model": {"uri": "demo:digits"}, "kernels": kernels, **more}
        job_folder.write_spec(folder, {**spec, "code_dirs": [], "file_dirs": [], "threads": 1})
        command = [sys.executable, "-m", "app.jobs.worker", str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        document = job_folder.read_document(folder / "attempts" / "1" / "graph.json") or {}
        assert document.get("graph", document)["kernels"] == kernels


class WithGpu(Quiet):
    def kernels(self) -> str:
        return "hopper"


def test_what_attention_works_in_is_as_wide_as_its_values() -> None:
    query, value = heads(2, 64, torch.bfloat16), heads(2, 256, torch.bfloat16)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert workspace_bytes(efficient, (query, query, value)) == value.numel() * 4

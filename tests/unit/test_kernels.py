"""What a model keeps on a GPU, traced where there is none; tests/gpu asks a real one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from app.freezing.calibrate import calibrate_model
from app.freezing.graph import ModelGraph
from app.freezing.kernels import kernels_of
from app.freezing.timing import read_timing
from app.freezing.trace import trace_model
from app.service import Service
from app.settings import Settings
from app.store.db import Database
from app.store.tables import Task
from tests.unit.peaks import SETS, choose, foretell, see
from tests.unit.test_memory import attention
from tests.unit.test_service import Quiet
from tests.zoo.library import build_library_model
from tests.zoo.observe import observe

MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "encoder": lambda: (attention()[0], torch.randn(4, 12, 32)),
    **{name: lambda name=name: build_library_model(name) for name in ("bert", "gpt2", "t5")},
}


@pytest.mark.parametrize("which", sorted(SETS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_plan_for_a_gpu_is_what_its_operations_do(name: str, which: str) -> None:
    """The same operations, run for real here: what is held and saved, and what gets a gradient."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model.train()
    graph = trace_model(model, example, kernels="cuda")
    trained = choose(graph, which)
    cost = foretell(graph, trained, optimizer="sgd")
    with kernels_of("cuda"):
        seen = observe(model, example, set(trained))
        peak = see(model, example, trained)
    assert cost["peak_bytes"] == pytest.approx(peak, rel=0.05)
    assert cost["activation_bytes"] == pytest.approx(seen.saved_bytes, rel=0.05)
    assert seen.reached == set(trained)


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
    before = F.dropout, F.scaled_dot_product_attention

    def interrupt() -> None:
        with kernels_of("cuda"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert (F.dropout, F.scaled_dot_product_attention) == before


def test_nothing_is_dropped_twice_or_in_eval_mode() -> None:
    x = torch.ones(3, 4)
    with kernels_of("cuda"):
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 1.0), torch.zeros(3, 4))
        dropped = F.dropout(x, 0.5)
        assert set(dropped.unique().tolist()) <= {0.0, 2.0}
        assert F.dropout(x, 0.5, inplace=True) is x


def test_a_model_traced_for_a_gpu_can_be_timed_on_a_cpu() -> None:
    model, example = MODELS["encoder"]()
    graph = trace_model(model, example, kernels="cuda")
    timing = read_timing(calibrate_model(model, example, graph, seconds=0.1), graph)
    assert timing is not None


def test_whose_operations_they_are_survives_json_and_an_older_graph_is_a_cpus() -> None:
    model, example = MODELS["encoder"]()
    document = json.loads(json.dumps(trace_model(model, example, kernels="cuda").to_document()))
    assert ModelGraph.from_document(document).kernels == "cuda"
    del document["kernels"]
    assert ModelGraph.from_document(document).kernels == "cpu"


def test_where_there_is_a_gpu_models_are_traced_for_it(tmp_path: Path) -> None:
    db = Database(tmp_path / "frostline.db")
    service = Service(Settings(data_dir=tmp_path), db, WithGpu())
    service.add_model({"uri": "demo:digits"})
    with db.read() as session:
        assert session.get_one(Task, 1).spec["kernels"] == "cuda"
    db.close()


class WithGpu(Quiet):
    def devices(self) -> list[dict[str, Any]]:
        (cpu,) = super().devices()
        return [cpu, {**cpu, "id": "cuda:0", "kind": "cuda"}]

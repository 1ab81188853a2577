"""A calibration and what is predicted from it: laws here, times in benchmarks/predict."""

import json

import pytest
import torch
from torch import nn

from app.freezing.assume import Assumption
from app.freezing.calibrate import NotTimed, _fit, calibrate_model, widen_batch
from app.freezing.config import FreezeConfig, Rule
from app.freezing.plan import plan_config
from app.freezing.timing import read_timing
from app.freezing.trace import trace_model
from tests.unit.models import make


@pytest.mark.parametrize("name", ["plain", "tied", "convolutional"])
def test_a_calibrated_model_has_predicted_steps(name: str) -> None:
    model, example = make(name)
    graph = trace_model(model, example)
    before = {key: value.clone() for key, value in model.named_parameters()}
    document = json.loads(json.dumps(calibrate_model(model, example, graph, seconds=0.2)))
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    timing = read_timing(document, graph)
    assert timing is not None
    cost = plan_config(graph, FreezeConfig(), timing=timing).cost
    assert cost["predicted_step_ms"] == cost["full"]["predicted_step_ms"] > 0
    assert cost["assumed"]["timed_on"]["device"] == "cpu"
    head = FreezeConfig(
        rules=(Rule("freeze", "**"), Rule("unfreeze", "head"), Rule("unfreeze", "layer3"))
    )
    less = plan_config(graph, head, timing=timing).cost
    assert 0 < less["predicted_step_ms"] <= cost["predicted_step_ms"]
    more = plan_config(graph, head, Assumption(batch_size=512), timing=timing).cost
    assert more["predicted_step_ms"] >= less["predicted_step_ms"]


def test_nothing_is_predicted_where_nothing_was_timed() -> None:
    graph = trace_model(*make("plain"))
    assert plan_config(graph, FreezeConfig()).cost["predicted_step_ms"] is None


def test_a_timing_of_another_model_is_not_used() -> None:
    model, example = make("plain")
    graph, other = trace_model(model, example), trace_model(*make("tied"))
    document = calibrate_model(model, example, graph, seconds=0.1)
    assert read_timing(document, other) is None
    assert read_timing({**document, "format": 99}, graph) is None


def test_a_model_whose_graph_changes_is_not_timed() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 3), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            for _ in range(self.calls):
                x = self.layer(x)
            return x

    model = Grows()
    graph = trace_model(model, torch.ones(2, 3))
    with pytest.raises(NotTimed):
        calibrate_model(model, torch.ones(2, 3), graph, seconds=0.1)


def test_a_wider_batch_repeats_rows_alone() -> None:
    example = {"x": torch.zeros(2, 3), "scale": torch.ones(3), "flag": torch.tensor(1.0)}
    wide = widen_batch(example, 2, 4)
    assert [tuple(wide[key].shape) for key in ("x", "scale", "flag")] == [(8, 3), (3,), ()]


def test_a_fit_has_no_negative_part() -> None:
    columns = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]).numpy()
    fixed, slope = _fit(columns, torch.tensor([5.0, 7.0, 9.0]).numpy())
    assert (fixed, slope) == pytest.approx((3.0, 2.0))
    fixed, slope = _fit(columns, torch.tensor([3.0, 2.0, 1.0]).numpy())
    assert (fixed, slope) == pytest.approx((2.0, 0.0))

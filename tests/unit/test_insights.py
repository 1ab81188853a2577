"""What layer measures say: each finding on a course that has it, and none on one that has not."""

import math
from collections.abc import Sequence
from typing import Any

from app.service.insights import Course, LayerCourse, find_insights

BUCKETS = 40


def course(*layers: LayerCourse, rates: Sequence[float] | None = None) -> Course:
    steps = range(10, 10 * BUCKETS + 1, 10)
    return Course(1, list(steps), [10.0] * BUCKETS, rates or [1.0] * BUCKETS, layers)


def layer(path: str = "a", **given: Any) -> LayerCourse:
    healthy: dict[str, Any] = {
        "is_trained": True,
        "unreached": False,
        "lost": 0.0,
        "grad_norm": [1.0] * BUCKETS,
        "update_norm": [0.1] * BUCKETS,
        "update_ratio": [0.01] * BUCKETS,
    }
    return LayerCourse(path, **{**healthy, **given})


def codes(found: Course) -> dict[str, list[str]]:
    return {f["code"]: f["names"] for f in find_insights(found)["findings"]}


def test_a_healthy_job_has_no_findings() -> None:
    assert codes(course(layer())) == {}
    assert find_insights(Course(0, [], [], [], [])) == {"steps": None, "findings": []}


def test_frozen_layers_are_nobodys_business() -> None:
    still = [None] * BUCKETS, [0.0] * BUCKETS
    frozen = layer(is_trained=False, lost=1.0, grad_norm=still[0], update_norm=still[1])
    assert codes(course(frozen)) == {}


def test_layers_that_do_not_move_are_told_by_why() -> None:
    zero = [0.0] * BUCKETS
    found = course(
        layer("unreached", unreached=True, is_trained=False, grad_norm=[None] * BUCKETS),
        layer("still", update_norm=zero, update_ratio=zero),
        layer("rounded", lost=0.97),
        layer("barely", update_ratio=[1e-7] * BUCKETS),
    )
    assert codes(found) == {
        "unreached": ["unreached"],
        "rounded_away": ["rounded"],
        "still": ["still"],
        "barely_moves": ["barely"],
    }


def test_a_gradient_that_explodes_for_one_step_is_found_with_its_evidence() -> None:
    values: list[Any] = [1.0 + i / 100 for i in range(BUCKETS)]
    values[30] = 500.0
    (finding,) = find_insights(course(layer(grad_norm=values), layer("b")))["findings"]
    assert finding["code"] == "explodes"
    evidence = finding["evidence"]["a"]
    assert evidence["until_step"] == 310
    assert evidence["grad_norm"] == 500.0
    assert math.isclose(evidence["usual"], 1.145)


def test_values_that_are_not_finite_are_found() -> None:
    values: list[Any] = [1.0] * BUCKETS
    values[3] = "NaN"
    assert codes(course(layer(grad_norm=values))) == {"nonfinite": ["a"]}


def test_a_layer_that_has_come_to_rest_is_a_candidate_for_freezing() -> None:
    slowing = [1e-2 * 0.5**i for i in range(BUCKETS)]
    found = find_insights(course(layer(update_ratio=slowing), layer("b")))["findings"]
    assert [(f["code"], f["names"]) for f in found] == [("converged", ["a"])]
    assert found[0]["evidence"]["a"]["moved_at_most"] < 1e-3
    assert found[0]["evidence"]["a"]["from_step"] == 310


def test_a_schedule_that_slows_everything_down_is_no_rest() -> None:
    rates = [0.5**i for i in range(BUCKETS)]
    slowed = layer(update_ratio=[1e-2 * rate for rate in rates])
    assert codes(course(slowed, rates=rates)) == {}


def test_names_are_listed_up_to_three() -> None:
    many = course(*(layer(f"l{i}", lost=1.0) for i in range(5)))
    (finding,) = find_insights(many)["findings"]
    assert "l0, l1, l2 and 2 more" in finding["message"]
    assert len(finding["names"]) == len(finding["evidence"]) == 5

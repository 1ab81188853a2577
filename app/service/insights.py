"""Insights: what a job's layer measures say about its layers, as findings with their evidence."""

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from app.service.documents import Document
from app.store import charts, samples
from app.store.tables import Job

POINTS = 64
MIN_STEPS = 50
EXPLOSION = 100.0  # a gradient so many times its median until then
TINY_TRAVEL = 1e-3  # of a layer's weight norm, over a quarter of the run
SLOWDOWN = 10.0


@dataclass(frozen=True)
class LayerCourse:
    """One layer over the buckets of a job, each with its largest value.

    Attributes:
        is_trained: trainable now; a frozen layer has nothing to be found.
        unreached, lost: what the newest exact pass found.
    """

    path: str
    is_trained: bool
    unreached: bool
    lost: float | None
    grad_norm: Sequence[Any]
    update_norm: Sequence[Any]
    update_ratio: Sequence[Any]


@dataclass(frozen=True)
class Course:
    """All layers of a job over the same buckets.

    Attributes:
        first, steps: the first recorded step, and the last of each bucket.
        counts: how many measured steps each bucket has, about.
        rates: the learning rate of each bucket as a share of the highest.
    """

    first: int
    steps: Sequence[int]
    counts: Sequence[float]
    rates: Sequence[float]
    layers: Sequence[LayerCourse]


def read_course(session: Session, job: Job) -> Course:
    """The course of a job as far as it is recorded, in a few buckets."""
    assert job.id is not None
    layers = samples.read_marks(session, job.id)
    everywhere = range(len(layers))
    steps, grads = charts.read_matrix(session, job.id, "grad_norm", everywhere, POINTS)
    _, updates = charts.read_matrix(session, job.id, "update_norm", everywhere, POINTS)
    _, ratios = charts.read_matrix(session, job.id, "update_ratio", everywhere, POINTS)
    first, count = samples.count_steps(session, job.id)
    ends = [first - 1, *steps]
    span = max(1, ends[-1] - ends[0])
    trainable = {name.rpartition(".")[0] for name in job.config["trainable"]}
    # Other mechanisms compute gradients of what is frozen, and cannot change it while running.
    is_plain = job.config["mechanism"] == "requires_grad"
    return Course(
        first,
        steps,
        [(end - begin) / span * count for begin, end in itertools.pairwise(ends)],
        _read_rates(session, job.id, steps),
        [
            LayerCourse(
                layer.path,
                bool(grad) and grad[-1] is not None and (is_plain or layer.path in trainable),
                layer.unreached,
                layer.lost,
                grad,
                update,
                ratio,
            )
            for layer, grad, update, ratio in zip(layers, grads, updates, ratios, strict=True)
        ],
    )


def _read_rates(session: Session, job_id: int, steps: Sequence[int]) -> list[float]:
    """The learning rate up to each of these steps, as a share of the highest."""
    series = charts.read_series(session, job_id, "lr", POINTS).get("lr")
    if series is None:
        return [1.0] * len(steps)
    highest = max(series["max"]) or 1.0
    places = (
        min(bisect.bisect_left(series["steps"], step), len(series["max"]) - 1) for step in steps
    )
    return [series["max"][place] / highest for place in places]


def find_insights(course: Course) -> Document:
    """Findings as those of a plan, each with `evidence`: layer → numbers."""
    if not course.steps:
        return {"steps": None, "findings": []}
    findings = [
        finding
        for find in (_unreached, _rounded_away, _still, _nonfinite, _explodes, _barely, _converged)
        if (finding := _gather(find, course)) is not None
    ]
    return {"steps": [course.first, course.steps[-1]], "findings": findings}


Evidence = dict[str, Any]
Found = Iterator[tuple[str, Evidence]]


def _gather(find: Callable[[Course], Found], course: Course) -> Document | None:
    evidence = dict(find(course))
    if not evidence:
        return None
    code, words = _WORDS[find.__name__]
    names = list(evidence)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    subject = f"{shown} {'has' if len(names) == 1 else 'have'}"
    return {
        "code": code,
        "message": words.format(layers=shown, have=subject),
        "names": names,
        "evidence": evidence,
    }


_WORDS: Mapping[str, tuple[str, str]] = {
    "_unreached": (
        "unreached",
        "No gradient comes to {layers}, though trainable: the loss does not depend on it. "
        "Freeze it, or look at the forward.",
    ),
    "_rounded_away": (
        "rounded_away",
        "Most updates of {layers} are rounded away: they are smaller than the precision of the "
        "weights. Train in float32 weights, or raise the learning rate.",
    ),
    "_still": (
        "still",
        "{have} not moved at all lately, though trainable and with a gradient. Look at the "
        "learning rate of its group.",
    ),
    "_nonfinite": (
        "nonfinite",
        "{have} had values that are not finite. Lower the learning rate, clip the gradient, or "
        "look at the data of that step.",
    ),
    "_explodes": (
        "explodes",
        "The gradient of {layers} exploded: for a step it was a hundred times its usual size or "
        "more. Clip the gradient (max_grad_norm), or look at the data of that step.",
    ),
    "_barely": (
        "barely_moves",
        "{have} barely moved since the beginning, though trainable: at most 0.1 % of the weight "
        "norm. Freezing would change little; a higher learning rate would let it learn.",
    ),
    "_converged": (
        "converged",
        "{have} come to rest: over the last quarter less than a tenth of the movement at first, "
        "and at most 0.1 % of the weight norm. A candidate for freezing from here on.",
    ),
}


def _unreached(course: Course) -> Found:
    for layer in course.layers:
        if layer.unreached:
            yield layer.path, {"step": course.steps[-1]}


def _rounded_away(course: Course) -> Found:
    for layer in course.layers:
        if layer.is_trained and layer.lost is not None and layer.lost >= 0.5:
            yield layer.path, {"lost": layer.lost}


def _still(course: Course) -> Found:
    quarter = _last_quarter(course)
    for layer in course.layers:
        grads = _numbers(layer.grad_norm[quarter:])
        if layer.is_trained and len(grads) >= 2 and set(layer.update_norm[quarter:]) == {0.0}:
            yield layer.path, {"from_step": course.steps[quarter], "largest_grad_norm": max(grads)}


def _nonfinite(course: Course) -> Found:
    for layer in course.layers:
        for name in ("grad_norm", "update_norm"):
            bad = [i for i, value in enumerate(getattr(layer, name)) if isinstance(value, str)]
            if bad:
                values = getattr(layer, name)
                yield layer.path, {"until_step": course.steps[bad[0]], name: values[bad[0]]}
                break


def _explodes(course: Course) -> Found:
    for layer in course.layers:
        before: list[float] = []
        for step, value in zip(course.steps, layer.grad_norm, strict=True):
            if not isinstance(value, float):
                continue
            usual = statistics.median(before) if len(before) >= 8 else 0.0
            if usual and value >= EXPLOSION * usual:
                yield layer.path, {"until_step": step, "grad_norm": value, "usual": usual}
                break
            before.append(value)


def _barely(course: Course) -> Found:
    for layer, travelled in _travels(course):
        if 0 < sum(travelled) <= TINY_TRAVEL:
            yield layer.path, {"moved_at_most": sum(travelled)}


def _converged(course: Course) -> Found:
    for layer, travelled in _travels(course):
        quarter = len(travelled) // 4
        early, late = sum(travelled[:quarter]), sum(travelled[-quarter:])
        if 0 < late <= TINY_TRAVEL and early >= SLOWDOWN * late:
            since = course.steps[_last_quarter(course)]
            yield layer.path, {"from_step": since, "moved_at_most": late, "at_first": early}


def _travels(course: Course) -> Iterator[tuple[LayerCourse, list[float]]]:
    """Trained layers, and how far each went in each bucket, in its weight norm, at the most.

    As if the learning rate had been the highest all the time: what a schedule slows down has not
    come to rest.
    """
    if course.steps[-1] - course.first < MIN_STEPS or len(course.steps) < 8:
        return
    for layer in course.layers:
        ratios = layer.update_ratio
        if layer.is_trained and all(isinstance(value, float) for value in ratios):
            told = zip(ratios, course.counts, course.rates, strict=True)
            yield layer, [ratio * count / rate for ratio, count, rate in told if rate > 0]


def _last_quarter(course: Course) -> int:
    return len(course.steps) * 3 // 4


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if isinstance(value, float) and math.isfinite(value)]

"""Trials of a model before a job: mechanisms side by side, and how long it takes. It runs none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from app.freezing.config import config_document
from app.freezing.errors import InvalidDocument
from app.service import Conflict, NotFound
from app.web.guard import signed_in
from app.web.pages.entries import typed
from app.web.pages.models import form_items, read_choice, service_of
from app.web.pages.training_form import dataset_request, training_request
from app.web.pages.workbench import Choice
from app.web.render import format_bytes, format_count, format_duration, redirect, render_page, shell
from app.web.views import TrialRow, TrialView

router = APIRouter(
    prefix="/models/{model_id}/trials", dependencies=[Depends(signed_in)], include_in_schema=False
)

Document = dict[str, Any]
MECHANISMS, CALIBRATE = "mechanisms", "calibrate"
# Options of a training form that a comparison of mechanisms takes into account.
SETTING = (
    "optimizer", "lr", "weight_decay", "momentum", "max_grad_norm", "batch_size", "seed",
)  # fmt: skip


@router.post("/mechanisms")
def start_comparison(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    """A few steps under each mechanism; with ``trial.data`` on the dataset in the training form."""
    choice, values = read_choice(request, items), dict(items)

    def start() -> Document:
        training = training_request({k: v for k, v in choice.training.items() if k in SETTING})
        if values.get("trial.steps", "").strip():
            training["max_steps"] = typed(values["trial.steps"])
        wanted: Document = {**config_document(choice.config(usable_only=False))}
        wanted["training"] = training
        if values.get("trial.data"):
            wanted["dataset"] = dataset_request(choice.training)
        return service_of(request).compare_mechanisms(model_id, wanted)

    return _start(request, model_id, choice, MECHANISMS, start)


@router.post("/calibrate")
def start_calibration(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    """Have the model's operations timed, so that plans predict the time of a step."""
    choice = read_choice(request, items)
    return _start(
        request, model_id, choice, CALIBRATE, lambda: service_of(request).calibrate(model_id)
    )


def _start(
    request: Request, model_id: int, choice: Choice, kind: str, start: Callable[[], Document]
) -> Response:
    """The page that waits for the trial, or says why there is none."""
    try:
        task = start()
    except (InvalidDocument, Conflict) as error:
        refused = {"reason": "bad_spec", "message": str(error)}
        none = {"id": 0, "kind": kind, "state": "failed", "error": refused, "result": None}
        status = 409 if isinstance(error, Conflict) else 422
        return _show(request, model_id, {**none, "progress": None}, choice.address(), status)
    return redirect(request, f"/models/{model_id}/trials/{task['id']}?{choice.address()}")


@router.get("/{task_id}")
def show_trial(request: Request, model_id: int, task_id: int) -> Response:
    return _show(request, model_id, _find_task(request, model_id, task_id), request.url.query)


@router.post("/{task_id}/stop")
def stop_trial(request: Request, model_id: int, task_id: int) -> Response:
    _find_task(request, model_id, task_id)
    service_of(request).stop_task(task_id)
    return redirect(request, f"/models/{model_id}/trials/{task_id}?{request.url.query}")


def _find_task(request: Request, model_id: int, task_id: int) -> Document:
    task = service_of(request).get_task(task_id)
    if task["kind"] not in (MECHANISMS, CALIBRATE) or task["model_id"] != model_id:
        raise NotFound(f"Model {model_id} has no trial {task_id}.")
    return task


def _show(
    request: Request, model_id: int, task: Document, address: str, status: int = 200
) -> Response:
    result = task["result"] or {}
    is_comparison = task["kind"] == MECHANISMS
    view = TrialView(
        shell=shell(request, "Mechanisms" if is_comparison else "Step time", "models"),
        model_id=model_id,
        task=task,
        address=address,
        rows=fact_rows(result) if is_comparison and result else (),
        settings=setting_rows(result) if is_comparison and result else (),
    )
    page = render_page(request, "trial.html", view, status)
    if not is_comparison and task["state"] == "succeeded":
        page.headers["HX-Trigger"] = "model:timed"  # the workbench asks for its plan again
    return page


# -------------------------------------------------------------------------------------------- words


def fact_rows(found: Mapping[str, Any]) -> list[TrialRow]:
    """What a comparison measured, a mechanism a column."""
    results = found["mechanisms"]
    fastest = results[0]["step_ms"]
    facts: list[tuple[str, str, Callable[[Document], str]]] = [
        (
            "gradients computed for nothing",
            "of frozen tensors",
            lambda r: format_count(r["gradients"]["frozen"]),
        ),
        ("gradients", "memory held", lambda r: format_bytes(r["gradient_bytes"])),
        ("optimizer state", "", lambda r: format_bytes(r["optimizer_bytes"])),
        ("peak memory", "", lambda r: format_bytes(r["peak_bytes"])),
        (
            "step",
            "in times of requires_grad",
            lambda r: f"{format_duration(r['step_ms'] / 1000)}, {r['step_ms'] / fastest:.2f} ×",
        ),
        (
            "left in gradients",
            "norm after the last step: added to the next where nothing zeroes it",
            lambda r: f"{r['left_behind'][-1]:.3g}",
        ),
        (
            "what is frozen",
            "after these steps",
            lambda r: "identical" if r["frozen_identical"] else "moved",
        ),
        (
            "what is trained",
            "against requires_grad",
            lambda r: "the same" if r["trained_identical"] else "differs",
        ),
        (
            "first step when all is trained",
            "of what was frozen, against a fresh start",
            lambda r: _times(r["afterwards"]["times_fresh"]),
        ),
    ]
    return [TrialRow(label, note, [read(r) for r in results]) for label, note, read in facts]


def setting_rows(found: Mapping[str, Any]) -> list[TrialRow]:
    """The largest difference in what is frozen and in what is trained, by setting."""
    names = [result["mechanism"] for result in found["mechanisms"]]
    return [
        TrialRow(
            variant["name"],
            "",
            [
                f"{_moved(variant['mechanisms'][n], 'frozen')} / "
                f"{_moved(variant['mechanisms'][n], 'trained')}"
                for n in names
            ],
        )
        for variant in found["variants"]
    ]


def _moved(outcome: Mapping[str, Any], which: str) -> str:
    if outcome[f"{which}_identical"]:
        return "same"
    value = outcome[f"{which}_difference"]
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _times(times: float | str | None) -> str:
    if times is None:
        return "no step"
    return f"{times:.2f} ×" if isinstance(times, float) else str(times)

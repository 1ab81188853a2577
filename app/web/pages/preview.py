"""The page of a dataset as a model will see it, before a job starts; the workbench shows a part."""

from __future__ import annotations

import base64
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request, Response

from app.freezing.errors import InvalidDocument
from app.service import NotFound
from app.web.guard import signed_in
from app.web.pages.entries import typed
from app.web.pages.models import form_items, read_choice, service_of
from app.web.pages.training_form import dataset_request
from app.web.render import redirect, render_page, shell
from app.web.views import PreviewView

router = APIRouter(
    prefix="/models/{model_id}/preview",
    dependencies=[Depends(signed_in)],
    include_in_schema=False,
)

PNG = "data:image/png;base64,"


@router.post("")
def start_preview(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    """Have the dataset in the training form read; the page that follows waits for it."""
    choice = read_choice(request, items)
    wanted = {"model_id": model_id, "dataset": dataset_request(choice.training)}
    seed = typed(choice.training.get("seed", ""))
    if isinstance(seed, int):
        wanted["training"] = {"seed": seed}
    try:
        task_id = service_of(request).preview_dataset(wanted)["id"]
    except InvalidDocument as error:
        error_document = {"reason": "bad_spec", "message": str(error)}
        task = {
            "id": 0,
            "state": "failed",
            "error": error_document,
            "result": None,
            "progress": None,
        }
        return _show(request, model_id, task, choice.address(), 422)
    return redirect(request, f"/models/{model_id}/preview/{task_id}?{choice.address()}")


@router.get("/{task_id}")
def show_preview(request: Request, model_id: int, task_id: int) -> Response:
    return _show(request, model_id, _find_task(request, model_id, task_id), request.url.query)


@router.get("/{task_id}/{example}/{name}.png")
def show_image(request: Request, model_id: int, task_id: int, example: int, name: str) -> Response:
    """One thumbnail, as a file of its own: pages take no images from within themselves."""
    examples = (_find_task(request, model_id, task_id)["result"] or {}).get("examples") or []
    shown = examples[example].get(name) if 0 <= example < len(examples) else None
    if not isinstance(shown, str) or not shown.startswith(PNG):
        raise NotFound(f"Preview {task_id} has no such image.")
    return Response(base64.b64decode(shown.removeprefix(PNG)), media_type="image/png")


def _find_task(request: Request, model_id: int, task_id: int) -> dict:
    task = service_of(request).get_task(task_id)
    if task["kind"] != "preview" or task["model_id"] != model_id:
        raise NotFound(f"Model {model_id} has no preview {task_id}.")
    return task


def _show(request: Request, model_id: int, task: dict, address: str, status: int = 200) -> Response:
    view = PreviewView(
        shell=shell(request, "Data", "models"),
        model_id=model_id,
        task=task,
        address=address,
        hidden=parse_qsl(address),
    )
    return render_page(request, "preview.html", view, status)

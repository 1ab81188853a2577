"""The pages that import a freeze config: a file or pasted text, and what it would change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Request, Response, UploadFile
from starlette.concurrency import run_in_threadpool

from app.freezing.config import split_names
from app.freezing.errors import InvalidDocument
from app.service import Service
from app.web.guard import signed_in
from app.web.pages.entries import entries_of
from app.web.pages.model_form import read_json
from app.web.pages.models import faults_of, read_choice, service_of
from app.web.pages.workbench import POLICIES, Choice
from app.web.render import redirect, render_page, shell
from app.web.views import Change, ImportView

router = APIRouter(
    prefix="/models/{model_id}/import",
    dependencies=[Depends(signed_in)],
    include_in_schema=False,
)

Document = dict[str, Any]


@router.get("")
def show_import(request: Request, model_id: int) -> Response:
    """An empty form; the query is the address of what is on the workbench now."""
    return render_page(request, "import.html", _view(request, model_id, request.url.query))


@router.post("")
async def import_config(request: Request, model_id: int) -> Response:
    """A file or pasted text: first what it would change, then, with ``accept``, stored and opened.

    ``now`` is the address of what is on the workbench, which the import is compared with.
    """
    form = await request.form()
    text = form.get("document")
    upload = form.get("file")
    if isinstance(upload, UploadFile) or hasattr(upload, "read"):
        content = await upload.read()  # type: ignore[union-attr]
        text = content.decode("utf-8", errors="replace") if content else text
    accept, now = str(form.get("accept") or ""), str(form.get("now") or "")
    return await run_in_threadpool(_import, request, model_id, str(text or ""), accept, now)


def _import(request: Request, model_id: int, text: str, accept: str, now: str) -> Response:
    service = service_of(request)
    try:
        if not text.strip():
            raise InvalidDocument([("", "Choose a file, or paste the JSON of a freeze config.")])
        document = read_json("document", text)
        if not isinstance(document, dict):
            raise InvalidDocument([("document", "A freeze config is a JSON object.")])
        if accept:
            saved = service.import_config(model_id, document, accept)
            return redirect(request, f"/models/{model_id}?{urlencode([('config', saved['id'])])}")
        review = service.review_import(model_id, document)
    except InvalidDocument as error:
        view = _view(request, model_id, now, document=text, faults=faults_of(error))
        return render_page(request, "import.html", view, 422)
    differences = [(kind, names) for kind, names in review["differing"].items() if names]
    view = _view(
        request,
        model_id,
        now,
        document=text,
        config=review["config"],
        is_other_model=_is_other_model(document, review["config"]),
        differences=differences,
        changes=_changes(service, model_id, read_choice(request, parse_qsl(now)), review),
    )
    return render_page(request, "import.html", view, 409 if differences else 200)


def _view(request: Request, model_id: int, now: str, **members: Any) -> ImportView:
    model = service_of(request).get_model(model_id)
    return ImportView(shell(request, "Import", "models"), model, now, **members)


def _is_other_model(document: Document, ours: Document) -> bool:
    theirs = document.get("model")
    fingerprint = theirs.get("fingerprint") if isinstance(theirs, dict) else None
    return fingerprint is not None and fingerprint != ours["model"]["fingerprint"]


def _changes(service: Service, model_id: int, choice: Choice, review: Document) -> list[Change]:
    """What would differ from the workbench: by its rules and by its lists of names."""
    graph = service.read_graph(model_id)
    config = review["config"]
    frozen_now, _ = split_names(choice.config(), graph)
    by_rules, by_names = set(config["frozen"]), set(review["names"]["frozen"])
    changes = [
        Change("become frozen", *(_beyond(names, frozen_now) for names in (by_rules, by_names))),
        Change("become trainable", *(_beyond(frozen_now, names) for names in (by_rules, by_names))),
    ]
    for key in POLICIES:
        if config[key] != choice.policies[key]:
            told = [f"{choice.policies[key]} → {config[key]}"]
            changes.append(Change(key.replace("_", " "), told, told))
    for kind, noun in (("phase", "phases"), ("group", "groups")):
        here, there = choice.entries[kind], entries_of(kind, config)
        if here != there:
            told = [" ".join(entry) for entry in there] or ["none any more"]
            changes.append(Change(noun, told, told))
    return [change for change in changes if change.by_rules or change.by_names]


def _beyond(names: Iterable[str], others: Iterable[str]) -> list[str]:
    gone = set(others)
    return sorted(name for name in names if name not in gone)

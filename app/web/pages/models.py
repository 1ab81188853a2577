"""The models' pages: the list at /, and the workbench where boxes are ticked and a plan answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Request, Response
from starlette.datastructures import FormData

from app.freezing.config import config_document
from app.freezing.errors import InvalidDocument
from app.freezing.export import config_as_python
from app.service import Conflict, Service
from app.web.guard import changes_nothing, signed_in
from app.web.pages import model_form, tree, workbench
from app.web.pages.entries import Items
from app.web.pages.jobs import view_jobs
from app.web.pages.training_form import suggest_training
from app.web.pages.workbench_view import build_view, count_rule
from app.web.render import redirect, render_block, render_page, shell
from app.web.views import Fault, ModelsView, WorkbenchView

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
RECENT_JOBS = 8
GUIDE_COOKIE = "frostline-guide"  # set by workbench.js where somebody hides the first steps


def service_of(request: Request) -> Service:
    return request.app.state.service


async def form_items(request: Request) -> list[tuple[str, str]]:
    """The text fields of a form in their order; repeated names stay repeated."""
    form: FormData = await request.form()
    return [(key, value) for key, value in form.multi_items() if isinstance(value, str)]


def faults_of(error: InvalidDocument) -> list[Fault]:
    return [Fault(field, message) for field, message in error.errors]


# ------------------------------------------------------------------------------------------- lists


@router.get("/")
def show_home(request: Request) -> Response:
    """The list; before anything was done, the only model itself, a job one click away."""
    service = service_of(request)
    models, jobs = service.list_models(limit=2), service.list_jobs(limit=1)
    if len(models) == 1 and not jobs:
        return redirect(request, f"/models/{models[0]['id']}")
    return show_models(request)


@router.get("/models")
def show_models(request: Request) -> Response:
    return render_page(request, "models.html", _models_view(request))


@router.get("/models/list")
def show_model_list(request: Request) -> Response:
    """The list alone, asked for while a model is being inspected."""
    return render_block(request, "models.html", "model_list", _models_view(request))


def _models_view(
    request: Request,
    values: Mapping[str, str] | None = None,
    faults: Sequence[Fault] = (),
    conflict: str = "",
    in_use: Sequence[int] = (),
) -> ModelsView:
    """The page; `values` fill the form, from what was sent or from the address."""
    service = service_of(request)
    uri, options, checks = model_form.form_fields(values or request.query_params, faults)
    beside = {field.fault for field in (uri, *options, *checks)}
    return ModelsView(
        shell=shell(request, "Models", "models"),
        models=service.list_models(),
        jobs=view_jobs(service, limit=RECENT_JOBS),
        uri=uri,
        options=options,
        checks=checks,
        faults=[fault for fault in faults if fault.message not in beside],
        conflict=conflict,
        in_use=in_use,
    )


@router.post("/models")
def add_model(request: Request, items: list[tuple[str, str]] = Depends(form_items)) -> Response:
    values = dict(items)
    try:
        model = service_of(request).add_model(model_form.read_spec(values))
    except InvalidDocument as error:
        view = _models_view(request, values, faults_of(error))
        return render_page(request, "models.html", view, 422)
    return redirect(request, f"/models/{model['id']}")


@router.post("/models/{model_id}/delete")
def delete_model(request: Request, model_id: int) -> Response:
    try:
        service_of(request).delete_model(model_id)
    except Conflict as conflict:
        view = _models_view(
            request, conflict=conflict.detail, in_use=conflict.extra.get("jobs") or ()
        )
        return render_page(request, "models.html", view, 409)
    return redirect(request, "/models")


# --------------------------------------------------------------------------------------- workbench


def read_choice(request: Request, items: Items) -> workbench.Choice:
    config_id = dict(items).get("config", "")
    base = None
    if config_id.isascii() and config_id.isdigit() and len(config_id) < 19:
        base = service_of(request).get_config(int(config_id))
    return workbench.read_choice(items, base)


def _build(
    request: Request,
    model_id: int,
    choice: workbench.Choice,
    faults: tuple[Fault, ...] = (),
    seen: workbench.Choice | None = None,
    *,
    with_rows: bool = True,
) -> WorkbenchView:
    """The page of one choice; `seen` is the one that the browser shows already."""
    service = service_of(request)
    model = service.get_model(model_id)
    if model["state"] != "ready":
        page, again = (
            shell(request, str(model["uri"]), "models"),
            model_form.spec_address(model["spec"]),
        )
        return WorkbenchView(shell=page, model=model, again=again)
    asked = workbench.plan_request(choice)
    # Before the plan, which knows more then: a page that is not told of a trace does not ask again.
    is_tracing = service.is_tracing(model_id, asked)
    plan = service.make_plan(model_id, asked)
    before = service.make_plan(model_id, workbench.plan_request(seen)) if seen else None
    saved = service.list_configs(model_id=model_id)
    graph = service.read_graph(model_id)
    view = build_view(
        request,
        model,
        graph,
        choice,
        plan,
        saved,
        faults,
        before,
        with_rows=with_rows,
        is_tracing=is_tracing,
    )
    is_hidden = request.cookies.get(GUIDE_COOKIE) == "hidden"
    is_demo = str(model["uri"]).startswith("demo:")
    return replace(
        view,
        again=model_form.spec_address(model["spec"]),
        guide=is_demo and not is_hidden and not service.list_jobs(limit=1),
    )


@router.get("/models/{model_id}")
def show_model(request: Request, model_id: int) -> Response:
    choice = read_choice(request, request.query_params.multi_items())
    if not choice.training:
        suggested = suggest_training(service_of(request).get_model(model_id)["uri"])
        choice = replace(choice, training=suggested)
    return render_page(request, "workbench.html", _build(request, model_id, choice))


@router.post("/models/{model_id}")
def change_choice(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    """A button without JavaScript: act, then the page at the new address."""
    choice = read_choice(request, items)
    try:
        choice = workbench.act(choice, service_of(request).read_graph(model_id), items)
    except InvalidDocument as error:
        view = _build(request, model_id, choice, tuple(faults_of(error)))
        return render_page(request, "workbench.html", view, 422)
    address = choice.address()
    return redirect(request, f"/models/{model_id}" + (f"?{address}" if address else ""))


@router.post("/models/{model_id}/plan", dependencies=[Depends(changes_nothing)])
def show_plan(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    """A button with JavaScript: the rules, the plan and what changes in the tree in one answer.

    ``seen`` is the address of what the browser shows; the states are those that differ from it.
    """
    choice = read_choice(request, items)
    address = dict(items).get("seen")
    seen = None if address is None else read_choice(request, parse_qsl(address))
    faults: tuple[Fault, ...] = ()
    try:
        choice = workbench.act(choice, service_of(request).read_graph(model_id), items)
    except InvalidDocument as error:
        faults = tuple(faults_of(error))
    view = _build(request, model_id, choice, faults, seen, with_rows=False)
    return render_block(request, "workbench.html", "answer", view)


@router.get("/models/{model_id}/rows")
def show_rows(request: Request, model_id: int, parent: int | None = None) -> Response:
    """What hangs below one module, what a search finds, or the whole tree, under the address."""
    service = service_of(request)
    choice = read_choice(request, request.query_params.multi_items())
    graph = service.read_graph(model_id)
    states = tree.read_states(graph, service.make_plan(model_id, workbench.plan_request(choice)))
    found = None
    if choice.search:
        rows, found = tree.find_rows(graph, states, choice.search)
    elif parent is None or not 0 <= parent < len(graph.modules):
        opened = tree.first_open(graph) if choice.opened is None else choice.opened
        rows = tree.list_rows(graph, states, opened)
    else:
        opened = (choice.opened or frozenset()) | {parent}
        rows = tree.list_rows(graph, states, opened, parent)[1:]
    page, model = shell(request, "Rows", "models"), service.get_model(model_id)
    view = WorkbenchView(page, model, tree=rows, found=found, address=choice.address())
    return render_block(request, "workbench.html", "rows", view)


@router.get("/models/{model_id}/matches")
def show_matches(
    request: Request, model_id: int, add_action: str = "freeze", add_text: str = ""
) -> Response:
    graph = service_of(request).read_graph(model_id)
    view = count_rule(graph, add_action, add_text)
    return render_page(request, "_matches.html", view)


@router.get("/models/{model_id}/download")
def download(request: Request, model_id: int) -> Response:
    """The freeze config in the address, saved or not, as an attachment."""
    service = service_of(request)
    choice = read_choice(request, request.query_params.multi_items())
    graph = service.read_graph(model_id)
    config = choice.config(usable_only=False)
    if request.query_params.get("as") == "python":
        return _attachment("freeze.py", "text/x-python", config_as_python(config, graph))
    document = config_document(config, graph)
    document["model"] = {**(document["model"] or {}), "uri": service.get_model(model_id)["uri"]}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return _attachment("freeze-config.json", "application/json", text)


def _attachment(filename: str, media_type: str, text: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(text, media_type=media_type, headers=headers)


@router.post("/models/{model_id}/configs")
def save_config(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    """Save the choice: over the config that it began as (``replace``), or as a new one."""
    service = service_of(request)
    choice = read_choice(request, items)
    try:
        document = {**config_document(choice.config(usable_only=False)), "model_id": model_id}
        if choice.base and "replace" in dict(items):
            saved = service.replace_config(int(choice.base["id"]), document)
        else:
            saved = service.save_config(document)
    except InvalidDocument as error:
        view = _build(request, model_id, choice, tuple(faults_of(error)))
        return render_page(request, "workbench.html", view, 422)
    training = [(f"train.{name}", value) for name, value in choice.training.items()]
    query = urlencode([("config", str(saved["id"])), *training])
    return redirect(request, f"/models/{model_id}?{query}")


def show_faults(
    request: Request, model_id: int, choice: workbench.Choice, error: InvalidDocument
) -> Response:
    """The workbench again, with what is wrong beside its field."""
    view = _build(request, model_id, choice, tuple(faults_of(error)))
    return render_page(request, "workbench.html", view, 422)


@router.post("/models/{model_id}/jobs")
def start_job(
    request: Request, model_id: int, items: list[tuple[str, str]] = Depends(form_items)
) -> Response:
    choice = read_choice(request, items)
    kind = "evaluate" if dict(items).get("kind") == "evaluate" else "train"
    try:
        job = service_of(request).launch_job(workbench.job_request(choice, model_id, kind))
    except InvalidDocument as error:
        return show_faults(request, model_id, choice, error)
    return redirect(request, f"/jobs/{job['id']}")

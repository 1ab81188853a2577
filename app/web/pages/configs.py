"""The page of saved freeze configs: open, rename, duplicate, download, delete."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Form, Request, Response

from app.service import Service
from app.web.guard import signed_in
from app.web.render import redirect, render_page, shell
from app.web.views import ConfigsView

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

# What the service adds to a freeze config; the rest is the document itself.
OWN_MEMBERS = ("id", "created_at", "updated_at", "frozen_count", "trainable_count")


def service_of(request: Request) -> Service:
    return request.app.state.service


@router.get("/configs")
def show_configs(request: Request) -> Response:
    service = service_of(request)
    models = {model["id"]: model for model in service.list_models(limit=1000)}
    view = ConfigsView(shell(request, "Configs", "configs"), service.list_configs(), models)
    return render_page(request, "configs.html", view)


def _read_document(service: Service, config_id: int) -> dict[str, Any]:
    config = service.get_config(config_id)
    return {key: value for key, value in config.items() if key not in OWN_MEMBERS}


@router.post("/configs/{config_id}/rename")
def rename_config(request: Request, config_id: int, name: str = Form("")) -> Response:
    service = service_of(request)
    service.replace_config(config_id, {**_read_document(service, config_id), "name": name.strip()})
    return redirect(request, "/configs")


@router.post("/configs/{config_id}/duplicate")
def duplicate_config(request: Request, config_id: int) -> Response:
    service = service_of(request)
    document = _read_document(service, config_id)
    service.save_config({**document, "name": f"{document.get('name') or 'unnamed'} (copy)"})
    return redirect(request, "/configs")


@router.post("/configs/{config_id}/delete")
def delete_config(request: Request, config_id: int) -> Response:
    service_of(request).delete_config(config_id)
    return redirect(request, "/configs")

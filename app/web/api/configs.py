"""Freeze configs: save, list, read, replace, delete, download."""

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Response

from app.web.api.body import Answer, Body, Id, Limit, OptionalId, Verbs, gives, takes
from app.web.api.models import RULES
from app.web.guard import signed_in

router = APIRouter(prefix="/configs", tags=["configs"], dependencies=[Depends(signed_in)])


@router.post("", status_code=201, openapi_extra=takes(model_id=1, name="late layers", rules=RULES))
def save_config(service: Verbs, body: Body) -> Answer:
    """Save a freeze config for a model."""
    return Answer(service.save_config(body), 201)


@router.get("")
def list_configs(
    service: Verbs, model_id: OptionalId = None, limit: Limit = 100, before: OptionalId = None
) -> Answer:
    """The saved freeze configs, newest first."""
    return Answer(service.list_configs(model_id, limit, before))


@router.get("/{config_id}")
def get_config(service: Verbs, config_id: Id) -> Answer:
    """One freeze config."""
    return Answer(service.get_config(config_id))


@router.put("/{config_id}", openapi_extra=takes(name="late layers", rules=RULES))
def replace_config(service: Verbs, config_id: Id, body: Body) -> Answer:
    """Replace a freeze config."""
    return Answer(service.replace_config(config_id, body))


@router.delete("/{config_id}", status_code=204)
def delete_config(service: Verbs, config_id: Id) -> Response:
    """Delete a freeze config; jobs keep their own copy."""
    service.delete_config(config_id)
    return Response(status_code=204)


@router.get("/{config_id}/download", responses=gives("application/json", "text/x-python"))
def download_config(
    service: Verbs,
    config_id: Id,
    as_: Annotated[Literal["json", "python"], Query(alias="as")] = "json",
) -> Response:
    """The freeze config as a JSON document or as a Python module without dependencies."""
    filename, media_type, text = service.download_config(config_id, as_)
    return Response(text, media_type=media_type, headers=attachment(filename))


def attachment(filename: str) -> dict[str, str]:
    """The header that makes a browser save the answer; a name is data, whatever is in it."""
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}"}

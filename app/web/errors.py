"""The one translator from an error to a page or a JSON problem; it decides nothing, it words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.freezing.errors import InvalidDocument
from app.numbers import name_non_finite
from app.service.documents import Conflict, NotFound
from app.store.db import DatabaseDamaged, DatabaseFull
from app.web import render, views

Fault = tuple[str, str]


def install(app: FastAPI) -> None:
    """Teach the application to answer every error it can meet."""

    @app.exception_handler(InvalidDocument)
    def unusable(request: Request, error: InvalidDocument) -> Response:
        return answer(request, 422, str(error), error.errors)

    @app.exception_handler(NotFound)
    def missing(request: Request, error: NotFound) -> Response:
        return answer(request, 404, str(error))

    @app.exception_handler(Conflict)
    def impossible(request: Request, error: Conflict) -> Response:
        return answer(request, 409, str(error), **error.extra)

    @app.exception_handler(DatabaseFull)
    def full(request: Request, error: DatabaseFull) -> Response:
        return answer(request, 507, f"{error.strerror}. Free some space, then repeat this.")

    @app.exception_handler(DatabaseDamaged)
    def damaged(request: Request, error: DatabaseDamaged) -> Response:
        return answer(request, 500, str(error))

    @app.exception_handler(RequestValidationError)
    def misshapen(request: Request, error: RequestValidationError) -> Response:
        # What came is not echoed: it may be a secret, and it may not be JSON (NaN).
        faults = [(".".join(map(str, fault["loc"][1:])), fault["msg"]) for fault in error.errors()]
        detail = "; ".join(f"{field}: {message}" for field, message in faults)
        in_address = any(fault["loc"][0] == "path" for fault in error.errors())
        return answer(request, 404 if in_address else 422, f"{detail}.", faults)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        is_script = "authorization" in request.headers  # a wrong token is never a redirect
        if error.status_code == 401 and is_page(request) and not is_script:
            return ask_to_sign_in(request)
        detail = str(error.detail)
        if detail == HTTPStatus(error.status_code).phrase:  # the router's own, in fewer words
            detail = _ROUTER_WORDS.get(error.status_code, "{method} {path} failed.").format(
                method=request.method, path=request.url.path
            )
        return answer(request, error.status_code, detail, headers=error.headers)


_ROUTER_WORDS = {
    404: "There is nothing at {path}.",
    405: "{path} does not take {method}.",
}


def answer(
    request: Request,
    status: int,
    detail: str,
    errors: Sequence[Fault] = (),
    *,
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> Response:
    """A problem as JSON below ``/api``, as a page elsewhere."""
    if is_page(request):
        title = HTTPStatus(status).phrase
        faults = tuple(views.Fault(field, message) for field, message in errors)
        view = views.ErrorView(render.shell(request, title), title, status, detail, faults)
        page = render.render_page(request, "error.html", view, status)
        page.headers.update(headers or {})
        return page
    return problem(status, detail, errors, headers=headers, **extra)


def problem(
    status: int,
    detail: str,
    errors: Sequence[Fault] = (),
    *,
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> Response:
    """RFC 9457 ``application/problem+json``."""
    document = {**extra, "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if errors:
        document["errors"] = [{"field": field, "message": message} for field, message in errors]
    return Response(
        to_json(document), status, dict(headers or {}), media_type="application/problem+json"
    )


def ask_to_sign_in(request: Request) -> Response:
    if "hx-request" in request.headers:  # a 303 would put the login page into a fragment
        return Response(
            status_code=401, headers={"HX-Redirect": f"{render.root_path(request)}/login"}
        )
    return render.redirect(request, "/login")


def is_page(request: Request) -> bool:
    path = request.scope["path"].removeprefix(render.root_path(request))
    return not (path == "/api" or path.startswith("/api/"))


def to_json(value: Any) -> str:
    """Valid JSON whatever the numbers: NaN and the infinities become strings that name them."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(name_non_finite(value), separators=(",", ":"))

"""The interface describes itself: OpenAPI, and a page that lists the routes."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from app.web import render, views
from app.web.api.body import Answer
from app.web.guard import signed_in

router = APIRouter(include_in_schema=False, dependencies=[Depends(signed_in)])


@router.get("/openapi.json")
def read_schema(request: Request) -> Answer:
    return Answer(request.app.openapi())


@router.get("/docs")
def show_docs(request: Request) -> Response:
    routes = [
        views.Route(method.upper(), path, operation["description"].partition("\n")[0])
        for path, operations in request.app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    view = views.DocsView(render.shell(request, "Interface"), routes)
    return render.render_page(request, "docs.html", view)

"""Log in with a one-time link, log out. It never shows the server's token."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request
from starlette.responses import Response

from app.web import render, views
from app.web.api.body import Verbs
from app.web.guard import anyone, cookie_name, require_same_origin, signed_in
from app.web.limits import FailedLogins

router = APIRouter(include_in_schema=False)

SESSION_SECONDS = 30 * 24 * 3600
NO_LONGER_GOOD = (
    "This link has been used, or is too old. Run 'frostline link' in a terminal for a new one."
)


@router.get("/login", dependencies=[Depends(anyone)])
def show_login(
    request: Request, link: Annotated[str | None, Query(max_length=200)] = None
) -> Response:
    """A page with a button: opening a link changes nothing, so no preview or prefetch spends it."""
    return _page(request, link)


@router.post("/login", dependencies=[Depends(anyone), Depends(require_same_origin)])
def log_in(
    request: Request, service: Verbs, link: Annotated[str, Form(max_length=200)]
) -> Response:
    failed: FailedLogins = request.app.state.failed_logins
    client = request.client.host if request.client else "somewhere"
    failed.check(client)
    session = service.use_link(link)
    if session is None:
        failed.add(client)
        return _page(request, None, NO_LONGER_GOOD, 403)
    failed.forget(client)
    response = render.redirect(request, "/")
    response.set_cookie(
        cookie_name(request),
        session,
        max_age=SESSION_SECONDS,
        path=render.root_path(request) or "/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )
    return response


@router.post("/logout", dependencies=[Depends(signed_in)])
def log_out(request: Request, service: Verbs) -> Response:
    session = request.cookies.get(cookie_name(request))
    if session:
        service.end_session(session)
    response = render.redirect(request, "/login")
    response.delete_cookie(cookie_name(request), path=render.root_path(request) or "/")
    return response


def _page(
    request: Request, link: str | None, message: str | None = None, status: int = 200
) -> Response:
    view = views.LoginView(render.shell(request, "Log in"), link, message)
    page = render.render_page(request, "login.html", view, status)
    page.headers["Cache-Control"] = "no-store"  # the link stands in it
    return page

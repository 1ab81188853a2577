"""Who may come in: hosts, origins, body sizes, headers, and who may call which route."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Iterator
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.service.documents import digest
from app.settings import Settings
from app.web.errors import problem

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY_LIMIT = 1 << 20
IMPORT_LIMIT = 8 << 20
# A client that is still sending reads no answer: what is too much is read on and thrown away.
DISCARD_LIMIT = 64 << 20
DISCARD_SECONDS = 5.0

CONTENT_POLICY = (
    "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


# ------------------------------------------------------------------- who may call: one each route


async def anyone() -> None:
    """Declares a route open to whoever reaches the server."""


# Only for the OpenAPI description: `signed_in` reads the header itself.
_BEARER = HTTPBearer(auto_error=False)


def signed_in(request: Request, _described: Annotated[object, Depends(_BEARER)]) -> None:
    """Declares a route open to the bearer of the token, and to a browser that has logged in.

    Raises:
        HTTPException: 401 without either (``errors`` sends a person to the login page), 403 where
            a cookie came with a request that another site may have forged.
    """
    given = request.headers.get("authorization")
    if given is not None:
        scheme, _, token = given.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            token.strip().encode(), request.app.state.token.encode()
        ):
            request.state.who = "token"
            return
        raise _unauthorized(
            "That is not this server's token; it lies in the data folder's 'token'."
        )
    session = request.cookies.get(cookie_name(request))
    if not session or not request.app.state.service.check_session(session):
        raise _unauthorized("Send 'Authorization: Bearer TOKEN', or log in with 'frostline link'.")
    request.state.who = f"session {digest(session)[:8]}"
    if request.method not in SAFE_METHODS:
        require_same_origin(request)


def changes_nothing(request: Request) -> None:
    """Declares a POST that only asks, such as a plan: it stays out of the audit log."""
    request.state.changes_nothing = True


def _unauthorized(detail: str) -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


def cookie_name(request: Request) -> str:
    """Named with the port: browsers share one host's cookies between all its ports."""
    return f"frostline-{request.app.state.settings.port}"


def require_same_origin(request: Request) -> None:
    """Refuse what a page of another site can make a browser send.

    Raises:
        HTTPException: 403, unless a ``Sec-Fetch-Site`` or an ``Origin`` says that the request
            comes from our own pages, and neither says otherwise.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if origin == "null":  # what `Referrer-Policy: no-referrer` makes of a form's origin
        origin = None
    claims = []
    if site is not None:
        claims.append(site == "same-origin")
    if origin is not None:
        claims.append(urlsplit(origin).netloc.lower() == request.headers["host"].lower())
    if not claims or not all(claims):
        raise HTTPException(
            403, "This request does not come from Frostline's own pages; open the page and repeat."
        )


def check_declared(app: FastAPI) -> None:
    """Refuse to start with a route that does not say who may call it.

    Raises:
        RuntimeError: naming every route without exactly one of ``anyone`` and ``signed_in``.
    """
    undeclared = []
    for route in iter_route_contexts(app.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is None and route.path == "/static":  # a mounted folder: files for anyone
            continue
        calls = [one.call for one in _walk(dependant)] if dependant is not None else []
        if sum(call in (anyone, signed_in) for call in calls) != 1:
            methods = ",".join(sorted(route.methods or {"*"}))
            undeclared.append(f"{methods} {route.path}")
    if undeclared:
        raise RuntimeError(
            "Each route depends on exactly one of guard.anyone and guard.signed_in; these do not: "
            + "; ".join(undeclared)
        )


def _walk(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for inner in dependant.dependencies:
        yield from _walk(inner)


def check_exposure(settings: Settings) -> None:
    """Refuse to show the token to a network in clear text without being asked to.

    Raises:
        ValueError: the address is not a loopback one, and nothing says why that is safe.
    """
    if is_loopback(settings.host) or settings.behind_proxy or settings.insecure_http:
        return
    raise ValueError(
        f"{settings.host} can be reached from other machines, and HTTP shows the token to whoever "
        "listens. Put a TLS proxy in front and say --behind-proxy, or accept it with "
        "--insecure-http."
    )


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may point anywhere
        return False


# -------------------------------------------------------------------------- before any route runs


class Guard:
    """Middleware: checks the Host, takes the body in whole, and puts headers on every answer."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        names = (*LOOPBACK, *settings.allowed_hosts, settings.host)
        self.hosts = {_bracketed(name.lower()) for name in names}
        # With no-referrer a form's Origin is "null"; over plain HTTP from another machine there is
        # no Sec-Fetch-Site either, and no form would ever be known as our own.
        referrer = "same-origin" if settings.insecure_http else "no-referrer"
        self.headers = {
            "Content-Security-Policy": CONTENT_POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": referrer,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(self.headers)
                headers.setdefault("Cache-Control", "private, no-cache")
                _audit(scope, message["status"])
            await send(message)

        try:
            admitted = await self.admit(scope, receive)
            if isinstance(admitted, Response):
                await admitted(scope, receive, send_guarded)
            elif admitted is not None:
                await self.app(scope, admitted, send_guarded)
        except Exception:
            # Answered here so that this answer has its headers too; raised on for the log.
            if not started:
                failure = problem(500, "Frostline failed on this request; its log says where.")
                await failure(scope, receive, send_guarded)
            raise

    async def admit(self, scope: Scope, receive: Receive) -> Receive | Response | None:
        """The request with its body taken in, a refusal, or None where the client has left."""
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or _without_port(hosts[0]) not in self.hosts:  # DNS rebinding ends here
            return problem(
                400,
                "This server does not answer to that Host name. Use 127.0.0.1, or add the name to "
                "FROSTLINE_ALLOWED_HOSTS.",
            )
        limit = IMPORT_LIMIT if scope["path"].endswith("/import") else BODY_LIMIT
        body = await _take_body(receive, limit)
        if body is None:
            return None
        if len(body) > limit:
            return problem(
                413,
                f"The body is larger than the {limit >> 20} MiB that this address takes.",
                headers={"Connection": "close"},
            )
        return _replay(body, receive)


def _audit(scope: Scope, status: int) -> None:
    audit = getattr(scope["app"].state, "audit", None) if "app" in scope else None
    is_asking = scope.get("state", {}).get("changes_nothing") and status < 400
    if audit is not None and scope["method"] not in SAFE_METHODS and not is_asking:
        audit.write(scope, status)


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and (port == "" or port.isdecimal()) else host.lower()


async def _take_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, one longer than the limit where it is too long; None when the client left."""
    body = bytearray()
    taken = 0
    deadline = None
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            return bytes(body)
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        taken += len(chunk)
        body += chunk[: limit + 1 - len(body)]
        if not message.get("more_body", False) or taken > limit + DISCARD_LIMIT:
            return bytes(body)
        if taken > limit and deadline is None:
            deadline = asyncio.get_running_loop().time() + DISCARD_SECONDS


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever follows it: the client's leaving."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again

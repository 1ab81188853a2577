"""Every route of the living application × every method × everybody who may ask."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.web.stream import close_streams

ADDRESS = "http://127.0.0.1:8000"
TOKEN = "a-token-for-tests"
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
OPEN = {("GET", "/api/health"), ("GET", "/login"), ("POST", "/login")}
COOKIE = "frostline-8000"

# Who asks: whether with the session's cookie, and with which further headers.
ASKERS: Mapping[str, tuple[str | None, Mapping[str, str]]] = {
    "nobody": (None, {}),
    "a dead session": ("long-since-logged-out", {"Sec-Fetch-Site": "same-origin"}),
    "a wrong token": (None, {"Authorization": "Bearer wrong"}),
    "a wrong token with a cookie": ("session", {"Authorization": "Bearer wrong"}),
    "the token": (None, {"Authorization": f"Bearer {TOKEN}"}),
    "the token from another site": (
        None,
        {"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"},
    ),
    "our page": ("session", {"Sec-Fetch-Site": "same-origin", "Origin": ADDRESS}),
    "another site": ("session", {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}),
    "another port": ("session", {"Origin": "http://127.0.0.1:9999"}),
    "no origin": ("session", {}),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("matrix"), token=TOKEN)
    app = create_app(settings)
    with TestClient(app, base_url=ADDRESS, follow_redirects=False) as client:
        close_streams(app)  # else the stream of all jobs is answered without end
        yield client


def _routes(client: TestClient) -> dict[str, set[str]]:
    """Path, with ids that nothing has → the methods that some route declares for it."""
    declared = [
        route for route in iter_route_contexts(client.app.routes) if route.path != "/static"
    ]
    found = {}
    for route in declared:
        path = re.sub(r"\{[^}]*\}", "999999", route.path)
        alike = (other for other in declared if _pattern(other.path).fullmatch(path))
        found[path] = set[str]().union(*(other.methods for other in alike))
    return found


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(path)))


def _is_right(
    path: str, methods: set[str], method: str, who: str, status: int, location: str
) -> bool:
    is_asked_to_log_in = status == 401 or (status == 303 and location == "/login")
    if method not in methods:
        return status == 405
    if who.startswith("a wrong token") and (method, path) not in OPEN:
        return status == 401
    if (method, path) in OPEN:
        refuses_others = method == "POST" and who not in ("our page", "a dead session")
        return status == 403 if refuses_others else status in (200, 403, 422)
    if who in ("nobody", "a dead session"):
        return status == (401 if path.startswith("/api") else 303) and is_asked_to_log_in
    if who in ("another site", "another port", "no origin") and method in UNSAFE:
        return status == 403
    if path == "/logout":
        return is_asked_to_log_in
    return status < 500 and status not in (403, 405) and not is_asked_to_log_in


@pytest.mark.parametrize("who", ASKERS)
def test_everybody_is_answered_as_declared(client: TestClient, who: str) -> None:
    cookie, headers = ASKERS[who]
    service = client.app.state.service
    if cookie == "session":
        cookie = service.use_link(service.make_link())
    routes, wrong = _routes(client), []
    assert len(routes) > 40
    for path, methods in sorted(routes.items(), key=lambda item: item[0] == "/logout"):
        for method in METHODS:
            if method not in methods and who not in ("nobody", "the token", "our page"):
                continue  # 405 before anybody is asked who they are
            if cookie:
                client.cookies.set(COOKIE, cookie)
            answer = client.request(method, path, headers=headers)
            client.cookies.clear()
            location = answer.headers.get("Location", "")
            if not _is_right(path, methods, method, who, answer.status_code, location):
                wrong.append(f"{method} {path}: {answer.status_code} {location}")
            assert TOKEN not in answer.text
    assert wrong == []

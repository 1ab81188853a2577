"""The door: who comes in, from where, with how much, and what every answer carries."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Depends, FastAPI
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.web import guard
from app.web.api.body import parse_json
from app.web.errors import to_json

ADDRESS = "http://127.0.0.1:8000"
TOKEN = "a-token-for-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("door"), token=TOKEN)
    with TestClient(create_app(settings), base_url=ADDRESS, follow_redirects=False) as client:
        yield client


@pytest.fixture
def browser(client: TestClient) -> Iterator[TestClient]:
    """The same server, seen by a browser that has logged in."""
    link = client.app.state.service.make_link()
    answer = client.post("/login", data={"link": link}, headers=OWN_PAGE)
    assert answer.status_code == 303
    yield client
    client.cookies.clear()


# ------------------------------------------------------------------------------------- declarations


def test_every_route_refuses_strangers_unless_declared_for_anyone(client: TestClient) -> None:
    open_to_anyone = set()
    for route in iter_route_contexts(client.app.routes):
        if route.path == "/static":
            continue
        path = re.sub(r"\{[^}]*\}", "1", route.path)
        for method in route.methods:
            status = client.request(method, path).status_code
            if status not in (401, 303):
                open_to_anyone.add((method, route.path))
            elif status == 303:
                assert not path.startswith("/api")
    assert open_to_anyone == {("GET", "/api/health"), ("GET", "/login"), ("POST", "/login")}


def test_an_undeclared_route_keeps_the_server_from_starting() -> None:
    site = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @site.get("/declared", dependencies=[Depends(guard.anyone)])
    def declared() -> None: ...

    guard.check_declared(site)

    @site.delete("/forgotten")
    def forgotten() -> None: ...

    @site.get("/both", dependencies=[Depends(guard.anyone), Depends(guard.signed_in)])
    def both() -> None: ...

    with pytest.raises(RuntimeError, match=r"DELETE /forgotten; GET /both"):
        guard.check_declared(site)


# -------------------------------------------------------------------------------------------- login


@pytest.mark.parametrize(
    "header",
    ["Bearer wrong", "Bearer ", "Bearer", "", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"],
)
@pytest.mark.parametrize("path", ["/api/jobs", "/jobs"])
def test_a_wrong_bearer_is_a_401_even_with_a_cookie(
    browser: TestClient, header: str, path: str
) -> None:
    answer = browser.get(path, headers={"Authorization": header.encode()})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert TOKEN not in answer.text


def test_a_stranger_is_sent_to_the_login_page_and_a_script_is_not(client: TestClient) -> None:
    assert client.get("/jobs").headers["Location"] == "/login"
    assert client.get("/jobs", headers={"HX-Request": "true"}).headers["HX-Redirect"] == "/login"
    problem = client.get("/api/jobs")
    assert problem.status_code == 401
    assert problem.headers["Content-Type"] == "application/problem+json"


def test_a_link_lets_in_once_and_looking_at_it_does_not_spend_it(client: TestClient) -> None:
    link = client.post("/api/links", headers=BEARER).json()["url"]
    assert link.startswith(f"{ADDRESS}/login?link=")
    for _ in range(2):
        page = client.get(link)
        assert page.status_code == 200
        assert page.headers["Cache-Control"] == "no-store"
    form = {"link": link.partition("link=")[2]}
    answer = client.post("/login", data=form, headers=OWN_PAGE)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("frostline-8000=")
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert client.get("/api/jobs").status_code == 200
    client.cookies.clear()
    again = client.post("/login", data=form, headers=OWN_PAGE)
    assert again.status_code == 403
    assert "frostline link" in again.text
    assert "Set-Cookie" not in again.headers


def test_logging_out_ends_the_session_on_the_server(browser: TestClient) -> None:
    cookies = dict(browser.cookies)
    assert browser.post("/logout", headers=OWN_PAGE).headers["Location"] == "/login"
    browser.cookies.clear()
    browser.cookies.update(cookies)
    assert browser.get("/api/jobs").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": ADDRESS}, 201),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 201),
        ({}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}, 403),
    ],
)
def test_a_cookie_changes_things_only_from_our_own_pages(
    browser: TestClient, headers: dict[str, str], status: int
) -> None:
    assert browser.post("/api/links", headers=headers).status_code == status
    link = browser.app.state.service.make_link()
    login = browser.post("/login", data={"link": link}, headers=headers).status_code
    assert login == (303 if status == 201 else 403)


def test_a_bearer_needs_no_origin(client: TestClient) -> None:
    headers = {**BEARER, "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert client.post("/api/links", headers=headers).status_code == 201


# ------------------------------------------------------------------------------------ host and size


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "[::1]:8000", "[::1]", "LOCALHOST"])
def test_loopback_names_are_answered_whatever_the_port(client: TestClient, host: str) -> None:
    assert client.get("/api/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8000",
        "",
        "localhost.",
        "a@localhost",
    ],
)
def test_any_other_host_is_refused_before_routing(client: TestClient, host: str) -> None:
    for path in ("/api/health", "/static/app.css", "/nothing"):
        answer = client.get(path, headers={"Host": host, **BEARER})
        assert answer.status_code == 400
        assert "FROSTLINE_ALLOWED_HOSTS" in answer.json()["detail"]


def test_a_name_on_the_list_is_answered(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, allowed_hosts=("gpu.lab",), host="::1")
    assert {"gpu.lab", "[::1]", "localhost"} <= guard.Guard(FastAPI(), settings).hosts


@pytest.mark.parametrize(
    ("path", "limit"), [("/api/models", 1 << 20), ("/api/models/1/configs/import", 8 << 20)]
)
@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_over_the_limit_is_a_413(
    client: TestClient, path: str, limit: int, chunked: bool
) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        for start in range(0, size, 65536):
            yield b" " * min(65536, size - start)

    for size, status in ((limit, 400), (limit + 1, 413)):
        body = chunks(size) if chunked else b" " * size
        answer = client.post(path, content=body, headers=BEARER)
        assert answer.status_code == status
        assert answer.json()["status"] == status


def test_every_answer_carries_the_security_headers(client: TestClient) -> None:
    answers = [
        client.get("/api/health"),
        client.get("/api/jobs"),
        client.get("/login"),
        client.get("/nothing"),
        client.get("/api/health", headers={"Host": "evil.example"}),
        client.post("/api/models", content=b" " * (2 << 20), headers=BEARER),
    ]
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_a_fault_of_ours_is_a_500_without_a_traceback(tmp_path: Path) -> None:
    site = FastAPI()

    @site.get("/api/broken")
    def broken() -> None:
        raise ZeroDivisionError("a secret")

    site.add_middleware(guard.Guard, settings=Settings(data_dir=tmp_path))
    client = TestClient(site, base_url=ADDRESS, raise_server_exceptions=False)
    answer = client.get("/api/broken")
    assert answer.status_code == 500
    assert answer.json()["title"] == "Internal Server Error"
    assert "secret" not in answer.text
    assert "Content-Security-Policy" in answer.headers


@pytest.mark.parametrize(
    ("changes", "is_safe"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "127.8.8.8"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "192.168.0.7"}, False),
        ({"host": "gpu.lab"}, False),
        ({"host": "0.0.0.0", "behind_proxy": True}, True),
        ({"host": "0.0.0.0", "insecure_http": True}, True),
    ],
)
def test_an_address_that_others_reach_must_be_asked_for(
    tmp_path: Path, changes: dict[str, object], is_safe: bool
) -> None:
    settings = Settings(data_dir=tmp_path, **changes)
    if is_safe:
        guard.check_exposure(settings)
    else:
        with pytest.raises(ValueError, match="--insecure-http"):
            guard.check_exposure(settings)


# --------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{'uri': 1}", "not JSON"),
        (b'{"uri": NaN}', "NaN"),
        (b'{"uri": -Infinity}', "Infinity"),
        (b'{"uri": 1e400}', "too large"),
        (b'{"uri": 9223372036854775808}', "64 bits"),
        (b'{"uri": ' + b"9" * 100_000 + b"}", "64 bits"),
        (b'{"uri": 1, "uri": 2}', "twice"),
        (b'{"uri": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"uri": "\xff"}', "UTF-8"),
        (b"[" * 33 + b"]" * 33, "32 levels"),
        (b"[" * 500_000, "32 levels"),
        (b'{"a":' * 200_000, "32 levels"),
    ],
)
def test_json_that_readers_disagree_on_is_a_400_in_words(
    client: TestClient, body: bytes, word: str
) -> None:
    answer = client.post("/api/models", content=body, headers=BEARER)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert word in answer.json()["detail"]
    assert len(answer.text) < 400


@pytest.mark.parametrize("body", [b"[]", b"3", b'"text"', b"null"])
def test_json_that_is_no_object_is_a_422(client: TestClient, body: bytes) -> None:
    assert client.post("/api/models", content=body, headers=BEARER).status_code == 422


def test_json_as_deep_and_as_large_as_allowed_is_read() -> None:
    assert parse_json(b"[" * 32 + b"]" * 32)
    assert parse_json(
        "\ufeff".encode() + b'{"a": -9223372036854775808, "b": "\\ud83e\\uddca"}'
    ) == {
        "a": -(2**63),
        "b": "\U0001f9ca",
    }


def test_numbers_that_json_lacks_are_named_in_answers() -> None:
    answer = to_json({"values": [float("nan"), (float("inf"), -float("inf"), 1.5, None)]})
    assert json.loads(answer) == {"values": ["NaN", ["Infinity", "-Infinity", 1.5, None]]}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/nothing", 404),
        ("PUT", "/api/jobs", 405),
        ("GET", "/api/jobs/0", 404),
        ("GET", "/api/jobs/x", 404),
        ("GET", f"/api/jobs/{2**63}", 404),
        ("GET", "/api/jobs/999", 404),
        ("GET", "/api/jobs?limit=0", 422),
        ("GET", "/api/jobs?before=1e9", 422),
        ("GET", f"/api/jobs?before={2**63}", 422),
        ("GET", "/api/jobs/999/layers?stat=size", 422),
        ("GET", "/api/jobs/999/events", 404),
        ("GET", "/api/jobs/999/metrics", 404),
        ("GET", "/api/models/999/tree", 404),
        ("DELETE", "/api/configs/999", 404),
        ("POST", "/api/jobs/999/stop", 404),
        ("GET", "/api/tasks/999", 404),
    ],
)
def test_every_refusal_is_a_problem_document(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path, headers=BEARER)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"].endswith(".")


def test_a_page_that_is_not_there_is_a_page(browser: TestClient) -> None:
    answer = browser.get("/nothing/<script>")
    assert answer.status_code == 404
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "<script>alert" not in answer.text
    assert "/nothing/<script>" not in answer.text

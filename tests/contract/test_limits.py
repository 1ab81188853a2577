"""The door's limits and its log: failed logins, event streams, who changed what."""

import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import HTTPException
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.web import limits

ADDRESS = "http://127.0.0.1:8000"
TOKEN = "a-token-for-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(data_dir=tmp_path, token=TOKEN)
    with TestClient(create_app(settings), base_url=ADDRESS, follow_redirects=False) as client:
        yield client


def test_failed_logins_are_limited_and_a_success_forgets_them(client: TestClient) -> None:
    def log_in(link: str) -> int:
        return client.post("/login", data={"link": link}, headers=OWN_PAGE).status_code

    assert [log_in("guess") for _ in range(9)] == [403] * 9
    assert log_in(client.app.state.service.make_link()) == 303
    assert [log_in("guess") for _ in range(10)] == [403] * 10
    good = client.app.state.service.make_link()
    answer = client.post("/login", data={"link": good}, headers=OWN_PAGE)
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert "frostline link" in answer.text
    # A session and a token are no logins: who is in stays in.
    assert client.get("/api/jobs").status_code == 200
    assert client.get("/api/jobs", headers=BEARER).status_code == 200


def test_failures_count_for_a_minute_and_for_their_own_address() -> None:
    now = [0.0]
    failed = limits.FailedLogins(clock=lambda: now[0])
    for second in range(limits.FAILED_LOGINS):
        now[0] = float(second)
        failed.check("here")
        failed.add("here")
    with pytest.raises(HTTPException, match="Wait 51 s"):
        failed.check("here")
    failed.check("elsewhere")
    now[0] = 60.5
    failed.check("here")


def test_streams_are_limited(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client.app.state.open_streams.count = limits.STREAMS
    answer = client.get("/api/events", headers=BEARER)
    assert answer.status_code == 429
    assert answer.headers["Retry-After"]
    client.app.state.open_streams.count = 0
    streams = limits.OpenStreams()
    with streams.one_more():
        assert streams.count == 1
    assert streams.count == 0


def test_changes_are_written_down_without_secrets(client: TestClient, tmp_path: Path) -> None:
    link = client.app.state.service.make_link()
    client.post("/login", data={"link": link}, headers=OWN_PAGE)
    client.post("/api/models", json={"uri": "demo:three-layers"}, headers=OWN_PAGE)
    client.post("/api/models/999/plan", json={}, headers=BEARER)
    client.post("/api/links?secret=in-the-query", headers=BEARER)
    client.post("/api/links", headers={"Authorization": "Bearer wrong-token"})
    client.get("/api/jobs", headers=BEARER)
    file = tmp_path / "audit.log"
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    told = [(line["who"][:7], line["method"], line["path"], line["status"]) for line in lines]
    assert told == [
        ("nobody", "POST", "/login", 303),
        ("session", "POST", "/api/models", 202),
        ("token", "POST", "/api/models/999/plan", 404),
        ("token", "POST", "/api/links", 201),
        ("nobody", "POST", "/api/links", 401),
    ]
    assert all(line["from"] and line["time"] for line in lines)
    for secret in (TOKEN, link, "wrong-token", "in-the-query"):
        assert secret not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_asking_for_a_plan_is_no_change(client: TestClient, tmp_path: Path) -> None:
    model = client.post("/api/models", json={"uri": "demo:three-layers"}, headers=BEARER).json()
    path = f"/api/models/{model['id']}"
    pause = threading.Event()
    while client.get(path, headers=BEARER).json()["state"] == "inspecting":
        pause.wait(0.05)
    assert client.post(f"{path}/plan", json={}, headers=BEARER).status_code == 200
    assert "/plan" not in (tmp_path / "audit.log").read_text()

"""What many ask for at once is made once, is never older than the store, and opens no door."""

import asyncio
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.web.shared import Shared

BEARER = {"Authorization": "Bearer a-token-for-tests"}


def test_who_asks_meanwhile_gets_the_same() -> None:
    made: list[str] = []
    gate = threading.Event()

    def make() -> str:
        made.append("made")
        gate.wait(5)
        return f"answer {len(made)}"

    async def ask() -> tuple[list[str], str]:
        shared = Shared()
        first = asyncio.create_task(shared.get("key", make))
        others = [asyncio.create_task(shared.get("key", make)) for _ in range(20)]
        await asyncio.sleep(0)
        first.cancel()  # who goes away takes it from nobody else
        asyncio.get_running_loop().call_soon(gate.set)
        return await asyncio.gather(*others), await shared.get("another key", make)

    same, other = asyncio.run(ask())
    assert same == ["answer 1"] * 20
    assert other == "answer 2"


def test_a_failure_is_everybodys_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.web.shared.KEPT_S", 0.0)

    def fail() -> None:
        raise LookupError("gone")

    async def ask() -> tuple[list[object], str]:
        shared = Shared()
        failures = await asyncio.gather(
            *(shared.get("key", fail) for _ in range(3)), return_exceptions=True
        )
        while shared._made:
            await asyncio.sleep(0)
        return failures, await shared.get("key", lambda: "there again")

    failures, answer = asyncio.run(ask())
    assert [str(failure) for failure in failures] == ["gone"] * 3
    assert answer == "there again"


def test_a_shared_answer_is_for_those_who_are_let_in(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, token="a-token-for-tests")
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        for path in ("/api/jobs/1/metrics", "/api/jobs/1/layers"):
            assert client.get(path, headers=BEARER).status_code == 404
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer x"}).status_code == 401

"""The hub's answers as sentences: a stand-in on the loopback refuses, is slow, or is not there."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.own_files import write_model

BUILD = """
import sys
from app.sources.models import build_model
from app.sources.spec import ModelSpec
from app.freezing.errors import InvalidDocument

uri, revision = sys.argv[1], sys.argv[2] or None
try:
    built = build_model(ModelSpec(uri, revision=revision), code_dirs=[])
    print("BUILT", type(built.model).__name__)
except InvalidDocument as error:
    print("REFUSED", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Has one model, org/small, and refuses the others as the real one does."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        if self.path == "/":
            self._send(200, b"", {})
            return
        if "/resolve/" not in self.path:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        _, name, _, revision, file = self.path.lstrip("/").split("/", 4)
        refused = {
            "gated": (403, "GatedRepo", "Access to model org/gated is restricted."),
            "missing": (401, "RepoNotFound", "Repository Not Found"),
        }.get(name)
        if refused is None and revision != "main":
            refused = (404, "RevisionNotFound", "Invalid rev id")
        path = self.folder / file
        if refused is None and not path.is_file():
            refused = (404, "EntryNotFound", "Entry not found")
        if refused:
            headers = {"X-Error-Code": refused[1], "X-Error-Message": refused[2]}
            self._send(refused[0], refused[2].encode() if with_body else b"", headers)
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{file}-1"', "X-Repo-Commit": "0" * 40}
        self._send(200, content if with_body else b"", headers, len(content))

    def _send(self, status: int, body: bytes, headers: dict[str, str], size: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(size or len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_model(tmp_path_factory.mktemp("hub") / "small", "bert", "BertForMaskedLM")
    handler = type("SmallHub", (Hub,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(endpoint: str, home: Path, name: str, revision: str = "", **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HTTP"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*", **more}
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"hf:{name}", revision]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_comes_with_progress_and_then_from_the_cache(hub: str, tmp_path: Path) -> None:
    said = ask(hub, tmp_path, "org/small")
    assert "Downloading model.safetensors" in said
    assert "(100%)" in said
    assert "BUILT BertForMaskedLM" in said
    offline = ask("http://127.0.0.1:1", tmp_path, "org/small")
    assert "The hub cannot be reached, so only its cache is used" in offline
    assert "BUILT BertForMaskedLM" in offline
    assert "Downloading" not in offline


@pytest.mark.parametrize(
    ("name", "revision", "more", "words"),
    [
        ("org/gated", "", {}, "org/gated is gated: ask for access on its page, then set HF_TOKEN"),
        ("org/missing", "", {}, "There is no model org/missing on the hub, or it is private"),
        ("org/small", "v9", {}, "org/small has no revision 'v9'."),
        ("org/small", "", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "and the hub cannot be reached"),
        ("org/small", "", {"HF_HUB_OFFLINE": "1"}, "and HF_HUB_OFFLINE is set; download it first"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: str, tmp_path: Path, name: str, revision: str, more: dict[str, str], words: str
) -> None:
    said = ask(more.pop("HF_ENDPOINT", hub), tmp_path, name, revision, **more)
    refusal = said.partition("REFUSED ")[2]
    assert words in refusal
    assert "\n" not in refusal.strip()

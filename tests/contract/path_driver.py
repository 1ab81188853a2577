"""A script in front of a real server: it starts `frostline serve` and speaks the contract alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx2

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-scripts"
ENDED = ("succeeded", "stopped", "failed", "interrupted")
# How long something may take that has not gone wrong, on a machine with other things to do.
PATIENCE_SECONDS = 180
LOOK_SECONDS = 0.05

Answer = TypeVar("Answer")


def until(claim: Callable[[], Answer | None], what: Callable[[], object] = lambda: "") -> Answer:
    """Wait for an answer that is true; the contract has nothing to wait on but the streams."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    between_looks = threading.Event()
    while not (answer := claim()):
        assert time.monotonic() < deadline, f"Not within {PATIENCE_SECONDS} s: {what()}"
        between_looks.wait(LOOK_SECONDS)
    return answer


class Event(NamedTuple):
    """One Server-Sent Event."""

    name: str
    data: Any
    id: str


class Script:
    """What somebody has who has an address and a token."""

    def __init__(self, http: httpx2.Client, process: subprocess.Popen[bytes]) -> None:
        self.http = http
        self.process = process

    def call(self, method: str, path: str, status: int, body: Any = None, **query: Any) -> Any:
        """One request that must have that status; its document."""
        answer = self.http.request(method, f"/api{path}", json=body, params=query)
        assert answer.status_code == status, f"{method} {path}: {answer.text}"
        return answer.json() if answer.content else None

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, 200, **query)

    def is_refused(
        self, method: str, path: str, status: int, body: Any = None, *words: str, **options: Any
    ) -> dict[str, Any]:
        """One request that must be refused in one clear sentence with these words in it."""
        options = {"json": body, **options} if body is not None else options
        answer = self.http.request(method, f"/api{path}", **options)
        assert answer.status_code == status, f"{method} {path}: {answer.text}"
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem: dict[str, Any] = answer.json()
        assert problem["status"] == status
        assert problem["title"]
        detail = problem["detail"]
        assert re.fullmatch(r"[^\n]{10,400}\.", detail), detail
        assert "Traceback" not in detail
        for word in words:
            assert word in detail, detail
        for fault in problem.get("errors", []):
            assert fault.keys() == {"field", "message"}
        return problem

    def add_model(self, **spec: Any) -> dict[str, Any]:
        """Add a model and wait until a worker has inspected it, or has failed to."""
        added = self.call("POST", "/models", 202, spec)
        assert added["state"] == "inspecting"
        return self.until(f"/models/{added['id']}", lambda model: model["state"] != "inspecting")

    def until(self, path: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for a document until it is as wanted."""
        latest: dict[str, Any] = {}

        def is_there() -> bool:
            latest.clear()
            latest.update(self.get(path))
            return is_so(latest)

        until(is_there, lambda: latest)
        return latest

    def until_ended(self, job_id: int) -> dict[str, Any]:
        return self.until(f"/jobs/{job_id}", lambda job: job["state"] in ENDED)

    @contextlib.contextmanager
    def events(self, path: str, last_id: str | None = None) -> Iterator[Iterator[Event]]:
        """A stream of events, which goes on behind an id where one is given."""
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        with self.http.stream("GET", f"/api{path}", headers=headers) as answer:
            assert answer.status_code == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            yield _read_events(answer.iter_lines())


def _read_events(lines: Iterable[str]) -> Iterator[Event]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    fields: dict[str, str] = {}
    for line in lines:
        assert time.monotonic() < deadline, "The stream does not come to its end."
        name, _, value = line.partition(": ")
        if line and name:  # a comment, which keeps the connection open, has no name
            fields[name] = fields.get(name, "") + value
        elif not line and "event" in fields:
            yield Event(fields["event"], json.loads(fields["data"]), fields["id"])
            fields = {}


@contextlib.contextmanager
def serving(data_dir: Path, **variables: str) -> Iterator[Script]:
    """`frostline serve` on a free port, until the script is done; its jobs end with it.

    Args:
        variables: ``FROSTLINE_*`` variables, without the prefix.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FROSTLINE_")}
    given = {"DATA_DIR": str(data_dir), "TOKEN": TOKEN, **variables}
    output = data_dir.with_name(f"{data_dir.name}.out")
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0", "--no-open", "--stop-jobs"],
            cwd=ROOT,
            env={**kept, **{f"FROSTLINE_{name}": value for name, value in given.items()}},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    with (
        _ending(process, data_dir),
        httpx2.Client(
            base_url=_find_address(process, output),
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=PATIENCE_SECONDS,
            trust_env=False,  # no proxy knows this machine's loopback
        ) as http,
    ):
        script = Script(http, process)
        until(lambda: script.get("/health")["workers"])
        yield script
        assert process.poll() in (None, 0), f"The server has ended: {output.read_text()}"


def _find_address(process: subprocess.Popen[bytes], output: Path) -> str:
    def is_printed() -> re.Match[str] | None:
        assert process.poll() is None, f"The server did not start: {output.read_text()}"
        return re.search(r"(http://\S+)/login\?link=\S+", output.read_text())

    return until(is_printed, output.read_text)[1]


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes], data_dir: Path) -> Iterator[None]:
    """Leave no process behind: neither the server nor the one that its workers came from."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
            process.wait()
    if (data_dir / "warm.lock").exists():
        with (data_dir / "warm.lock").open("rb") as lock:
            until(lambda: _is_free(lock.fileno()), lambda: "The keeper does not leave.")


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ------------------------------------------------------------------------- what the database says


def read_database(data_dir: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """A query as anybody asks it who opens the file beside the running server."""
    address = f"{(data_dir / 'frostline.db').as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
        return database.execute(query, values).fetchall()


def check_records(data_dir: Path, job: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Compare `layer_stats` and `metrics` of an ended job with what the plan had promised."""
    steps = list(range(1, job["step"] + 1))
    stats = "SELECT step, grad_norm, update_norm, weight_norm FROM layer_stats"
    layers = "SELECT DISTINCT layer FROM layer_stats WHERE job_id = ?"
    recorded = {path for (path,) in read_database(data_dir, layers, job["id"])}
    assert recorded == {layer["path"] for layer in plan["layers"]}
    for layer in plan["layers"]:
        where = f"{stats} WHERE job_id = ? AND layer = ? ORDER BY step"
        rows = read_database(data_dir, where, job["id"], layer["path"])
        assert [step for step, *_ in rows] == steps, layer["path"]
        gradients, updates, weights = ([row[column] for row in rows] for column in (1, 2, 3))
        assert all(isinstance(value, float) for value in updates + weights), layer["path"]
        if layer["weight_gradient"]:
            assert all(isinstance(value, float) and value >= 0 for value in gradients), layer
        else:
            assert set(gradients) == {None}, layer
        if layer["flow"] == "trained":
            assert updates[0] > 0, layer
        else:
            assert set(updates) == {0.0}, layer
    series = "SELECT step FROM metrics WHERE job_id = ? AND name = ? ORDER BY step"
    for name in ("loss", "lr", "grad_norm_total"):
        assert [step for (step,) in read_database(data_dir, series, job["id"], name)] == steps, name
    evaluated = [step for (step,) in read_database(data_dir, series, job["id"], "eval/eval/loss")]
    assert evaluated[0] == 0
    assert evaluated == sorted(set(evaluated))
    missing = "SELECT count(*) FROM metrics WHERE job_id = ? AND value IS NULL"
    assert read_database(data_dir, missing, job["id"]) == [(0,)]

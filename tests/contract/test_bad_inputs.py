"""Bad input at every entry point: a refusal in words, never a fault, and the server goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import fields
from html.parser import HTMLParser
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
import pytest

from app.cli import main
from app.freezing.config import FreezeConfig
from app.service.jobs import JOB_MEMBERS
from app.sources.spec import DatasetSpec, ModelSpec
from app.training.recipe import OPTIONS
from tests.contract import bad_inputs as bad
from tests.contract.path_driver import ROOT, TOKEN, Script, serving

OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
RULES = [{"action": "freeze", "match": "l1"}]
LONGEST_SECONDS = 10  # no request comes near it; only a hang would
SECRETS = re.compile(rf"{TOKEN}|Traceback \(most recent call last\)|/site-packages/")
SHOWN = 300


class Prober:
    """Sends what is bad, and keeps a list of what was answered badly."""

    def __init__(self, script: Script, data_dir: Path, model: int, job: int) -> None:
        self.script, self.http = script, script.http
        self.data_dir, self.model, self.job = data_dir, model, job
        self.wrong: list[str] = []

    def send(self, what: str, method: str, path: str, **options: Any) -> httpx2.Response:
        """One request, whose answer must be none of a fault, a traceback, a secret."""
        try:
            with self.http.stream(method, path, timeout=LONGEST_SECONDS, **options) as answer:
                is_endless = answer.headers.get("Content-Type", "").startswith("text/event-stream")
                text = "" if is_endless else answer.read().decode(errors="replace")
        except httpx2.HTTPError as error:
            raise AssertionError(f"{what}: {method} {path[:SHOWN]}: {error!r}") from error
        self.judge(f"{what}: {method} {path[:SHOWN]}", answer.status_code, text)
        if answer.status_code >= 400 and path.startswith("/api"):
            is_problem = answer.headers["Content-Type"] == "application/problem+json"
            if not is_problem or not re.fullmatch(r"[^\n]{8,1000}\.", json.loads(text)["detail"]):
                self.wrong.append(f"{what}: {method} {path[:SHOWN]}: {text[:SHOWN]}")
        return answer

    def judge(self, what: str, status: int, text: str) -> None:
        if status >= 500 or SECRETS.search(text):
            self.wrong.append(f"{what}: {status} {text[:SHOWN]}")

    def conclude(self) -> None:
        assert self.script.get("/health")["status"] == "ok"
        assert self.script.get(f"/models/{self.model}")["state"] == "ready"
        assert not self.wrong, "\n".join(self.wrong[:20])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Script, Path, int, int]]:
    """A server whose only slot is taken, so that what is accepted by mistake only waits."""
    data_dir = tmp_path_factory.mktemp("bad")
    files = tmp_path_factory.mktemp("files")
    with serving(data_dir, FILE_DIRS=str(files), CPU_SLOTS="1") as script:
        model = script.add_model(uri="demo:three-layers")["id"]
        digits = script.add_model(uri="demo:digits")["id"]
        spec = {"model_id": digits, "config": {}, "dataset": {"uri": "demo:digits"}}
        job = script.call("POST", "/jobs", 201, {**spec, "training": {"epochs": 10**6}})["id"]
        script.until(f"/jobs/{job}", lambda job: job["state"] == "running")
        script.call("POST", f"/jobs/{job}/pause", 202, {"mode": "hold"})
        script.until(f"/jobs/{job}", lambda job: job["state"] == "paused")
        yield script, data_dir, model, job


@pytest.fixture
def prober(server: tuple[Script, Path, int, int]) -> Iterator[Prober]:
    prober = Prober(*server)
    yield prober
    prober.conclude()


def test_there_are_three_hundred_of_them() -> None:
    tables = (bad.BODIES, bad.VALUES, bad.MODEL_URIS, bad.DATASET_URIS, bad.RULES, bad.PATHS)
    more = (bad.QUERY_VALUES, bad.REQUESTS, bad.WEIGHTS, bad.COMMANDS)
    inside = (bad.SPOOL_RECORDS, bad.RESULTS, bad.MANIFESTS)  # tests/worker, tests/unit
    assert sum(map(len, (*tables, *more, *inside))) >= 500
    for table in (bad.MODEL_URIS, bad.DATASET_URIS, bad.PATHS, bad.QUERY_VALUES):
        assert len(set(table)) == len(table)


# ------------------------------------------------------------------------------------------ the API


def _operations(prober: Prober) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every described method and path; a job's and a model's id are mostly ones that exist."""
    for path, operations in prober.script.get("/openapi.json")["paths"].items():
        # The held job must not go on: it would take a core from everything after.
        job = 999_999 if path.endswith("/resume") else prober.job
        filled = path.replace("{model_id}", str(prober.model)).replace("{job_id}", str(job))
        for method, operation in operations.items():
            yield method.upper(), re.sub(r"\{[^}]*\}", "1", filled), operation


def test_bodies_that_are_no_documents(prober: Prober) -> None:
    count = 0
    for method, path, operation in _operations(prober):
        if "requestBody" not in operation:
            continue
        for name, body in bad.BODIES.items():
            answer = prober.send(name, method, path, content=body)
            is_optional = not body.strip()
            if answer.status_code < 400 and not is_optional:
                prober.wrong.append(f"{name} was taken by {method} {path}")
            count += 1
    assert count > 300


def _members(kind: str) -> tuple[str, ...]:
    return {
        "model": tuple(one.name for one in fields(ModelSpec)),
        "config": (*(one.name for one in fields(FreezeConfig)), "format", "version", "frozen"),
        "dataset": tuple(one.name for one in fields(DatasetSpec)),
        "training": tuple(option.name for option in OPTIONS),
        "job": JOB_MEMBERS,
    }[kind]


def _documents(prober: Prober) -> Iterator[tuple[str, str, Callable[[str, Any], dict[str, Any]]]]:
    """(path, kind of its members, a document with one member replaced)."""
    job = {"model_id": prober.model, "config": {"rules": RULES}, "dataset": {"uri": "demo:digits"}}
    yield "/api/models", "model", lambda key, value: {"uri": "demo:nothing", key: value}
    for path in ("plan", "configs/import"):
        path = f"/api/models/{prober.model}/{path}"
        yield path, "config", lambda key, value: {"rules": RULES, key: value}
    yield "/api/jobs", "job", lambda key, value: {**job, key: value}
    yield "/api/jobs", "training", lambda key, value: {**job, "training": {key: value}}
    yield (
        "/api/jobs",
        "dataset",
        lambda key, value: {**job, "dataset": {"uri": "demo:digits", key: value}},
    )


def test_values_of_every_kind_in_every_member(prober: Prober) -> None:
    """Twenty of the values in each member, in rotation, so that each one gets everywhere."""
    values, count = cycle(bad.VALUES.items()), 0
    for path, kind, make in _documents(prober):
        for member in _members(kind):
            for name, value in islice(values, 20):
                body = json.dumps(make(member, value)).encode()
                prober.send(f"{name} as {member} of a {kind}", "POST", path, content=body)
                count += 1
    assert count > 1000


def test_values_of_every_kind_in_what_steers_a_job(prober: Prober) -> None:
    values = cycle(bad.VALUES.items())
    requests = [
        ("PATCH", f"/api/jobs/{prober.job}", ("name", "notes", "state", "step")),
        ("PATCH", f"/api/jobs/{prober.job}/freeze", ("rules", "optimizer_state")),
        ("POST", "/api/jobs/999999/resume", ("config", "training")),
        ("POST", f"/api/jobs/{prober.job}/pause", ("mode",)),
    ]
    for method, path, members in requests:
        for member in members:
            for name, value in islice(values, 30):
                body = json.dumps({member: value}).encode()
                prober.send(f"{name} as {member}", method, path, content=body)


@pytest.mark.parametrize("uri", ["model", "dataset"])
def test_uris(prober: Prober, uri: str) -> None:
    table = bad.MODEL_URIS if uri == "model" else bad.DATASET_URIS
    spec = {"model_id": prober.model, "config": {"rules": RULES}}
    accepted = []
    for text in table:
        if uri == "model":
            answer = prober.send(text, "POST", "/api/models", json={"uri": text})
        else:
            answer = prober.send(text, "POST", "/api/jobs", json={**spec, "dataset": {"uri": text}})
        if answer.status_code < 400:
            accepted.append(text)
    # Names that only the library or the hub can know fail later, with a reason; and a module that
    # is there is taken at its word.
    later = ("hf:", "timm:", "torchvision:", "python:app.")
    assert [text for text in accepted if not text.startswith(later)] == []


def test_rules(prober: Prober) -> None:
    path = f"/api/models/{prober.model}/plan"
    linear = (
        "(a+)+$",
        "(.*a)",
        "((((",
        "(?x)",
        "a?a?",
        "has:",
        "**.",
        "*a*a",
        "****",
        "{9..0}",
        "re:",
    )
    for rule in bad.RULES:
        answer = prober.send(repr(rule)[:80], "POST", path, json={"rules": [rule]})
        assert answer.status_code in (200, 422)
        match = rule.get("match") if isinstance(rule, dict) else None
        if answer.status_code == 200 and not any(mark in str(match) for mark in linear):
            assert match in (bad.MARKUP, "a\x00b", "\u202e**", "a..b"), rule
    many = [{"action": "freeze", "match": f"re:(x{n}+)+$"} for n in range(2_000)]
    prober.send("two thousand rules", "POST", path, json={"rules": many})


def test_parameters_of_addresses(prober: Prober) -> None:
    count = 0
    for method, path, operation in _operations(prober):
        if method != "GET":
            continue
        for parameter in operation.get("parameters", ()):
            if parameter["in"] != "query":
                continue
            for value in bad.QUERY_VALUES:
                query = {parameter["name"]: value}
                prober.send(parameter["name"], "GET", path, params=query)
                count += 1
            twice = f"{path}?{parameter['name']}=1&{parameter['name']}=x"
            prober.send(f"{parameter['name']} twice", "GET", twice)
    assert count > 300


# ------------------------------------------------------------------------------------ below the API


def _speak(prober: Prober, request: bytes) -> bytes:
    """One connection: the request as it is, and what comes back until the end of the answer."""
    address = urlsplit(str(prober.http.base_url))
    with socket.create_connection((address.hostname, address.port), LONGEST_SECONDS) as line:
        try:
            line.sendall(request)
            line.shutdown(socket.SHUT_WR)
            answer = b""
            while len(answer) < 1 << 20 and (piece := line.recv(65536)):
                answer += piece
        except ConnectionError:  # hung up on: an answer too
            return b""
        return answer


def test_request_lines_and_hosts_as_no_library_sends_them(prober: Prober) -> None:
    for name, request in bad.REQUESTS.items():
        answer = _speak(prober, request)
        text = answer.decode(errors="replace")
        statuses = [int(code) for code in re.findall(r"^HTTP/1\.[01] (\d{3})", text, re.MULTILINE)]
        for status in statuses:
            prober.judge(name, status, text)
        if "Host" in name and 200 in statuses:
            prober.wrong.append(f"{name} was answered: {text[:SHOWN]}")
        if '"worker_pid"' in text or '"state":' in text:
            prober.wrong.append(f"{name} read what needs a login: {text[:SHOWN]}")


def test_addresses_as_no_library_sends_them(prober: Prober) -> None:
    source = (ROOT / "app/main.py").read_text("utf-8")[:60]
    for path in bad.PATHS:
        target = quote(path, safe="/?=&%,:;+$.-_~!*()").encode()
        request = b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\n\r\n"
        answer = _speak(prober, request % (target, TOKEN.encode()))
        text = answer.decode(errors="replace")
        status = re.match(r"HTTP/1\.1 (\d{3})", text)
        prober.judge(path, int(status[1]) if status else 400, text)
        if "root:x:0:0" in text or source in text or "manifest" in text.partition("\r\n\r\n")[2]:
            prober.wrong.append(f"{path[:SHOWN]} gave a file away")


# -------------------------------------------------------------------------------------------- pages


class FormReader(HTMLParser):
    """The forms and the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[tuple[str, str, dict[str, str]]] = []
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if tag == "form":
            self.forms.append((given.get("method", "get").upper(), given.get("action", ""), {}))
        elif tag in ("input", "select", "textarea", "button") and self.forms:
            if "formaction" in given:
                self.forms.append(("POST", given["formaction"], self.forms[-1][2]))
            if "name" in given:
                self.forms[-1][2][given["name"]] = given.get("value", "")
        elif tag == "a" and given.get("href", "").startswith("/"):
            self.links.add(given["href"].partition("#")[0])


NEVER_SENT = re.compile(r"/(logout|login|delete|stop|resume)$|/delete\b")


def _read_pages(browser: Prober) -> Iterator[tuple[str, FormReader]]:
    waiting, seen = [f"/models/{browser.model}", f"/jobs/{browser.job}", "/models"], set[str]()
    while waiting:
        path = waiting.pop(0)
        shape = re.sub(r"\d+", "N", path.partition("?")[0])
        if shape in seen or path.startswith(("/static", "/api")):
            continue
        seen.add(shape)
        answer = browser.http.get(path, headers=OWN_PAGE)
        if "text/html" in answer.headers.get("Content-Type", ""):
            page = FormReader()
            page.feed(answer.text)
            waiting += sorted(page.links)
            yield path, page


@pytest.fixture
def browser(prober: Prober) -> Iterator[Prober]:
    """The same server, seen by a browser that has logged in."""
    link = prober.script.call("POST", "/links", 201)["url"].partition("link=")[2]
    token = prober.http.headers.pop("Authorization")
    answer = prober.http.post("/login", data={"link": link}, headers=OWN_PAGE)
    assert answer.status_code == 303
    yield prober
    prober.http.cookies.clear()
    prober.http.headers["Authorization"] = token


def test_fields_of_every_form(browser: Prober) -> None:
    """Each field of each form gets three of the values, in rotation."""
    values = cycle([str(value) for value in bad.VALUES.values()] + bad.MODEL_URIS)
    tried: set[tuple[str, str]] = set()
    for path, page in _read_pages(browser):
        for method, action, given in page.forms:
            target = action or path
            shape = re.sub(r"\d+", "N", target.partition("?")[0])
            if NEVER_SENT.search(target):
                continue
            for field in given:
                if (shape, field) in tried:
                    continue
                tried.add((shape, field))
                for value in islice(values, 3):
                    content = {**given, field: value}
                    if method == "GET":  # longer ones no client sends
                        content[field] = value[:5_000]
                    options = {"params" if method == "GET" else "data": content}
                    browser.send(f"{field} of {path}", method, target, headers=OWN_PAGE, **options)
    assert len(tried) > 50


def test_forms_that_are_no_forms(browser: Prober) -> None:
    bodies = {
        "json": ("application/json", b'{"uri": "demo:digits"}'),
        "no type": ("", b"uri=x"),
        "an unknown type": ("text/x-nothing", b"uri=x"),
        "not UTF-8": ("application/x-www-form-urlencoded", b"uri=\xff\xfe&name=%ff"),
        "ten thousand fields": (
            "application/x-www-form-urlencoded",
            b"&".join([b"uri=x"] * 10_000),
        ),
        "multipart without a boundary": ("multipart/form-data", b"--b\r\n\r\nx\r\n--b--"),
        "multipart that never ends": ("multipart/form-data; boundary=b", b"--b\r\nContent-Disp"),
        "multipart of another boundary": ("multipart/form-data; boundary=b", b"--c\r\n\r\n--c--"),
        "a file where a text belongs": (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="uri"; filename="../../x"\r\n\r\nx\r\n'
            b"--b--\r\n",
        ),
        "two thousand files": (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\nx\r\n' * 2000
            + b"--b--\r\n",
        ),
    }
    shapes = set[str]()
    for path, page in _read_pages(browser):
        for method, action, _ in page.forms:
            target = action or path
            shape = re.sub(r"\d+", "N", target)
            if method == "GET" or shape in shapes or NEVER_SENT.search(target):
                continue
            shapes.add(shape)
            for name, (kind, body) in bodies.items():
                headers = {**OWN_PAGE, "Content-Type": kind}
                browser.send(name, method, target, content=body, headers=headers)
    assert len(shapes) > 3, shapes


# --------------------------------------------------------------------------------- files, commands


def test_weights_that_are_no_weights(
    prober: Prober, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = next(tmp_path_factory.getbasetemp().glob("files*"))
    added = {}
    for name, content in bad.WEIGHTS.items():
        path = files / f"{quote(name)}.safetensors"
        path.write_bytes(content)
        spec = {"uri": "demo:three-layers", "weights": str(path)}
        answer = prober.send(name, "POST", "/api/models", json=spec)
        if answer.status_code < 400:
            added[name] = json.loads(answer.content)["id"]
    for name, model_id in added.items():
        model = prober.script.until(
            f"/models/{model_id}", lambda model: model["state"] != "inspecting"
        )
        prober.judge(name, 200, json.dumps(model))
        if model["state"] != "failed" or not model["error"]["message"].endswith("."):
            prober.wrong.append(f"{name}: {model['state']} {model['error']}")


def test_checkpoints_that_are_none(prober: Prober) -> None:
    """What user code may leave where checkpoints lie: listed or not, nothing else is given away."""
    folder = prober.data_dir / "jobs" / str(prober.job) / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "step-000000001").write_text("a file")
    (folder / "step-99999999999999999999").mkdir()
    (folder / "step-000000002").symlink_to("/etc")
    for number, (name, manifest) in enumerate(bad.MANIFESTS.items(), start=3):
        step = folder / f"step-{number:09d}"
        step.mkdir()
        (step / "manifest.json").write_bytes(manifest)
        (step / "model.safetensors").symlink_to("/etc/passwd")
        (step / name).mkdir()
    os.mkfifo(step / "fifo")
    steps = (0, 1, 2, 3, number, 99999999999999999999)
    routes = [
        f"/api/jobs/{prober.job}/checkpoints",
        *(f"/api/jobs/{prober.job}/checkpoints/{step}/model.safetensors" for step in steps),
        f"/jobs/{prober.job}",
        f"/api/jobs/{prober.job}/report",
        "/system",
        "/api/system",
    ]
    for path in routes:
        answer = prober.send("checkpoints that are none", "GET", path, headers=OWN_PAGE)
        if answer.status_code == 200 and path.endswith(".safetensors"):
            prober.wrong.append(f"{path} gave away what is no checkpoint's")
    for step in steps:
        path = f"/api/jobs/{prober.job}/checkpoints/{step}"
        assert prober.send("no checkpoint", "DELETE", path).status_code in (404, 409, 422)
    shutil.rmtree(folder)


def test_command_lines(
    prober: Prober, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROSTLINE_DATA_DIR", str(prober.data_dir))
    monkeypatch.setenv("FROSTLINE_TOKEN", TOKEN)
    for command in bad.COMMANDS:
        with pytest.raises(SystemExit) as left:
            main(command)
        told = capsys.readouterr().err.strip().splitlines()
        is_one_line = len(told) == 1 and told[0].startswith("frostline: ")
        if left.value.code not in (1, 2) or not is_one_line:
            prober.wrong.append(f"{' '.join(command)}: {left.value.code} {told}")
        prober.judge(" ".join(command), 400, "\n".join(told))

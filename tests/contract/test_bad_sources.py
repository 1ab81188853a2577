"""Every bad model and dataset of the table, on the page and in the terminal: one clear sentence.

Each entry goes to one server, by the form that somebody would fill in and by the command that
somebody would type. What only a worker finds out of a model it finds out once: the command names
the model by its number. Likewise a job of a text model, which imports Transformers for two seconds:
its page is that of the job which the command began. Everything else is sent twice.
"""

import html
import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.cli import main
from tests.contract.dashboard import TOKEN, serve
from tests.unit.bad_sources import TABLE, Bad, write_shelf

BRIEF = {"max_steps": 2, "batch_size": 4, "device": "cpu"}
MAX_CHARACTERS = 600
WAITING = ("inspecting", "queued", "starting", "running", "stopping")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[httpx2.Client]:
    shelf = write_shelf(tmp_path_factory.mktemp("shelf"))
    with serve(data_dir=data_dir, file_dirs=(shelf,), code_dirs=(shelf,)) as client:
        yield client


def wait_for(door: httpx2.Client, path: str) -> dict[str, Any]:
    """Ask until it waits no more; over HTTP there is nothing to wait on."""
    pause = threading.Event()
    while (document := door.get(path).json())["state"] in WAITING:
        pause.wait(0.05)
    return document


@pytest.fixture(scope="module")
def models(door: httpx2.Client) -> dict[str, int]:
    """The models on which bad data is tried, by their specs."""
    specs = {json.dumps(bad.spec): bad.spec for bad in TABLE if bad.found != "model"}
    ids = {key: door.post("/api/models", json=spec).json()["id"] for key, spec in specs.items()}
    for model_id in ids.values():
        assert wait_for(door, f"/api/models/{model_id}")["state"] == "ready"
    return ids


@pytest.fixture(scope="module")
def answers(door: httpx2.Client, models: Mapping[str, int]) -> dict[str, httpx2.Response]:
    """What forms answered: a page with the sentence, or where a worker's will stand.

    All are sent first: workers inspect the models while the commands run their jobs.
    """
    return {str(bad): send_form(door, models, bad) for bad in TABLE if not is_costly(bad)}


def is_costly(bad: Bad) -> bool:
    return bad.found != "model" and bad.model.startswith("hf:./bert")


def send_form(door: httpx2.Client, models: Mapping[str, int], bad: Bad) -> httpx2.Response:
    if bad.found == "model":
        form = {name: typed(value) for name, value in bad.spec.items()}
        return door.post("/models", data=form)
    assert bad.data is not None
    data = {name: value for name, value in bad.data.items() if name not in ("uri", "columns")}
    data |= {f"columns.{role}": name for role, name in bad.data.get("columns", {}).items()}
    data |= {"dataset": bad.dataset, **BRIEF}
    if "eval" in data:
        data["eval"] = ", ".join(f"{name}={uri}" for name, uri in data["eval"].items())
    form = {f"train.{name}": typed(value) for name, value in data.items()}
    where = "jobs" if bad.found == "job" else "preview"
    return door.post(f"/models/{models[json.dumps(bad.spec)]}/{where}", data=form)


def typed(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else ""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def read_page(door: httpx2.Client, bad: Bad, answer: httpx2.Response) -> str:
    """The page on which the sentence stands, once a worker has come to it."""
    if answer.status_code == 422:
        return answer.text
    assert answer.status_code == 303, answer.text
    place = answer.headers["Location"]
    number = place.partition("?")[0].rpartition("/")[2]
    kind = {"model": "models", "data": "tasks", "job": "jobs"}[bad.found]
    assert wait_for(door, f"/api/{kind}/{number}")["state"] == "failed"
    page = door.get(place)
    assert page.status_code == 200
    return page.text


def type_command(words: list[str], data_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Type a command that fails; its only line of an error."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--data-dir", str(data_dir)])
    printed = capsys.readouterr().err
    assert ended.value.code == 1, printed
    assert "Traceback" not in printed
    *_, line = printed.splitlines()
    assert line.startswith("frostline: ")
    return line.removeprefix("frostline: ")


def test_the_table_is_long_enough() -> None:
    assert len({str(bad) for bad in TABLE}) == len(TABLE) >= 60


# Data first: its jobs have another slot than the inspections.
@pytest.mark.parametrize("bad", sorted(TABLE, key=lambda bad: bad.found), ids=str)
def test_it_is_one_sentence_on_the_page_and_in_the_terminal(
    bad: Bad,
    door: httpx2.Client,
    models: dict[str, int],
    answers: dict[str, httpx2.Response],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FROSTLINE_TOKEN", TOKEN)
    answer = answers.get(str(bad))
    if bad.found == "model":
        assert answer is not None
        page = read_page(door, bad, answer)
        number = answer.headers.get("Location", "").rpartition("/")[2]
        line = type_command(["plan", number or json.dumps(bad.spec)], data_dir, capsys)
    else:
        words = ["train", str(models[json.dumps(bad.spec)]), json.dumps(bad.data)]
        words += [f"--{name.replace('_', '-')}={value}" for name, value in BRIEF.items()]
        line = type_command(words, data_dir, capsys)
        job = re.match(r"Job (\d+) failed", line)
        if job and is_costly(bad):
            page = door.get(f"/jobs/{job[1]}").text
        else:
            page = read_page(door, bad, answer or send_form(door, models, bad))
    sentence = re.sub(r"^(Job \d+ failed \(\w+\): |\d+ cannot be used: )", "", line)
    assert bad.says in sentence
    assert len(sentence) <= MAX_CHARACTERS
    assert not re.search(r"0x[0-9a-f]{6}|<class |site-packages|InvalidDocument", sentence)
    assert sentence in " ".join(html.unescape(page).split())
    assert "Traceback" not in page.partition('id="log"')[0]
    assert door.get("/api/health").json()["status"] == "ok"

"""Somebody's own models and data, over HTTP: added, read, shown, refused in words, and mended."""

import html
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.contract.dashboard import TOKEN, serve
from tests.unit.own_files import make_reviews, write_csv, write_images, write_model

ROOT = Path(__file__).resolve().parents[2]
FROSTLINE = (sys.executable, "-m", "app")
SIZED = """
import torch


def bare():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.Linear(3, 2))

    def loss(output, batch):
        return torch.nn.functional.cross_entropy(output, batch[1])

    return {"model": model, "loss": loss}


def load(size):
    return {"train": [(torch.zeros(1, 8, 8), 0)] * size}
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    write_model(folder / "bert", "bert", "BertForSequenceClassification")
    write_model(folder / "vit", "vit", "ViTForImageClassification")
    rows = make_reviews()
    write_csv(folder / "reviews.csv", rows)
    write_csv(folder / "two.csv", [{"a": r["review"], "b": r["review"], **r} for r in rows])
    both = [{"a": r["review"], "b": r["review"], "verdict": r["verdict"]} for r in rows]
    write_csv(folder / "ambiguous.csv", both)
    write_images(folder / "photos")
    (folder / "sized.py").write_text(SIZED)
    (folder / "slow.py").write_text("import time\ndef load():\n    time.sleep(10**6)\n")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def door(shelf: Path, data_dir: Path) -> Iterator[httpx2.Client]:
    with serve(data_dir=data_dir, file_dirs=(shelf,), code_dirs=(shelf,)) as client:
        yield client


def wait_for(door: httpx2.Client, path: str, *waiting: str) -> dict[str, Any]:
    """Ask until the state is none of `waiting`; over HTTP there is nothing to wait on."""
    pause = threading.Event()
    while (document := door.get(path).json())["state"] in waiting:
        pause.wait(0.05)
    return document


def add_model(door: httpx2.Client, uri: str) -> int:
    model_id = door.post("/api/models", json={"uri": uri}).json()["id"]
    model = wait_for(door, f"/api/models/{model_id}", "inspecting")
    assert model["state"] == "ready", model["error"]
    return model_id


@pytest.fixture(scope="module")
def bert(door: httpx2.Client) -> int:
    return add_model(door, "hf:./bert")


def preview(door: httpx2.Client, model_id: int, **dataset: Any) -> dict[str, Any]:
    body = {"model_id": model_id, "dataset": dataset}
    answer = door.post("/api/datasets/preview", json=body)
    assert answer.status_code == 202, answer.text
    return wait_for(door, f"/api/tasks/{answer.json()['id']}", "queued", "running")


def test_a_table_is_shown_with_its_columns_classes_split_and_tokens(
    door: httpx2.Client, bert: int
) -> None:
    task = preview(door, bert, uri="csv:reviews.csv", eval_fraction=0.25)
    assert (task["state"], task["error"]) == ("succeeded", None)
    shown = task["result"]
    assert shown["columns"] == {"text": "review", "label": "verdict"}
    assert shown["offered"] == ["review", "verdict"]
    assert shown["classes"] == [
        {"name": "bad", "counts": {"train": 15, "eval": 5}},
        {"name": "good", "counts": {"train": 15, "eval": 5}},
    ]
    first = shown["examples"][0]
    assert first["encoded"]["tokens"] == first["text"].split()
    assert "seed 0" in shown["split"]
    assert door.get(f"/api/models/{bert}").json()["state"] == "ready"


def test_an_ambiguous_table_shows_its_rows_and_takes_the_named_column(
    door: httpx2.Client, bert: int
) -> None:
    task = preview(door, bert, uri="csv:ambiguous.csv")
    assert (task["state"], task["error"]["reason"]) == ("failed", "data_error")
    assert "Which column" in task["error"]["message"]
    assert task["result"]["offered"] == ["a", "b", "verdict"]
    assert len(task["result"]["examples"]) == 8
    assert task["result"]["errors"][0]["field"] == "dataset.columns.text"
    task = preview(door, bert, uri="csv:ambiguous.csv", columns={"text": "b"})
    assert task["result"]["columns"] == {"text": "b", "label": "verdict"}


def test_the_page_waits_shows_and_keeps_what_was_chosen(door: httpx2.Client, bert: int) -> None:
    form = {"train.dataset": "csv:two.csv", "train.columns.text": "b", "train.epochs": "7"}
    answer = door.post(f"/models/{bert}/preview", data=form)
    assert answer.status_code == 303
    address = answer.headers["Location"]
    assert "train.epochs=7" in address
    assert door.get(address).status_code == 200
    task = address.partition("?")[0].rpartition("/")[2]
    assert wait_for(door, f"/api/tasks/{task}", "queued", "running")["state"] == "succeeded"
    page = door.get(address).text
    assert "hx-trigger" not in page.partition('id="preview"')[2].partition(">")[0]
    assert re.search(r"<option[^>]* selected[^>]*>b</option>", page)
    assert "5 tokens" in page
    refused = door.post(f"/models/{bert}/preview", data={"train.dataset": "csv:none.csv"})
    assert refused.status_code == 422
    assert "There is no &#39;none.csv&#39;" in refused.text


def test_the_arguments_of_a_dataset_are_typed_beside_it_and_come_back(door: httpx2.Client) -> None:
    model_id = add_model(door, "demo:digits")
    form = {"train.dataset": "python:sized:load", "train.kwargs": '{"size": 24}'}
    for kwargs, words in (
        ("{", "&#39;kwargs&#39; must be an object of keyword arguments; this is &#39;{&#39;."),
        ("[1]", "&#39;kwargs&#39; must be an object of keyword arguments; this is [1]."),
    ):
        for place in ("jobs", "sweeps", "preview"):
            bad = {**form, "train.kwargs": kwargs, "sweep.set": "choice"}
            refused = door.post(f"/models/{model_id}/{place}", data=bad)
            assert (refused.status_code, words in refused.text) == (422, True)
    started = door.post(f"/models/{model_id}/jobs", data={**form, "train.max_steps": "1"})
    place = started.headers["Location"]
    job = wait_for(door, f"/api{place}", "queued", "starting", "running")
    assert (job["state"], job["dataset"]["kwargs"]) == ("succeeded", {"size": 24})
    again = re.search(r'href="(/models/[^"]+train.dataset[^"]+)"', door.get(place).text)
    assert again is not None
    field = door.get(html.unescape(again.group(1))).text.partition('name="train.kwargs"')[2]
    assert "{&#34;size&#34;: 24}" in field.partition(">")[0]


def test_a_model_without_an_example_is_traced_on_the_data_that_it_is_shown(
    door: httpx2.Client, data_dir: Path
) -> None:
    model_id = add_model(door, "python:sized:bare")
    config = {"rules": [{"action": "freeze", "match": "1"}]}

    def plan() -> tuple[set[str], int | None]:
        found = door.post(f"/api/models/{model_id}/plan", json=config).json()
        return {one["code"] for one in found["warnings"]}, found["cost"]["forward_flops"]

    before = plan()
    assert "untraced" in before[0]
    task = preview(door, model_id, uri="python:sized:load", kwargs={"size": 8})
    assert task["result"]["traced_by"] == "fake"
    found, flops = plan()
    assert "untraced" not in found
    assert flops is not None
    assert flops > 0
    page = door.get(f"/models/{model_id}/preview/{task['id']}").text
    assert "The model gives no example of its own" in page
    with_one = preview(door, add_model(door, "demo:digits"), uri="demo:digits")
    assert "traced_by" not in with_one["result"]
    told = subprocess.run(
        [*FROSTLINE, "plan", "python:sized:bare", "--json", "--data-dir", str(data_dir),
         "--dataset", '{"uri": "python:sized:load", "kwargs": {"size": 4}}'],
        capture_output=True, text=True, cwd=ROOT, check=True,
        env={**os.environ, "FROSTLINE_TOKEN": TOKEN},
    ).stdout  # fmt: skip
    assert "untraced" not in {one["code"] for one in json.loads(told)["warnings"]}


def test_images_are_files_of_their_own(door: httpx2.Client) -> None:
    vit = add_model(door, "hf:./vit")
    task = preview(door, vit, uri="folder:photos")
    assert task["result"]["examples"][0]["encoded"] == {"shape": [3, 16, 16]}
    page = door.get(f"/models/{vit}/preview/{task['id']}")
    assert "data:image" not in page.text
    image = door.get(f"/models/{vit}/preview/{task['id']}/0/image.png")
    assert image.headers["Content-Type"] == "image/png"
    assert image.content.startswith(b"\x89PNG")
    for missing in ("99/image.png", "0/label.png"):
        assert door.get(f"/models/{vit}/preview/{task['id']}/{missing}").status_code == 404


def test_what_cannot_be_previewed_is_refused_at_once(door: httpx2.Client, bert: int) -> None:
    body = {"model_id": bert, "dataset": {"uri": "csv:none.csv"}, "more": 1}
    refused = door.post("/api/datasets/preview", json=body)
    assert refused.status_code == 422
    assert [error["field"] for error in refused.json()["errors"]] == ["more", "dataset.uri"]
    body = {"model_id": 10**6, "dataset": {"uri": "csv:reviews.csv"}}
    assert door.post("/api/datasets/preview", json=body).status_code == 404


def test_a_preview_that_hangs_is_stopped_and_the_next_one_runs(
    door: httpx2.Client, bert: int
) -> None:
    body = {"model_id": bert, "dataset": {"uri": "python:slow:load"}}
    task = door.post("/api/datasets/preview", json=body).json()["id"]
    assert door.post(f"/api/tasks/{task}/stop").status_code == 202
    ended = wait_for(door, f"/api/tasks/{task}", "queued", "running", "stopping")
    assert (ended["state"], ended["result"]) == ("stopped", None)
    assert preview(door, bert, uri="csv:reviews.csv")["state"] == "succeeded"


def test_every_option_of_a_model_is_in_the_form_with_its_fault_beside_it(
    door: httpx2.Client,
) -> None:
    form = {
        "uri": "hf:./bert",
        "task": "text-classification",
        "num_classes": "many",
        "revision": "a b",
        "weights": "none.safetensors",
        "kwargs": '{"hidden_size": 16}',
        "input": "3, 4",
        "dtype": "int64",
        "new_head": "on",
    }
    refused = door.post("/models", data=form)
    assert refused.status_code == 422
    for name, words in {
        "num_classes": "must be a whole number",
        "revision": "must be a branch",
        "weights": "There is no",
    }.items():
        field = refused.text.partition(f'name="{name}"')[2].partition("</label>")[0]
        assert words in field
    assert refused.text.count('role="alert"') == 3
    for kwargs, words in (("{", "This is not JSON"), ("[]", "object of keyword arguments")):
        assert words in door.post("/models", data={"uri": "hf:./bert", "kwargs": kwargs}).text
    assert "sizes without the batch" in door.post("/models", data={**form, "input": "big"}).text
    good = {key: form[key] for key in ("uri", "task", "kwargs", "input", "dtype")}
    added = door.post("/models", data={**good, "num_classes": "5", "random_init": "on"})
    assert added.status_code == 303
    model_id = added.headers["Location"].rpartition("/")[2]
    model = wait_for(door, f"/api/models/{model_id}", "inspecting")
    assert model["spec"]["input"] == {"shape": [3, 4], "dtype": "int64"}
    assert (model["spec"]["num_classes"], model["spec"]["random_init"]) == (5, True)


def test_a_model_that_could_not_be_read_says_why_and_fills_the_form_again(
    door: httpx2.Client,
) -> None:
    body = {"uri": "hf:./bert", "kwargs": {"hidden_sizes": 3}, "num_classes": 4}
    model_id = door.post("/api/models", json=body).json()["id"]
    model = wait_for(door, f"/api/models/{model_id}", "inspecting")
    assert model["state"] == "failed"
    page = door.get(f"/models/{model_id}").text
    assert "is not an option of BertConfig" in page
    address = re.search(r'href="(/models\?[^"]+)"', page)
    assert address is not None
    form = door.get(html.unescape(address.group(1))).text
    assert 'value="4"' in form
    assert "hidden_sizes" in form


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "hf:./absent"), "There is no './absent' below"),
        (("plan", "timm:resnet18"), "pip install timm"),
        (("plan", '{"uri": "hf:./bert", "kwargs": {"x": 1}}'), "'x' is not an option of Bert"),
        (("train", "hf:./bert", "csv:ambiguous.csv"), "(data_error): Which column of"),
        (("train", "hf:./bert", "folder:photos"), "holds images, and a model for"),
    ],
)
def test_the_terminal_says_the_same_in_one_line(
    door: httpx2.Client, data_dir: Path, arguments: tuple[str, ...], words: str
) -> None:
    command = [*FROSTLINE, *arguments, "--data-dir", str(data_dir)]
    environment = {**os.environ, "FROSTLINE_TOKEN": TOKEN}
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert words in " ".join(ended.stderr.split())


def test_a_model_with_jobs_names_them_instead_of_going(door: httpx2.Client) -> None:
    model_id = add_model(door, "demo:three-layers")
    job = {"model_id": model_id, "config": {}, "dataset": {"uri": "demo:three-layers"}}
    job_id = door.post("/api/jobs", json={**job, "training": {"max_steps": 1}}).json()["id"]
    refused = door.post(f"/models/{model_id}/delete")
    assert refused.status_code == 409
    assert f"Model {model_id} is used by 1 job; delete it first." in refused.text
    assert f'href="/jobs/{job_id}"' in refused.text
    assert "Add a model" in refused.text

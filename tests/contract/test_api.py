"""The whole path as a script walks it: only the HTTP contract, on a real server and worker."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.client import LOOPBACK, read_events
from app.serving import Dashboard, listen
from app.settings import Settings
from app.store.lock import read_holder
from tests.contract.dashboard import serve

RULES = [{"action": "freeze", "match": "**"}, {"action": "unfreeze", "match": "layer3"}]
ENDED = {"succeeded", "stopped", "failed", "interrupted"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    with serve(data_dir=tmp_path_factory.mktemp("api")) as client:
        client.base_url = client.base_url.join("/api")
        yield client


@pytest.fixture(autouse=True)
def no_job_is_left(api: httpx2.Client) -> Iterator[None]:
    """A test that fails half-way leaves no job that the others would wait behind."""
    yield
    pause = threading.Event()
    for job in ask(api, "GET", "/jobs", 200):
        while ask(api, "GET", f"/jobs/{job['id']}", 200)["state"] not in ENDED:
            api.post(f"/jobs/{job['id']}/stop")
            pause.wait(0.1)


def ask(api: httpx2.Client, method: str, path: str, status: int, body: Any = None) -> Any:
    answer = api.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


def wait_for_model(api: httpx2.Client, model_id: int) -> dict[str, Any]:
    """Until a worker has inspected it; every change of a model is a change of the store."""
    pause = threading.Event()
    while (model := ask(api, "GET", f"/models/{model_id}", 200))["state"] == "inspecting":
        pause.wait(0.05)
    return model


def follow(api: httpx2.Client, job_id: int, last_id: str | None = None) -> list[tuple[str, Any]]:
    """Every event of a job until its stream ends by itself."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with api.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return [event for event in read_events(answer.iter_lines()) if event[0]]


@pytest.fixture(scope="module")
def model(api: httpx2.Client) -> dict[str, Any]:
    added = ask(api, "POST", "/models", 202, {"uri": "demo:three-layers"})
    assert added["state"] == "inspecting"
    return wait_for_model(api, added["id"])


@pytest.fixture(scope="module")
def job(api: httpx2.Client, model: dict[str, Any]) -> dict[str, Any]:
    """A short job that has succeeded."""
    request = {
        "model_id": model["id"],
        "config": {"rules": RULES},
        "dataset": {"uri": "demo:three-layers"},
        "training": {"max_steps": 20, "seed": 1, "device": "cpu"},
        "name": "short",
    }
    queued = ask(api, "POST", "/jobs", 201, request)
    assert queued["state"] == "queued"
    assert follow(api, queued["id"])[-1][0] == "end"
    return ask(api, "GET", f"/jobs/{queued['id']}", 200)


def test_a_model_is_inspected_and_its_tree_is_read(
    api: httpx2.Client, model: dict[str, Any]
) -> None:
    assert model["state"] == "ready", model["error"]
    assert model["error"] is None
    assert model["tensor_count"] == 6
    assert model["fingerprint"].startswith("sha256:")
    assert model["weights_digest"].startswith("sha256:")
    modules = ask(api, "GET", f"/models/{model['id']}/tree", 200)["modules"]
    assert [modules[0]["path"], modules[0]["depth"]] == ["", 0]
    names = [one["name"] for module in modules for one in module["parameters"]]
    assert len(names) == 6
    assert sum(p["numel"] for m in modules for p in m["parameters"]) == model["parameter_count"]


def test_a_plan_covers_every_parameter(api: httpx2.Client, model: dict[str, Any]) -> None:
    plan = ask(api, "POST", f"/models/{model['id']}/plan", 200, {"rules": RULES})
    assert len(plan["frozen"]) == 4
    assert plan["trainable"] == ["layer3.weight", "layer3.bias"]
    flows = {layer["path"]: layer["flow"] for layer in plan["layers"]}
    assert flows == {"layer1": "idle", "layer2": "idle", "layer3": "trained"}
    nothing = {"rules": [{"action": "freeze", "match": "layer9.**"}]}
    warnings = ask(api, "POST", f"/models/{model['id']}/plan", 200, nothing)["warnings"]
    assert any("layer9" in warning["message"] for warning in warnings)


def test_a_config_is_saved_replaced_downloaded_imported_and_deleted(
    api: httpx2.Client, model: dict[str, Any]
) -> None:
    saved = ask(api, "POST", "/configs", 201, {"model_id": model["id"], "rules": RULES})
    path = f"/configs/{saved['id']}"
    renamed = {"model_id": model["id"], "rules": RULES, "name": 'late "layers"\r\nX: 1'}
    assert ask(api, "PUT", path, 200, renamed)["name"] == renamed["name"]
    download = api.get(f"{path}/download")
    assert download.headers["Content-Disposition"].startswith("attachment")
    assert "\n" not in download.headers["Content-Disposition"]
    document = download.json()
    assert document["format"] == "frostline.freeze-config"
    assert len(document["frozen"]) == 4
    module = api.get(f"{path}/download", params={"as": "python"})
    compile(module.text, "freeze.py", "exec")
    importing = f"/models/{model['id']}/configs/import"
    assert ask(api, "POST", importing, 201, document)["id"] != saved["id"]
    document["frozen"].remove("layer1.bias")
    document["trainable"].append("layer1.bias")
    refused = ask(api, "POST", importing, 409, document)
    assert "layer1.bias" in json.dumps(refused["differing"])
    ask(api, "POST", f"{importing}?accept=names", 201, document)
    listed = ask(api, "GET", f"/configs?model_id={model['id']}", 200)
    assert [one["id"] for one in listed] == sorted((one["id"] for one in listed), reverse=True)
    ask(api, "DELETE", path, 204)
    ask(api, "GET", path, 404)


def test_a_job_leaves_complete_records(api: httpx2.Client, job: dict[str, Any]) -> None:
    assert (job["state"], job["step"], job["total_steps"]) == ("succeeded", 20, 20), job["error"]
    path = f"/jobs/{job['id']}"
    metrics = ask(api, "GET", f"{path}/metrics", 200)
    assert metrics["loss"]["steps"] == list(range(1, 21))
    assert metrics["loss"]["values"] == metrics["loss"]["min"] == metrics["loss"]["max"]
    assert metrics["eval/eval/loss"]["steps"][0] == 0
    few = ask(api, "GET", f"{path}/metrics?name=loss&points=5&from=1&to=10", 200)
    assert list(few) == ["loss"]
    assert len(few["loss"]["steps"]) <= 5
    layers = ask(api, "GET", f"{path}/layers?stat=update_norm", 200)
    rows = dict(zip(layers["layers"], layers["values"], strict=True))
    assert set(rows["layer1"]) == {0}
    assert all(value > 0 for value in rows["layer3"])
    gradients = ask(api, "GET", f"{path}/layers?stat=grad_norm&match=layer1", 200)
    assert set(gradients["values"][0]) == {None}
    proof = ask(api, "GET", f"{path}/proof", 200)
    assert proof["verdict"] == "holds"
    assert (proof["frozen"]["checked"], proof["frozen"]["identical"]) == (4, 4)
    assert ask(api, "GET", f"{path}/config", 200)["trainable"] == ["layer3.weight", "layer3.bias"]


def test_a_finished_stream_ends_and_goes_on_where_it_was_left(
    api: httpx2.Client, job: dict[str, Any]
) -> None:
    with api.stream("GET", f"/jobs/{job['id']}/events") as answer:
        ids = [line[4:] for line in answer.iter_lines() if line.startswith("id: ")]
    events = follow(api, job["id"])
    assert {"state", "metrics", "proof", "end"} <= {name for name, _ in events}
    states = [data["state"] for name, data in events if name == "state"]
    assert states[-1] == "succeeded"
    rest = follow(api, job["id"], ids[-2])
    assert len(rest) <= 1
    halfway = follow(api, job["id"], ids[0])
    assert halfway == events[1:]
    assert follow(api, job["id"], ids[-1])[-1][0] == "end"


def test_checkpoints_log_and_export_are_files(api: httpx2.Client, job: dict[str, Any]) -> None:
    path = f"/jobs/{job['id']}"
    checkpoints = ask(api, "GET", f"{path}/checkpoints", 200)
    assert checkpoints[-1]["step"] == 20 or checkpoints[0]["step"] == 20
    weights = api.get(f"{path}/checkpoints/20/model.safetensors")
    assert weights.status_code == 200
    header = int.from_bytes(weights.content[:8], "little")
    assert "layer1.weight" in json.loads(weights.content[8 : 8 + header])
    assert api.get(f"{path}/log").headers["Content-Type"].startswith("text/plain")
    export = api.get(f"{path}/export", params={"format": "csv"})
    assert export.headers["Content-Disposition"].startswith("attachment")
    assert b"loss" in export.content
    assert api.get(f"{path}/export", params={"format": "xls"}).status_code == 422
    parquet = api.get(f"{path}/export", params={"format": "parquet"})
    assert parquet.content[-4:] == b"PAR1"
    packed = api.get(f"{path}/layers", params={"as": "float32", "points": 5}).content
    head, _, values = packed.partition(b"\n")
    shape = json.loads(head)
    assert len(values) == 4 * len(shape["layers"]) * len(shape["steps"]) > 0
    insights = api.get(f"{path}/insights").json()
    assert insights["steps"][0] == 1
    assert all(set(f) == {"code", "message", "names", "evidence"} for f in insights["findings"])
    assert 0 < api.get(path).json()["measure_percent"] < 100
    ask(api, "DELETE", f"{path}/checkpoints/20", 204)
    ask(api, "GET", f"{path}/checkpoints/20/model.safetensors", 404)


def test_a_long_job_is_paused_resumed_stopped_and_deleted(
    api: httpx2.Client, model: dict[str, Any]
) -> None:
    request = {
        "model_id": model["id"],
        "config": {"rules": RULES},
        "dataset": {"uri": "demo:three-layers"},
        "training": {"max_steps": 10**8, "device": "cpu"},
    }
    job_id = ask(api, "POST", "/jobs", 201, request)["id"]
    path = f"/jobs/{job_id}"
    wait_for_state(api, job_id, "running")
    ask(api, "DELETE", path, 409)
    ask(api, "DELETE", f"/models/{model['id']}", 409)
    ask(api, "POST", f"{path}/pause", 422, {"mode": "sleep"})
    for _ in range(2):
        ask(api, "POST", f"{path}/pause", 202)
    wait_for_state(api, job_id, "paused")
    ask(api, "POST", f"{path}/resume", 202)
    wait_for_state(api, job_id, "running")
    for _ in range(2):
        ask(api, "POST", f"{path}/stop", 202)
    wait_for_state(api, job_id, "stopped")
    ask(api, "POST", f"{path}/stop", 202)
    assert ask(api, "GET", f"{path}/checkpoints", 200)
    other = {"config": {"rules": [{"action": "freeze", "match": "{layer1,layer3}"}]}}
    ask(api, "POST", f"{path}/resume", 202, other)
    wait_for_state(api, job_id, "running")
    first, second = ask(api, "GET", f"{path}/attempts", 200)
    assert first["resumed"] is None
    told = {key: set(second["resumed"][key]) for key in ("kept", "fresh", "dropped")}
    assert told == {
        "kept": set(),
        "fresh": {"layer2.weight", "layer2.bias"},
        "dropped": {"layer3.weight", "layer3.bias"},
    }
    ask(api, "POST", f"{path}/stop", 202)
    wait_for_state(api, job_id, "stopped")
    assert ask(api, "PATCH", path, 200, {"name": "endless", "notes": "n"})["name"] == "endless"
    ask(api, "DELETE", path, 204)
    ask(api, "GET", path, 404)


def test_what_is_frozen_changes_while_a_job_runs(api: httpx2.Client, model: dict[str, Any]) -> None:
    request = {
        "model_id": model["id"],
        "config": {"rules": RULES},
        "dataset": {"uri": "demo:three-layers"},
        "training": {"max_steps": 10**8, "device": "cpu", "eval_every": 10**8},
    }
    job_id = ask(api, "POST", "/jobs", 201, request)["id"]
    path = f"/jobs/{job_id}"
    unfreeze = {"rules": [{"action": "unfreeze", "match": "layer1"}]}
    wait_for_state(api, job_id, "running")
    edit = ask(api, "PATCH", f"{path}/freeze", 202, unfreeze)
    nothing = {"rules": [{"action": "freeze", "match": "**"}]}
    assert ask(api, "PATCH", f"{path}/freeze", 409, nothing)["state"] == "running"
    ask(api, "POST", f"{path}/pause", 202)
    wait_for_state(api, job_id, "paused")
    held = ask(api, "PATCH", f"{path}/freeze", 202, {"rules": RULES, "optimizer_state": "keep"})
    assert held["step"] == ask(api, "GET", path, 200)["step"] + 1
    ask(api, "POST", f"{path}/stop", 202)
    wait_for_state(api, job_id, "stopped")
    around = f"from={edit['step'] - 1}&to={held['step'] - 1}&match=layer1&stat=update_norm"
    answer = ask(api, "GET", f"{path}/layers?{around}", 200)
    moved = dict(zip(answer["steps"], (value > 0 for value in answer["values"][0]), strict=True))
    assert moved == {step: step >= edit["step"] for step in moved}
    assert max(moved) == held["step"] - 1
    config = ask(api, "GET", f"{path}/config", 200)
    assert config["rules"] == RULES
    assert [change["at"]["step"] + 1 for change in config["schedule"]] == [
        edit["step"],
        held["step"],
        held["step"],
    ]
    ask(api, "PATCH", f"{path}/freeze", 409, unfreeze)
    ask(api, "DELETE", path, 204)


def test_the_stream_of_a_deleted_job_ends(api: httpx2.Client, model: dict[str, Any]) -> None:
    request = {
        "model_id": model["id"],
        "config": {"rules": RULES},
        "dataset": {"uri": "demo:three-layers"},
        "training": {"max_steps": 10**8, "device": "cpu"},
    }
    running, queued = (ask(api, "POST", "/jobs", 201, request)["id"] for _ in range(2))
    with api.stream("GET", f"/jobs/{queued}/events") as answer:
        events = read_events(answer.iter_lines())
        assert next(events)[1]["state"] == "queued"
        ask(api, "DELETE", f"/jobs/{queued}", 204)
        assert "end" in [name for name, _ in events]
    ask(api, "POST", f"/jobs/{running}/stop", 202)
    wait_for_state(api, running, "stopped")
    ask(api, "DELETE", f"/jobs/{running}", 204)


def wait_for_state(api: httpx2.Client, job_id: int, state: str) -> None:
    with api.stream("GET", f"/jobs/{job_id}/events", params={"cursor": "now"}) as answer:
        now = ask(api, "GET", f"/jobs/{job_id}", 200)["state"]
        events = read_events(answer.iter_lines())
        while now != state:
            assert now not in ENDED
            name, data = next(events)
            now = data["state"] if name == "state" else now


def test_an_ended_job_is_not_stopped_again(api: httpx2.Client, job: dict[str, Any]) -> None:
    refused = ask(api, "POST", f"/jobs/{job['id']}/stop", 409)
    assert refused["state"] == "succeeded"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": {"rules": [{"action": "freeze", "match": "**"}]}}, "config"),
        ({"config": {"rules": [{"action": "melt", "match": "**"}]}}, "config"),
        ({"training": {"epoch": 3}}, "training.epoch"),
        ({"training": {"lr": -1}}, "training.lr"),
        ({"dataset": {"uri": "demo:nothing"}}, "dataset"),
        ({"dataset": {}}, "dataset"),
        ({"model_id": "one"}, "model_id"),
        ({"kind": "dream"}, "kind"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_launched_is_a_422_that_names_the_field(
    api: httpx2.Client, model: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    request = {
        "model_id": model["id"],
        "config": {"rules": RULES},
        "dataset": {"uri": "demo:three-layers"},
    }
    problem = ask(api, "POST", "/jobs", 422, {**request, **changes})
    assert any(fault["field"].startswith(field) for fault in problem["errors"])
    assert all(fault["message"] for fault in problem["errors"])


def test_behind_a_root_path_the_folder_names_an_address_that_answers(tmp_path: Path) -> None:
    listener = listen(LOOPBACK, 0)
    port = listener.getsockname()[1]
    settings = Settings(data_dir=tmp_path, port=port, root_path="/ice", behind_proxy=True)
    with Dashboard(settings, listener).in_background():
        holder = read_holder(tmp_path)
        assert holder is not None
        assert httpx2.get(f"{holder.address}/api/health", trust_env=False).status_code == 200
        page = httpx2.get(f"{holder.address}/jobs", trust_env=False)
        assert page.headers["Location"] == "/ice/login"


def test_the_interface_describes_itself(api: httpx2.Client) -> None:
    paths = ask(api, "GET", "/openapi.json", 200)["paths"]
    assert {"/api/models/{model_id}/plan", "/api/jobs/{job_id}/freeze"} <= set(paths)
    assert "202" in paths["/api/models"]["post"]["responses"]
    assert "204" in paths["/api/jobs/{job_id}"]["delete"]["responses"]
    assert "4XX" in paths["/api/jobs"]["get"]["responses"]
    assert paths["/api/jobs"]["get"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in paths["/api/health"]["get"]
    page = api.get("/docs")
    assert page.status_code == 200
    assert "/api/jobs/{job_id}/freeze" in page.text

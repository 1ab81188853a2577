"""The main job from end to end, as a script does it that knows the contract and a token."""

import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.contract.path_driver import Event, Script, check_records, serving

# The stem learns below two frozen blocks, so that gradients must pass through those; the head is
# frozen in part.
RULES = [
    {"action": "freeze", "match": "**"},
    {"action": "unfreeze", "match": "stem"},
    {"action": "unfreeze", "match": "{layer3,fc}.**"},
    {"action": "freeze", "match": "re:fc\\.bias"},
]
NAMED = {"format": "frostline.freeze-config", "version": 1, "name": "stem and late blocks"}
ENDLESS = {"epochs": 10**6, "eval_every": 10**6, "checkpoint_every": 10**6, "device": "cpu"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("path")


@pytest.fixture(scope="module")
def script(data_dir: Path) -> Iterator[Script]:
    with serving(data_dir) as script:
        yield script


@pytest.fixture(scope="module")
def model(script: Script) -> dict[str, Any]:
    model = script.add_model(uri="demo:digits")
    assert (model["state"], model["error"]) == ("ready", None)
    return model


def test_the_whole_path_on_the_demo(script: Script, model: dict[str, Any], data_dir: Path) -> None:
    names = _read_tree(script, model)
    plan = _make_plan(script, model, names)
    config = _save_download_and_import(script, model, plan)

    endless = _launch(script, model, config, ENDLESS, name="until stopped", notes="by hand")
    queued = _launch(script, model, config, {"max_steps": 40, "checkpoint_every": 20, "seed": 7})
    stopped = _watch_and_stop(script, endless, queued)
    succeeded = script.until_ended(queued["id"])
    assert (succeeded["state"], succeeded["error"]) == ("succeeded", None)
    assert succeeded["step"] == succeeded["total_steps"] == 40
    assert succeeded["worker_pid"] is None
    listed = script.get("/jobs")[:2]
    assert [job["id"] for job in listed] == [queued["id"], endless["id"]]
    assert [job["notes"] for job in listed] == ["", "by hand"]

    for job in (stopped, succeeded):
        _read_records(script, job, plan)
        _read_proof(script, job, plan, names)
        check_records(data_dir, job, plan)
        as_trained = script.get(f"/jobs/{job['id']}/config")
        assert (as_trained["rules"], as_trained["frozen"]) == (RULES, plan["frozen"])
    _compare_checkpoints(script, stopped, succeeded, plan)


@pytest.mark.parametrize("mechanism", ["exclude", "zero_lr", "zero_grad"])
def test_frozen_layers_have_gradients_where_the_mechanism_computes_them(
    script: Script, model: dict[str, Any], data_dir: Path, mechanism: str
) -> None:
    config = {"rules": RULES, "mechanism": mechanism}
    plan = script.call("POST", f"/models/{model['id']}/plan", 200, config)
    computed = {layer["path"]: layer["weight_gradient"] for layer in plan["layers"]}
    assert computed["layer1.conv1"] is True
    job = script.until_ended(_launch(script, model, config, {"max_steps": 3})["id"])
    assert (job["state"], job["error"]) == ("succeeded", None)
    check_records(data_dir, job, plan)
    assert script.get(f"/jobs/{job['id']}/proof")["verdict"] == "holds"


def test_a_plan_predicts_the_step_time_of_a_model_that_was_calibrated(script: Script) -> None:
    model = script.add_model(uri="demo:three-layers")["id"]
    path = f"/models/{model}/plan"
    assert script.call("POST", path, 200, {"rules": RULES})["cost"]["predicted_step_ms"] is None
    task = script.call("POST", f"/models/{model}/calibrate", 202)
    ended = ("succeeded", "failed", "stopped")
    done = script.until(f"/tasks/{task['id']}", lambda task: task["state"] in ended)
    assert (done["state"], done["error"]) == ("succeeded", None)
    cost = script.call("POST", path, 200, {"rules": RULES})["cost"]
    assert 0 < cost["predicted_step_ms"] <= cost["full"]["predicted_step_ms"]
    assert cost["assumed"]["timed_on"]["device"] == "cpu"
    half = script.call("POST", path, 200, {"assume": {"precision": "bf16"}})["cost"]
    assert half["predicted_step_ms"] is None  # timed at full precision


def test_bad_input_is_refused_in_words_and_nothing_is_lost(
    script: Script, model: dict[str, Any]
) -> None:
    model_path = f"/models/{model['id']}"
    config = script.call("POST", "/configs", 201, {"model_id": model["id"], "rules": RULES})
    job = _launch(script, model, config, ENDLESS)
    job_path = f"/jobs/{job['id']}"
    script.until(job_path, lambda job: job["step"] > 0)
    before = [script.get(path) for path in ("/models", "/configs", "/jobs")]
    assert before[2][0]["state"] == "running"

    _refuse_models_and_configs(script, model, config)
    _refuse_jobs(script, model, config)
    script.is_refused("DELETE", model_path, 409, None, "job")
    assert script.is_refused("DELETE", job_path, 409, None, "running")["state"] == "running"

    after = [script.get(path) for path in ("/models", "/configs", "/jobs")]
    assert after[:2] == before[:2]
    assert [job["id"] for job in after[2]] == [job["id"] for job in before[2]]
    assert after[2][0]["state"] == "running"  # not one of the refusals disturbed the job

    for _ in range(2):
        assert script.call("POST", f"{job_path}/stop", 202)["state"] in ("stopping", "stopped")
    stopped = script.until_ended(job["id"])
    assert (stopped["state"], stopped["error"]) == ("stopped", None)
    assert script.call("POST", f"{job_path}/stop", 202)["state"] == "stopped"
    assert script.get(job_path)["step"] == stopped["step"]
    ended = _launch(script, model, config, {"max_steps": 1})
    script.until_ended(ended["id"])
    refused = script.is_refused("POST", f"/jobs/{ended['id']}/stop", 409, None, "succeeded")
    assert refused["state"] == "succeeded"


# ------------------------------------------------------------------------ the path, step by step


def _launch(
    script: Script,
    model: dict[str, Any],
    config: dict[str, Any],
    training: dict[str, Any],
    **texts: str,
) -> dict[str, Any]:
    request = {
        "model_id": model["id"],
        "config": config.get("id", config),
        "dataset": {"uri": "demo:digits"},
        "training": {"device": "cpu", **training},
        **texts,
    }
    queued: dict[str, Any] = script.call("POST", "/jobs", 201, request)
    assert queued["state"] == "queued"
    return queued


def _read_tree(script: Script, model: dict[str, Any]) -> list[str]:
    """Every parameter's name in model order, when the tree agrees with the model's counts."""
    modules = script.get(f"/models/{model['id']}/tree")["modules"]
    assert (modules[0]["path"], modules[0]["depth"]) == ("", 0)
    assert len(modules) == model["module_count"]
    parameters = [one for module in modules for one in module["parameters"]]
    assert len(parameters) == model["tensor_count"]
    assert sum(one["numel"] for one in parameters) == model["parameter_count"]
    assert {"name", "shape", "dtype", "numel", "shared_with"} <= parameters[0].keys()
    assert model["fingerprint"].startswith("sha256:")
    return [one["name"] for one in parameters]


def _make_plan(script: Script, model: dict[str, Any], names: list[str]) -> dict[str, Any]:
    plan: dict[str, Any] = script.call(
        "POST", f"/models/{model['id']}/plan", 200, {**NAMED, "rules": RULES}
    )
    assert [name for name in names if name in plan["trainable"]] == plan["trainable"]
    assert [name for name in names if name not in plan["trainable"]] == plan["frozen"]
    assert "fc.bias" in plan["frozen"]
    flows = {layer["path"]: layer["flow"] for layer in plan["layers"]}
    assert flows["stem.conv"] == flows["fc"] == "trained"
    assert flows["layer1.conv1"] == flows["layer2.conv2"] == "passes"
    assert {layer["flow"] for layer in plan["layers"]} == {"trained", "passes"}
    computed = {layer["path"]: layer["weight_gradient"] for layer in plan["layers"]}
    assert (computed["stem.conv"], computed["layer1.conv1"], computed["fc"]) == (True, False, True)
    assert plan["warnings"] == []
    assert plan["cost"]["step_flops"] < plan["cost"]["full_step_flops"]
    return plan


def _save_download_and_import(
    script: Script, model: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    saved: dict[str, Any] = script.call(
        "POST", "/configs", 201, {**NAMED, "rules": RULES, "model_id": model["id"]}
    )
    path, importing = f"/configs/{saved['id']}", f"/models/{model['id']}/configs/import"
    assert script.get(path) == saved

    download = script.http.get(f"/api{path}/download", params={"as": "json"})
    assert download.headers["Content-Disposition"].startswith("attachment")
    document = download.json()
    assert {**document, **NAMED, "rules": RULES} == document
    assert document["model"] == {"uri": "demo:digits", "fingerprint": model["fingerprint"]}
    assert (document["frozen"], document["trainable"]) == (plan["frozen"], plan["trainable"])

    download = script.http.get(f"/api{path}/download", params={"as": "python"})
    assert download.headers["Content-Disposition"].startswith("attachment")
    module: dict[str, Any] = {"__name__": "freeze"}
    exec(compile(download.text, "freeze.py", "exec"), module)
    assert all(
        callable(module[name]) for name in ("apply_freeze", "parameter_groups", "assert_frozen")
    )

    again = script.call("POST", importing, 201, document)
    assert again["id"] > saved["id"]
    assert script.http.get(f"/api/configs/{again['id']}/download").json() == document

    document["frozen"].remove("layer1.conv1.weight")
    document["trainable"].append("layer1.conv1.weight")
    count = len(script.get("/configs", model_id=model["id"]))
    refused = script.is_refused("POST", importing, 409, document, "rules", "names")
    assert "layer1.conv1.weight" in json.dumps(refused["differing"])
    assert len(script.get("/configs", model_id=model["id"])) == count
    by_names = script.call("POST", importing, 201, document, accept="names")
    assert "layer1.conv1.weight" in by_names["trainable"]
    by_rules = script.call("POST", importing, 201, document, accept="rules")
    assert by_rules["frozen"] == plan["frozen"]
    return saved


def _watch_and_stop(
    script: Script, job: dict[str, Any], behind_it: dict[str, Any]
) -> dict[str, Any]:
    """Follow a job that would never end, leave in the middle, come back, stop it."""
    path = f"/jobs/{job['id']}"
    first: list[Event] = []
    with script.events(f"{path}/events") as events:
        for event in events:
            first.append(event)
            layers = sum(one.name == "layers" for one in first)
            if layers >= 6 and len(_told_losses(first)) >= 3:
                break
    # It ends by our wish alone, so all that is here came while it ran.
    for name in ("metrics", "layers"):
        arrived = script.get(f"{path}/{name}")
        assert script.get(path)["state"] == "running"
        steps = arrived["loss"]["steps"] if name == "metrics" else arrived["steps"]
        assert steps[0] == 1
        script.until(path, lambda job, last=steps[-1]: job["step"] > last)  # type: ignore[misc]
        more = script.get(f"{path}/{name}")
        assert len(more["loss"]["steps"] if name == "metrics" else more["steps"]) > len(steps)
    assert script.get(f"/jobs/{behind_it['id']}")["state"] == "queued"  # there is one slot

    rest: list[Event] = []
    with script.events(f"{path}/events", last_id=first[-1].id) as events:
        for event in events:
            if not rest:
                script.call("POST", f"{path}/stop", 202)
            rest.append(event)
    assert rest[-1].name == "end"
    both = first + rest
    states = [event.data["state"] for event in both if event.name == "state"]
    assert states[-1] == "stopped"
    assert "running" in states
    assert [event.name for event in rest if event.name in ("metrics", "layers", "proof")]
    stopped = script.until_ended(job["id"])
    told = [step for steps in _told_losses(both) for step in steps]
    assert told == list(range(1, stopped["step"] + 1))  # each once, though the reader left
    for event in both:
        if event.name == "layers":
            assert len(event.data["values"]) == len(event.data["layers"])
            assert all(len(row) == len(event.data["steps"]) for row in event.data["values"])
    assert any(event.name == "proof" and event.data["verdict"] == "holds" for event in both)
    assert (stopped["state"], stopped["error"]) == ("stopped", None)
    return stopped


def _told_losses(events: list[Event]) -> list[list[int]]:
    """The steps of each event with losses in it; the first has the evaluation before training."""
    return [e.data["loss"]["steps"] for e in events if e.name == "metrics" and "loss" in e.data]


def _read_records(script: Script, job: dict[str, Any], plan: dict[str, Any]) -> None:
    path, steps = f"/jobs/{job['id']}", list(range(1, job["step"] + 1))
    metrics = script.get(f"{path}/metrics")
    assert metrics["loss"]["steps"] == steps
    assert metrics["eval/eval/accuracy"]["steps"][0] == 0
    assert all(0 <= value <= 1 for value in metrics["eval/eval/accuracy"]["values"])
    few = script.get(f"{path}/metrics", name="loss", points=5, to=30)["loss"]
    assert len(few["steps"]) <= 5
    assert all(low <= high for low, high in zip(few["min"], few["max"], strict=True))
    updates = script.get(f"{path}/layers", stat="update_norm")
    assert updates["steps"] == steps
    assert updates["layers"] == [layer["path"] for layer in plan["layers"]]
    gradients = script.get(f"{path}/layers", stat="grad_norm", match="layer1")
    assert gradients["layers"]
    assert all(value is None for row in gradients["values"] for value in row)
    assert isinstance(script.http.get(f"/api{path}/log").text, str)


def _read_proof(
    script: Script, job: dict[str, Any], plan: dict[str, Any], names: list[str]
) -> None:
    proof = script.get(f"/jobs/{job['id']}/proof")
    assert proof["verdict"] == "holds"
    frozen = len(plan["frozen"])
    assert proof["frozen"] == {"checked": frozen, "identical": frozen, "changed": []}
    trained = len(names) - frozen
    assert (proof["trained"]["checked"], proof["trained"]["moved"]) == (trained, trained)
    assert proof["trained"]["still"] == []


def _compare_checkpoints(
    script: Script, stopped: dict[str, Any], succeeded: dict[str, Any], plan: dict[str, Any]
) -> None:
    """Two jobs from one start agree, bit by bit, on what both had frozen and on nothing else."""
    tensors = []
    for job, expected in ((stopped, [stopped["step"]]), (succeeded, [20, 40])):
        path = f"/jobs/{job['id']}/checkpoints"
        listed = script.get(path)
        assert [one["step"] for one in listed] == expected
        assert all(one["bytes"] > 0 and one["created_at"].endswith("Z") for one in listed)
        file = script.http.get(f"/api{path}/{job['step']}/model.safetensors")
        assert file.status_code == 200
        tensors.append(_read_tensors(file.content))
        script.is_refused("GET", f"{path}/{10**6}/model.safetensors", 404, None, "checkpoint")
    for one, other in pairwise(tensors):
        assert one.keys() == other.keys()
        assert all(one[name] == other[name] for name in plan["frozen"])
        assert all(one[name] != other[name] for name in plan["trainable"])


def _read_tensors(file: bytes) -> dict[str, bytes]:
    """The raw bytes of each tensor of a safetensors file, as its format describes them."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    header.pop("__metadata__", None)
    data = file[8 + length :]
    return {name: data[slice(*tensor["data_offsets"])] for name, tensor in header.items()}


# -------------------------------------------------------------------------------- what is refused


def _refuse_models_and_configs(
    script: Script, model: dict[str, Any], config: dict[str, Any]
) -> None:
    path, unknown = f"/models/{model['id']}", 10**9
    for spec, word in (
        ({"uri": "demo:nothing"}, "demo:digits"),
        ({"uri": "digits"}, "digits"),
        ({"uri": "python:nowhere.at_all:factory"}, "nowhere"),
        ({"uri": "demo:digits", "num_clases": 3}, "num_classes"),
        ({}, "uri"),
    ):
        assert script.is_refused("POST", "/models", 422, spec, word)["errors"]
    for broken in (b'{"uri": "demo:digits"', b"", b"\xff", b'{"uri": NaN}', b'{"a": 1, "a": 2}'):
        for route in ("/models", "/configs", "/jobs", f"{path}/plan", f"{path}/configs/import"):
            script.is_refused("POST", route, 400, content=broken)
    script.is_refused("POST", "/models", 422, [], "object")

    lost = [*RULES, {"action": "freeze", "match": "layer9.**"}]
    plan = script.call("POST", f"{path}/plan", 200, {"rules": lost})
    (warning,) = plan["warnings"]
    assert "layer9.**" in warning["message"]
    assert warning["code"]
    assert script.call("POST", f"{path}/plan", 200, {"rules": RULES})["frozen"] == plan["frozen"]
    for rule in (
        {"action": "freze", "match": "**"},
        {"action": "freeze"},
        {"action": "freeze", "match": "layer{1"},
        {"action": "freeze", "match": "re:("},
    ):
        for route, more in ((f"{path}/plan", {}), ("/configs", {"model_id": model["id"]})):
            refused = script.is_refused("POST", route, 422, {"rules": [rule], **more})
            assert refused["errors"][0]["field"].startswith("rules")
    body: Any
    for method, route, body in (
        ("GET", f"/models/{unknown}", None),
        ("GET", f"/models/{unknown}/tree", None),
        ("DELETE", f"/models/{unknown}", None),
        ("POST", f"/models/{unknown}/plan", {"rules": []}),
        ("POST", f"/models/{unknown}/configs/import", {"rules": []}),
        ("GET", f"/configs/{unknown}", None),
        ("PUT", f"/configs/{unknown}", {"rules": RULES}),
        ("DELETE", f"/configs/{unknown}", None),
        ("GET", f"/configs/{unknown}/download", None),
        ("GET", f"/tasks/{unknown}", None),
    ):
        script.is_refused(method, route, 404, body, str(unknown))
    script.is_refused("POST", "/configs", 422, {"model_id": unknown, "rules": []}, str(unknown))
    script.is_refused("GET", f"/configs/{config['id']}/download?as=yaml", 422)


def _refuse_jobs(script: Script, model: dict[str, Any], config: dict[str, Any]) -> None:
    good = {"model_id": model["id"], "config": config["id"], "dataset": {"uri": "demo:digits"}}
    everything = {"rules": [{"action": "freeze", "match": "**"}]}
    unknown = 10**9
    for change, word, field in (
        ({"config": everything}, "evaluat", "config"),
        ({"config": unknown}, str(unknown), "config"),
        ({"model_id": unknown}, str(unknown), "model_id"),
        ({"dataset": {"uri": "demo:nothing"}}, "demo:digits", "dataset.uri"),
        ({"dataset": {}}, "uri", "dataset.uri"),
        ({"training": {"epoch": 3}}, "epochs", "training.epoch"),
        ({"training": {"lr": -1}}, "lr", "training.lr"),
        ({"training": {"batch_size": "many"}}, "batch_size", "training.batch_size"),
        ({"training": {"device": "cuda:99"}}, "cuda:99", "training.device"),
        ({"kind": "trian"}, "train", "kind"),
        ({"nmae": "x"}, "name", "nmae"),
    ):
        refused = script.is_refused("POST", "/jobs", 422, {**good, **change}, word)
        assert [fault["field"] for fault in refused["errors"]] == [field]
    for needed in good:
        rest = {key: value for key, value in good.items() if key != needed}
        refused = script.is_refused("POST", "/jobs", 422, rest, needed)
        assert refused["errors"][0]["field"].startswith(needed)
    nowhere = f"/jobs/{unknown}"
    reads = ("", "/metrics", "/layers", "/proof", "/config", "/checkpoints", "/log", "/export")
    for read in (*reads, "/events", "/checkpoints/1/model.safetensors"):
        script.is_refused("GET", f"{nowhere}{read}", 404, None, str(unknown))
    for verb in ("stop", "pause", "resume"):
        script.is_refused("POST", f"{nowhere}/{verb}", 404, None, str(unknown))
    script.is_refused("PATCH", nowhere, 404, {"name": "x"}, str(unknown))
    script.is_refused("DELETE", nowhere, 404, None, str(unknown))
    for bearer in ("", "Bearer", "Bearer wrong", "Basic eDp5"):
        script.is_refused("GET", "/jobs", 401, headers={"Authorization": bearer})

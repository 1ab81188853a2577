"""The command line, run as people run it: its verbs, its exit codes, its one line of error."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).resolve().parents[2]
VERBS = [
    "serve",
    "plan",
    "train",
    "verify",
    "export",
    "jobs",
    "stop",
    "pause",
    "resume",
    "freeze",
    "delete",
    "evaluate",
    "sweep",
    "link",
    "doctor",
]


def environment(data: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FROSTLINE_")}
    return {**kept, "FROSTLINE_DATA_DIR": str(data), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def start(data: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(data),
        cwd=data,
    )


def run(data: Path, *arguments: str, status: int = 0) -> str:
    """What a command prints; where it fails, its error."""
    process = start(data, *arguments)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, (output, errors)
    assert "Traceback" not in errors
    return output if status == 0 else errors.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that nobody serves: each command does its work itself."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder with a running server, through which the commands go."""
    folder = tmp_path_factory.mktemp("served")
    with start(folder, "serve", "--port", "0") as server:
        assert server.stdout is not None
        server.stdout.readline()
        yield folder
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=10)


def test_the_version_is_told(data: Path) -> None:
    assert run(data, "--version").startswith("frostline ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(data: Path, verb: str) -> None:
    page = run(data, verb, "--help")
    assert "--data-dir" in page
    assert "--debug" in page


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["frobnicate"], "frobnicate"),
        (["train", "demo:digits"], "DATASET"),
        (["plan", "demo:digits", "--freze", "x"], "--freze"),
        (["train", "a", "b", "--optimizer", "lion"], "lion"),
        (["train", "a", "b", "--eval", "demo:digits"], "NAME=URI"),
        (["sweep", "a", "b", "--set", "nothing", "--eval", "x=a", "--eval", "x=b"], "twice"),
        (["stop", "one"], "JOB"),
        (["serve", "--host", "0.0.0.0", "--port", "0"], "--insecure-http"),
        (["serve", "--port", "70000"], "--port"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(
    data: Path, arguments: list[str], word: str
) -> None:
    assert word in run(data, *arguments, status=2)


def test_a_plan_takes_its_rules_in_the_order_they_came(served: Path) -> None:
    model = "demo:three-layers"
    plan = json.loads(run(served, "plan", model, "--freeze", "**", "--unfreeze=layer3", "--json"))
    assert plan["trainable"] == ["layer3.weight", "layer3.bias"]
    plan = json.loads(run(served, "plan", model, "--unfreeze=layer3", "--freeze", "**", "--json"))
    assert plan["trainable"] == []
    text = run(served, "plan", model, "--freeze", "layer1")
    assert re.search(r"layer1 .*idle", text)
    assert re.search(r"layer3 .*trained", text)


def test_a_plan_is_made_for_another_size(served: Path) -> None:
    small, large = (
        json.loads(run(served, "plan", "demo:digits", "--image-size", str(side), "--json"))["cost"]
        for side in (8, 16)
    )
    assert large["assumed"]["image_size"] == 16
    assert large["activation_bytes"] > 3 * small["activation_bytes"]
    refused = run(served, "plan", "demo:digits", "--sequence-length", "9")
    assert "A sequence length of 9 was not applied: its example has no sequence" in refused


def test_a_plan_says_what_it_assumed(served: Path) -> None:
    model = "demo:digits"
    options = ("--freeze", "stem", "--batch-size", "64", "--optimizer", "sgd")
    cost = json.loads(run(served, "plan", model, *options, "--json"))["cost"]
    assert (cost["assumed"]["batch_size"], cost["assumed"]["optimizer"]) == (64, "sgd")
    text = run(served, "plan", model, *options)
    assert "batch size 64" in text
    assert "frost line" in text
    assert "\x1b[" not in text
    assert max(map(len, text.splitlines())) > 60  # wide rows are not broken where nobody looks
    assert "--batch-size" in run(served, "plan", model, "--batch-size", "0", status=2)


def test_mechanisms_are_compared_side_by_side(served: Path) -> None:
    command = ("plan", "demo:three-layers", "--freeze", "layer2", "--compare-mechanisms")
    found = json.loads(run(served, *command, "--steps", "2", "--json"))
    assert [one["mechanism"] for one in found["mechanisms"]] == [
        "requires_grad", "exclude", "zero_lr", "zero_grad",
    ]  # fmt: skip
    assert (found["frozen"], found["trained"], found["on"]) == (2, 4, "example")
    text = run(served, *command, "--steps", "2", "--dataset", "demo:three-layers")
    assert re.search(r"frozen tensors with a gradient +0 +2 +2 +2", text)
    assert "on the data" in text
    assert "Nothing is trainable" in run(served, *command, "--freeze", "**", status=1)
    assert "demo:nothing" in run(served, *command, "--dataset", "demo:nothing", status=1)


def test_a_refusal_is_the_servers_own_sentence(data: Path, served: Path) -> None:
    model = "demo:three-layers"
    assert model in run(served, "plan", "demo:four-layers", status=1)
    assert "99" in run(served, "stop", "99", status=1)
    assert "no.json" in run(served, "plan", model, "--config", "no.json", status=1)
    assert "frostline serve" in run(data, "link", status=1)


@pytest.mark.parametrize("rate", ["nan", "inf", "-1"])
def test_a_number_that_json_lacks_is_refused_as_any_other(served: Path, rate: str) -> None:
    told = run(served, "train", *["demo:three-layers"] * 2, "--lr", rate, status=1)
    assert told == f"frostline: 'lr' must be finite and above 0; this is {float(rate)}."
    told = run(served, "freeze", "1", "--unfreeze", "x", "--lr-scale", "nan", status=1)
    assert told == "frostline: 'lr_scale' is nan; it must be finite and at least 0."
    config = served / "nan.json"
    config.write_text('{"groups": [{"match": "**", "lr_scale": NaN}]}')
    told = run(served, "plan", "demo:three-layers", "--config", str(config), status=1)
    assert told == f"frostline: {config} is not JSON: NaN is not a JSON number."


def test_training_exporting_verifying_and_deleting(served: Path) -> None:
    config = served / "config.json"
    config.write_text(json.dumps({"rules": [{"action": "freeze", "match": "layer1"}]}))
    job = json.loads(
        run(
            served,
            *("train", "demo:three-layers", "demo:three-layers", "--config", str(config)),
            *("--max-steps", "12", "--checkpoint-every", "6", "--device", "cpu", "--json"),
        )
    )
    assert (job["state"], job["step"], job["proof"]["verdict"]) == ("succeeded", 12, "holds")
    number = str(job["id"])
    assert json.loads(run(served, "jobs", "--json"))[0]["id"] == job["id"]
    assert "succeeded" in run(served, "jobs")
    run(served, "export", number, "--format", "csv", "-o", str(served / "out.csv"))
    run(served, "export", number, "--format", "parquet", "-o", str(served / "out.parquet"))
    assert (served / "out.parquet").read_bytes()[-4:] == b"PAR1"
    run(served, "export", number, "--format", "tensorboard", "-o", str(served / "events"))
    (events,) = (served / "events").iterdir()
    assert "tfevents" in events.name
    assert events.stat().st_size > 1000
    assert "loss" in (served / "out.csv").read_text()
    folders = sorted((served / "jobs" / number / "checkpoints").iterdir())
    first, last = folders[0], folders[-1]
    verify = ("verify", str(first), str(last), "--config", str(config))
    assert "bit-identical" in run(served, *verify)
    config.write_text(json.dumps({"rules": [{"action": "freeze", "match": "layer3"}]}))
    told = run(served, *verify, status=1)
    assert "did: layer3.bias layer3.weight" in told
    assert "did not move: layer1.bias layer1.weight" in told
    run(served, "delete", number)
    assert "job" in run(served, "delete", number, status=1).lower()


def test_evaluating_gives_metrics_alone(data: Path) -> None:
    job = json.loads(
        run(data, "evaluate", "demo:three-layers", "demo:three-layers", "--json", "--device", "cpu")
    )
    assert job["state"] == "succeeded"
    assert any(name.startswith("eval/") for name in job["metrics"])
    assert job["proof"] is None


def test_further_evaluation_sets_are_named_by_options(data: Path) -> None:
    brief = ("--max-steps", "1", "--device", "cpu", "--json")
    own = '{"uri": "demo:digits-shifted", "eval": {"whole": "demo:digits"}}'
    told = run(data, "train", "demo:digits", own, "--eval", "again=demo:digits", *brief)
    job = json.loads(told)
    assert job["dataset"]["eval"] == {"whole": "demo:digits", "again": "demo:digits"}
    names = {n.split("/")[1] for n in job["metrics"] if n.startswith("eval/")}
    assert names == {"eval", "before", "whole", "again"}
    assert job["metrics"]["eval/whole/accuracy"] == job["metrics"]["eval/again/accuracy"]


def test_a_sweep_is_one_table_of_freeze_sets(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "first-layer.json"
    own.write_text(json.dumps({"rules": [{"action": "freeze", "match": "layer1"}]}))
    told = run(
        data,
        *("sweep", "demo:three-layers", "demo:three-layers", "--set", "nothing"),
        *("--set", str(own), "--max-steps", "3", "--device", "cpu", "--json"),
    )
    table = json.loads(told)["table"]
    assert [row["set"] for row in table] == ["Freeze nothing", "first-layer"]
    assert {row["state"] for row in table} == {"succeeded"}
    assert [row["frozen_count"] for row in table] == [0, 2]
    assert "'hed' is not a preset" in run(
        data, "sweep", "demo:three-layers", "demo:three-layers", "--set", "hed", status=1
    )


def test_ctrl_c_stops_a_training_with_a_checkpoint(data: Path) -> None:
    with start(
        data,
        *("train", "demo:three-layers", "demo:three-layers", "--device", "cpu"),
        *("--max-steps", "100000000"),
    ) as process:
        wait_for_steps(process, data)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was stopped" in errors
    job = json.loads(run(data, "jobs", "--json"))[0]
    assert job["state"] == "stopped"
    assert any((data / "jobs" / str(job["id"]) / "checkpoints").iterdir())


def test_what_is_frozen_changes_while_a_job_runs(data: Path) -> None:
    with start(
        data,
        *("train", "demo:three-layers", "demo:three-layers", "--device", "cpu"),
        *("--max-steps", "100000000"),
    ) as process:
        wait_for_steps(process, data)
        try:
            number = str(json.loads(run(data, "jobs", "--json"))[0]["id"])
            told = run(data, "freeze", number, "--freeze", "layer2", "--warmup-steps", "5")
            refusal = run(data, "freeze", number, "--freeze", "**", status=1)
            empty = run(data, "freeze", number, status=2)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert re.fullmatch(rf"Job {number}: holds from step \d+ on\.\n", told)
    assert "last trainable layer" in refusal
    assert "--unfreeze" in empty
    job = json.loads(run(data, "jobs", "--json"))[0]
    assert [entry["match"] for entry in job["config"]["schedule"]] == ["layer2"]


def test_a_job_goes_past_its_end_only_where_that_is_said(data: Path) -> None:
    run(data, "train", *["demo:three-layers"] * 2, "--device", "cpu", "--max-steps", "2")
    number = str(json.loads(run(data, "jobs", "--json"))[0]["id"])
    assert "more 'epochs' or 'max_steps'" in run(data, "resume", number, status=1)
    assert "would end at step 1" in run(data, "resume", number, "--max-steps", "1", status=1)
    run(data, "resume", number, "--max-steps", "4")
    job = json.loads(run(data, "jobs", "--json"))[0]
    assert (job["state"], job["step"]) == ("succeeded", 4)


def wait_for_steps(process: "subprocess.Popen[str]", data: Path) -> None:
    """Until the newest job of whoever holds the folder has made steps."""
    pause = threading.Event()
    while process.poll() is None:
        pause.wait(0.1)
        try:
            token = (data / "token").read_text().strip()
            holder = json.loads((data / "writer.lock").read_text())
            if holder["pid"] != process.pid:
                continue
            jobs = httpx2.get(
                f"{holder['address']}/api/jobs",
                headers={"Authorization": f"Bearer {token}"},
                trust_env=False,
            ).json()
        except (OSError, ValueError, httpx2.TransportError):
            continue
        if jobs and jobs[0]["state"] == "running" and jobs[0]["step"] > 0:
            return
    raise AssertionError(process.communicate())


def test_a_server_is_found_by_the_other_verbs_and_leaves_with_status_0(tmp_path: Path) -> None:
    with start(tmp_path, "serve", "--port", "0") as server:
        assert server.stdout is not None
        page = server.stdout.readline() + server.stdout.readline()
        [link] = re.findall(r"http://127\.0\.0\.1:\d+/login\?link=\S+", page)
        assert httpx2.get(link, trust_env=False).status_code == 200
        assert run(tmp_path, "link").startswith(link.partition("=")[0])
        assert json.loads(run(tmp_path, "jobs", "--json")) == []
        assert "belongs to process" in run(tmp_path, "serve", "--port", "0", status=1)
        port = re.search(r":(\d+)/", link)
        assert port
        assert "--port" in run(tmp_path / "..", "serve", "--port", port[1], status=1)
        token = {"Authorization": f"Bearer {(tmp_path / 'token').read_text().strip()}"}
        address = link.partition("/login")[0]
        with httpx2.stream("GET", f"{address}/api/events", headers=token, trust_env=False) as open_:
            server.send_signal(signal.SIGTERM)
            open_.read()  # the server ends it, and does not wait for it
        _, errors = server.communicate(timeout=5)
    assert server.returncode == 0
    assert errors == ""


@pytest.mark.parametrize("stops", [True, False])
def test_leaving_lets_jobs_go_on_or_stops_them(tmp_path: Path, stops: bool) -> None:
    options = ["--stop-jobs"] if stops else []
    with start(tmp_path, "serve", "--port", "0", *options) as server:
        assert server.stdout is not None
        server.stdout.readline()
        [address] = re.findall(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        token = {"Authorization": f"Bearer {(tmp_path / 'token').read_text().strip()}"}
        with httpx2.Client(base_url=address, headers=token, trust_env=False) as client:
            request = {"uri": "demo:three-layers"}
            model_id = client.post("/api/models", json=request).json()["id"]
            pause = threading.Event()
            while client.get(f"/api/models/{model_id}").json()["state"] == "inspecting":
                pause.wait(0.05)
            job = {"model_id": model_id, "config": {}, "dataset": request}
            training = {"max_steps": 10**8, "device": "cpu"}
            assert client.post("/api/jobs", json={**job, "training": training}).status_code == 201
            wait_for_steps(server, tmp_path)
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=30)
    assert (server.returncode, errors) == (0, "")
    assert ("Stopping 1 job, each" in output) == stops
    assert ("Job 1 goes on without the dashboard" in output) == (not stops)
    # The next server finds what this one left.
    assert json.loads(run(tmp_path, "jobs", "--json"))[0]["state"] == (
        "stopped" if stops else "running"
    )
    if not stops:  # each command finds the worker, and stays until it has heeded
        assert "paused" in run(tmp_path, "pause", "1")
        assert json.loads(run(tmp_path, "jobs", "--json"))[0]["state"] == "paused"
        assert "stopped" in run(tmp_path, "stop", "1")


def test_the_doctor_says_what_jobs_run_in(data: Path) -> None:
    page = run(data, "doctor")
    assert re.search(r"ok +jobs run in .*torch", page)
    assert "data is private  " in page  # the longest name runs into no words

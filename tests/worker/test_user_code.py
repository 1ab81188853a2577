"""Somebody's own module and data: in our environment, in theirs, and when they misbehave."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.contract.path_driver import Script, check_records, serving

MODELS = '''
"""A network of their own, with its own loss and metric."""

import sys
from importlib.util import find_spec

import torch
from torch import nn


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.below = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU())
        self.above = nn.Linear(width, 3)

    def forward(self, inputs):
        return self.above(self.below(inputs))


def loss(output, batch):
    is_example = isinstance(batch, torch.Tensor)  # a plan asks with it, and it has no target
    target = torch.zeros(len(output), dtype=torch.long) if is_example else batch[1]
    return nn.functional.cross_entropy(output, target)


def margin(output, batch):
    top = output.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).mean().item()


def tower(width=8):
    print("python", sys.executable, flush=True)
    found = [name for name in NOT_THEIRS if find_spec(name)]
    print("found", found, flush=True)
    example = torch.randn(4, 6)
    return {"model": Tower(width), "example": example, "loss": loss, "metrics": {"margin": margin}}


NOT_THEIRS = ("fastapi", "starlette", "sqlmodel", "sqlalchemy", "pydantic", "uvicorn", "typer")
'''

DATA = '''
"""Data of their own, from a file beside this module."""

import csv
from pathlib import Path

import torch


def rows(first, last):
    with (Path(__file__).parent / "points.csv").open() as file:
        points = [[float(value) for value in row] for row in csv.reader(file)]
    return [(torch.tensor(p[:-1]), int(p[-1])) for p in points[first:last]]


def points():
    return {"train": rows(0, 60), "eval": {"near": rows(60, 80), "eval": rows(60, None)}}
'''

PRIVATE = '''
"""What only their own environment has."""

SCALE = 0.5
'''

OWN = '''
"""A model that needs what only their own environment has."""

from mine.models import tower
from their_private_package import SCALE


def scaled():
    answer = tower()
    for parameter in answer["model"].parameters():
        parameter.data.mul_(SCALE)
    return answer
'''

UNRULY = '''
"""What can go wrong in a factory."""

import sys


def raises():
    raise ValueError("the disk with the weights is in the other office")


def shouts():
    for _ in range(25):
        print("x" * 2**20)
    raise ValueError("and hoarse in the end")


def leaves():
    sys.exit(0)


def gives_nothing():
    pass
'''

LACKING = """
import there_is_no_such_package


def factory():
    pass
"""

RULES = [{"action": "freeze", "match": "below"}, {"action": "unfreeze", "match": "**.1.bias"}]
ENDLESS = {"epochs": 10**6, "eval_every": 10**6, "checkpoint_every": 10**6}


class Wrong(NamedTuple):
    """A factory, what its job must end with, and a word that must be said."""

    uri: str
    reason: str
    word: str


WRONGS = [
    Wrong("python:mine.unruly:raises", "user_code", "the other office"),
    Wrong("python:mine.unruly:shouts", "user_code", "hoarse"),
    Wrong("python:mine.unruly:leaves", "user_code", "sys.exit(0)"),
    Wrong("python:mine.unruly:gives_nothing", "bad_spec", "None"),
    Wrong("python:mine.unruly:missing", "bad_spec", "raises, shouts"),
    Wrong("python:mine.lacking:factory", "import_error", "there_is_no_such_package"),
    Wrong("python:mine.own:scaled", "import_error", "their_private_package"),
]


@pytest.fixture(scope="module")
def code_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    package = folder / "mine"
    package.mkdir()
    sources = {"models": MODELS, "data": DATA, "own": OWN, "unruly": UNRULY, "lacking": LACKING}
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    (package / "__init__.py").touch()
    points = [[(row * 7 + column * 3) % 11 / 5 - 1 for column in range(6)] for row in range(90)]
    lines = (",".join(map(str, [*point, row % 3])) for row, point in enumerate(points))
    (package / "points.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, code_dir: Path) -> Iterator[Script]:
    """A server whose jobs run in our own environment."""
    with serving(tmp_path_factory.mktemp("ours"), CODE_DIRS=str(code_dir)) as script:
        yield script


# ------------------------------------------------------------------------------- the path is theirs


def test_the_path_works_on_a_module_and_data_of_ones_own(ours: Script) -> None:
    model = _inspect(ours, uri="python:mine.models:tower", kwargs={"width": 12})
    _train_and_stop(ours, model)
    succeeded = ours.until_ended(_launch(ours, model, {"max_steps": 9}))
    assert (succeeded["state"], succeeded["step"], succeeded["error"]) == ("succeeded", 9, None)
    _read(ours, model, succeeded)


def test_the_path_works_in_an_environment_of_ones_own(
    tmp_path_factory: pytest.TempPathFactory, code_dir: Path
) -> None:
    python = _make_environment(tmp_path_factory.mktemp("environment"))
    data_dir = tmp_path_factory.mktemp("theirs")
    variables = {"CODE_DIRS": str(code_dir), "WORKER_PYTHON": str(python)}
    with serving(data_dir, **variables) as theirs:
        stopped = _train_and_stop(theirs, _inspect(theirs, uri="python:mine.own:scaled"))
        log = theirs.http.get(f"/api/jobs/{stopped['id']}/log").text
    assert f"python {python}\n" in log
    assert "found []\n" in log  # torch and theirs, and nothing else that is ours


def _inspect(script: Script, **spec: Any) -> dict[str, Any]:
    model = script.add_model(**spec)
    assert (model["state"], model["error"]) == ("ready", None)
    modules = script.get(f"/models/{model['id']}/tree")["modules"]
    layers = [module["path"] for module in modules if module["parameters"]]
    assert layers == ["below.0", "below.1", "above"]
    return model


def _launch(script: Script, model: dict[str, Any], training: dict[str, Any]) -> int:
    saved = script.call("POST", "/configs", 201, {"model_id": model["id"], "rules": RULES})
    request = {
        "model_id": model["id"],
        "config": saved["id"],
        "dataset": {"uri": "python:mine.data:points"},
        "training": training,
    }
    job_id: int = script.call("POST", "/jobs", 201, request)["id"]
    return job_id


def _train_and_stop(script: Script, model: dict[str, Any]) -> dict[str, Any]:
    job_id = _launch(script, model, ENDLESS)
    seen = script.until(f"/jobs/{job_id}", lambda job: job["step"] > 2 or job["error"])
    assert (seen["state"], seen["error"]) == ("running", None)
    assert script.get(f"/jobs/{job_id}/metrics", name="loss")["loss"]["steps"]
    assert script.get(f"/jobs/{job_id}/layers", stat="update_norm")["steps"]
    script.call("POST", f"/jobs/{job_id}/stop", 202)
    stopped = script.until_ended(job_id)
    assert (stopped["state"], stopped["error"]) == ("stopped", None)
    _read(script, model, stopped)
    return stopped


def _read(script: Script, model: dict[str, Any], job: dict[str, Any]) -> None:
    """Plan, proof, metrics, checkpoint and database of an ended job."""
    plan = script.call("POST", f"/models/{model['id']}/plan", 200, {"rules": RULES})
    assert plan["trainable"] == ["below.1.bias", "above.weight", "above.bias"]
    assert [layer["flow"] for layer in plan["layers"]] == ["idle", "trained", "trained"]
    path = f"/jobs/{job['id']}"
    proof = script.get(f"{path}/proof")
    assert (proof["verdict"], proof["frozen"]["checked"]) == ("holds", 3)
    assert {"eval/near/loss", "eval/eval/margin"} <= script.get(f"{path}/metrics").keys()
    assert script.get(f"{path}/checkpoints")[-1]["step"] == job["step"]
    check_records(Path(script.get("/system")["data_dir"]), job, plan)


def _make_environment(folder: Path) -> Path:
    """A virtual environment with torch, numpy, safetensors and one package that we do not have.

    Nothing is downloaded: what is wanted of our own packages is linked into it.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(_print_with(python, where))
    for name in _with_requirements("torch", "numpy", "safetensors"):
        distribution = importlib.metadata.distribution(name)
        tops = {Path(file.parts[0]) for file in distribution.files or ()}
        for top in tops - {Path(".."), Path("__pycache__")}:
            link = site / top
            if not link.is_symlink():  # packages of one namespace share a folder
                link.symlink_to(Path(str(distribution.locate_file(top))))
    (site / "their_private_package.py").write_text(PRIVATE)
    names = ("fastapi", "sqlmodel", "pydantic", "httpx2", "typer", "psutil", "app", "pytest")
    look = f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])"
    assert _print_with(python, look) == "[]"
    assert importlib.util.find_spec("their_private_package") is None
    return python


def _print_with(python: Path, code: str) -> str:
    command = [str(python), "-I", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _with_requirements(*names: str) -> set[str]:
    """These distributions and all that they need where we are."""
    found: set[str] = set()
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
            wanted += [
                one.name
                for one in requirements
                if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


# -------------------------------------------------------------------------------- theirs goes wrong


def test_a_factory_that_goes_wrong_ends_with_its_reason_and_the_server_stays_well(
    ours: Script,
) -> None:
    server = ours.get("/system")["keeper"]
    added = [ours.call("POST", "/models", 202, {"uri": wrong.uri})["id"] for wrong in WRONGS]
    good = ours.add_model(uri="demo:three-layers")
    assert good["state"] == "ready"
    request = {"model_id": good["id"], "config": {"rules": []}}
    jobs = [
        ours.call("POST", "/jobs", 201, {**request, "dataset": {"uri": wrong.uri}})["id"]
        for wrong in WRONGS
    ]
    for wrong, model_id in zip(WRONGS, added, strict=True):
        model = ours.until(f"/models/{model_id}", lambda model: model["state"] != "inspecting")
        assert model["state"] == "failed"
        _is_told(wrong, model["error"])
        refused = ours.call("GET", f"/models/{model_id}/tree", 409)
        assert (refused["state"], wrong.word in refused["detail"]) == ("failed", True)
    for wrong, job_id in zip(WRONGS, jobs, strict=True):
        job = ours.until_ended(job_id)
        assert (job["state"], job["step"]) == ("failed", 0)
        _is_told(wrong, job["error"])
        log = ours.http.get(f"/api/jobs/{job_id}/log").text
        assert len(log) < 11 * 2**20
        assert wrong.word in log or "limit" in log[-200:]

    assert ours.process.poll() is None
    assert ours.get("/health")["status"] == "ok"
    system = ours.get("/system")
    assert system["keeper"] == server
    assert system["memory"]["server"] < 150 * 2**20
    training = {"max_steps": 2}
    well = {**request, "dataset": {"uri": "demo:three-layers"}, "training": training}
    assert ours.until_ended(ours.call("POST", "/jobs", 201, well)["id"])["state"] == "succeeded"


def _is_told(wrong: Wrong, error: dict[str, str]) -> None:
    assert error["reason"] == wrong.reason, error
    assert wrong.word in error["message"], error
    assert len(error["message"]) <= 1000
    assert "\n" not in error["message"]
    assert "app." not in error["message"]  # where our classes lie is no part of a sentence

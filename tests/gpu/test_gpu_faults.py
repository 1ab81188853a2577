"""What goes wrong on a GPU ends a job in words, and the next has the device; skipped without."""

from collections.abc import Iterator

import pytest
import torch

from tests.contract.path_driver import Script, serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SOURCE = """
import torch
from torch import nn


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        if x.is_cuda:
            self.kept = torch.empty(2**50, device=x.device, dtype=torch.uint8)
        return self.layer(x)


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        rows = self.layer(x)
        if x.is_cuda:
            rows = rows + rows[torch.full((1,), 10**6, device=x.device)]
        return rows


def greedy():
    return {"model": Greedy(), "example": torch.zeros(2, 4)}


def outside():
    return {"model": Outside(), "example": torch.zeros(2, 4)}


def load():
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    return {"train": [(x, int(x[0] > 0)) for x in inputs]}
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    code, data_dir = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("data")
    (code / "on_gpu.py").write_text(SOURCE)
    with serving(data_dir, CODE_DIRS=str(code)) as script:
        yield script


@pytest.mark.parametrize(
    ("factory", "reason", "advice"),
    [("greedy", "oom_cuda", "batch_size"), ("outside", "cuda_fatal", "CUDA_LAUNCH_BLOCKING")],
)
def test_the_reason_is_named_and_the_device_is_free_again(
    script: Script, factory: str, reason: str, advice: str
) -> None:
    model = script.add_model(uri=f"python:on_gpu:{factory}")
    assert model["state"] == "ready", model["error"]
    failed = launch(script, model["id"], "python:on_gpu:load")
    assert failed["state"] == "failed"
    assert failed["error"]["reason"] == reason
    assert "Traceback" not in failed["error"]["message"]
    page = script.http.get(f"/jobs/{failed['id']}").text
    assert advice in page
    healthy = launch(script, script.add_model(uri="demo:three-layers")["id"], "demo:three-layers")
    assert healthy["state"] == "succeeded"


def launch(script: Script, model_id: int, dataset: str) -> dict[str, object]:
    training = {"max_steps": 3, "batch_size": 4, "device": "cuda"}
    spec = {"model_id": model_id, "config": {}, "dataset": {"uri": dataset}, "training": training}
    return script.until_ended(script.call("POST", "/jobs", 201, spec)["id"])

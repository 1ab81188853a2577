"""The Python download, used as somebody's own script would."""

import types
from typing import Any

import pytest
import torch

from app.freezing.config import parse_config
from app.freezing.export import config_as_python
from app.freezing.trace import read_model
from tests.unit.models import make


def load(name: str, document: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType("freeze_download")
    source = config_as_python(parse_config(document), read_model(make(name)[0]))
    assert "import app" not in source
    assert "from app" not in source
    exec(compile(source, "freeze_download.py", "exec"), module.__dict__)
    return module


CONFIG: dict[str, Any] = {
    "name": 'stem """ \\ frozen',
    "rules": [{"action": "freeze", "match": "stem"}],
    "groups": [{"match": "head", "lr_scale": 10.0, "weight_decay": 0.0}],
}


def test_the_downloaded_module_freezes_trains_and_checks() -> None:
    module = load("convolutional", CONFIG)
    model, example = make("convolutional")
    module.apply_freeze(model)
    model.train()
    assert not model.stem[1].training
    groups = module.parameter_groups(model, lr=0.1, weight_decay=0.5)
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(0.1, 0.5), (1.0, 0.0)}
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        model(example).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    module.assert_frozen(model)
    with torch.no_grad():
        model.stem[1].running_mean.add_(1)
        model.stem[0].bias.add_(1)
    with pytest.raises(AssertionError, match=r"2 frozen tensors moved: stem\.0\.bias, stem\.1\."):
        module.assert_frozen(model)


def test_another_model_is_refused() -> None:
    with pytest.raises(KeyError, match="lacks"):
        load("convolutional", CONFIG).apply_freeze(make("plain")[0])


@pytest.mark.parametrize("mechanism", ["exclude", "zero_lr", "zero_grad"])
def test_every_mechanism_is_applied_as_it_is_named(mechanism: str) -> None:
    module = load(
        "plain", {"rules": [{"action": "freeze", "match": "layer1"}], "mechanism": mechanism}
    )
    model, example = make("plain")
    module.apply_freeze(model)
    groups = module.parameter_groups(model, lr=0.1)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model(example).square().mean().backward()
    module.zero_frozen_gradients(model) if mechanism == "zero_grad" else None
    optimizer.step()
    module.assert_frozen(model)
    assert model.layer1.weight.requires_grad
    assert len(groups) == (2 if mechanism == "zero_lr" else 1)

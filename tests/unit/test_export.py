"""The Python download, used as somebody's own script would."""

import ast
import copy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from app.freezing.apply import apply_config
from app.freezing.config import MECHANISMS, parse_config
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


SETS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"rules": [{"action": "freeze", "match": "layer2"}]}),
    ("plain", {"rules": [{"action": "freeze", "match": "**.bias"}], "groups": CONFIG["groups"]}),
    ("tied", {"rules": [{"action": "freeze", "match": "head"}]}),
    ("tied", {"rules": [{"action": "freeze", "match": "block"}], "dropout": "off"}),
    ("convolutional", {"rules": [{"action": "freeze", "match": "{stem,body}"}], "dropout": "off"}),
    ("convolutional", {"rules": [{"action": "freeze", "match": "stem"}], "dropout": "keep"}),
    (
        "convolutional",
        {"rules": [{"action": "freeze", "match": "stem"}], "norm_statistics": "update"},
    ),
    ("convolutional", CONFIG),
    ("plain", {"rules": []}),
]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("name", "document"), SETS)
def test_the_download_does_what_the_server_does(
    name: str, document: dict[str, Any], mechanism: str
) -> None:
    document = {**document, "mechanism": mechanism}
    module = load(name, document)
    ours, example = make(name)
    theirs, _ = make(name)
    freeze = apply_config(ours, parse_config(document))
    module.apply_freeze(theirs)
    theirs.train()
    assert [p.requires_grad for p in theirs.parameters()] == [
        p.requires_grad for p in ours.parameters()
    ]
    assert [m.training for m in theirs.modules()] == [m.training for m in ours.modules()]
    ours_groups = freeze.parameter_groups(weight_decay=0.1)
    for group in ours_groups:
        group["lr"] = 0.01 * group.pop("lr_scale")
    theirs_groups = module.parameter_groups(theirs, lr=0.01, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in theirs_groups] == [
        (g["lr"], g["weight_decay"], len(g["params"])) for g in ours_groups
    ]
    optimizers = torch.optim.AdamW(ours_groups), torch.optim.AdamW(theirs_groups)
    for _ in range(3):
        for model, optimizer, hold in (
            (ours, optimizers[0], freeze.hold_gradients),
            (theirs, optimizers[1], lambda: zero(module, theirs)),
        ):
            torch.manual_seed(1)
            model(example).float().square().mean().backward()
            hold()
            optimizer.step()
            optimizer.zero_grad()
    for tensor, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    if mechanism != "zero_grad":
        module.assert_frozen(theirs)


def zero(module: types.ModuleType, model: torch.nn.Module) -> None:
    if module.MECHANISM == "zero_grad":
        module.zero_frozen_gradients(model)


def test_a_gradient_on_something_frozen_is_told() -> None:
    module, (model, _) = load("plain", SETS[0][1]), make("plain")
    module.apply_freeze(model)
    model.layer2.bias.grad = torch.zeros(8)
    with pytest.raises(AssertionError, match=r"have a gradient: layer2\.bias"):
        module.assert_frozen(model)


def test_a_copy_and_a_part_of_a_frozen_model_keep_norms_still() -> None:
    module, (model, _) = load("convolutional", CONFIG), make("convolutional")
    copied = copy.deepcopy(module.apply_freeze(model))
    copied.train()
    copied.stem.train()
    assert not copied.stem[1].training
    assert copied.body[1].training
    model.train()
    assert not model.stem[1].training


def test_the_file_is_one_that_people_like_to_read() -> None:
    schedule = [{"at": {"epoch": 2}, "action": "unfreeze", "match": 're:.*"""\\.bias'}]
    document = {**CONFIG, "schedule": schedule}
    graph = read_model(make("convolutional")[0])
    source = config_as_python(parse_config(document), graph)
    compile(source, "freeze.py", "exec")
    tree = ast.parse(source)
    kinds = [type(node) for node in tree.body]
    assert kinds[0] is ast.Expr
    imports = [i for i, kind in enumerate(kinds) if kind in (ast.Import, ast.ImportFrom)]
    assert imports == list(range(1, 1 + len(imports)))
    assert "noqa" not in source
    assert "type: ignore" not in source
    assert max(map(len, source.splitlines())) <= 100
    told = ast.get_docstring(tree) or ""
    assert "unfreeze" in told
    assert "after epoch 2" in told


def test_the_file_needs_torch_alone(tmp_path: Path) -> None:
    graph = read_model(make("plain")[0])
    source = config_as_python(parse_config(SETS[0][1]), graph)
    (tmp_path / "freeze.py").write_text(source)
    script = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch
from torch import nn
import freeze
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
model = freeze.apply_freeze(Net())
freeze.assert_frozen(model)
model.layer2.bias.data[0] += 1
try:
    freeze.assert_frozen(model)
except AssertionError as error:
    print(error)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "1 frozen tensors moved: layer2.bias\n", done.stderr

"""Models: the built-in ones, a user's own, and weights that fit or do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from app.freezing.errors import InvalidDocument
from app.sources.demo import DEMO_MODELS
from app.sources.demo.networks import DigitsNet, build_network
from app.sources.models import BuiltModel, build_model, load_weights
from app.sources.spec import InputSpec, ModelSpec
from app.sources.user_code import UserCodeError


def build_own(code_dir: Path, source: str, **options: Any) -> BuiltModel:
    """Build ``make`` of a module `net` with this source, torch and nn imported."""
    (code_dir / "net.py").write_text(f"import torch\nfrom torch import nn\n{source}")
    return build_model(ModelSpec("python:net:make", **options), code_dirs=[code_dir])


# ------------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_a_demo_model_takes_its_example_and_is_the_same_each_time(name: str) -> None:
    torch.manual_seed(1)
    one = build_model(ModelSpec(f"demo:{name}"), code_dirs=[])
    torch.manual_seed(2)
    two = build_model(ModelSpec(f"demo:{name}"), code_dirs=[])
    assert one.model(one.example).shape == (2, 10 if name.startswith("digits") else 2)
    two.model(two.example)  # moves running statistics as the call above did
    for (key, left), right in zip(
        one.model.state_dict().items(), two.model.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), key


def test_building_a_demo_model_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    build_network("three-layers")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_digits_network_has_the_promised_modules_and_size() -> None:
    model = DigitsNet()
    assert [name for name, _ in model.named_children()] == [
        "stem", "layer1", "layer2", "layer3", "fc",
    ]  # fmt: skip
    assert 55_000 < sum(p.numel() for p in model.parameters()) < 65_000


def test_the_pretrained_head_stays_unless_it_has_another_size() -> None:
    kept = build_network("digits", num_classes=10).state_dict()
    new = build_network("digits", num_classes=3).state_dict()
    fresh = build_network("digits", num_classes=3, random_init=True).state_dict()
    shipped = build_network("digits").state_dict()
    assert torch.equal(kept["fc.weight"], shipped["fc.weight"])
    assert new["fc.weight"].shape[0] == 3
    assert torch.equal(new["fc.weight"], fresh["fc.weight"])
    assert torch.equal(new["layer3.conv2.weight"], shipped["layer3.conv2.weight"])
    assert not torch.equal(fresh["layer3.conv2.weight"], shipped["layer3.conv2.weight"])


# ----------------------------------------------------------------------------------------- python


def test_a_factory_may_return_a_module_alone(code_dir: Path) -> None:
    built = build_own(code_dir, "def make(width): return nn.Linear(width, 2)", kwargs={"width": 4})
    assert built.model(torch.zeros(3, 4)).shape == (3, 2)
    assert (built.example, built.loss, dict(built.metrics)) == (None, None, {})


def test_a_factory_may_return_everything(code_dir: Path) -> None:
    built = build_own(
        code_dir,
        "def make():\n"
        "    return {'model': nn.Linear(4, 2), 'example': (torch.zeros(1, 4),),\n"
        "            'loss': lambda output, batch: output.sum(),\n"
        "            'metrics': {'mean': lambda output, batch: 0.5}}",
    )
    assert isinstance(built.example, tuple)
    assert built.loss is not None
    assert built.metrics["mean"](None, None) == 0.5


def test_input_makes_an_example_and_wins_over_the_factorys(code_dir: Path) -> None:
    source = "def make(): return {'model': nn.Linear(4, 2), 'example': torch.zeros(7, 4)}"
    built = build_own(code_dir, source, input=InputSpec((4,)))
    again = build_own(code_dir, source, input=InputSpec((4,)))
    assert built.example.shape == (2, 4)
    assert torch.equal(built.example, again.example)
    tokens = build_own(code_dir, source, input=InputSpec((5,), "int64")).example
    assert torch.equal(tokens, torch.zeros(2, 5, dtype=torch.int64))


def test_lazy_layers_get_their_shapes_from_the_example(code_dir: Path) -> None:
    source = "def make(): return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())"
    with pytest.raises(InvalidDocument, match="has lazy layers, which need an example"):
        build_own(code_dir, source)
    model = build_own(code_dir, source, input=InputSpec((5,))).model
    assert model[0].weight.shape == (3, 5)
    assert model.training
    assert torch.equal(model[1].running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def make(): return 3", "returned an object of type int; it must return an nn.Module"),
        ("def make(): return None", "returned None"),
        ("def make(): return {'example': 1}", "'model' of python:net:make is None; it must"),
        ("def make(): return {'model': nn.Linear(1, 1), 'exampel': 1}", "did it mean 'example'"),
        ("def make(): return {'model': nn.Linear(1, 1), 'example': [1]}", "'example' .* type list"),
        ("def make(): return {'model': nn.Linear(1, 1), 'loss': 1}", "'loss' .* type int"),
        ("def make(): return {'model': nn.Linear(1, 1), 'metrics': {'a/b': len}}", "'metrics'"),
        ("def build(): pass", "has no 'make'; it defines build"),
        ("make = 3", "'make' in net is 3, not a function"),
        ("make = nn.Linear(1, 1)", "not a function"),
        ("def make(width): pass", r"has the form make\(width\).*missing"),
    ],
)
def test_a_factory_that_gives_no_model_is_a_bad_spec(
    code_dir: Path, source: str, sentence: str
) -> None:
    with pytest.raises(InvalidDocument, match=sentence):
        build_own(code_dir, source)


@pytest.mark.parametrize(
    ("source", "reason", "sentence"),
    [
        ("import absent_package", "import_error", "No module named 'absent_package'"),
        ("1 / 0", "import_error", "ZeroDivisionError"),
        ("def make(: pass", "import_error", "SyntaxError"),
        ("def make(): raise ValueError('odd\\nmore')", "user_code", "ValueError: odd$"),
        ("def make(): return len()", "user_code", "TypeError"),
    ],
)
def test_user_code_that_raises_keeps_its_cause(
    code_dir: Path, source: str, reason: str, sentence: str
) -> None:
    with pytest.raises(UserCodeError, match=sentence) as raised:
        build_own(code_dir, source)
    assert raised.value.reason == reason
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("error", ["MemoryError", "torch.OutOfMemoryError", "SystemExit"])
def test_running_out_of_memory_and_leaving_are_not_disguised(code_dir: Path, error: str) -> None:
    with pytest.raises((MemoryError, torch.OutOfMemoryError, SystemExit)):
        build_own(code_dir, f"def make(): raise {error}()")


@pytest.mark.parametrize("module", ["json", "app.net"])
def test_a_module_that_another_one_hides_is_named(code_dir: Path, module: str) -> None:
    file = code_dir / (module.replace(".", "/") + ".py")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(InvalidDocument, match=r"is already the name of .*\.py"):
        build_model(ModelSpec(f"python:{module}:make"), code_dirs=[code_dir])


def test_user_code_may_import_its_neighbours_later(code_dir: Path) -> None:
    (code_dir / "parts").mkdir()
    (code_dir / "parts" / "width.py").write_text("WIDTH = 6")
    source = "def make():\n    from parts.width import WIDTH\n    return nn.Linear(WIDTH, 1)"
    assert build_own(code_dir, source).model.in_features == 6


# ---------------------------------------------------------------------------------------- weights


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


class Tied(nn.Module):
    """Two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False)
        self.outer = nn.Linear(2, 2, bias=False)
        self.outer.weight = self.inner.weight


def test_weights_are_loaded_over_the_model(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    given = two_layers().state_dict()
    save_file(given, path)
    model = two_layers()
    load_weights(model, path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in given.items())


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "2.x": torch.ones(1)}, path)
    model = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidDocument) as refused:
        load_weights(model, path)
    assert str(refused.value) == (
        "w.safetensors does not fit the model; missing: 1.weight, 1.bias; unexpected: 2.x; "
        "of another shape: 0.bias (4,) for (3,). If only a head is new, say 'new_head': true."
    )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_tied_weights_may_come_under_one_name(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"outer.weight": torch.eye(2)}, path)
    model = Tied()
    load_weights(model, path)
    assert torch.equal(model.inner.weight, torch.eye(2))
    assert model.inner.weight is model.outer.weight


def test_sharded_weights_are_read_by_their_index(tmp_path: Path) -> None:
    given = two_layers().state_dict()
    shards = {"a.safetensors": ["0.weight", "0.bias"], "b.safetensors": ["1.weight", "1.bias"]}
    for shard, names in shards.items():
        save_file({name: given[name] for name in names}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = two_layers()
    load_weights(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {"a": "../out.safetensors"}}', '{"weight_map": {"a": 1}}'],
)
def test_a_bad_shard_index_is_refused(tmp_path: Path, index: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidDocument):
        load_weights(two_layers(), folder)


def test_a_broken_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(InvalidDocument, match="cannot be read as weights"):
        load_weights(two_layers(), path)


def test_pickled_weights_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    model = two_layers()
    torch.save({"state_dict": two_layers().state_dict()}, path)
    load_weights(model, path, allow_pickle=True)
    torch.save(two_layers(), path)  # a whole module, which would have to run its class
    with pytest.raises(InvalidDocument, match="cannot be read as weights"):
        load_weights(model, path, allow_pickle=True)
    torch.save([1, 2], path)
    with pytest.raises(InvalidDocument, match="does not hold tensors by name"):
        load_weights(model, path, allow_pickle=True)

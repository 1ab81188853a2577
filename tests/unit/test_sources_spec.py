"""Specs: what is accepted, what is refused, and in which words. Nothing is loaded here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.cli.given import is_same
from app.freezing.errors import InvalidDocument
from app.sources.demo import DEMO_DATASETS, DEMO_MODELS
from app.sources.spec import (
    DatasetSpec,
    ModelSpec,
    parse_dataset_spec,
    parse_model_spec,
    spec_document,
)


def read_model(
    document: Any, code_dirs: tuple[Path, ...] = (), file_dirs: tuple[Path, ...] = ()
) -> ModelSpec:
    return parse_model_spec(document, code_dirs=code_dirs, file_dirs=file_dirs)


def read_dataset(document: Any, code_dirs: tuple[Path, ...] = ()) -> DatasetSpec:
    return parse_dataset_spec(document, code_dirs=code_dirs, file_dirs=())


def refusal(read: Any, *args: Any) -> dict[str, str]:
    with pytest.raises(InvalidDocument) as refused:
        read(*args)
    return dict(refused.value.errors)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_every_demo_model_is_accepted_by_name_alone(name: str) -> None:
    assert read_model({"uri": f"demo:{name}"}) == ModelSpec(f"demo:{name}")


@pytest.mark.parametrize("name", DEMO_DATASETS)
def test_every_demo_dataset_is_accepted_by_name_alone(name: str) -> None:
    assert read_dataset({"uri": f"demo:{name}"}) == DatasetSpec(f"demo:{name}")


def test_a_model_document_survives_json_and_parsing(tmp_path: Path) -> None:
    (tmp_path / "net.py").touch()
    (tmp_path / "net.safetensors").touch()
    document = {
        "uri": "python:net:make",
        "weights": "net.safetensors",
        "kwargs": {"width": 3, "deep": [1, {"a": None}]},
        "input": {"shape": [3, 6, 6], "dtype": "int64"},
    }
    spec = read_model(document, (tmp_path,), (tmp_path,))
    assert spec.weights == str(tmp_path / "net.safetensors")
    again = json.loads(json.dumps(spec_document(spec)))
    assert read_model(again, (tmp_path,), (tmp_path,)) == spec
    assert set(again) >= {"uri", "revision", "task", "num_classes", "weights", "random_init"}


def test_a_dataset_document_survives_json_and_parsing(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    document = {
        "uri": "python:data:make",
        "eval": {"other": "demo:digits"},
        "eval_fraction": 0.25,
        "num_workers": 2,
        "kwargs": {"size": 8},
    }
    spec = read_dataset(document, (tmp_path,))
    assert read_dataset(json.loads(json.dumps(spec_document(spec))), (tmp_path,)) == spec


def test_null_options_of_the_contract_ask_for_nothing() -> None:
    document = {"uri": "demo:digits", "revision": None, "task": None, "num_classes": 10,
                "weights": None, "random_init": False, "kwargs": {}, "input": None}  # fmt: skip
    assert read_model(document) == ModelSpec("demo:digits", num_classes=10)


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("demo:digit", "'demo:digit' is not built in; built in are demo:digits, "),
        ("hf:a b", "must have the form hf:ORG/NAME or hf:/FOLDER"),
        ("resnet18", "A model is named by demo:NAME, hf:ORG/NAME, hf:/FOLDER, timm:NAME"),
        (None, "there is no 'uri'"),
        (7, "this is 7"),
        ("demo:" + "x" * 1000, "at most 1,000 characters; this one has 1,005"),
        ("python:net", "must have the form python:PACKAGE.MODULE:FACTORY"),
        ("python:../net:make", "must have the form"),
        ("python:a..b:make", "must have the form"),
        ("python:net:make:more", "must have the form"),
        ("python:nowhere:make", "No folder is open for python: entry points"),
    ],
)
def test_a_bad_uri_is_refused_in_a_sentence(uri: Any, sentence: str) -> None:
    assert sentence in refusal(read_model, {"uri": uri})["uri"]


def test_a_dataset_uri_is_refused_under_its_field_in_a_job() -> None:
    assert "demo:digits-shifted" in refusal(read_dataset, {"uri": "demo:x"})["dataset.uri"]
    assert (
        "No folder is open for reading"
        in refusal(read_dataset, {"uri": "csv:a.csv"})["dataset.uri"]
    )


@pytest.mark.parametrize("document", ["demo:digits", None, [], 3])
def test_a_spec_that_is_no_object_is_refused(document: Any) -> None:
    assert "is an object with a 'uri'" in refusal(read_model, document)[""]
    assert "is an object with a 'uri'" in refusal(read_dataset, document)["dataset"]


def test_an_unknown_option_names_the_nearest() -> None:
    errors = refusal(read_model, {"uri": "demo:digits", "num_clases": 3})
    assert "the nearest is 'num_classes'" in errors["num_clases"]


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("num_classes", 0, "num_classes"),
        ("num_classes", True, "num_classes"),
        ("num_classes", 10.0, "num_classes"),
        ("num_classes", 10**7 + 1, "num_classes"),
        ("random_init", 1, "random_init"),
        ("weights", 5, "weights"),
        ("weights", "", "weights"),
        ("input", [3, 6, 6], "input"),
        ("input", {"shape": [3], "size": 1}, "input"),
        ("input", {"shape": [0]}, "input.shape"),
        ("input", {"shape": [10**5] * 3}, "input.shape"),
        ("input", {"shape": [3], "dtype": "float8"}, "input.dtype"),
        ("input", {"shape": [3], "dtype": ["float32"]}, "input.dtype"),
        ("revision", "main", "revision"),
        ("task", "image-classification", "task"),
        ("kwargs", {"a": 1}, "kwargs"),
        ("kwargs", 0, "kwargs"),
    ],
)
def test_a_bad_model_option_is_refused_under_its_field(option: str, value: Any, field: str) -> None:
    errors = refusal(read_model, {"uri": "demo:digits", option: value})
    assert list(errors) == [field]


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("num_workers", -1, "dataset.num_workers"),
        ("eval_fraction", 0.5, "dataset.eval_fraction"),
        ("columns", {"input": "text"}, "dataset.columns"),
        ("max_length", 128, "dataset.max_length"),
        ("image_size", 224, "dataset.image_size"),
        ("kwargs", {"a": 1}, "dataset.kwargs"),
        ("eval", ["demo:digits"], "dataset.eval"),
        ("eval", {"a/b": "demo:digits"}, "dataset.eval"),
        ("eval", {"": "demo:digits"}, "dataset.eval"),
        ("eval", {"other": "demo:nothing"}, "dataset.eval.other"),
    ],
)
def test_a_bad_dataset_option_is_refused_under_its_field(
    option: str, value: Any, field: str
) -> None:
    errors = refusal(read_dataset, {"uri": "demo:digits", option: value})
    assert list(errors) == [field]


@pytest.mark.parametrize("fraction", [1, 1.0, -0.1, "0.1", True, float("nan")])
def test_an_eval_fraction_is_from_0_to_below_1(fraction: Any, tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    document = {"uri": "python:data:make", "eval_fraction": fraction}
    assert list(refusal(read_dataset, document, (tmp_path,))) == ["dataset.eval_fraction"]


def test_two_ways_to_the_set_named_eval_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    document = {"uri": "python:data:make", "eval_fraction": 0.2, "eval": {"eval": "demo:digits"}}
    assert list(refusal(read_dataset, document, (tmp_path,))) == ["dataset.eval_fraction"]


def test_a_document_of_nothing_but_unknown_options_gets_a_short_answer() -> None:
    errors = refusal(read_model, {"uri": "demo:digits", **{f"x{n}": 1 for n in range(5000)}})
    assert len(errors) == 100
    errors = refusal(read_model, {"uri": "demo:digits", "y" * 10**6: 1})
    assert all(len(field) + len(message) < 400 for field, message in errors.items())


def test_every_fault_is_told_at_once() -> None:
    errors = refusal(read_model, {"uri": "demo:digits", "num_classes": 0, "task": "x", "wat": 1})
    assert set(errors) == {"num_classes", "task", "wat"}


@pytest.mark.parametrize("file", ["net.py", "net/__init__.py", "net/deep/model.py"])
def test_a_python_module_is_found_as_a_file_and_not_imported(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise SystemExit('imported')")
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert read_model({"uri": f"python:{module}:make"}, (tmp_path,)).uri.endswith(":make")


def test_a_python_module_must_lie_below_a_code_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "net.py").touch()
    (inside / "link.py").symlink_to(outside / "net.py")
    for module in ("net", "link", "os", "n" * 900):
        errors = refusal(read_model, {"uri": f"python:{module}:make"}, (inside,))
        assert "There is no" in errors["uri"]


@pytest.mark.parametrize("option", [{"num_classes": 3}, {"random_init": True}])
def test_a_factory_decides_what_a_spec_cannot(option: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "net.py").touch()
    errors = refusal(read_model, {"uri": "python:net:make", **option}, (tmp_path,))
    assert "give it in 'kwargs'" in next(iter(errors.values()))


def test_weights_lie_below_the_open_folders(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.safetensors").touch()
    (inside / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (inside / "loop.safetensors").symlink_to(inside / "loop.safetensors")
    (inside / "good.safetensors").touch()
    for given in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "/etc/passwd",
                  "link.safetensors", "loop.safetensors", "absent.safetensors",
                  "x" * 5000, "a\ud800b"):  # fmt: skip
        errors = refusal(read_model, {"uri": "demo:digits", "weights": given}, (), (inside,))
        assert "below the folders open for reading" in errors["weights"]
    for given in ("good.safetensors", str(inside / "good.safetensors")):
        spec = read_model({"uri": "demo:digits", "weights": given}, (), (inside,))
        assert spec.weights == str(inside / "good.safetensors")
    errors = refusal(read_model, {"uri": "demo:digits", "weights": "good.safetensors"})
    assert "FROSTLINE_FILE_DIRS" in errors["weights"]


def test_pickle_weights_need_to_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()
    document = {"uri": "demo:digits", "weights": "net.pt"}
    assert "allow_pickle" in refusal(read_model, document, (), (tmp_path,))["weights"]
    assert read_model({**document, "allow_pickle": True}, (), (tmp_path,)).allow_pickle


def test_a_folder_of_weights_needs_an_index_or_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    document = {"uri": "demo:digits", "weights": "sharded"}
    assert "holds neither" in refusal(read_model, document, (), (tmp_path,))["weights"]
    (folder / "model.safetensors").touch()
    assert read_model(document, (), (tmp_path,)).weights == str(folder)


def test_specs_are_read_without_torch() -> None:
    probe = "import sys, app.sources.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


@pytest.mark.parametrize(
    ("spec", "is_reused"),
    [
        ({"uri": "demo:digits"}, True),
        ({"uri": "hf:gpt2", "random_init": True, "kwargs": {"n_layer": 2}}, True),
        ({"uri": "hf:gpt2", "weights": "gpt2.safetensors"}, False),  # a file may have changed
        ({"uri": "python:nets:build"}, False),
        ({"uri": "hf:./bert"}, False),
    ],
)
def test_a_model_of_the_same_spec_is_not_inspected_again(
    spec: dict[str, Any], is_reused: bool
) -> None:
    assert is_same(spec_document(ModelSpec(**spec)), spec) is is_reused
    assert not is_same(spec_document(ModelSpec(**{**spec, "num_classes": 3})), spec)

"""Bad models and datasets in one table, and the shelf of files that they name. Knows no test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from tests.unit.own_files import make_reviews, write_csv, write_images, write_model


@dataclass(frozen=True)
class Bad:
    """A model, a dataset where that is at fault, and what the sentence says.

    Attributes:
        found: when somebody is told: as the model is added, as the data is looked at, or only in a
            job, which loads weights and calls the model.
    """

    model: str
    dataset: str | None
    says: str
    of_model: Mapping[str, Any] = field(default_factory=dict)
    of_dataset: Mapping[str, Any] = field(default_factory=dict)
    found: Literal["model", "data", "job"] = "data"

    def __str__(self) -> str:
        options = json.dumps({**self.of_model, **self.of_dataset})
        return f"{self.model} {self.dataset or ''} {options}"

    @property
    def spec(self) -> dict[str, Any]:
        return {"uri": self.model, **self.of_model}

    @property
    def data(self) -> dict[str, Any] | None:
        return None if self.dataset is None else {"uri": self.dataset, **self.of_dataset}


UNTRAINED = {"random_init": True, "task": "text-classification",
             "kwargs": {"hidden_size": 24, "num_hidden_layers": 1}}  # fmt: skip
HEADLESS = {"random_init": True, "task": "feature-extraction"}


TABLE: tuple[Bad, ...] = (
    # Models, as they are added.
    Bad("hf:org/absent", None, "is not in the cache and HF_HUB_OFFLINE is set", found="model"),
    Bad(
        "hf:/nowhere",
        None,
        "There is no '/nowhere' below the folders open for reading",
        found="model",
    ),
    Bad("hf:./empty", None, "has no config.json", found="model"),
    Bad("hf:./junk", None, "cannot be loaded", found="model"),
    Bad("hf:./unknown", None, "cannot be loaded", found="model"),
    Bad("hf:./remote", None, "brings code of its own, which Frostline never runs", found="model"),
    Bad("hf:./bert", None, "no head for", of_model={"task": "image-classification"}, found="model"),
    Bad("hf:./bert", None, "'task' must be one of", of_model={"task": "painting"}, found="model"),
    Bad(
        "hf:./bert",
        None,
        "is not an option of Bert",
        of_model={"kwargs": {"hidden": 3}},
        found="model",
    ),
    Bad("hf:./bert", None, "'revision' must be", of_model={"revision": "a b"}, found="model"),
    Bad("timm:resnet18", None, "pip install timm", found="model"),
    Bad("torchvision:resnet18", None, "pip install 'torchvision==0.", found="model"),
    Bad("bert-base", None, "A model is named by demo:NAME, hf:ORG/NAME", found="model"),
    Bad("demo:digit", None, "is not built in; built in are", found="model"),
    Bad("hf:", None, "must have the form hf:ORG/NAME", found="model"),
    Bad(
        "hf:./bert",
        None,
        "cannot be read as",
        of_model={"weights": "cut.safetensors"},
        found="model",
    ),
    Bad(
        "hf:./bert",
        None,
        "cannot be read as",
        of_model={"weights": "junk.safetensors"},
        found="model",
    ),
    Bad(
        "hf:./bert",
        None,
        "does not fit the model; missing: ",
        of_model={"weights": "vit/model.safetensors"},
        found="model",
    ),
    Bad(
        "hf:./bert",
        None,
        "of another shape: ",
        of_model={"weights": "wide.safetensors"},
        found="model",
    ),
    Bad(
        "hf:./bert",
        None,
        "say 'allow_pickle': true",
        of_model={"weights": "pickle.bin"},
        found="model",
    ),
    Bad(
        "hf:./bert",
        None,
        "cannot be read as weights",
        of_model={"weights": "evil.bin", "allow_pickle": True},
        found="model",
    ),
    Bad(
        "hf:./bert",
        None,
        "does not hold tensors by name",
        of_model={"weights": "list.bin", "allow_pickle": True},
        found="model",
    ),
    Bad("hf:./bert", None, "holds neither", of_model={"weights": "photos"}, found="model"),
    Bad("hf:./bert", None, "not a file beside it", of_model={"weights": "shards"}, found="model"),
    Bad(
        "hf:./bert",
        None,
        "'num_classes' must be a whole",
        of_model={"num_classes": 0},
        found="model",
    ),
    Bad(
        "python:own_factories:nothing",
        None,
        "returned None; it must return an nn.Module",
        found="model",
    ),
    Bad("python:own_factories:breaks", None, "raised RuntimeError: not today", found="model"),
    Bad(
        "python:own_factories:absent",
        None,
        "has no 'absent'; it defines nothing, breaks",
        found="model",
    ),
    Bad("python:own_absent:model", None, "There is no own_absent.py", found="model"),
    Bad(
        "python:own_broken:model",
        None,
        "Importing 'own_broken' raised ModuleNotFound",
        found="model",
    ),
    Bad(
        "python:own_factories:nothing",
        None,
        "do not fit",
        of_model={"kwargs": {"x": 1}},
        found="model",
    ),
    # Datasets, as they are looked at.
    Bad("hf:./bert", "csv:absent.csv", "There is no 'absent.csv' below"),
    Bad("hf:./bert", "csv:", "needs a path"),
    Bad("hf:./bert", "csv:photos", "is not a regular file"),
    Bad("hf:./bert", "folder:good.csv", "is not a folder"),
    Bad("hf:./bert", "csv:one.csv", "has one class, 'same'"),
    Bad("hf:./bert", "csv:three.csv", "give the model 'num_classes': 3"),
    Bad("hf:./bert", "csv:vague.csv", "Which column of"),
    Bad("hf:./bert", "csv:negative.csv", "class ids count from 0"),
    Bad("hf:./bert", "csv:share.csv", "a class is a name or a whole number"),
    Bad("hf:./bert", "csv:hole.csv", "Row 4 of"),
    Bad("hf:./bert", "csv:numbers.csv", "where a text is needed"),
    Bad("hf:./bert", "csv:header.csv", "is empty"),
    Bad("hf:./bert", "csv:void.csv", "cannot be read"),
    Bad("hf:./bert", "json:broken.json", "cannot be read"),
    Bad("hf:./bert", "parquet:broken.parquet", "cannot be read"),
    Bad("hf:./bert", "hf:org/absent", "Download it first"),
    Bad(
        "hf:./bert",
        "csv:good.csv",
        "has no column 'body'",
        of_dataset={"columns": {"text": "body"}},
    ),
    Bad("hf:./bert", "csv:good.csv", "'columns' must be", of_dataset={"columns": {"txt": "body"}}),
    Bad("hf:./bert", "csv:good.csv", "has no column", of_dataset={"eval": {"x": "csv:vague.csv"}}),
    Bad(
        "hf:./bert",
        "csv:good.csv",
        "is not among the training",
        of_dataset={"eval": {"x": "csv:one.csv"}},
    ),
    Bad("hf:./bert", "csv:good.csv", "is no table", of_dataset={"eval": {"x": "demo:digits"}}),
    Bad("hf:./bert", "folder:photos", "takes text"),
    Bad("hf:./vit", "csv:good.csv", "is the image?"),
    Bad("hf:./vit", "folder:alone", "has one class, 'only'"),
    Bad("hf:./vit", "folder:many", "give the model 'num_classes': 3"),
    Bad("hf:./vit", "folder:spoilt", "9.png cannot be read as an image"),
    Bad("hf:./vit", "folder:hollow", "no image in its sub-folders"),
    Bad("hf:./vit", "folder:empty", "has no sub-folders"),
    Bad("hf:bert", "csv:good.csv", "brings no tokenizer", of_model=UNTRAINED),
    Bad("hf:./config", "csv:good.csv", "has no head to train on", of_model=HEADLESS),
    Bad("demo:three-layers", "csv:good.csv", "does not say what it takes"),
    Bad("hf:./bert", "reviews.csv", "A dataset is named by demo:NAME, folder:PATH"),
    Bad("demo:digits", "python:own_factories:nothing", "returned None; it must return a map"),
    Bad("demo:digits", "python:own_factories:no_rows", "is empty; it must have at least one"),
    Bad("demo:digits", "python:own_factories:bare", "items must be (input, target) pairs"),
    Bad("hf:./bert", "csv:good.csv", "too few to hold out", of_dataset={"eval_fraction": 0.999}),
    Bad(
        "hf:./bert",
        "csv:good.csv",
        "'eval_fraction' must be a number",
        of_dataset={"eval_fraction": 2},
    ),
    # Weights that are read, and batches that a model is called with, in a job alone.
    Bad("hf:./short", "csv:good.csv", "cannot be loaded", found="job"),
    Bad("hf:./config", "csv:good.csv", "has no model.safetensors", found="job"),
    Bad("hf:./vit", "folder:torn", "9.png cannot be read as an image", found="job"),
    Bad("demo:digits", "python:own_data:colour", "gives float32 [3, 8, 8]", found="job"),
    Bad("demo:digits", "python:own_data:flat", "gives float32 [64]", found="job"),
    Bad("demo:digits", "python:own_data:whole", "gives int64 [1, 8, 8]", found="job"),
    Bad("demo:digits", "python:own_data:named", "gives pixels: float32 [1, 8, 8]", found="job"),
    Bad(
        "demo:digits",
        "python:own_data:twelfth",
        "label 12, outside the model's head of 10",
        found="job",
    ),
    Bad(
        "demo:digits",
        "python:own_data:below",
        "label -1, outside the model's head of 10",
        found="job",
    ),
    Bad("demo:digits", "python:own_data:wide", "must have the same size", found="job"),
    Bad("demo:digits", "python:own_data:twice", "needs one axis more, the classes", found="job"),
    Bad(
        "demo:digits", "python:own_data:ragged", "failed: RuntimeError: stack expects", found="job"
    ),
    Bad(
        "demo:digits",
        "python:own_data:Late",
        "failed: OSError: the disc is in another",
        found="job",
    ),
    Bad(
        "demo:digits",
        "python:own_data:Late",
        "failed: OSError: the disc is in another",
        of_dataset={"num_workers": 1},
        found="job",
    ),
    Bad("hf:./bert", "python:own_data:strange_ids", "has the id 99, and the model's", found="job"),
    Bad("hf:./bert", "python:own_data:strange_name", "gives words: int64 [4]", found="job"),
    Bad("hf:./bert", "python:own_data:many_labels", "not its labels, int64 [3]", found="job"),
)


FACTORIES = """
def nothing():
    return None


def breaks():
    raise RuntimeError("not today")


def no_rows():
    return {"train": []}


def bare():
    return {"train": [1, 2, 3]}
"""

DATA = """
import torch


def pairs(inputs, targets=torch.zeros(8, dtype=torch.int64)):
    return {"train": list(zip(inputs, targets))}


def colour():
    return pairs(torch.zeros(8, 3, 8, 8))


def flat():
    return pairs(torch.zeros(8, 64))


def whole():
    return pairs(torch.zeros(8, 1, 8, 8, dtype=torch.int64))


def named():
    return {"train": [{"pixels": torch.zeros(1, 8, 8), "labels": 0}] * 8}


def twelfth():
    return pairs(torch.zeros(8, 1, 8, 8), torch.tensor([0, 12] * 4))


def below():
    return pairs(torch.zeros(8, 1, 8, 8), torch.tensor([-1] * 8))


def wide():
    return pairs(torch.zeros(8, 1, 8, 8), torch.zeros(8, 3))


def twice():
    return pairs(torch.zeros(8, 1, 8, 8), torch.zeros(8, 2, dtype=torch.int64))


def ragged():
    return pairs([torch.zeros(1, 8, 8 + n) for n in range(8)])


class Late:
    def __new__(cls):
        return {"train": super().__new__(cls), "eval": pairs(torch.zeros(8, 1, 8, 8))["train"]}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index:
            raise OSError("the disc is in another drive")
        return torch.zeros(1, 8, 8), 0


def texts(name="input_ids", value=1, labels=0):
    return {"train": [{name: torch.full((4,), value), "labels": torch.tensor(labels)}] * 8}


def strange_ids():
    return texts(value=99)


def strange_name():
    return texts(name="words")


def many_labels():
    return texts(labels=[0, 1, 0])
"""


class Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def write_bad_weights(folder: Path) -> None:
    good = load_file(folder / "bert/model.safetensors")
    content = (folder / "bert/model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[:-100])
    (folder / "junk.safetensors").write_bytes(b"nothing of the kind")
    save_file({name: tensor.repeat(2) for name, tensor in good.items() if tensor.dim() == 1}
              | {name: tensor for name, tensor in good.items() if tensor.dim() > 1},
              folder / "wide.safetensors")  # fmt: skip
    torch.save(good, folder / "pickle.bin")
    torch.save({"weights": Evil()}, folder / "evil.bin")
    torch.save([1, 2], folder / "list.bin")
    (folder / "shards").mkdir()
    index = {"weight_map": {"a": "../bert/model.safetensors"}}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))


def write_shelf(folder: Path) -> Path:
    """Good files, and the bad ones of the table."""
    write_model(folder / "bert", "bert", "BertForSequenceClassification")
    write_model(folder / "vit", "vit", "ViTForImageClassification")
    write_model(folder / "config", "bert")
    (folder / "empty").mkdir()
    (folder / "junk").mkdir()
    (folder / "junk/config.json").write_text("{not json")
    (folder / "unknown").mkdir()
    (folder / "unknown/config.json").write_text('{"model_type": "no-such-type"}')
    (folder / "remote").mkdir()
    (folder / "remote/config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    )
    write_model(folder / "short", "bert", "BertForSequenceClassification")
    weights = folder / "short/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    good = make_reviews()
    write_csv(folder / "good.csv", good)
    write_csv(folder / "one.csv", [{**row, "verdict": "same"} for row in good])
    write_csv(folder / "three.csv", [{**r, "verdict": n % 3} for n, r in enumerate(good)])
    write_csv(folder / "vague.csv", [{"a": "x", "b": "y", "c": "z"}] * 4)
    write_csv(folder / "negative.csv", [{"text": "x", "label": n % 2 - 1} for n in range(8)])
    write_csv(folder / "share.csv", [{"text": "x", "label": n / 7} for n in range(8)])
    write_csv(folder / "hole.csv", [*[{"text": "x", "label": 1}] * 3, {"text": "", "label": 0}])
    write_csv(folder / "numbers.csv", [{"text": n, "label": n % 2} for n in range(8)])
    (folder / "header.csv").write_text("text,label\n")
    (folder / "void.csv").write_text("")
    (folder / "broken.json").write_text('{"text": "x"\n{{')
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    write_images(folder / "photos")
    write_images(folder / "alone", ("only",))
    write_images(folder / "many", ("a", "b", "c"))
    write_images(folder / "spoilt")
    (folder / "spoilt/dark/9.png").write_bytes(b"no image")
    write_images(folder / "torn", size=1)
    image = folder / "torn/dark/9.png"
    image.write_bytes((folder / "torn/dark/0.png").read_bytes()[:200])
    (folder / "hollow/a").mkdir(parents=True)
    write_bad_weights(folder)
    (folder / "own_factories.py").write_text(FACTORIES)
    (folder / "own_data.py").write_text(DATA)
    (folder / "own_broken.py").write_text("import no_such_library\n")
    return folder

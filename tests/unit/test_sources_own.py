"""People's own models and tables: built, traced, trained with a freeze, and refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.freezing.config import parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.trace import trace_model
from app.sources.datasets import Data, build_data
from app.sources.hub import build_on_meta
from app.sources.models import BuiltModel, build_model
from app.sources.preview import preview_data
from app.sources.spec import DatasetSpec, parse_dataset_spec, parse_model_spec
from app.sources.user_code import UserCodeError
from app.training.batches import DataError
from app.training.loop import train
from app.training.recipe import parse_recipe
from tests.unit.bad_sources import TABLE, Bad, write_shelf
from tests.unit.own_files import make_reviews, write_csv, write_images, write_json, write_model
from tests.unit.runs import Wish

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def build(folder: Path, uri: str, *, weightless: bool = False, **options: Any) -> BuiltModel:
    spec = parse_model_spec({"uri": uri, **options}, code_dirs=[folder], file_dirs=[folder])
    return build_model(spec, code_dirs=[folder], weightless=weightless)


def read(folder: Path, uri: str, built: BuiltModel, **options: Any) -> Data:
    spec = parse_dataset_spec({"uri": uri, **options}, code_dirs=[folder], file_dirs=[folder])
    return build_data(spec, code_dirs=[folder], seed=0, intake=built.intake)


def run(built: BuiltModel, data: Data, folder: Path, frozen: str, **options: Any) -> Any:
    """Train with `frozen` frozen; (first loss, last loss, proof, last metrics)."""
    events: list[tuple[str, dict[str, Any]]] = []
    train(
        built,
        data,
        parse_config({"rules": [{"action": "freeze", "match": frozen}]}),
        parse_recipe({"batch_size": 8, "epochs": 12, "lr": 0.01, "device": "cpu", **options}),
        device="cpu",
        checkpoints=folder / "checkpoints",
        emit=lambda kind, payload: events.append((kind, payload)),
        wishes=Wish,
    )
    judged = [
        e["values"] for kind, e in events if kind == "metrics" and "eval/eval/loss" in e["values"]
    ]
    proof = [payload for kind, payload in events if kind == "proof"][-1]
    return judged[0], judged[-1], proof


def test_a_text_classifier_learns_from_a_csv_with_its_embeddings_frozen(tmp_path: Path) -> None:
    write_model(tmp_path / "bert", "bert", "BertForSequenceClassification")
    write_csv(tmp_path / "reviews.csv", make_reviews(160))
    built = build(tmp_path, f"hf:{tmp_path}/bert")
    data = read(tmp_path, "csv:reviews.csv", built, eval_fraction=0.25)
    assert data.columns == {"text": "review", "label": "verdict"}
    assert data.class_names == ("bad", "good")
    assert len(data.evals["eval"]) == 40
    held_out = [data.evals["eval"][i]["labels"] for i in range(40)]
    assert sum(held_out) == 20
    first, last, proof = run(built, data, tmp_path, "bert.embeddings.**")
    assert last["eval/eval/loss"] < first["eval/eval/loss"]
    assert last["eval/eval/accuracy"] > 0.85
    assert proof["verdict"] == "holds"
    assert proof["frozen"]["identical"] == 5


def test_a_causal_model_learns_from_json_with_its_first_block_frozen(tmp_path: Path) -> None:
    write_model(tmp_path / "gpt2", "gpt2", "GPT2LMHeadModel")
    write_json(tmp_path / "texts.json", [{"text": row["review"]} for row in make_reviews()])
    built = build(tmp_path, f"hf:{tmp_path}/gpt2")
    data = read(tmp_path, "json:texts.json", built)
    first, last, proof = run(built, data, tmp_path, "transformer.h.0")
    assert last["eval/eval/loss"] < first["eval/eval/loss"] - 0.5
    assert proof["verdict"] == "holds"


@pytest.mark.parametrize(
    ("kind", "architecture", "frozen"),
    [
        ("t5", "T5ForConditionalGeneration", "encoder"),
        ("bert", "BertForMaskedLM", "bert.embeddings"),
    ],
)
def test_other_text_models_train_from_parquet(
    tmp_path: Path, kind: str, architecture: str, frozen: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    write_model(tmp_path / kind, kind, architecture)
    rows = [{"source": row["review"], "target": row["verdict"]} for row in make_reviews()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    built = build(tmp_path, f"hf:{tmp_path}/{kind}")
    data = read(tmp_path, "parquet:rows.parquet", built)
    first, last, proof = run(built, data, tmp_path, frozen)
    assert last["eval/eval/loss"] < first["eval/eval/loss"]
    assert proof["verdict"] == "holds"


def test_an_image_classifier_learns_from_a_folder_with_a_new_head(tmp_path: Path) -> None:
    write_model(tmp_path / "vit", "vit", "ViTForImageClassification", num_labels=5)
    write_images(tmp_path / "photos")
    built = build(tmp_path, f"hf:{tmp_path}/vit", num_classes=2)
    assert built.notes == ("New, not in the weights: classifier.bias, classifier.weight.",)
    data = read(tmp_path, "folder:photos", built, eval_fraction=0.25)
    assert data.class_names == ("dark", "light")
    first, last, proof = run(built, data, tmp_path, "vit.**")
    assert last["eval/eval/loss"] < first["eval/eval/loss"]
    assert proof["verdict"] == "holds"


def test_a_tagger_trains_on_words_with_a_label_each(tmp_path: Path) -> None:
    write_model(tmp_path / "bert", "bert", "BertForTokenClassification", num_labels=2)
    rows = [{"tokens": r["review"].split(), "ner_tags": [0, 0, 0, 1, 1]} for r in make_reviews()]
    write_json(tmp_path / "tags.json", rows)
    built = build(tmp_path, f"hf:{tmp_path}/bert")
    data = read(tmp_path, "json:tags.json", built)
    _, last, proof = run(built, data, tmp_path, "bert.embeddings.**")
    assert last["eval/eval/accuracy"] > 0.9
    assert proof["verdict"] == "holds"


def test_images_also_train_a_network_that_only_has_an_example(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ("a", "b"))
    built = build(tmp_path, "demo:multi-layer-model")
    data = read(tmp_path, "folder:photos", built)
    _, _, proof = run(built, data, tmp_path, "conv1")
    assert proof["verdict"] == "holds"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "vit"])
def test_a_configuration_is_enough_for_the_tree_and_the_same_graph(
    tmp_path: Path, kind: str
) -> None:
    write_model(tmp_path / kind, kind)
    uri = f"hf:{tmp_path}/{kind}"
    fake = build(tmp_path, uri, weightless=True)
    real = build(tmp_path, uri, random_init=True)
    left, right = trace_model(fake.model, fake.example), trace_model(real.model, real.example)
    assert left.traced_by == right.traced_by == "fake"
    assert left.nodes == right.nodes
    assert left.to_document() == right.to_document()


def test_a_model_larger_than_any_memory_shows_its_tree(tmp_path: Path) -> None:
    kwargs = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
              "num_attention_heads": 64}  # fmt: skip
    built = build(tmp_path, "hf:llama", random_init=True, kwargs=kwargs, weightless=True)
    assert trace_model(built.model, built.example).parameter_count > 60e9


def test_a_preview_shows_examples_with_their_labels(tmp_path: Path) -> None:
    write_model(tmp_path / "bert", "bert", "BertForSequenceClassification")
    write_model(tmp_path / "vit", "vit", "ViTForImageClassification")
    write_csv(tmp_path / "reviews.csv", make_reviews())
    write_images(tmp_path / "photos")
    texts = build(tmp_path, "hf:./bert", weightless=True)
    shown = preview_data(read(tmp_path, "csv:reviews.csv", texts))
    assert shown["sizes"] == {"train": 36, "eval": 4}
    assert shown["columns"] == {"text": "review", "label": "verdict"}
    assert {example["label"] for example in shown["examples"]} == {"good", "bad"}
    images = build(tmp_path, "hf:./vit", weightless=True)
    photos = preview_data(read(tmp_path, "folder:photos", images))
    assert photos["examples"][0]["image"].startswith("data:image/png;base64,")
    demo = preview_data(build_data(DatasetSpec("demo:digits"), code_dirs=[], seed=0))
    assert demo["examples"][0]["input"] == "float32 of shape (1, 8, 8)"
    json.dumps([shown, photos, demo])


# ------------------------------------------------------------------------------------------ refused


def refusal(folder: Path, bad: Bad) -> str:
    try:
        built = build(folder, bad.model, **bad.of_model)
        if bad.dataset is not None:
            data = read(folder, bad.dataset, built, **bad.of_dataset)
        if bad.found == "job":
            run(built, data, folder / "job", "nothing", epochs=1)
    except (InvalidDocument, UserCodeError, DataError) as error:
        return str(error)
    pytest.fail("nothing was refused")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.mark.parametrize("bad", TABLE, ids=str)
def test_what_cannot_be_used_is_refused_in_one_sentence(shelf: Path, bad: Bad) -> None:
    message = refusal(shelf, bad)
    assert bad.says in message
    assert "\n" not in message


def test_weights_over_a_model_may_leave_a_new_head(shelf: Path) -> None:
    given = {"random_init": True, "task": "text-classification", "num_classes": 3,
             "weights": "bert/model.safetensors"}  # fmt: skip
    assert "If only a head is new, say 'new_head'" in refusal(
        shelf, Bad("hf:./config", None, "", given)
    )
    built = build(shelf, "hf:./config", **given, new_head=True)
    assert built.notes == ("New, not in the weights: classifier.weight, classifier.bias.",)
    left = build(shelf, "hf:./bert").model.state_dict()
    right = built.model.state_dict()
    assert all(left[name].equal(right[name]) for name in left if "classifier" not in name)


def test_a_folder_of_shards_loads_like_a_single_file(shelf: Path) -> None:
    whole = load_file(shelf / "bert/model.safetensors")
    names = sorted(whole)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    (shelf / "sharded").mkdir()
    for file, own in parts.items():
        save_file({name: whole[name] for name in own}, shelf / "sharded" / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (shelf / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    built = build(shelf, "hf:./bert", random_init=True, weights="sharded")
    left = built.model.state_dict()
    assert all(left[name].equal(tensor) for name, tensor in whole.items())


def test_a_relative_folder_needs_no_dot_where_it_lies_in_another(tmp_path: Path) -> None:
    write_model(tmp_path / "models/bert", "bert")
    spec = parse_model_spec({"uri": "hf:models/bert"}, code_dirs=[], file_dirs=[tmp_path])
    assert spec.uri == f"hf:{tmp_path}/models/bert"
    absent = parse_model_spec({"uri": "hf:models/gpt"}, code_dirs=[], file_dirs=[tmp_path])
    assert absent.uri == "hf:models/gpt"


def test_fewer_layers_keep_the_first_types_and_a_named_list_stands(tmp_path: Path) -> None:
    options = {"random_init": True, "task": "text-generation", "weightless": True}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}  # fmt: skip
    built = build(tmp_path, "hf:gemma3_text", kwargs={**small, "num_hidden_layers": 7}, **options)
    assert [kind[0] for kind in built.model.config.layer_types] == list("sssssfs")
    types = ["full_attention", "sliding_attention"]
    kwargs = {**small, "num_hidden_layers": 2, "layer_types": types}
    built = build(tmp_path, "hf:gemma3_text", kwargs=kwargs, **options)
    assert built.model.config.layer_types == types


def test_a_constructor_that_reads_values_is_built_without_memory_all_the_same() -> None:
    class Widths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = int(torch.arange(3)[-1].item()) + 10**4
            self.a, self.b = (torch.nn.Linear(wide, wide) for _ in range(2))
            self.b.weight = self.a.weight

    model = build_on_meta(Widths)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert model.a.weight is model.b.weight
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # nothing stays behind


@pytest.mark.parametrize("kind", ["oneformer", "pvt"])
def test_configurations_of_odd_habits_show_their_tree(tmp_path: Path, kind: str) -> None:
    """One names several inputs, one has no names for its classes."""
    built = build(tmp_path, f"hf:{kind}", random_init=True, weightless=True)
    assert trace_model(built.model, built.example).parameter_count > 10**6

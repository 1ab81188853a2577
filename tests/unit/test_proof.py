"""Digests, what a proof says besides its verdict, and checkpoints compared on disk."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from app.cli.plan import proof_words
from app.freezing.apply import apply_config
from app.freezing.config import FreezeConfig, config_document, parse_config
from app.freezing.digest import MIXED, digest_tensor, digest_tensors
from app.freezing.errors import InvalidDocument
from app.freezing.proof import SAMPLE_VALUES, Proof
from app.freezing.trace import read_model
from app.freezing.verify import compare_checkpoints
from app.freezing.witness import explain_values
from tests.unit.models import MODELS, make
from tests.unit.runs import freeze

TYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.complex64, torch.int8, torch.int64, torch.bool,
)  # fmt: skip


def mix(tensor: torch.Tensor) -> str:
    """The digest as a device other than the host computes it."""
    return digest_tensors({"": tensor}, {"": MIXED})[""]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (64, 33)])
@pytest.mark.parametrize("digest", [mix, digest_tensor])
def test_a_digest_tells_every_single_bit(digest: Any, shape: tuple, dtype: torch.dtype) -> None:
    tensor = (torch.rand(shape) * 3).to(dtype)
    before = digest(tensor)
    assert digest(tensor.clone()) == before
    bits = tensor.numel() * tensor.element_size() * 8
    for bit in range(0, bits, bits // 7 + 1):
        other = tensor.clone().contiguous()
        raw = other.flatten().view(torch.uint8)
        raw[bit // 8] ^= 1 << bit % 8
        assert digest(raw.view(dtype).view(shape)) != before


@pytest.mark.parametrize("digest", [mix, digest_tensor])
def test_a_digest_tells_order_signs_of_zero_and_nothing_of_strides(digest: Any) -> None:
    tensor = torch.randn(8, 16)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(tensor.flip(0)) != digest(tensor)
    assert digest(tensor[[1, 0, *range(2, 8)]]) != digest(tensor)
    assert digest(torch.zeros(9)) != digest(-torch.zeros(9))
    assert digest(torch.zeros(8)) != digest(torch.zeros(9))
    nan = torch.tensor([float("nan")])
    assert digest(nan) == digest(nan.clone())
    odd = torch.arange(100, dtype=torch.uint8)[3:19]  # eight bytes, not at a multiple of eight
    assert digest(odd) == digest(odd.clone())


def test_mixed_digests_do_not_collide() -> None:
    tensors = {
        f"{i}.{j}": torch.full((i,), j, dtype=torch.int8) for i in range(1, 20) for j in range(20)
    }
    digests = digest_tensors(tensors, dict.fromkeys(tensors, MIXED))
    assert len(set(digests.values())) == len(tensors)


def test_a_run_goes_on_under_the_digests_of_another_device() -> None:
    model, _ = make("convolutional")
    applied = apply_config(model, parse_config(freeze("stem")))
    tensors = {**applied.parameters, **dict(model.named_buffers())}
    elsewhere = digest_tensors(tensors, dict.fromkeys(tensors, MIXED))
    proof = Proof(applied)
    proof.resume({"digests": elsewhere, "breaches": []})
    assert proof.check()["verdict"] == "holds"
    assert all(not digest.startswith(MIXED) for digest in proof.state()["digests"].values())
    moved = {**elsewhere, "stem.0.weight": mix(model.stem[0].weight + 1)}
    proof.resume({"digests": moved, "breaches": []})
    assert [c["name"] for c in proof.check()["frozen"]["changed"]] == ["stem.0.weight"]


def test_a_gradient_on_something_frozen_is_told_though_it_moves_nothing() -> None:
    model, example = make("plain")
    proof = Proof(apply_config(model, parse_config(freeze("layer1"))))
    model(example).sum().backward()
    assert proof.check()["gradients"] == {"checked": 2, "present": []}
    model.layer1.bias.grad = torch.zeros(8)
    document = proof.check()
    assert document["gradients"]["present"] == ["layer1.bias"]
    assert document["verdict"] == "holds"


def test_nothing_watches_optimizers_once_a_proof_is_gone() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    gc.collect()
    before = len(hooks)
    proof = Proof(apply_config(make("plain")[0], FreezeConfig()))
    assert len(hooks) == before + 1
    del proof
    gc.collect()
    assert len(hooks) == before


def test_a_tensor_too_large_to_keep_is_told_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.freezing.proof.COPY_LIMIT_BYTES", 0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    proof = Proof(apply_config(model, parse_config(freeze("0"))))
    model[0].weight.data.add_(0.5)
    (changed,) = proof.check()["frozen"]["changed"]
    assert not changed["is_exact"]
    assert changed["largest_difference"] == pytest.approx(0.5)
    assert all(c.values.numel() <= 2 * SAMPLE_VALUES for c in proof._copies.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t * 0.99, "factor 0.99, as weight decay"),
        (lambda t: t.half().float(), "float16"),
        (lambda t: t.bfloat16().float(), "bfloat16"),
        (lambda t: t.half(), "it is float16 of shape (20, 8) and was float32"),
        (lambda t: t / 0, "no longer finite"),
        (lambda t: torch.cat([t[:3] + 1, t[3:]]), "3 of its 20 rows"),
        (lambda t: t - (torch.arange(160).view(20, 8) % 5 == 0).float(), "32 of its 160 values"),
    ],
)
def test_values_alone_tell_some_causes(change: Any, words: str) -> None:
    before = torch.randn(20, 8)
    assert words in (explain_values(before, change(before)) or "")
    assert explain_values(before, torch.randn(20, 8)) is None


# ------------------------------------------------------------------------------- on disk


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", sorted(MODELS))
def test_checkpoints_are_compared_across_shards(tmp_path: Path, name: str) -> None:
    model, _ = make(name)
    graph = read_model(model)
    tensors = {
        n: t.clone() for n, t in model.state_dict().items() if graph.canonical_names.get(n, n) == n
    }
    first, *_, last = [p.name for p in graph.parameters]
    config = parse_config(config_document(parse_config(freeze(first)), graph))
    trained = set(config.trainable or ())
    after = {n: t + 1 if n in trained else t for n, t in tensors.items()}
    before = write(tmp_path / "before", tensors, shards=3)
    document = compare_checkpoints(before, write(tmp_path / "after", after), config)
    assert document["verdict"] == "holds"
    assert document["frozen"] == {"checked": 1, "identical": 1, "changed": []}
    assert document["trained"] == {"checked": len(trained), "moved": len(trained), "still": []}
    after[first] = after[first] - 0.5
    after[last] = tensors[last]
    document = compare_checkpoints(before, write(tmp_path / "broken", after, shards=2), config)
    assert [c["name"] for c in document["frozen"]["changed"]] == [first]
    assert [s["name"] for s in document["trained"]["still"]] == [last]


def test_a_tied_tensor_is_found_under_the_name_it_was_stored_by(tmp_path: Path) -> None:
    model, _ = make("tied")
    document = config_document(parse_config(freeze("embedding")), read_model(model))
    save_model(model, str(tmp_path / "a.safetensors"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(name != "embedding.weight")
    save_model(model, str(tmp_path / "b.safetensors"))
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    proof = compare_checkpoints(*paths, parse_config(document))
    assert proof["verdict"] == "holds"
    assert proof["frozen"]["checked"] == 1
    assert proof["trained"]["still"] == []


def test_what_a_schedule_covers_is_not_judged(tmp_path: Path) -> None:
    tensors = {n: t.clone() for n, t in make("plain")[0].state_dict().items()}
    before = write(tmp_path / "before", tensors)
    after = write(tmp_path / "after", {n: t + 1 for n, t in tensors.items()})
    config = freeze("layer1", "layer2")
    config["schedule"] = [{"at": {"step": 3}, "action": "unfreeze", "match": "layer2"}]
    document = compare_checkpoints(before, after, parse_config(config))
    assert document["scheduled"] == ["layer2.bias", "layer2.weight"]
    assert [c["name"] for c in document["frozen"]["changed"]] == ["layer1.bias", "layer1.weight"]
    assert proof_words(document) == (
        "0 of 2 frozen tensors are bit-identical, 2 of 2 trained ones moved; "
        "2 tensors that the schedule touches are not judged."
    )
    document["scheduled"] = []
    assert proof_words(document).endswith("trained ones moved.")


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"w": torch.zeros(3)}, "two shapes"),
        ({"v": torch.zeros(2)}, "Only one of the checkpoints"),
        ({"w": torch.zeros(2, dtype=torch.float16)}, None),
    ],
)
def test_checkpoints_that_cannot_be_compared_are_refused(
    tmp_path: Path, after: dict[str, torch.Tensor], words: str | None
) -> None:
    paths = write(tmp_path / "a", {"w": torch.zeros(2)}), write(tmp_path / "b", after)
    config = parse_config(freeze("w"))
    if words is not None:
        with pytest.raises(InvalidDocument, match=words):
            compare_checkpoints(*paths, config)
        return
    (changed,) = compare_checkpoints(*paths, config)["frozen"]["changed"]
    assert changed["cause"] == "it is float16 of shape (2,) and was float32 of shape (2,)"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", {"w": torch.zeros(2)})
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "broken", {"w": torch.zeros(2)}, shards=2)
    (broken / "model-00001-of-00002.safetensors").unlink()
    for path in ("bad.safetensors", "empty", "broken", "nowhere"):
        with pytest.raises(InvalidDocument, match=path):
            compare_checkpoints(good, tmp_path / path, FreezeConfig())

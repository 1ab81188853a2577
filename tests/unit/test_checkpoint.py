"""Checkpoints are complete or absent, and say so themselves."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from app.training.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    delete_checkpoint,
    load_model_tensors,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from app.training.places import checkpoint_path, checkpoint_steps
from tests.contract.bad_inputs import MANIFESTS, WEIGHTS
from tests.unit.models import make

CHECKPOINT = Checkpoint(7, {"w": torch.arange(3.0)}, {"m": torch.ones(2)}, {"position": 4})


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    described = write_checkpoint(tmp_path, CHECKPOINT)
    assert described["step"] == 7
    again = read_checkpoint(checkpoint_path(tmp_path, 7))
    assert torch.equal(again.model["w"], CHECKPOINT.model["w"])
    assert again.state == {"position": 4}
    assert checkpoint_steps(tmp_path) == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000007"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.json", "manifest.json"])
def test_a_changed_byte_is_noticed(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CHECKPOINT)
    file = checkpoint_path(tmp_path, 7) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpoint):
        read_checkpoint(checkpoint_path(tmp_path, 7))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_nobody_writes_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CHECKPOINT)
    (checkpoint_path(tmp_path, 7) / "manifest.json").write_bytes(MANIFESTS[name])
    with pytest.raises(CorruptCheckpoint, match=r"^step-000000007[^\n]{,500}$"):
        read_checkpoint(checkpoint_path(tmp_path, 7))


@pytest.mark.parametrize("name", WEIGHTS)
def test_tensors_that_are_none_are_no_checkpoint_even_with_their_digest(
    name: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, CHECKPOINT)
    folder = checkpoint_path(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "model.safetensors").write_bytes(WEIGHTS[name])
    digest = hashlib.sha256(WEIGHTS[name]).hexdigest()
    manifest["files"]["model.safetensors"] = {"bytes": len(WEIGHTS[name]), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match=r"^[^\n]{,500}$"):
        load_model_tensors(make("tied")[0], read_checkpoint(folder).model)


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CHECKPOINT)
    (checkpoint_path(tmp_path, 7) / "trainer.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint):
        read_checkpoint(checkpoint_path(tmp_path, 7))


def test_what_was_not_published_does_not_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CHECKPOINT)
    (tmp_path / ".step-000000008.4711").mkdir()
    assert checkpoint_steps(tmp_path) == [7]
    delete_checkpoint(tmp_path, 7)
    assert checkpoint_steps(tmp_path) == []


def test_tied_weights_are_stored_once_and_loaded_into_both(tmp_path: Path) -> None:
    model, _ = make("tied")
    stored = model_tensors(model)
    assert "embedding.weight" in stored
    assert "head.weight" not in stored
    other, _ = make("tied")
    with torch.no_grad():
        other.embedding.weight.zero_()
    load_model_tensors(other, {name: t.clone() for name, t in stored.items()})
    assert torch.equal(other.head.weight, model.head.weight)
    assert other.head.weight is other.embedding.weight


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(CorruptCheckpoint, match="differ"):
        load_model_tensors(make("plain")[0], model_tensors(make("tied")[0]))

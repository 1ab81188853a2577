"""Checkpoints that are complete or absent, by name and not by position. Knows no loop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from app.freezing.digest import digest_tensor
from app.freezing.trace import read_model
from app.training.places import checkpoint_path

FORMAT = 1
MODEL_FILE = "model.safetensors"
TRAINER_FILE = "trainer.safetensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"


class CorruptCheckpoint(Exception):
    """A checkpoint does not match its own manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: the model, the trainer's tensors and its plain values.

    Attributes:
        model: all that a model's state dict has, or the part of it that differs from the base.
        base: of the base model ``fingerprint`` and ``weights_digest``; None where `model` is whole.
        beside: name → text of files that make the folder one that Transformers loads.
    """

    step: int
    model: Mapping[str, torch.Tensor]
    trainer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    base: Mapping[str, str] | None = None
    beside: Mapping[str, str] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Write a checkpoint so that a crash at any moment leaves it complete or absent.

    A temporary folder, a manifest with SHA-256 of every file, fsync, a rename, fsync of the parent.

    Returns:
        ``{"step", "bytes", "created_at"}``.

    Raises:
        OSError: the disk refused; nothing was published, and what was there is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        facts = {f"base_{key}": value for key, value in (checkpoint.base or {}).items()}
        metadata = {"format": "pt", **facts}
        save_file(_storable(checkpoint.model), temporary / MODEL_FILE, metadata=metadata)
        save_file(_storable(checkpoint.trainer), temporary / TRAINER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(checkpoint.state))
        for name, text in checkpoint.beside.items():
            (temporary / name).write_text(text, encoding="utf-8")
        created_at = datetime.now(UTC).isoformat()
        files = {path.name: _describe_file(path) for path in sorted(temporary.iterdir())}
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "created_at": created_at,
            "base": checkpoint.base,
            "files": files,
        }
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        # The same step from an earlier attempt stays beside until the new one is published: a
        # worker that starts renames it back where that did not come to pass.
        aside = folder / f".old-{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        _sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    size = sum(entry["bytes"] for entry in files.values())
    return {"step": checkpoint.step, "bytes": size, "created_at": created_at}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying its manifest.

    Raises:
        CorruptCheckpoint: a file is missing or differs from what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        if manifest["format"] != FORMAT:
            raise CorruptCheckpoint(f"{path.name} has format {manifest['format']!r}, not {FORMAT}.")
        files = dict(manifest["files"])
        if missing := {MODEL_FILE, TRAINER_FILE, STATE_FILE} - set(files):
            raise CorruptCheckpoint(f"{path.name} has no {min(missing)} in its manifest.")
        for name, entry in files.items():
            if Path(name).name != name or _describe_file(path / name) != entry:
                raise CorruptCheckpoint(f"{path.name}: {name} is not what was written.")
        return Checkpoint(
            step=int(manifest["step"]),
            model=load_file(path / MODEL_FILE),
            trainer=load_file(path / TRAINER_FILE),
            state=dict(json.loads((path / STATE_FILE).read_text())),
            base=manifest.get("base"),
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read: {error}") from error


def delete_checkpoint(folder: Path, step: int) -> None:
    """Remove a checkpoint: unpublished by one rename, then deleted."""
    path = checkpoint_path(folder, step)
    doomed = path.with_name(f".deleted-{path.name}.{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model's checkpoint holds: parameters by first name, and persistent buffers."""
    first = read_model(model).canonical_names
    state = model.state_dict()
    return {
        name: t
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and first.get(name, name) == name
    }


def describe_base(model: nn.Module) -> dict[str, str]:
    """What ties a partial checkpoint to the model as it was built: its shape and its weights."""
    return {"fingerprint": read_model(model).fingerprint, "weights_digest": digest_weights(model)}


def digest_weights(model: nn.Module) -> str:
    """SHA-256 of what a whole checkpoint of the model would hold, by name."""
    tensors = model_tensors(model)
    listed = [[name, digest_tensor(tensor)] for name, tensor in sorted(tensors.items())]
    return "sha256:" + hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def describe_for_transformers(model: nn.Module) -> dict[str, str]:
    """The files with which ``from_pretrained`` loads a checkpoint's folder; none for other models.

    Known by what it offers, so that nothing is imported and users' own wrappers count too.
    """
    files = {}
    for name in ("config", "generation_config"):
        describe = getattr(getattr(model, name, None), "to_json_string", None)
        if describe is not None:
            document = json.loads(describe())
            if name == "config":
                document["architectures"] = [type(model).__name__]
            files[f"{name}.json"] = json.dumps(document, indent=2, sort_keys=True) + "\n"
    return files if "config.json" in files else {}


def load_checkpoint_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a freshly built model the tensors of a checkpoint.

    Raises:
        CorruptCheckpoint: names or shapes differ, or it holds a part and the base is another one.
    """
    if checkpoint.base is not None:
        here = describe_base(model)
        if here != checkpoint.base:
            what = "weights" if here["fingerprint"] == checkpoint.base["fingerprint"] else "shape"
            raise CorruptCheckpoint(
                f"Checkpoint {checkpoint.step} holds only what was trained over a base model with "
                f"another {what}: {checkpoint.base} there, {here} here. Restore that base model."
            )
    load_model_tensors(model, checkpoint.model, partial=checkpoint.base is not None)


def load_model_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], partial: bool = False
) -> None:
    """Copy a checkpoint's tensors into a model of the same names and shapes.

    Args:
        partial: tensors that are not given stay as they are.

    Raises:
        CorruptCheckpoint: names or shapes differ.
    """
    own = model_tensors(model)
    late = {name: t for name, t in tensors.items() if name not in own}
    if partial or not set(own) - set(tensors):
        own |= _register_late_buffers(model, late)
    if partial:
        own = {name: tensor for name, tensor in own.items() if name in tensors}
    if set(own) != set(tensors):
        raise CorruptCheckpoint(
            f"The checkpoint and the model differ in {sorted(set(own) ^ set(tensors))[:5]}."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise CorruptCheckpoint(
                    f"{name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} in the model."
                )
            own[name].copy_(tensor)


def _register_late_buffers(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give a fresh model the buffers that its forward registered before the checkpoint."""
    modules = dict(model.named_modules())
    registered = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if path in modules and not hasattr(modules[path], last):
            modules[path].register_buffer(last, tensor.clone())
            registered[name] = modules[path].get_buffer(last)
    return registered


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the host, each with a storage of its own, as safetensors wants them."""
    return {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

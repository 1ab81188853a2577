"""Two checkpoints on disk, compared bit for bit, a tensor at a time. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from app.freezing.config import FreezeConfig, expand_rules, held_norms, match_names
from app.freezing.errors import InvalidDocument
from app.freezing.graph import Buffer, ModelGraph, Module, Parameter
from app.freezing.proof import largest_difference, proof_document
from app.freezing.witness import explain_values


def compare_checkpoints(before: Path, after: Path, config: FreezeConfig) -> dict[str, Any]:
    """The proof for two checkpoints on disk: frozen tensors bit-identical, trained ones moved.

    One tensor of each is in memory at a time, whatever the size of the files.

    Args:
        before: a safetensors file, or a folder of one or, with an index, of several.
        after: likewise.
        config: its `frozen` and `trainable` names where it has them, else its rules on the names.
            What its schedule covers is listed under ``scheduled`` and not judged.

    Raises:
        InvalidDocument: a file is no checkpoint, a tensor is missing or of another shape, or the
            rules need more than names.
    """
    with ExitStack() as stack:
        old, new = (stack.enter_context(_Tensors(path)) for path in (before, after))
        if missing := sorted(set(old.names) ^ set(new.names)):
            where = f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
            raise InvalidDocument([("after", f"Only one of the checkpoints has {where}.")])
        parameters, buffers, scheduled = _sort_names(old, config)
        same, changed = set(), {}
        for name in (*parameters, *buffers):
            first, second = old.read(name), new.read(name)
            if first.shape != second.shape:
                shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
                raise InvalidDocument([("after", f"{name} has two shapes: {shapes}.")])
            if _is_identical(first, second):
                same.add(name)
            else:
                changed[name] = _describe(name, first, second)
    held = _held_buffers(config, parameters, buffers)
    frozen = [n for n, is_frozen in parameters.items() if is_frozen and n not in scheduled]
    trained = [n for n, is_frozen in parameters.items() if not is_frozen and n not in scheduled]
    document = proof_document(
        frozen=frozen,
        changed=[changed[n] for n in frozen if n in changed],
        trained=trained,
        still=[{"name": n, "cause": "unknown"} for n in trained if n in same],
        held=held,
        drifted=[changed[n] for n in held if n in changed],
        allowed=[n for n in buffers if n not in held and n in changed],
    )
    return {**document, "scheduled": sorted(scheduled)}


def _is_identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself and −0 is not +0."""
    if first.dtype != second.dtype:
        return False
    as_bytes = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(*as_bytes)


def _describe(name: str, first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    is_statistic = name.rpartition(".")[2] in _STATISTICS
    told = "a norm layer in train mode moves its running statistics" if is_statistic else None
    unknown = "unknown: the two checkpoints alone do not tell"
    return {
        "name": name,
        "largest_difference": largest_difference(first, second),
        "is_exact": True,
        "cause": told or explain_values(first, second) or unknown,
    }


def _held_buffers(
    config: FreezeConfig, parameters: Mapping[str, bool], buffers: Iterable[str]
) -> list[str]:
    if config.norm_statistics != "freeze":
        return []
    statistics = [name for name in buffers if name.rpartition(".")[2] in _STATISTICS]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in statistics)
    norms = set(held_norms(owners, parameters))
    return [name for name in statistics if name.rpartition(".")[0] in norms]


class _Tensors:
    """The tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._aliases: dict[str, str] = {}

    def __enter__(self) -> _Tensors:
        from safetensors import SafetensorError, safe_open

        try:
            for file in self._list_files():
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
                self._files |= dict.fromkeys(opened.keys(), opened)
                self._aliases |= opened.metadata() or {}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self._stack.close()
            message = f"{self._path} is not a safetensors checkpoint: {error}."
            raise InvalidDocument([("path", message)]) from error
        if not self._files:
            message = f"{self._path} holds no .safetensors file with tensors in it."
            raise InvalidDocument([("path", message)])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _list_files(self) -> list[Path]:
        if not self._path.is_dir():
            return [self._path]
        index = self._path / "model.safetensors.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return sorted(self._path / shard for shard in shards)
        whole = self._path / "model.safetensors"
        return [whole] if whole.is_file() else sorted(self._path.glob("*.safetensors"))

    @property
    def names(self) -> Iterable[str]:
        return self._files.keys()

    def find(self, name: str) -> str | None:
        """The name under which a tensor lies: a tied one is stored once, and says where."""
        other = name if name in self._files else self._aliases.get(name)
        return other if other in self._files else None

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def describe(self, name: str) -> Parameter:
        """Name and shape, without reading the values."""
        part = self._files[name].get_slice(name)
        shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
        numel = 1
        for size in shape:
            numel *= size
        floating = dtype.startswith(("F", "BF", "C"))
        return Parameter(name, shape, dtype.lower(), numel, 0, floating, floating)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _sort_names(
    tensors: _Tensors, config: FreezeConfig
) -> tuple[dict[str, bool], list[str], set[str]]:
    """(parameter → is frozen, buffers, what a schedule covers), by the config's lists or rules."""
    needs_types = any(rule.type for rule in config.rules)
    if config.frozen is not None and config.trainable is not None:
        parameters = _listed(tensors, config)
    elif needs_types:
        message = "A rule by type needs the model: use a downloaded config, which lists names."
        raise InvalidDocument([("config", message)])
    else:
        names = [name for name in tensors.names if name.rpartition(".")[2] not in _STATISTICS]
        parameters = expand_rules(config, _graph_of_names(tensors, names))
    buffers = [name for name in tensors.names if name not in parameters]
    graph = _graph_of_names(tensors, parameters)
    scheduled = {name for c in config.schedule for name in match_names(c.rule, graph)}
    return parameters, buffers, scheduled


def _listed(tensors: _Tensors, config: FreezeConfig) -> dict[str, bool]:
    claimed = dict.fromkeys(config.frozen or (), True) | dict.fromkeys(
        config.trainable or (), False
    )
    found = {name: tensors.find(name) for name in claimed}
    absent = [name for name, where in found.items() if where is None]
    if absent:
        raise InvalidDocument([("before", f"The checkpoints have no tensor {absent[0]!r}.")])
    return {where: claimed[name] for name, where in found.items() if where is not None}


def _graph_of_names(tensors: _Tensors, names: Iterable[str]) -> ModelGraph:
    parameters = tuple(tensors.describe(name) for name in names)
    return ModelGraph(modules=tuple(_modules_of(parameters)), parameters=parameters)


def _modules_of(parameters: Iterable[Parameter]) -> Iterator[Module]:
    owned: dict[str, list[str]] = {}
    for parameter in parameters:
        owned.setdefault(parameter.name.rpartition(".")[0], []).append(parameter.name)
    for path, names in owned.items():
        yield Module(
            path, "Module", path.count(".") + 1, tuple(names), buffers=tuple[Buffer, ...]()
        )

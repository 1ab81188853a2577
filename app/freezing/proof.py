"""Digests before, during and after; what moved that must not. Knows no loop and no optimizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from app.freezing.apply import Freeze
from app.freezing.config import FreezeConfig, expand_rules, held_norms
from app.freezing.errors import InvalidDocument
from app.freezing.graph import Buffer, ModelGraph, Module, Parameter

# Tensors up to this size in all are kept on the host, so that a breach can be told in numbers too.
COPY_LIMIT_BYTES = 64 * 2**20


def digest_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in C order: equal exactly when bit-identical, even NaN and −0."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


class Proof:
    """Checks that what is frozen stayed bit-identical to where it was frozen.

    A digest of every parameter and buffer is taken when the object is made, and of what is newly
    frozen at `follow`; `check` takes them again.
    """

    def __init__(self, freeze: Freeze) -> None:
        self._freeze = freeze
        self._start: dict[str, str] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._room = COPY_LIMIT_BYTES
        self._held = set(freeze.held_buffers)
        self._breaches: list[dict[str, Any]] = []
        self._take(freeze.parameters)
        self._take(self._buffers())

    def _parameters(self) -> dict[str, torch.Tensor]:
        """What the model holds now under each name, which somebody may have replaced."""
        named = dict(self._freeze.model.named_parameters(remove_duplicate=False))
        return {n: named.get(n, torch.empty(0)) for n in self._freeze.parameters}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(self._freeze.model.named_buffers())

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._start[name] = digest_tensor(tensor)
            if name not in self._copies:
                self._room -= tensor.numel() * tensor.element_size()
            if name in self._copies or self._room >= 0:
                self._copies[name] = tensor.detach().cpu().clone()

    def follow(self, newly_frozen: Iterable[str], newly_unfrozen: Iterable[str]) -> None:
        """After a change on the running model: settle what was frozen until now, and start anew.

        What a tensor breached before it was released stays in every later check.
        """
        tensors = {**self._freeze.parameters, **self._buffers()}
        held = set(self._freeze.held_buffers)
        released = [*newly_unfrozen, *(self._held - held)]
        for name in released:
            if digest_tensor(tensors[name]) != self._start[name]:
                self._breaches.append(self._describe(name, tensors[name]))
        anew = [*newly_frozen, *newly_unfrozen, *(self._held ^ held)]
        self._take({name: tensors[name] for name in anew})
        self._held = held

    def state(self) -> dict[str, Any]:
        """Where everything began and what was breached since, as JSON to go with a checkpoint."""
        return {"digests": dict(self._start), "breaches": list(self._breaches)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of an earlier attempt; its copies are gone."""
        self._start.update(state["digests"])
        self._breaches = list(state["breaches"])
        self._copies = {n: t for n, t in self._copies.items() if digest_tensor(t) == self._start[n]}

    def check(self, gradients: Mapping[str, float | None] | None = None) -> dict[str, Any]:
        """Compare everything with where it was frozen or began.

        Args:
            gradients: name → the largest gradient norm a parameter ever had, None where none was
                computed; tells why a trainable tensor stood still.

        Returns:
            The proof in the shape of ``GET /api/jobs/{id}/proof``.
        """
        parameters = self._parameters()
        now = {name: digest_tensor(p) for name, p in parameters.items()}
        frozen = [n for n, is_frozen in self._freeze.frozen.items() if is_frozen]
        trained = [n for n, is_frozen in self._freeze.frozen.items() if not is_frozen]
        changed = [n for n in frozen if now[n] != self._start[n]]
        still = [n for n in trained if now[n] == self._start[n]]
        buffers = self._buffers()
        held = self._freeze.held_buffers
        buffers |= {n: torch.empty(0) for n in held if n not in buffers}  # gone: so it changed
        drifted = [n for n in buffers if digest_tensor(buffers[n]) != self._start.get(n)]
        return proof_document(
            frozen=frozen,
            changed=self._breaches + [self._describe(n, parameters[n]) for n in changed],
            trained=trained,
            still=[{"name": n, "cause": _cause_of_stillness(n, gradients or {})} for n in still],
            held=held,
            drifted=[self._describe(n, buffers[n]) for n in drifted if n in held],
            allowed=[n for n in drifted if n not in held],
        )

    def _describe(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        before = self._copies.get(name)
        difference = None if before is None else _largest_difference(before, tensor)
        return {
            "name": name,
            "largest_difference": difference,
            "cause": _SIGN_OF_ZERO if difference == 0.0 else self._likely_cause(name),
        }

    def _likely_cause(self, name: str) -> str:
        module = dict(self._freeze.model.named_modules()).get(name.rpartition(".")[0])
        if module is None:
            return "the module that owned it is gone"
        own = self._freeze.parameters.get(name)
        if (
            own is not None
            and dict(module.named_parameters()).get(name.rpartition(".")[2]) is not own
        ):
            return "the model holds another tensor under this name: its parameter was replaced"
        if isinstance(module, _NormBase):
            return "a norm layer in train mode moves its running statistics"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "the embedding's max_norm rewrites rows in forward"
        if self._freeze.config.mechanism == "zero_grad":
            return "weight decay or momentum moves it although its gradient is zeroed"
        return "something writes to it: its module's forward, a hook, or code outside the optimizer"


_SIGN_OF_ZERO = "the sign of a zero changed: a step of size zero turns −0.0 into +0.0"


def proof_document(
    *,
    frozen: list[str],
    changed: list[dict[str, Any]],
    trained: list[str],
    still: list[dict[str, Any]],
    held: list[str],
    drifted: list[dict[str, Any]],
    allowed: list[str],
) -> dict[str, Any]:
    """The contract's proof. Broken if and only if a frozen parameter or a held buffer changed."""
    return {
        "verdict": "broken" if changed or drifted else "holds",
        "frozen": {
            "checked": len(frozen),
            "identical": len(frozen) - len({c["name"] for c in changed} & set(frozen)),
            "changed": changed,
        },
        "trained": {"checked": len(trained), "moved": len(trained) - len(still), "still": still},
        "buffers": {
            "checked": len(held),
            "identical": len(held) - len(drifted),
            "changed": drifted,
            "allowed": allowed,
        },
    }


def _largest_difference(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """max |after − before| in float64; None where a difference is not a number."""
    if before.shape != after.shape or not before.numel():
        return None
    difference = (after.detach().cpu().double() - before.double()).abs().max().item()
    return difference if difference == difference else None


def _cause_of_stillness(name: str, gradients: Mapping[str, float | None]) -> str:
    peak = gradients.get(name)
    if peak is None:
        return "unreached: no gradient was ever computed for it"
    if peak == 0.0:
        return "no gradient: its gradient was zero in every step"
    return "rounded away: its updates were smaller than its precision can hold"


# ------------------------------------------------------------------------------ two checkpoints


def compare_checkpoints(before: Path, after: Path, config: FreezeConfig) -> dict[str, Any]:
    """The proof for two checkpoints on disk: frozen tensors bit-identical, trained ones moved.

    Args:
        before: a safetensors file, or a folder of them.
        after: likewise.
        config: its `frozen` and `trainable` names where it has them, else its rules on the names.

    Raises:
        InvalidDocument: a file is no checkpoint, a tensor is missing or of another shape, or the
            rules need more than names.
    """
    old, new = _read_tensors(before), _read_tensors(after)
    missing = sorted(set(old) ^ set(new))
    if missing:
        where = f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
        raise InvalidDocument([("after", f"Only one of the checkpoints has {where}.")])
    parameters, buffers = _sort_names(old, config)
    wrong = [n for n in (*parameters, *buffers) if old[n].shape != new[n].shape]
    if wrong:
        raise InvalidDocument([("after", f"{wrong[0]} has another shape in each checkpoint.")])
    same = {name: digest_tensor(old[name]) == digest_tensor(new[name]) for name in old}
    held: list[str] = []
    if config.norm_statistics == "freeze":
        owners = dict.fromkeys(name.rpartition(".")[0] for name in buffers)
        norms = set(held_norms(owners, parameters))
        held = [
            name
            for name in buffers
            if name.rpartition(".")[2] in _STATISTICS and name.rpartition(".")[0] in norms
        ]

    def describe(names: Iterable[str]) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "largest_difference": _largest_difference(old[name], new[name]),
                "cause": "unknown: only the two checkpoints were compared",
            }
            for name in names
        ]

    frozen = [name for name, is_frozen in parameters.items() if is_frozen]
    trained = [name for name, is_frozen in parameters.items() if not is_frozen]
    return proof_document(
        frozen=frozen,
        changed=describe(n for n in frozen if not same[n]),
        trained=trained,
        still=[{"name": n, "cause": "unknown"} for n in trained if same[n]],
        held=held,
        drifted=describe(n for n in held if not same[n]),
        allowed=[n for n in buffers if n not in held and not same[n]],
    )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    files = [path]
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            files = sorted({path / f for f in json.loads(index.read_text())["weight_map"].values()})
        elif (path / "model.safetensors").is_file():
            files = [path / "model.safetensors"]
        else:
            files = sorted(path.glob("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidDocument(
            [("path", f"{path} is not a safetensors checkpoint: {error}.")]
        ) from error
    if not tensors:
        raise InvalidDocument([("path", f"{path} holds no .safetensors file with tensors in it.")])
    return tensors


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _sort_names(
    tensors: Mapping[str, torch.Tensor], config: FreezeConfig
) -> tuple[dict[str, bool], list[str]]:
    """(parameter name → is frozen, buffer names), by the config's lists or by its rules."""
    if config.frozen is not None and config.trainable is not None:
        listed = dict.fromkeys(config.frozen, True) | dict.fromkeys(config.trainable, False)
        absent = [name for name in listed if name not in tensors]
        if absent:
            raise InvalidDocument([("before", f"The checkpoints have no tensor {absent[0]!r}.")])
        return listed, [name for name in tensors if name not in listed]
    if any(rule.type for rule in config.rules):
        raise InvalidDocument(
            [
                (
                    "config",
                    "A rule by type needs the model: use a downloaded config, which lists names.",
                )
            ]
        )
    buffers = [name for name in tensors if name.rpartition(".")[2] in _STATISTICS]
    names = [name for name in tensors if name not in buffers]
    return expand_rules(config, _graph_of_names(tensors, names)), buffers


def _graph_of_names(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> ModelGraph:
    parameters = tuple(_parameter_of(name, tensors[name]) for name in names)
    return ModelGraph(modules=tuple(_modules_of(parameters)), parameters=parameters)


def _parameter_of(name: str, tensor: torch.Tensor) -> Parameter:
    size = tensor.numel() * tensor.element_size()
    dtype = str(tensor.dtype).removeprefix("torch.")
    floating = tensor.is_floating_point()
    return Parameter(name, tuple(tensor.shape), dtype, tensor.numel(), size, floating, floating)


def _modules_of(parameters: Iterable[Parameter]) -> Iterator[Module]:
    owned: dict[str, list[str]] = {}
    for parameter in parameters:
        owned.setdefault(parameter.name.rpartition(".")[0], []).append(parameter.name)
    for path, names in owned.items():
        yield Module(
            path, "Module", path.count(".") + 1, tuple(names), buffers=tuple[Buffer, ...]()
        )

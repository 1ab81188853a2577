"""Digests before, during and after; what moved that must not. Knows no loop and no recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from app.freezing.apply import Freeze
from app.freezing.digest import digest_tensors
from app.freezing.witness import SIGN_OF_ZERO, Witness, explain_values

# Frozen tensors up to this size in all are kept on the host, so that a breach can be told in exact
# numbers; of every one beyond, so many values evenly spread, which give a lower bound.
COPY_LIMIT_BYTES = 64 * 2**20
SAMPLE_VALUES = 4096


@dataclass(frozen=True)
class _Copy:
    """What a tensor was: every `stride`-th value of it, on the host."""

    values: torch.Tensor
    stride: int

    @classmethod
    def of(cls, tensor: torch.Tensor, whole: bool) -> _Copy:
        stride = 1 if whole else max(1, tensor.numel() // SAMPLE_VALUES)
        kept = tensor.detach()
        return cls((kept if stride == 1 else kept.flatten()[::stride]).cpu().clone(), stride)


class Proof:
    """Checks that what is frozen stayed bit-identical to where it was frozen.

    A digest of every parameter and buffer is taken, where it lies, when the object is made, and of
    what is newly frozen at `follow`; `check` takes them again. In between, every optimizer of this
    process is watched, so that a breach can be told with its cause.
    """

    def __init__(self, freeze: Freeze) -> None:
        self._freeze = freeze
        self._start: dict[str, str] = {}
        self._copies: dict[str, _Copy] = {}
        self._room = COPY_LIMIT_BYTES
        self._held = set(freeze.held_buffers)
        self._breaches: list[dict[str, Any]] = []
        self._witness = Witness()
        self._watch()
        self._take({**freeze.parameters, **self._buffers()})

    def _parameters(self) -> dict[str, torch.Tensor]:
        """What the model holds now under each name, which somebody may have replaced."""
        named = dict(self._freeze.model.named_parameters(remove_duplicate=False))
        return {n: named.get(n, torch.empty(0)) for n in self._freeze.parameters}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(self._freeze.model.named_buffers())

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._freeze.parameters.items() if self._freeze.frozen[n]}

    def _watch(self) -> None:
        self._witness.watch(self._frozen(), self._freeze.config.mechanism)

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._start |= digest_tensors(tensors)
        for name in [n for n in tensors if self._freeze.frozen.get(n) or n in self._held]:
            tensor = tensors[name]
            known = self._copies.get(name)
            if known is None:
                self._room -= tensor.numel() * tensor.element_size()
            whole = known.stride == 1 if known is not None else self._room >= 0
            self._copies[name] = _Copy.of(tensor, whole)

    def follow(self, newly_frozen: Iterable[str], newly_unfrozen: Iterable[str]) -> None:
        """After a change on the running model: settle what was frozen until now, and start anew.

        What a tensor breached before it was released stays in every later check.
        """
        tensors = {**self._freeze.parameters, **self._buffers()}
        held = set(self._freeze.held_buffers)
        released = {name: tensors[name] for name in [*newly_unfrozen, *(self._held - held)]}
        for name, digest in digest_tensors(released, self._start).items():
            if digest != self._start[name]:
                self._breaches.append(self._describe(name, tensors[name]))
        anew = [*newly_frozen, *newly_unfrozen, *(self._held ^ held)]
        self._held = held
        self._watch()
        self._take({name: tensors[name] for name in anew})

    def state(self) -> dict[str, Any]:
        """Where everything began and what was breached since, as JSON to go with a checkpoint."""
        return {"digests": dict(self._start), "breaches": list(self._breaches)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of an earlier attempt, which may have run on another device."""
        here, earlier = self._start, state["digests"]
        tensors = {**self._parameters(), **self._buffers()}
        alike = digest_tensors({n: t for n, t in tensors.items() if n in earlier}, earlier)
        # What is as it was goes on under the digest that is quick on this device.
        self._start = {
            **here,
            **{n: here[n] if alike.get(n) == d and n in here else d for n, d in earlier.items()},
        }
        self._breaches = list(state["breaches"])
        self._copies = {n: c for n, c in self._copies.items() if self._start[n] == here[n]}

    def check(self, gradients: Mapping[str, float | None] | None = None) -> dict[str, Any]:
        """Compare everything with where it was frozen or began.

        Args:
            gradients: name → the largest gradient norm a parameter ever had, None where none was
                computed; tells why a trainable tensor stood still.

        Returns:
            The proof in the shape of ``GET /api/jobs/{id}/proof``; ``gradients.present`` names what
            is frozen by ``requires_grad`` and has, or had at a step, a gradient all the same.
        """
        parameters, buffers = self._parameters(), self._buffers()
        held = self._freeze.held_buffers
        buffers |= {n: torch.empty(0) for n in held if n not in buffers}  # gone: so it changed
        now = digest_tensors({**parameters, **buffers}, self._start)
        frozen = [n for n, is_frozen in self._freeze.frozen.items() if is_frozen]
        trained = [n for n, is_frozen in self._freeze.frozen.items() if not is_frozen]
        still = [n for n in trained if now[n] == self._start[n]]
        drifted = [n for n in buffers if now[n] != self._start.get(n)]
        without_gradient = frozen if self._freeze.config.mechanism == "requires_grad" else []
        return proof_document(
            frozen=frozen,
            changed=self._breaches
            + [self._describe(n, parameters[n]) for n in frozen if now[n] != self._start[n]],
            without_gradient=without_gradient,
            with_gradient=self._with_gradient(without_gradient),
            trained=trained,
            still=[{"name": n, "cause": _cause_of_stillness(n, gradients or {})} for n in still],
            held=held,
            drifted=[self._describe(n, buffers[n]) for n in drifted if n in held],
            allowed=[n for n in drifted if n not in held],
        )

    def _with_gradient(self, frozen: Iterable[str]) -> list[str]:
        return [
            name
            for name in frozen
            if name in self._witness.gradients or self._freeze.parameters[name].grad is not None
        ]

    def _describe(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        kept = self._copies.get(name)
        difference, is_exact = None, False
        if kept is not None:
            is_exact = kept.stride == 1
            now = tensor if is_exact else tensor.detach().flatten()[:: kept.stride]
            difference = largest_difference(kept.values, now)
        return {
            "name": name,
            "largest_difference": difference,
            "is_exact": is_exact,  # or a lower bound, from a sample of its values
            "cause": self._likely_cause(name, tensor, kept if is_exact else None),
        }

    def _likely_cause(self, name: str, tensor: torch.Tensor, before: _Copy | None) -> str:
        """The first that applies: the plainest facts first, inferences from values last."""
        path, _, last = name.rpartition(".")
        module = dict(self._freeze.model.named_modules()).get(path)
        if module is None:
            return "the module that owned it is gone"
        own = self._freeze.parameters.get(name)
        if own is not None:
            held = dict(module.named_parameters(recurse=False)).get(last)
            if held is None:
                return "its parameter is gone: pruning or a parametrization took its place"
            if held is not own:
                return "the model holds another tensor under this name: its parameter was replaced"
        if isinstance(module, _NormBase) and own is None:
            if module.training:
                return "a norm layer in train mode moves its running statistics"
            return "its norm layer was in train mode for a while, or code wrote its statistics"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            return "the embedding's max_norm rewrites rows in forward"
        seen = self._witness.explain(name) if own is not None else None
        if seen is not None and self._witness.saw_step(name):
            return seen
        told = None if before is None else explain_values(before.values, tensor)
        if told == SIGN_OF_ZERO:
            return told
        if (companion := self._shares_memory(name, tensor)) is not None:
            seen = f"it shares its memory with {companion}, which is trained"
        unknown = "something writes to it: a forward, a hook, or code outside the optimizer"
        return "; ".join(filter(None, (told, seen))) or unknown

    def _shares_memory(self, name: str, tensor: torch.Tensor) -> str | None:
        """Another trainable parameter in the same storage; None where there is none."""
        place = tensor.untyped_storage().data_ptr()
        for other, parameter in self._freeze.parameters.items():
            is_trained = other != name and not self._freeze.frozen[other]
            if is_trained and place and parameter.untyped_storage().data_ptr() == place:
                return other
        return None


def proof_document(
    *,
    frozen: list[str],
    changed: list[dict[str, Any]],
    trained: list[str],
    still: list[dict[str, Any]],
    held: list[str],
    drifted: list[dict[str, Any]],
    allowed: list[str],
    without_gradient: Sequence[str] = (),
    with_gradient: Sequence[str] = (),
) -> dict[str, Any]:
    """The contract's proof. Broken if and only if a frozen parameter or a held buffer changed."""
    return {
        "verdict": "broken" if changed or drifted else "holds",
        "frozen": {
            "checked": len(frozen),
            "identical": len(frozen) - len({c["name"] for c in changed} & set(frozen)),
            "changed": changed,
        },
        "gradients": {"checked": len(without_gradient), "present": list(with_gradient)},
        "trained": {"checked": len(trained), "moved": len(trained) - len(still), "still": still},
        "buffers": {
            "checked": len(held),
            "identical": len(held) - len(drifted),
            "changed": drifted,
            "allowed": allowed,
        },
    }


def largest_difference(before: torch.Tensor, after: torch.Tensor) -> float | None:
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

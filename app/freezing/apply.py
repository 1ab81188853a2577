"""Hold parameters, gradients and running statistics still on a live model, and change that.

Knows no data, no loop and no optimizer but the one it is handed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from app.freezing.config import FreezeConfig, expand_rules, held_norms, match_names
from app.freezing.errors import InvalidDocument
from app.freezing.trace import drops_at_random, is_statistics_norm, read_model


class Freeze:
    """A freeze config applied to one model.

    Attributes:
        frozen: first name of every parameter, in model order → whether it is frozen.
        parameters: first name → the parameter itself.
        held_buffers: names of the buffers that the norm policy holds still.
        parked: optimizer state of what was frozen while running, by name.
    """

    def __init__(self, model: nn.Module, config: FreezeConfig) -> None:
        """Apply `config`: set flags, clear gradients, choose what runs in eval mode.

        Side effects: `requires_grad` and `grad` of every parameter, and the model's mode.
        """
        self.model = model
        self.graph = read_model(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {p.name: named[p.name] for p in self.graph.parameters}
        self._came = {name: p.requires_grad for name, p in self.parameters.items()}
        self.parked: dict[str, dict[str, Any]] = {}
        self._set(config)

    def _set(self, config: FreezeConfig) -> None:
        self.config = config
        self.frozen = expand_rules(config, self.graph)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self._requires_grad(name))
            parameter.grad = None
        every_name = {n: self.frozen[first] for n, first in self.graph.canonical_names.items()}
        modules = dict(self.model.named_modules())
        self._eval_modules: list[nn.Module] = []
        self.held_buffers: list[str] = []
        if config.norm_statistics == "freeze":
            norms = (path for path, module in modules.items() if is_statistics_norm(module))
            for path in held_norms(norms, every_name):
                self._eval_modules.append(modules[path])
                self.held_buffers += [
                    f"{path}.{name}" if path else name for name, _ in modules[path].named_buffers()
                ]
        if config.dropout == "off":
            drops = (path for path, module in modules.items() if drops_at_random(module))
            self._eval_modules += [modules[path] for path in held_norms(drops, every_name)]
        self.train()

    def _requires_grad(self, name: str) -> bool:
        if not self.frozen[name]:
            return True
        return self.config.mechanism != "requires_grad" and self._came[name]

    def train(self) -> None:
        """Put the model in train mode, and what is held still in eval mode.

        Every call of ``model.train()`` must go through here: that method sets the mode of all
        modules and would let frozen running statistics move again.
        """
        self.model.train()
        for module in self._eval_modules:
            module.eval()

    def trainable(self) -> list[nn.Parameter]:
        return [p for name, p in self.parameters.items() if not self.frozen[name]]

    def parameter_groups(
        self, weight_decay: float, apart: Mapping[str, Hashable] | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer, each with ``lr_scale`` and ``weight_decay``, all in model order.

        Under ``requires_grad`` every parameter is in from the start, whatever is frozen: without a
        gradient an optimizer allocates nothing for it and leaves it alone, and no parameter is ever
        added later, which would upset learning-rate schedules.

        Args:
            apart: name → a value; names with different values are in different groups, which have
                it as ``apart`` (None where a name has none).
        """
        if not any(not is_frozen for is_frozen in self.frozen.values()):
            raise InvalidDocument(
                [("config", "Nothing is trainable under this freeze config. Unfreeze something.")]
            )
        settings = dict.fromkeys(self.parameters, (1.0, weight_decay))
        for group in self.config.groups:
            for name in match_names(group, self.graph):
                decay = weight_decay if group.weight_decay is None else group.weight_decay
                settings[name] = (group.lr_scale, decay)
        grouped: dict[tuple[float, float, Hashable], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            floating = parameter.is_floating_point() or parameter.is_complex()
            if not floating or (self.config.mechanism == "exclude" and self.frozen[name]):
                continue
            scale, decay = settings[name]
            if self.config.mechanism == "zero_lr" and self.frozen[name]:
                scale = 0.0
            key = (scale, decay, (apart or {}).get(name))
            grouped.setdefault(key, []).append(parameter)
        return [
            {"params": members, "lr_scale": scale, "weight_decay": decay, "apart": value}
            for (scale, decay, value), members in grouped.items()
        ]

    def hold_gradients(self) -> None:
        """Under ``zero_grad``: zero the gradients of frozen parameters, just before the step."""
        if self.config.mechanism == "zero_grad":
            for name, parameter in self.parameters.items():
                if self.frozen[name] and parameter.grad is not None:
                    parameter.grad.zero_()

    def change(
        self,
        config: FreezeConfig,
        optimizer: torch.optim.Optimizer,
        keep_state: Iterable[str] = (),
    ) -> tuple[list[str], list[str]]:
        """Freeze and unfreeze on a running model, between two optimizer steps.

        What is frozen loses its gradient and its optimizer state, which is parked; what is
        unfrozen starts with a fresh one, or with the parked one where `keep_state` names it.

        Returns:
            (newly frozen, newly unfrozen) first names.

        Raises:
            InvalidDocument: the mechanism is not ``requires_grad``, or nothing would be trainable.
        """
        if self.config.mechanism != "requires_grad" or config.mechanism != "requires_grad":
            raise InvalidDocument(
                [("config", "Changing what is frozen needs the mechanism 'requires_grad'.")]
            )
        wanted = expand_rules(config, self.graph)
        if all(wanted.values()):
            raise InvalidDocument(
                [("rules", "This would freeze the last trainable layer; keep one trainable.")]
            )
        newly_frozen = [n for n, is_frozen in wanted.items() if is_frozen and not self.frozen[n]]
        newly_unfrozen = [n for n, is_frozen in wanted.items() if not is_frozen and self.frozen[n]]
        self._set(config)
        kept = set(keep_state)
        for name in newly_frozen:
            state = optimizer.state.pop(self.parameters[name], None)
            if state:
                self.parked[name] = state
        for name in newly_unfrozen:
            parked = self.parked.pop(name, None)
            if parked and name in kept:
                optimizer.state[self.parameters[name]] = parked
        return newly_frozen, newly_unfrozen


def apply_config(model: nn.Module, config: FreezeConfig) -> Freeze:
    """Apply a freeze config to a model. See `Freeze`."""
    return Freeze(model, config)

"""What is frozen when: rules, schedule and live edits over one run. Knows no data and no loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from app.freezing.apply import Freeze, apply_config
from app.freezing.config import (
    Change,
    FreezeConfig,
    config_document,
    due_changes,
    expand_rules,
    match_names,
    parse_config,
    parse_rules,
)
from app.freezing.errors import InvalidDocument
from app.freezing.presets import shortest_rules
from app.freezing.trace import read_model
from app.training.optimizer import Groups, read_state, regroup

Pace = tuple[int, float, int]  # the step it begins after, the factor on the rate, warm-up steps


@dataclass(frozen=True)
class Turn:
    """What one change of the frozen set did, by first names."""

    frozen: list[str]
    unfrozen: list[str]

    def words(self) -> str:
        """What it did, for the log: ``2 tensors frozen, 1 unfrozen``, without what is zero."""
        kinds = (("frozen", len(self.frozen)), ("unfrozen", len(self.unfrozen)))
        (kind, count), *more = [pair for pair in kinds if pair[1]]
        first = f"{count} tensor{'s' * (count > 1)} {kind}"
        return ", ".join([first, *(f"{count} {kind}" for kind, count in more)])


class Phases:
    """Says what is frozen after a step, and makes it so on the running model.

    Attributes:
        config: the freeze config as trained: live edits are entries of its schedule.
        freeze: what holds on the model now.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FreezeConfig,
        *,
        steps_per_epoch: int,
        step: int = 0,
        then: Mapping[str, Any] | None = None,
    ) -> None:
        """Apply what holds after `step` steps.

        Args:
            then: the `state` of a checkpoint of that step. What was frozen when it was written is
                applied, so that its state fits; what holds by now comes with `enter`.
        """
        self.config, self._steps_per_epoch = config, steps_per_epoch
        self._graph = read_model(model)
        began = self.config_at(step)
        if then is not None and config.mechanism == "requires_grad":
            before = parse_config(then["config"])
            began = replace(
                began,
                rules=shortest_rules(then["frozen"], self._graph),
                norm_statistics=before.norm_statistics,
                dropout=before.dropout,
            )
        self._held = began
        self.freeze: Freeze = apply_config(model, began)

    def config_at(self, step: int) -> FreezeConfig:
        """The config with the entries of its schedule that hold after `step` steps as rules."""
        due = tuple(self._due(step))
        rules = (*self.config.rules, *(change.rule for change in due))
        return replace(self.config, rules=rules, schedule=due)

    def groups(self, step: int, weight_decay: float) -> Groups:
        """The optimizer's groups; what was unfrozen at a pace of its own is apart."""
        return self.freeze.parameter_groups(weight_decay, self._paces(step))

    def take_edit(self, edit: Mapping[str, Any], step: int) -> str | None:
        """Append a live edit to the schedule; the sentence that refuses it, where it must be.

        It holds from the next step on, when `enter` is called: of several edits between two steps
        only what they come to together is ever done, as it is when the schedule is replayed.
        """
        pace = edit.get("lr_scale", 1.0), edit.get("warmup_steps", 0)
        state = edit.get("optimizer_state", "fresh")
        added = tuple(
            Change(rule, "step", step, state, *(() if rule.freezes else pace))
            for rule in parse_rules(edit["rules"])
        )
        before = self.config
        self.config = replace(before, schedule=(*before.schedule, *added))
        try:
            if before.mechanism != "requires_grad":
                raise InvalidDocument([("rules", "A live edit needs 'requires_grad'.")])
            if all(expand_rules(self.config_at(step), self._graph).values()):
                raise InvalidDocument([("rules", "It would freeze the last trainable layer.")])
        except InvalidDocument as error:
            self.config = before
            return str(error)
        return None

    def enter(self, step: int, optimizer: torch.optim.Optimizer, weight_decay: float) -> Turn:
        """Make what holds from the next step on hold, between two optimizer steps.

        Raises:
            InvalidDocument: nothing would be trainable.
        """
        config = self.config_at(step)
        if config == self._held:
            return Turn([], [])
        turn = Turn(*self.freeze.change(config, optimizer, self._keeping_state(step)))
        self._held = config
        regroup(optimizer, self.groups(step, weight_decay))
        return turn

    def describe_resume(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What becomes of a checkpoint's optimizer state under the config that holds by now.

        Returns:
            ``kept``: trained on with its state; ``fresh``: trained from now on, starting anew;
            ``dropped``: it had a state and is frozen now; each a list of first names.
        """
        frozen = expand_rules(self.config_at(step), self._graph)
        keeping = self._keeping_state(step)
        had = set(read_state(optimizer, self.freeze.parameters))
        back = {n for n in self.freeze.parked if n in keeping and self.freeze.frozen[n]}
        trained = [n for n, is_frozen in frozen.items() if not is_frozen]
        return {
            "step": step,
            "kept": [n for n in trained if n in had | back],
            "fresh": [n for n in trained if self.freeze.frozen[n] and n not in back],
            "dropped": [n for n, is_frozen in frozen.items() if is_frozen and n in had],
        }

    def document(self) -> dict[str, Any]:
        """The freeze config as trained until now."""
        return config_document(self.config, self.freeze.graph)

    def _due(self, step: int) -> list[Change]:
        return due_changes(self.config, step, self._steps_per_epoch)

    def _keeping_state(self, step: int) -> set[str]:
        """Names whose newest due entry of the schedule wants their parked state back."""
        keeping: set[str] = set()
        for change in self._due(step):
            names = match_names(change.rule, self._graph)
            keeping = keeping | names if change.optimizer_state == "keep" else keeping - names
        return keeping

    def _paces(self, step: int) -> dict[str, Pace]:
        """Name → the pace of the entry that unfroze it, for entries that name one."""
        frozen = expand_rules(self.config, self._graph)
        paces: dict[str, Pace] = {}
        for change in self._due(step):
            began = int(change.begins(self._steps_per_epoch))
            for name in match_names(change.rule, self._graph):
                if change.rule.freezes or frozen[name]:
                    paces.pop(name, None)
                    if (change.lr_scale, change.warmup_steps) != (1.0, 0):
                        paces[name] = (began, change.lr_scale, change.warmup_steps)
                frozen[name] = change.rule.freezes
        return paces

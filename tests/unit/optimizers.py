"""Every optimizer that we offer, in each of its implementations. Knows no test."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
EVERY_OPTIMIZER = [(kind, how) for kind in KINDS for how in IMPLEMENTATIONS]
with_every_optimizer = pytest.mark.parametrize(("optimizer", "implementation"), EVERY_OPTIMIZER)


def build(
    optimizer: str,
    implementation: str,
    groups: Iterable[Any],
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:
    """SGD has momentum, and each decays, unless a test wants it otherwise."""
    more: dict[str, Any] = {"momentum": momentum} if optimizer == "sgd" else {}
    more |= IMPLEMENTATIONS[implementation]
    return KINDS[optimizer](groups, lr=lr, weight_decay=weight_decay, **more)  # type: ignore[call-arg]

"""A model whose module is named as an attack would be; for the pages that show its tree."""

import torch
from torch import nn

MARKUP = '"><img src=x onerror=alert(1)>'


def build() -> dict[str, object]:
    """A layer of that name between two harmless ones."""
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module(MARKUP, nn.Linear(4, 4))
    model.add_module("last", nn.Linear(4, 2))
    return {"model": model, "example": torch.zeros(2, 4)}

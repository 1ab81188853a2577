"""Small models that between them hold the traps of freezing. They know no test."""

import torch
import torch.nn.functional as F
from torch import nn


class Plain(nn.Module):
    """x → L1 → L2 → L3 → y, as the question that the project began with has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(6, 8), nn.Linear(8, 8)
        self.layer3 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer3(torch.tanh(self.layer2(torch.tanh(self.layer1(x)))))


class Tied(nn.Module):
    """Raw parameters on the root, a scale used as 1 + w, tied weights, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.scale = nn.Parameter(torch.zeros(8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.block(self.embedding(tokens) + self.position) * (1 + self.scale)
        x = self.shared(self.shared(x).relu_())
        return self.head(x.mean(1))


class Convolutional(nn.Module):
    """Convolutions with BatchNorm, a residual branch, dropout, and a norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.branch = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.3)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.body(x) + self.branch(x)).mean((2, 3)))


MODELS = {
    "plain": (Plain, lambda: torch.randn(4, 6)),
    "tied": (Tied, lambda: torch.randint(0, 11, (4, 5))),
    "convolutional": (Convolutional, lambda: torch.randn(4, 2, 6, 6)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model and an example, the same each time."""
    torch.manual_seed(0)
    factory, example = MODELS[name]
    return factory(), example()

"""The networks behind the ``demo:`` models. Knows no data and no training."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent


class Stem(nn.Module):
    """From one grey channel to `width` of them, at full resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images)).relu()


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut, which is a projection where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(inner)) + self.shortcut(x)).relu()


class DigitsNet(nn.Module):
    """A small residual network over 8×8 grey images: a stem, three blocks, a linear head."""

    def __init__(self, num_classes: int = 10, width: int = 14) -> None:
        super().__init__()
        self.stem = Stem(width)
        self.layer1 = ResidualBlock(width, width, stride=1)
        self.layer2 = ResidualBlock(width, 2 * width, stride=2)
        self.layer3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(features.mean((2, 3)))


class ThreeLayers(nn.Module):
    """Three linear layers and nothing between them: freeze the middle, the first still learns."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.layer1 = nn.Linear(10, 20)
        self.layer2 = nn.Linear(20, 30)
        self.layer3 = nn.Linear(30, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(x)))


class SimpleModel(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class MultiLayerModel(nn.Module):
    """Two convolutions without padding, then two linear layers; made for 6×6 images."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.fc1 = nn.Linear(32 * 2 * 2, 10)
        self.fc2 = nn.Linear(10, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv2(self.conv1(images).relu()).relu()
        return self.fc2(self.fc1(features.flatten(1)).relu())


_NETWORKS: dict[str, tuple[Callable[[int], nn.Module], int, tuple[int, ...]]] = {
    "digits": (DigitsNet, 10, (1, 8, 8)),
    "digits-shifted": (DigitsNet, 10, (1, 8, 8)),
    "three-layers": (ThreeLayers, 2, (10,)),
    "simple-model": (SimpleModel, 2, (10,)),
    "multi-layer-model": (MultiLayerModel, 2, (3, 6, 6)),
}
"""Name → network, its classes by default, the shape of one input."""


def input_shape(name: str) -> tuple[int, ...]:
    """The shape of one input of ``demo:`` model `name`, without the batch."""
    return _NETWORKS[name][2]


def weights_path(name: str) -> Path:
    """The shipped weights of a pretrained ``demo:`` model; the seeds' models have no such file."""
    return HERE / f"{name}.safetensors"


def build_network(
    name: str, *, num_classes: int | None = None, random_init: bool = False
) -> nn.Module:
    """Build a ``demo:`` model; what is not pretrained is the same random start every time.

    Args:
        name: a key of `DEMO_MODELS`.
        num_classes: outputs of the head; another number than it was pretrained with, a new head.
        random_init: leave the pretrained weights out.

    Side effects: none; the global random state is as before.
    """
    network, default_classes, _ = _NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs as well
        model = network(num_classes or default_classes)
    if weights_path(name).exists() and not random_init:
        weights = load_file(weights_path(name))
        if num_classes not in (None, default_classes):
            head = model.get_submodule("fc").state_dict()
            weights.update({f"fc.{key}": value for key, value in head.items()})
        model.load_state_dict(weights)
    return model

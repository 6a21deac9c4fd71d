"""The four networks and their data, in plain torch: float32, eval mode, always the same values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0
SEQUENCE = 32
VOCABULARY = 1000
OUTPUTS = 10


@dataclass(frozen=True)
class Workload:
    """One network and its data.

    Attributes:
        title: What it is, in a few words.
        build: A new copy of the network, in eval mode.
        draw: (n, generator) -> n examples.
    """

    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Tensor]

    def model(self) -> nn.Module:
        """A new copy of the network, always with the same values; torch's own generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.build().float().eval()

    def data(self, n: int) -> Tensor:
        """The first n examples of one fixed stream: more examples begin with the same ones."""
        generator = torch.Generator().manual_seed(SEED + 1)
        pieces = [self.draw(64, generator) for _ in range(-(-n // 64))]
        return torch.cat(pieces)[:n].clone()


# ---------------------------------------------------------------- W1


def mlp(inputs: int = 784, width: int = 2048, outputs: int = OUTPUTS) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


# ---------------------------------------------------------------- W2


def cnn(width: int = 64, outputs: int = OUTPUTS) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, outputs),
    )


# ---------------------------------------------------------------- W3


def _near_zero(values: Tensor) -> None:
    nn.init.normal_(values, std=0.1)


def _near_one(values: Tensor) -> None:
    nn.init.uniform_(values, 0.5, 1.5)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem and no max-pool, four stages of two blocks."""

    def __init__(self, width: int = 64, outputs: int = OUTPUTS) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(inputs, width * 2**stage, stride))
                inputs = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, outputs)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after training: fresh statistics would make it the identity
                for statistic, draw in ((module.running_mean, _near_zero), (module.running_var, _near_one)):
                    assert statistic is not None
                    draw(statistic)
                _near_one(module.weight)
                _near_zero(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


# ---------------------------------------------------------------- W4


class TransformerClassifier(nn.Module):
    """Tokens plus learned positions, encoder layers, the mean over the sequence, a linear head."""

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        sequence: int = SEQUENCE,
        width: int = 256,
        heads: int = 4,
        feedforward: int = 1024,
        layers: int = 4,
        outputs: int = OUTPUTS,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(sequence, width))
        self.layers = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.0, batch_first=True)
                for _ in range(layers)
            ]
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(x) + self.positions).mean(dim=1))


# ---------------------------------------------------------------- the table


def vectors(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 784, generator=generator)


def images(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=generator)


def sentences(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY, (n, SEQUENCE), generator=generator)


WORKLOADS = {
    "W1": Workload("MLP 784-2048-2048-10", mlp, vectors),
    "W2": Workload("CNN, 4 convolutions, 3x32x32", cnn, images),
    "W3": Workload("ResNet-18 for 32x32", ResNet18, images),
    "W4": Workload("transformer encoder, 4 layers, d=256", TransformerClassifier, sentences),
}

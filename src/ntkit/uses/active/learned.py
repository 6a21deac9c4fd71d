"""A strategy that learns which points the network gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.solve.losses import CrossEntropy, Loss
from ntkit.uses.active.layers import layer_inputs
from ntkit.uses.active.picks import Picked, one_after_the_other
from ntkit.uses.active.strategy import Round, Strategy


@dataclass(frozen=True)
class LearnedLoss(Strategy):
    """The points whose loss is predicted to be largest, by a small network beside the trained one (Yoo & Kweon 2019).

    It reads what comes into several layers of the network, averaged over all but the channels, each through a linear
    layer and a ReLU, and learns on the labelled points which of two has the larger loss. The paper trains it together
    with the network, whose features it leaves alone in the second half; here it comes after, since training is yours.
    Weights of labels are not looked at.

    Attributes:
        loss: that the network is trained with.
        layers: names of the modules whose inputs are read; all linear and convolution modules but the first by
            default.
        width: of the linear layers.
        steps: of Adam.
        batch_size: labelled points of a step, an even number; they are compared in pairs.
        lr: learning rate.
        margin: by which the order of a pair should be right.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    layers: Sequence[str] | None = None
    width: int = 128
    steps: int = 500
    batch_size: int = 64
    lr: float = 1e-3
    margin: float = 1.0

    def __post_init__(self) -> None:
        """Check the loss and the batch.

        Raises:
            InputError: if the loss is none, or a batch has no pair.
        """
        super().__post_init__()
        if self.batch_size < 2:
            raise InputError(
                f"labelled points are compared in pairs: got batch_size={self.batch_size}, expected 2 or more"
            )

    def choose(self, now: Round) -> Picked:
        """Cost: a forward pass, and the small network's training.

        Raises:
            InputError: if fewer than two points have labels.
            ModelError: if the network has no such layers.
        """
        known = now.labelled
        if len(known) < 2:
            raise InputError(f"losses are compared in pairs of labelled points: got {len(known)}, expected at least 2")
        outputs = now.outputs()
        losses = torch.stack([self.loss.value(outputs[i][None], now.labels[i][None]) for i in known.tolist()])
        seen = [(part - part[known].mean(0)) / part[known].std().clamp_min(1e-6) for part in self._inputs(now)]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=now.generator)))
            judge = _Judge([part.shape[1] for part in seen], self.width)
            optimizer = torch.optim.Adam(judge.parameters(), self.lr)
            for _ in range(self.steps):
                order = torch.randperm(len(known))[: self.batch_size]
                order = order[: len(order) // 2 * 2]
                said, true = judge([part[known[order]] for part in seen]), losses[order].float()
                optimizer.zero_grad()
                ranking_loss(said, true, self.margin).backward()
                optimizer.step()
        with torch.no_grad():
            scores = judge([part[now.candidates] for part in seen]).double()
        places = scores.sort(descending=True, stable=True).indices[: now.size]
        return Picked(now.candidates[places], one_after_the_other(scores, places))

    def _inputs(self, now: Round) -> list[Tensor]:
        """What comes into every layer that is read, (n, channels)."""
        parts = list(layer_inputs(now.tangent, now.x, self.layers).inputs.values())
        if self.layers is None:
            parts = parts[1:]
        if not parts:
            raise ModelError(
                "the network has fewer than two linear or convolution modules: say layers=[...], the names of modules "
                "whose inputs tell something"
            )
        return [part.float() for part in parts]


class _Judge(nn.Module):
    """From features of several layers to one number for each example."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(w, width) for w in widths)
        self.last = nn.Linear(width * len(widths), 1)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.last(torch.cat([torch.relu(r(part)) for r, part in zip(self.read, parts, strict=True)], 1))[:, 0]


def ranking_loss(said: Tensor, true: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin - sign(l_i - l_j) (s_i - s_j)) over pairs of the first and the second half (equation 2)."""
    half = len(said) // 2
    sign = torch.sign(true[:half] - true[half:])
    return (margin - sign * (said[:half] - said[half:])).clamp_min(0).mean()

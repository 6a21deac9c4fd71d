"""A strategy that learns which points the network gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.uses.active.losses import CrossEntropy, Loss
from ntkit.uses.active.picks import Picked, one_after_the_other
from ntkit.uses.active.strategy import Round, Strategy

# Examples of one forward pass.
BATCH = 256
# Modules whose inputs are read, where nothing else is said.
_LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


@dataclass(frozen=True)
class LearnedLoss(Strategy):
    """The points whose loss is predicted to be largest, by a small network beside the trained one (Yoo & Kweon 2019).

    It reads what comes into several layers of the network, averaged over all but the channels, each through a linear
    layer and a ReLU, and learns on the labelled points which of two has the larger loss. The paper trains it together
    with the network, whose features it leaves alone in the second half; here it comes after, since training is yours.

    Attributes:
        loss: that the network is trained with.
        layers: names of the modules whose inputs are read; all linear, convolution and layer normalization modules but
            the first by default.
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
        with torch.random.fork_rng(devices=[]):
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
        modules = dict(now.tangent.model.named_modules())
        if self.layers is None:
            chosen = [module for module in modules.values() if isinstance(module, _LEAVES)][1:]
        else:
            unknown = [name for name in self.layers if name not in modules]
            if unknown:
                raise ModelError(f"the network has no module {unknown[0]!r}: expected some of {', '.join(modules)}")
            chosen = [modules[name] for name in self.layers]
        if not chosen:
            raise ModelError(
                "the network has fewer than two linear, convolution or normalization modules: say layers=[...], the "
                "names of modules whose inputs tell something"
            )
        found: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[module] = _pooled(inputs[0].detach().float(), module)

        hooks = [module.register_forward_pre_hook(note) for module in chosen]
        parts: list[list[Tensor]] = []
        examples = now.tangent.examples(now.x)
        try:
            for start in range(0, len(examples), BATCH):
                stop = min(start + BATCH, len(examples))
                now.tangent.outputs(examples.pick(range(start, stop)), batch=BATCH)
                if len(found) < len(chosen) or any(len(part) != stop - start for part in found.values()):
                    raise ModelError(
                        "some of the layers are not called once for each example: say layers=[...], the names of "
                        "modules that are"
                    )
                parts.append([found[module].cpu() for module in chosen])
                found.clear()
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(column) for column in zip(*parts, strict=True)]


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


def _pooled(x: Tensor, module: nn.Module) -> Tensor:
    """Averaged over all axes but examples and channels: the second axis for convolutions, the last for others."""
    if x.ndim == 2:
        return x
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    axes = tuple(range(2, x.ndim)) if convolution else tuple(range(1, x.ndim - 1))
    return x.mean(axes)

"""Strategies that ask several networks: where they disagree, and what a label would tell about others."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.solve.losses import CrossEntropy, Loss
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import logits
from ntkit.tangent.untouched import untouched
from ntkit.uses.active.labels import as_count
from ntkit.uses.active.picks import Picked, one_after_the_other
from ntkit.uses.active.strategy import Round, Strategy

if TYPE_CHECKING:
    from typing import Any

# Examples of one forward pass; numbers in a tensor of pairs.
BATCH, MOST = 256, 2**23
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# These drop inside of one operation, by a rate and a mode of their own.
_DROP_INSIDE = (nn.MultiheadAttention, nn.RNNBase)


class Members(ABC):
    """Networks that might all be right."""

    @abstractmethod
    def outputs(self, now: Round) -> Tensor:
        """Logits of every member at every point, (members, n, C), float64."""


@dataclass(frozen=True)
class Dropout(Members):
    """A copy of the network with its dropout switched on, several times (Gal & Ghahramani 2016).

    Dropout is that of torch's modules, attention and recurrent layers included; all else stays in evaluation mode.

    Attributes:
        samples: how many times, two or more.
    """

    samples: int = 20

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not two or more: one network does not disagree.
        """
        as_count(self.samples, "samples", 2)

    def outputs(self, now: Round) -> Tensor:
        """Cost: `samples` forward passes.

        Raises:
            ModelError: if the network has no dropout, or none that its outputs depend on.
        """
        model = copy.deepcopy(now.tangent.model)
        drops = [module for module in model.modules() if _rate(module) > 0]
        if not drops:
            raise ModelError("the network has no dropout to draw from: use Ensemble([...]) of networks trained apart")
        for module in drops:
            module.training = True  # this flag alone: a BatchNorm inside of it stays as it is
        seed = int(torch.randint(2**62, (1,), generator=now.generator))
        # without torch's fused attention, which knows no dropout
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), untouched(model):
            torch.manual_seed(seed)
            found = torch.stack([_outputs(model, now) for _ in range(self.samples)])
        if bool((found == found[0]).all()):
            raise ModelError(
                f"dropout changes nothing in the network's outputs: {self.samples} draws are all the same. Use "
                "Ensemble([...]) of networks trained apart"
            )
        return found


@dataclass(frozen=True, eq=False)
class Ensemble(Members):
    """Networks trained apart, in evaluation mode.

    Attributes:
        models: two or more, with the same outputs as the network that is asked about.
    """

    models: Sequence[nn.Module]

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if there are fewer than two.
        """
        if len(self.models) < 2:
            raise InputError(f"an ensemble has two networks or more: got {len(self.models)}")

    def outputs(self, now: Round) -> Tensor:
        """Cost: a forward pass of each; they are not changed.

        Raises:
            InputError: if they have not the same number of outputs as the network.
            ModelError: if one is in training mode, or its outputs are not finite.
        """
        readout, count = now.tangent.readout, now.outputs().shape[1]
        found = []
        for k, model in enumerate(self.models):
            member = linearize(model, readout=readout, parameters=lambda *_: True)  # frozen ones, too
            found.append(member.outputs(now.x, batch=BATCH).cpu().double())
            if found[-1].shape[1] != count:
                raise InputError(f"member {k} of the ensemble has {found[-1].shape[1]} outputs, the network {count}")
        return torch.stack(found)


@dataclass(frozen=True)
class BALD(Strategy):
    """What a label would tell about which member is right: H(mean p) - mean H(p), one by one (Houlsby et al. 2011).

    Attributes:
        members: the networks.
        loss: what their outputs say about the classes.
    """

    members: Members = field(default_factory=Dropout)
    loss: Loss = field(default_factory=CrossEntropy)

    def choose(self, now: Round) -> Picked:  # noqa: D102
        p = _probabilities(self, now)[:, now.candidates]
        scores = torch.special.entr(p.mean(0)).sum(1) - torch.special.entr(p).sum(2).mean(0)
        places = scores.sort(descending=True, stable=True).indices[: now.size]
        return Picked(now.candidates[places], one_after_the_other(scores, places))


@dataclass(frozen=True)
class EPIG(Strategy):
    """What a label would tell about the labels of other points, one by one (Bickford Smith et al. 2023, equation 5).

    Attributes:
        members: the networks.
        loss: what their outputs say about the classes.
        target_size: so many points without a label are drawn as those others.
    """

    members: Members = field(default_factory=Dropout)
    loss: Loss = field(default_factory=CrossEntropy)
    target_size: int = 200

    def __post_init__(self) -> None:
        """Check the loss and the number.

        Raises:
            InputError: if the loss is none, or there are no targets.
        """
        super().__post_init__()
        as_count(self.target_size, "target_size")

    def choose(self, now: Round) -> Picked:
        """Cost: candidates x targets x C^2 for each member."""
        p = _probabilities(self, now)
        pool = (now.labels < 0).nonzero()[:, 0]
        drawn = torch.randperm(len(pool), generator=now.generator)[: self.target_size]
        theirs = p[:, pool[drawn].sort().values]
        apart = torch.special.entr(theirs.mean(0)).sum(1)
        found = []
        for some in now.candidates.split(max(1, MOST // (theirs.shape[1] * p.shape[2] ** 2))):
            mine = p[:, some]
            joint = torch.einsum("snc,smd->nmcd", mine, theirs) / len(p)
            together = torch.special.entr(joint).sum((2, 3))
            found.append((torch.special.entr(mine.mean(0)).sum(1)[:, None] + apart - together).mean(1))
        scores = torch.cat(found)
        places = scores.sort(descending=True, stable=True).indices[: now.size]
        return Picked(now.candidates[places], one_after_the_other(scores, places))


def _rate(module: nn.Module) -> float:
    """With which a module drops what comes into it, or something inside of it."""
    if isinstance(module, _DROPS):
        return module.p
    return module.dropout if isinstance(module, _DROP_INSIDE) else 0.0


def _probabilities(strategy: BALD | EPIG, now: Round) -> Tensor:
    """(members, n, C)."""
    outputs = strategy.members.outputs(now)
    if not bool(outputs.isfinite().all()):
        raise InputError("a member of the ensemble gives outputs that are not finite (NaN or infinity)")
    return strategy.loss.probabilities(outputs.flatten(0, 1)).view_as(outputs)


def _outputs(model: nn.Module, now: Round) -> Tensor:
    examples, parts = now.tangent.examples(now.x), []
    select: Any = getattr(now.tangent.readout, "select", None)
    with torch.no_grad():
        for start in range(0, len(examples), BATCH):
            some = examples.batch(slice(start, start + BATCH), now.tangent.device)
            parts.append(logits(some.call(model), select).cpu().double())
    return torch.cat(parts)

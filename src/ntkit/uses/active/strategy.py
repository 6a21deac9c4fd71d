"""The question every strategy answers, in scikit-activeml's words: which points should be labelled next?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from ntkit.errors import InputError
from ntkit.solve.losses import CrossEntropy, Loss, as_loss
from ntkit.tangent.linearize import Tangent, linearize
from ntkit.tangent.readout import Logits
from ntkit.uses.active.geometry import Geometry, WithOutputs
from ntkit.uses.active.labels import as_candidates, as_count, as_labels, as_weights, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ntkit.kernel.base import Kernel
    from ntkit.uses.active.picks import Picked


@dataclass(frozen=True)
class Round:
    """What is known when points are to be chosen.

    Attributes:
        tangent: the network with all its logits.
        x: all n points.
        labels: their classes, (n,); -1 where there is none.
        weights: of the labels in the loss, (n,).
        candidates: numbers of the points that may be chosen, in rising order.
        size: how many.
        generator: for what is drawn.
        loss: that the network is trained with, as far as the strategy knows it.
    """

    tangent: Tangent
    x: Any
    labels: Tensor
    weights: Tensor
    candidates: Tensor
    size: int
    generator: torch.Generator
    loss: Loss = field(default_factory=CrossEntropy)

    @property
    def labelled(self) -> Tensor:
        """Numbers of the points with labels."""
        return (self.labels >= 0).nonzero()[:, 0]

    def outputs(self) -> Tensor:
        """The network's logits, (n, C), float64; computed once.

        Raises:
            InputError: if a label is none of its classes, or there is one class alone.
            ModelError: if an output is not finite.
        """
        outputs = self._outputs
        if outputs.shape[1] < 2:
            raise InputError(
                "the network has one output, expected one for each class: with a single logit z for two classes, "
                "return (0, z) for each point"
            )
        if int(self.labels.max()) >= outputs.shape[1]:
            raise InputError(
                f"labels are classes from 0 to {outputs.shape[1] - 1}, one for each of the network's "
                f"{outputs.shape[1]} outputs: got {int(self.labels.max())}"
            )
        return outputs

    def utilities(self, picked: Picked) -> np.ndarray:
        """The scores of a batch for all points, (size, n), NaN for those that could not be chosen then."""
        every = np.full((len(picked.numbers), len(self.labels)), np.nan)
        found = picked.utilities.numpy()
        every[:, self.candidates.numpy()] = np.where(np.isneginf(found), np.nan, found)
        return every

    def kernel(self, geometry: Geometry) -> Kernel:
        """The kernel of all points.

        Raises:
            InputError: if the points do not fit, or what is to make the kernel is something else.
            ModelError: if the network has not what the kernel needs.
        """
        require_kernel(geometry)
        found = geometry.of(self.tangent, self.x)
        if isinstance(found, WithOutputs):  # one forward pass is enough
            vars(self).setdefault("_outputs", found.outputs.double())
        return found

    @cached_property
    def _outputs(self) -> Tensor:
        return self.tangent.outputs(self.x).detach().cpu().double()


def require(name: str, value: Any, kind: type, expected: str) -> None:
    """What a strategy is made of are objects.

    Raises:
        InputError: if it is a name, a class, or an object of another kind.
    """
    if isinstance(value, kind):
        return
    got = repr(value) if isinstance(value, str) else type(value).__name__
    if isinstance(value, type):
        got = f"the class {value.__name__}, not an object of it"
    raise InputError(f"{name}: got {got}; expected an object such as {expected}")


def require_kernel(value: Any) -> None:
    """The kernel of a strategy is an object that makes one.

    Raises:
        InputError: if it is something else.
    """
    require("kernel", value, Geometry, "Hidden(), LastLayer(), Sketched(1024), Exact(), or Given(...) with your own")


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Chooses points. Subclasses say how in `choose`.

    Attributes:
        select: takes the (n, C) logits out of the model's output, if it is not a tensor.
        missing_label: what stands in y where there is no label.
        random_state: seed of all draws; the same labels then lead to the same choice.
    """

    select: Any = None
    missing_label: float | None = float("nan")
    random_state: int = 0

    def __post_init__(self) -> None:
        """Take torch's loss for ours, where a strategy has one.

        Raises:
            InputError: if it is neither.
        """
        loss = getattr(self, "loss", None)
        if loss is not None:
            object.__setattr__(self, "loss", as_loss(loss))

    @abstractmethod
    def choose(self, now: Round) -> Picked:
        """Choose `now.size` of `now.candidates`.

        Raises:
            InputError: if the points or the network's outputs cannot be used.
            ModelError: if the network has not what the strategy needs.
        """

    @overload
    def query(
        self, X: Any, y: Any, model: nn.Module, candidates: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 1, sample_weight: Any = None, return_utilities: Literal[False] = False,
    ) -> np.ndarray: ...  # fmt: skip

    @overload
    def query(
        self, X: Any, y: Any, model: nn.Module, candidates: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 1, sample_weight: Any = None, *, return_utilities: Literal[True],
    ) -> tuple[np.ndarray, np.ndarray]: ...  # fmt: skip

    def query(
        self,
        X: Any,
        y: Any,
        model: nn.Module,
        candidates: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 1,
        sample_weight: Any = None,
        return_utilities: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Numbers of the points to be labelled next, best first.

        Args:
            X: all n points, with and without labels, as the model takes them.
            y: n classes, with `missing_label` where there is none.
            model: the network, trained on the labels so far, in evaluation mode; it is not changed.
            candidates: numbers of the points that may be chosen; all without a label by default.
            batch_size: how many.
            sample_weight: n weights of the labels in the loss; 1 by default. They count where labels leave a posterior:
                for look-aheads, `Bait`, and designs with a `sigma`. Other strategies do not look at them.
            return_utilities: give the scores as well, (batch_size, n), NaN for points that could not be chosen then.

        Raises:
            InputError: if anything does not fit: more asked for than there are candidates, labels out of range, outputs
                that are not finite.
            ModelError: if the network has not what the strategy needs.
        """
        now = self.round(X, y, model, candidates, batch_size, sample_weight)
        picked = self.choose(now)
        return (picked.numbers.numpy(), now.utilities(picked)) if return_utilities else picked.numbers.numpy()

    def round(
        self,
        X: Any,
        y: Any,
        model: nn.Module,
        candidates: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 1,
        sample_weight: Any = None,
    ) -> Round:
        """What `query` is asked, checked and in the form that `choose` takes.

        Raises:
            InputError: if anything does not fit.
        """
        size = as_count(batch_size, "batch_size")
        tangent = linearize(model, readout=Logits(self.select))
        n = len(tangent.examples(X))
        labels = as_labels(y, n, self.missing_label)
        numbers = as_candidates(candidates, labels, size)
        weights = torch.ones(n, dtype=torch.float64) if sample_weight is None else as_weights(sample_weight, n)
        generator = torch.Generator().manual_seed(draw(self.random_state, labels))
        return Round(tangent, X, labels, weights, numbers, size, generator, as_loss(getattr(self, "loss", None)))

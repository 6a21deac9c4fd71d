"""Witness functions: trained on one half of two samples, large where the first is likelier than the second."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.explicit import FeatureFunction
from ntkit.kernel.function import KernelFunction
from ntkit.tangent.linearize import Tangent, linearize
from ntkit.tangent.readout import Readout, SumOfLogits
from ntkit.uses.twosample.pool import feature_rows, finite

if TYPE_CHECKING:
    from ntkit.tangent.examples import Examples
    from ntkit.tangent.parameters import Choice


class Witness(ABC):
    """A way to a function whose mean differs between two samples."""

    @property
    @abstractmethod
    def name(self) -> str:
        """In words."""

    @abstractmethod
    def __call__(
        self, pooled: Examples, signs: Tensor, train: list[int], at: list[int], generator: torch.Generator
    ) -> Tensor:
        """Values of the witness.

        Args:
            pooled: both samples.
            signs: of the training examples: 1 for those of x, and -n/m for those of y, so that they add up to 0.
            train: numbers of the training examples.
            at: numbers of the others, where the values are wanted.
            generator: for what is random.
        """


@dataclass(frozen=True)
class ZeroTime(Witness):
    """What a pass of training would do to the outputs of a network, to first order: sum_i sign_i K(., x_i), exactly.

    K is the tangent kernel at the present parameters, which is never formed: one vector-Jacobian product over the
    training half, one Jacobian-vector product for each other example. Cheng and Xie 2021, equation 8.

    Attributes:
        model: any module in evaluation mode.
        readout: one scalar per example; the scaled sum of the outputs by default.
        parameters: which of them are trained, as in `linearize`; all that require gradients by default.
    """

    model: nn.Module
    readout: Readout | None = None
    parameters: Choice | None = None

    @property
    def name(self) -> str:  # noqa: D102
        return "NTK-MMD at time zero"

    def __call__(  # noqa: D102
        self, pooled: Examples, signs: Tensor, train: list[int], at: list[int], generator: torch.Generator
    ) -> Tensor:
        tangent = one_scalar(self.model, self.readout, self.parameters, pooled)
        direction = tangent.vjp(pooled.pick(train), signs[:, None].to(tangent.dtype))
        return tangent.jvp(pooled.pick(at), direction)[:, 0].double().cpu()


@dataclass(frozen=True)
class OnlineTraining(Witness):
    """The change of a network's output in one pass of online SGD, over the learning rate. Linear time, one pass.

    The loss is -f(x) for the first sample and +f(y) for the second, times n/m where the samples are of different sizes.
    Cheng and Xie 2021, algorithm 1. A copy of the network is trained, in evaluation mode (no dropout, running
    statistics).

    Attributes:
        model: any module in evaluation mode.
        learning_rate: small enough that the network stays near its tangent; then the witness is that of `ZeroTime`.
        batch_size: examples of one step, whose losses are summed.
        readout: one scalar per example; the scaled sum of the outputs by default.
        parameters: which of them are trained, as in `linearize`; all that require gradients by default.
    """

    model: nn.Module
    learning_rate: float = 1e-3
    batch_size: int = 1
    readout: Readout | None = None
    parameters: Choice | None = None

    @property
    def name(self) -> str:  # noqa: D102
        return "NTK-MMD by one pass of training"

    def __call__(
        self, pooled: Examples, signs: Tensor, train: list[int], at: list[int], generator: torch.Generator
    ) -> Tensor:
        """Cost: a forward and a backward pass for each training example, two forward passes for each other.

        Raises:
            InputError: if the rate or the batch is no positive number, or the read-out has not one scalar.
            ModelError: if training diverges.
        """
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"the learning rate is a positive number: got {self.learning_rate!r}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"a batch holds a positive whole number of examples: got {self.batch_size!r}")
        before = one_scalar(self.model, self.readout, self.parameters, pooled)
        names = set(before.parameter_names)
        after = linearize(
            copy.deepcopy(self.model), readout=before.readout, parameters=lambda name, _: name in names
        )  # fmt: skip
        rest = pooled.pick(at)
        start = before.outputs(rest)
        order = torch.randperm(len(train), generator=generator, device=generator.device).tolist()
        moved = after.selection.tensors
        for first in range(0, len(train), self.batch_size):
            some = order[first : first + self.batch_size]
            batch = pooled.batch([train[i] for i in some], after.device)
            with after.selection.differentiable():
                values = after.readout.scalars(batch.call(after.model))[:, 0]
                gain = (values * signs[some].to(values)).sum()
                steps = torch.autograd.grad(gain, moved, allow_unused=True)
            with torch.no_grad():
                for parameter, step in zip(moved, steps, strict=True):
                    if step is not None:
                        parameter.add_(step, alpha=self.learning_rate)
        change = (after.outputs(rest) - start)[:, 0].double().cpu() / self.learning_rate
        if not bool(change.isfinite().all()):
            raise ModelError("training made the network's outputs NaN or infinite: take a smaller learning rate")
        return change


@dataclass(frozen=True)
class KernelWitness(Witness):
    """The same with any kernel, sum_i sign_i k(., x_i). Cost: n_train n_test values of it; n D with features.

    Attributes:
        kernel: a `KernelFunction`, with features or without.
    """

    kernel: KernelFunction

    @property
    def name(self) -> str:  # noqa: D102
        return "MMD by a kernel's witness"

    def __call__(
        self, pooled: Examples, signs: Tensor, train: list[int], at: list[int], generator: torch.Generator
    ) -> Tensor:
        """Values of the witness.

        Raises:
            InputError: if the kernel has not one value for each pair of examples, or is no kernel.
        """
        if isinstance(self.kernel, FeatureFunction):
            phi = feature_rows(self.kernel, pooled)
            return (phi[at] @ (phi[train].T @ signs.to(phi))).cpu()
        if not isinstance(self.kernel, KernelFunction):
            raise InputError(f"kernel is a KernelFunction such as RBF() or Features(map): got {self.kernel!r}")
        kernel = self.kernel(pooled.pick(at), pooled.pick(train))
        if kernel.shape != (len(at), len(train)):
            raise InputError(
                f"a witness needs one kernel value for each pair of {len(at)} and {len(train)} examples: got a matrix "
                f"of shape {kernel.shape}. Take SumOfLogits() as read-out, or Empirical(..., trace=True)"
            )
        return finite((kernel @ signs.to(kernel.device)).detach().double().cpu())


def one_scalar(model: nn.Module, readout: Readout | None, parameters: Choice | None, examples: Examples) -> Tangent:
    """The network with its read-out.

    Raises:
        InputError: if that is not one scalar per example.
    """
    tangent = linearize(model, readout=SumOfLogits() if readout is None else readout, parameters=parameters)
    scalars = tangent.outputs(examples.pick([0])).shape[1]
    if scalars != 1:
        raise InputError(
            f"a witness is one number for each example: the read-out gives {scalars}. Take SumOfLogits(), "
            "SingleLogit(c) or RandomLogits(1, generator)"
        )
    return tangent

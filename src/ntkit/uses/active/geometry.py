"""Which kernel a look-ahead goes by: features of a network, or a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import Kernel
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.features import FeatureKernel, FeatureMap
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, Readout
from ntkit.tangent.sketch import Sketch
from ntkit.tangent.untouched import untouched
from ntkit.uses.active.layers import incoming, layer_inputs
from ntkit.uses.active.posterior import FeaturePosterior, KernelPosterior, Posterior

if TYPE_CHECKING:
    from ntkit.tangent.linearize import Tangent

# A ridge below this part of the kernel's diagonal is lost in rounding.
LEAST = 1e-6
# Examples of one forward pass.
BATCH = 256


class Geometry(ABC):
    """Makes the kernel of points, or their features."""

    @abstractmethod
    def of(self, tangent: Tangent, x: Any) -> Kernel:
        """The kernel of the points: `FeatureKernel` where there are features; n rows, or n*C that couple the outputs.

        Args:
            tangent: the network with all its logits.
            x: the n points.

        Raises:
            InputError: if the points, or what was given for them, do not fit.
            ModelError: if the network does not have what is asked for.
        """


@dataclass(frozen=True)
class LastLayer(Geometry):
    """What comes into the last linear layer, and 1 for its bias: the exact kernel of that layer's parameters.

    Cost: a forward pass. On small networks as good as the whole kernel for cross-entropy, at a tenth of the time.
    """

    def of(self, tangent: Tangent, x: Any) -> Kernel:  # noqa: D102
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(module: nn.Linear, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            seen[:] = [(module, incoming(inputs, named).detach(), output.detach())]

        linear = [module for module in tangent.model.modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_hook(note, with_kwargs=True) for module in linear]
        examples, parts, outs = tangent.examples(x), [], []
        try:
            for start in range(0, len(examples), BATCH):
                stop = min(start + BATCH, len(examples))
                outputs = tangent.outputs(examples.pick(range(start, stop)), batch=BATCH)
                if not seen or not torch.equal(seen[0][2].reshape(len(seen[0][2]), -1), outputs):
                    raise ModelError(
                        "the network's outputs are not those of an nn.Linear, so that it has no last layer here: use "
                        "Sketched(...), or Given(...) with features of your own"
                    )
                layer, hidden, said = seen[0]
                outs.append(said.reshape(len(said), -1).cpu())
                bias = [] if layer.bias is None else [hidden.new_ones(len(hidden), 1)]
                parts.append(torch.cat([hidden.reshape(len(hidden), -1), *bias], 1).cpu())
        finally:
            for hook in hooks:
                hook.remove()
        return WithOutputs(torch.cat(parts), torch.cat(outs))


@dataclass(frozen=True)
class Hidden(Geometry):
    """What comes into the last layers, side by side, each scaled to a mean square of 1, and 1 for biases.

    The tangent kernel of a layer's parameters is (a^T a') (g^T g') with inputs a and backward signals g. Here the
    signals are taken for equal: what is left is as cheap as the last layer alone, and served better (measured).
    Convolutions count by the mean of their inputs over places.

    Attributes:
        depth: so many linear and convolution modules, the last that are called.
        layers: names of modules instead.
    """

    depth: int = 2
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not positive.
        """
        if self.depth < 1:
            raise InputError(f"depth is a number of layers: got {self.depth!r}, expected a positive one")

    def of(self, tangent: Tangent, x: Any) -> Kernel:
        """Cost: a forward pass.

        Raises:
            ModelError: if the network has no such layers, or nothing comes into them.
        """
        seen = layer_inputs(tangent, x, self.layers, 0 if self.layers is not None else self.depth)
        sizes = [float(part.norm(dtype=torch.float64)) / len(part) ** 0.5 for part in seen.inputs.values()]
        parts = [(part, size) for part, size in zip(seen.inputs.values(), sizes, strict=True) if size > 0]
        if not parts:
            raise ModelError(
                "nothing comes into the network's last linear and convolution modules: use Sketched(...), or "
                "Given(...) with features of your own"
            )
        dtype = reduce(torch.promote_types, (part.dtype for part, _ in parts))
        features = torch.ones(len(seen.outputs), sum(part.shape[1] for part, _ in parts) + 1, dtype=dtype)
        start = 0
        for part, size in parts:
            torch.div(part, size, out=features[:, start : start + part.shape[1]])
            start += part.shape[1]
        return WithOutputs(features, seen.outputs)


class WithOutputs(FeatureKernel):
    """Features of points, from a pass that has seen the network's outputs as well.

    Attributes:
        outputs: (n, C).
    """

    def __init__(self, features: Tensor, outputs: Tensor) -> None:
        """Keep both."""
        super().__init__(features)
        self.outputs = outputs


@dataclass(frozen=True)
class Sketched(Geometry):
    """Sketched features of the whole network's kernel.

    Attributes:
        size: D.
        seed: of the random map.
        readout: which outputs are differentiated; with all logits, those that the strategy's `select` takes, their
            mean: the trace kernel.
        coupled: keep one row for each output instead, the full kernel.
    """

    size: int = 1024
    seed: int = 0
    readout: Readout = field(default_factory=Logits)
    coupled: bool = False

    def of(self, tangent: Tangent, x: Any) -> Kernel:  # noqa: D102
        some = linearize(tangent.model, readout=_of_all_logits(self.readout, tangent))
        features = FeatureMap(some, Sketch(self.size, self.seed, trace=not self.coupled))(x)
        kernel = FeatureKernel(features)
        kernel.scalars = len(features) // len(tangent.examples(x))
        return kernel


@dataclass(frozen=True)
class Exact(Geometry):
    """The whole network's exact kernel: n^2 numbers, or (n*C)^2 that couple the outputs.

    Attributes:
        readout: which outputs are differentiated; with all logits, those that the strategy's `select` takes, their
            mean: the trace kernel.
        coupled: the full kernel instead.
    """

    readout: Readout = field(default_factory=Logits)
    coupled: bool = False

    def of(self, tangent: Tangent, x: Any) -> Kernel:  # noqa: D102
        some = linearize(tangent.model, readout=_of_all_logits(self.readout, tangent))
        return TangentKernel(some, x, trace=not self.coupled)


@dataclass(frozen=True, eq=False)
class Given(Geometry):
    """A kernel of your own: a matrix, features, or a function that makes one of them from (model, x).

    Attributes:
        what: a `Kernel`, with `FeatureKernel(...)` for features in memory or on disk; or a function.
    """

    what: Kernel | Callable[[nn.Module, Any], Kernel]

    def __post_init__(self) -> None:
        """Check what is given.

        Raises:
            InputError: if it is neither a kernel nor a function.
        """
        if not callable(self.what):
            _as_kernel(self.what, "Given takes a Kernel, or a function that makes one")

    def of(self, tangent: Tangent, x: Any) -> Kernel:  # noqa: D102
        if isinstance(self.what, Kernel):
            return self.what
        with untouched(tangent.model), torch.no_grad():
            found = self.what(tangent.model, x)
        return _as_kernel(found, "a function for Given makes a Kernel")


def _as_kernel(found: Any, expected: str) -> Kernel:
    """A kernel as it is.

    Raises:
        InputError: if it is something else.
    """
    if isinstance(found, Kernel):
        return found
    raise InputError(
        f"{expected}: got {type(found).__name__}. Wrap features (n, D) as FeatureKernel(features), a matrix as "
        "DenseKernel(matrix)"
    )


def _of_all_logits(readout: Readout, tangent: Tangent) -> Readout:
    """The strategy knows best where the logits are, if nothing else was said."""
    return tangent.readout if readout == Logits() else readout


def posterior(kernel: Kernel, labelled: Tensor, precision: Tensor, weights: Tensor, ridge: float) -> Posterior:
    """In the form that suits the kernel: by features where there are some.

    Raises:
        InputError: if the kernel has not the right number of rows.
    """
    n, c = precision.shape[:2]
    if kernel.shape != (n * c, n * c):
        raise InputError(f"a kernel of {n} points and blocks of {c} has {n * c} rows and columns: got {kernel.shape}")
    if isinstance(kernel, FeatureKernel):
        return FeaturePosterior(kernel, labelled, precision, weights, ridge)
    return KernelPosterior(kernel.dense().cpu(), labelled, precision, weights, ridge)


def scale(kernel: Kernel, labelled: Tensor, precision: Tensor) -> float:
    """The mean diagonal entry of labelled points, times their mean precision; of all points where there are none.

    Raises:
        InputError: if the diagonal is zero.
    """
    n, c = precision.shape[:2]
    numbers = labelled if len(labelled) else torch.arange(n)
    rows = (numbers[:, None] * c + torch.arange(c)).reshape(-1)
    mean = float(kernel.diagonal().double()[rows].mean())
    if not mean > 0:
        raise InputError(f"the kernel's mean diagonal entry is {mean!r}: the points have no features")
    certain = float(precision[numbers].diagonal(dim1=1, dim2=2).mean())
    return mean * max(certain, LEAST)

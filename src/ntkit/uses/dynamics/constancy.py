"""How constant the kernel is: networks of several widths, really trained, beside the flow of their first kernel.

With width the kernel moves less in training, and the network comes nearer to its linearisation: the gap falls like
1/sqrt(width) or faster (Lee et al. 2019; Yang and Littwin 2021).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.course import GradientDescent
from ntkit.solve.flow import KernelFlow
from ntkit.solve.regression import as_targets
from ntkit.solve.spectrum import drift
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import logits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Trained:
    """One network beside the flow of its first kernel.

    Attributes:
        width: of the network.
        seed: of its weights.
        drift: ||K_T - K_0|| / ||K_0|| on the training examples, Frobenius, full kernels.
        gap: ||f_T - flow_T|| / ||f_T - f_0|| on the test examples.
        learning_rate: that both were trained with.
    """

    width: int
    seed: int
    drift: float
    gap: float
    learning_rate: float


@dataclass(frozen=True)
class Constancy:
    """Networks of several widths.

    Attributes:
        networks: one for each width and seed.
        drift_slope: of log drift against log width, least squares through all.
        gap_slope: of log gap.
    """

    networks: tuple[Trained, ...]
    drift_slope: float
    gap_slope: float


def constancy(
    network: Callable[[int], nn.Module],
    widths: Sequence[int],
    train: tuple[Any, Tensor],
    test: Any,
    *,
    generator: torch.Generator,
    steps: int = 100,
    rate: float = 0.5,
    seeds: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Constancy:
    """Train networks by full-batch gradient descent on the square loss, and compare them with their first kernel.

    Args:
        network: makes a new one of a width; what it draws follows torch's seed, which is set from `generator`.
        widths: at least two.
        train: (x, y): N examples with targets (N, C), or (N,) for one output.
        test: other examples.
        generator: of seeds.
        steps: of gradient descent.
        rate: the learning rate, in parts of the largest at which the first kernel's flow converges.
        seeds: networks of each width.
        progress: called with (networks done, networks in all).

    Cost: for each network an N*C x N*C kernel twice, its eigendecomposition, and `steps` full-batch steps.

    Raises:
        InputError: if there are fewer than two widths, numbers are out of range, or targets do not fit the outputs.
    """
    if len(set(widths)) < 2 or min(widths) < 1:
        raise InputError(f"a slope needs two widths or more: got {list(widths)}")
    if steps < 1 or seeds < 1 or not 0 < rate < 1:
        raise InputError(f"steps and seeds are positive and 0 < rate < 1: got {steps}, {seeds} and {rate}")
    found: list[Trained] = []
    for width in widths:
        for _ in range(seeds):
            seed = int(torch.randint(2**31, (1,), generator=generator).item())
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = network(width).eval()
            found.append(_trained(model, width, seed, train, test, steps, rate))
            if progress is not None:
                progress(len(found), len(widths) * seeds)
    logs = np.log([one.width for one in found])
    return Constancy(
        tuple(found),
        *(float(np.polyfit(logs, np.log([getattr(one, name) for one in found]), 1)[0]) for name in ("drift", "gap")),
    )


def _trained(
    model: nn.Module, width: int, seed: int, train: tuple[Any, Tensor], test: Any, steps: int, rate: float
) -> Trained:
    tangent = linearize(model)
    x, before, prior = train[0], tangent.outputs(train[0]), tangent.outputs(test)
    y = as_targets(train[1], "targets", tuple(before.shape))
    first, cross = TangentKernel(tangent, x).dense(), TangentKernel(tangent, test, x).dense()
    flow = KernelFlow.decompose(first, y, prior=before)
    step = rate * flow.largest_learning_rate()
    course = GradientDescent(steps, step)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=step)
    examples, wanted = tangent.examples(x).batch(slice(None), tangent.device), y.to(before)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (logits(examples.call(twin), None) - wanted).square().sum() / len(y)).backward()
        optimizer.step()
    after = linearize(twin)
    outputs = after.outputs(test).double()
    expected = flow.predict(cross, course, prior).to(outputs)
    return Trained(
        width=width,
        seed=seed,
        drift=drift(first, TangentKernel(after, x).dense()).relative_change,
        gap=float((outputs - expected).norm() / (outputs - prior).norm()),
        learning_rate=step,
    )

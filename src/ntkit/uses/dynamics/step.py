"""One step of training, taken apart: what an update on some examples does to the predictions of others.

    logits             z_{t+1} - z_t         = -lr K G                    + O(lr^2)
    probabilities      q_{t+1} - q_t         = -lr A K G                  + O(lr^2)     A = diag(q) - q q^T
    log-probabilities  log q_{t+1} - log q_t = -lr (I - 1 q^T) K G        + O(lr^2)

G is the gradient of the loss at the logits of the update (how much there is to learn, and in which direction), K the
tangent kernel between the observed and the updated examples (how alike they are to the network), A what the softmax
lets through (nothing, where it is sure). Ren, Guo and Sutherland 2022; Ren and Sutherland 2025 for sequences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.losses import CrossEntropy, Loss, as_loss, require_classes
from ntkit.tangent.linearize import Tangent, linearize
from ntkit.tangent.readout import Readout
from ntkit.tangent.untouched import untouched
from ntkit.uses.dynamics.looking import call
from ntkit.uses.dynamics.optimizers import displacement

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ntkit.tangent.readout import Select

# Targets that stand for no target, as everywhere in PyTorch.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Change:
    """What was to change, and what changed.

    Attributes:
        predicted: to first order in the learning rate.
        actual: after the step was really taken, on a copy of the network.
    """

    predicted: Tensor
    actual: Tensor

    @property
    def gap(self) -> float:
        """||actual - predicted|| / ||actual||; infinite where nothing changed but something was predicted."""
        away, size = float((self.actual - self.predicted).norm()), float(self.actual.norm())
        return away / size if size else (float("inf") if away else 0.0)


@dataclass(frozen=True, eq=False)
class Step:
    """One update taken apart. M observed examples, N updated ones; with sequences each has T positions in a row.

    Attributes:
        outputs: logits of the observed examples before, (M, C) or (M, T, C).
        probabilities: q, of the same shape.
        A: what the softmax lets through, (M, C, C) or (M, T, C, C); the identity for the square loss.
        G: gradient of the trained loss at the logits of the update, weights and mean included, (N, C) or (N, T, C).
        K: the tangent kernel (M*C, N*C), or with positions (M*T*C, N*T*C), times what the optimiser makes of each
            parameter's gradient over the learning rate (1 for SGD); None if it was not asked for.
        logits: their change.
        in_probability: the change of probabilities, or for the square loss of outputs.
        in_log_probability: the change of log-probabilities; None for the square loss.
        past: the part of the predicted change of logits that is not this gradient's, but that of momentum and weight
            decay; zero for plain SGD.
        learning_rate: of the first group of parameters.
    """

    outputs: Tensor
    probabilities: Tensor
    A: Tensor
    G: Tensor
    K: Tensor | None
    logits: Change
    in_probability: Change
    in_log_probability: Change | None
    past: Tensor
    learning_rate: float

    def __str__(self) -> str:
        """In words."""
        size = self.in_probability
        parts = [
            f"one step with learning rate {self.learning_rate:g} on {len(self.G)} examples, seen at {len(self.A)}: "
            f"predictions change by {float(size.actual.norm()):.3g} (predicted {float(size.predicted.norm()):.3g}, "
            f"gap {100 * size.gap:.2g}%)",
            f"mean trace of A {float(self.A.diagonal(dim1=-2, dim2=-1).sum(-1).mean()):.3g}",
            f"norm of G {float(self.G.norm()):.3g}",
        ]
        if self.K is not None:
            parts.append(f"norm of K {float(self.K.norm()):.3g}")
        return "; ".join(parts)


@dataclass(frozen=True)
class AllPositions(Readout):
    """All logits at all positions, K = T*C: (N, T, C) and (N, C) outputs alike.

    Attributes:
        select: takes the logits out of the model's output.
    """

    select: Select | None = None

    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The logits, flat: (N, K).

        Raises:
            InputError: if the output is no such tensor.
        """
        return logits_of(output, self.select).flatten(1)


def logits_of(output: Any, select: Select | None) -> Tensor:
    """The logits among a model's output, (N, C) or (N, T, C).

    Raises:
        InputError: if there are none.
    """
    chosen = output if select is None else select(output)
    if isinstance(chosen, Tensor) and chosen.ndim in (2, 3) and chosen.is_floating_point():
        return chosen
    got = f"a tensor of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
    raise InputError(
        f"logits are a floating point tensor of shape (N, C), or (N, T, C) for sequences: got {got}. Say where they "
        "are, for example select=lambda output: output.logits"
    )


def one_step(
    model: nn.Module,
    update: tuple[Any, Tensor],
    observe: Any,
    optimizer: Optimizer | float,
    *,
    loss: Loss | nn.CrossEntropyLoss | None = None,
    weights: Tensor | None = None,
    mean: bool = True,
    matrices: bool = False,
    select: Select | None = None,
) -> Step:
    """Predict what one update does, take it on a copy, and compare. The model and the optimiser are not changed.

    Args:
        model: in evaluation mode.
        update: (x, y): the examples of the update with classes (N,), soft targets (N, C), or for sequences classes
            (N, T) or (N, T, C): the target of the logits at the same position (a language model's are shifted by one),
            -100 where there is none.
        observe: x of the M observed examples.
        optimizer: a learning rate for plain SGD; or the `torch.optim` SGD, Adam or AdamW that trains the model, with
            its momentum as it is.
        loss: cross-entropy by default; `SquareLoss()`, one of your own, or a plain `nn.CrossEntropyLoss()`.
        weights: of the examples (N,) or positions (N, T); negative to climb the loss, as preference tuning does with
            answers that are to be avoided.
        mean: whether the loss is the mean over all targets there are, or their sum.
        matrices: form K, (M*C) x (N*C) numbers. Without it K G costs one vjp and one jvp.
        select: takes the logits out of the model's output, if it is not a tensor.

    Returns:
        The factors, and predicted and actual changes. Cost: a forward and a backward pass of the N, three to five
        forward passes of the M; memory: two copies of the parameters; with `matrices` the kernel, and for Adam the rows
        of all Jacobians.

    Raises:
        InputError: if targets, weights or optimiser do not fit; for `matrices` if the first group's learning rate is 0.
        ModelError: if the model is in training mode with BatchNorm or Dropout.
    """
    loss = as_loss(loss, mean=mean)
    tangent = linearize(model, readout=AllPositions(select))
    x, y = update
    shape, seen = _shapes(tangent, x), _shapes(tangent, observe)
    outputs = tangent.outputs(x).view(-1, *shape)
    gradient_at_logits = _misfit(outputs, y, loss, weights, mean=mean)
    gradient = tangent.vjp(x, gradient_at_logits.flatten(1))
    step = displacement(model, tangent.selection, gradient, optimizer)
    if matrices and not step.learning_rate:
        raise InputError(
            "K is measured in learning rates of the optimiser's first group of parameters, which is 0: take the step "
            "where it is positive, put another group first, or leave `matrices` out"
        )
    before = tangent.outputs(observe)
    whole = tangent.jvp(observe, step.total)
    own = tangent.jvp(observe, -step.scale * gradient)
    after = _after(tangent, step.total, observe)
    count = seen[-1]
    first, second = (z.view(-1, *seen) for z in (before, after))
    predicted = whole.view(-1, *seen)
    rows = first.reshape(-1, count)
    q = loss.probabilities(rows).view_as(first)
    if isinstance(loss, CrossEntropy):
        a = torch.diag_embed(q) - q[..., :, None] * q[..., None, :]
        inside = Change((a @ predicted[..., None])[..., 0], second.softmax(-1) - q)
        mean_shift = (q * predicted).sum(-1, keepdim=True)
        logs: Change | None = Change(predicted - mean_shift, second.log_softmax(-1) - first.log_softmax(-1))
    else:
        a = torch.eye(count, dtype=q.dtype, device=q.device).expand(*q.shape, count)
        inside, logs = Change(predicted, second - first), None
    return Step(
        outputs=first,
        probabilities=q,
        A=a,
        G=gradient_at_logits,
        K=_kernel(tangent, observe, x, step.scale / step.learning_rate) if matrices else None,
        logits=Change(predicted, second - first),
        in_probability=inside,
        in_log_probability=logs,
        past=(whole - own).view(-1, *seen),
        learning_rate=step.learning_rate,
    )


def _shapes(tangent: Tangent, x: Any) -> torch.Size:
    """Of one example's logits, from one forward pass of it."""
    examples = tangent.examples(x)
    readout = tangent.readout
    assert isinstance(readout, AllPositions)
    with untouched(tangent.model), torch.no_grad():
        return logits_of(call(tangent.model, examples.batch([0], tangent.device)), readout.select).shape[1:]


def _misfit(outputs: Tensor, y: Tensor, loss: Loss, weights: Tensor | None, *, mean: bool) -> Tensor:
    """Gradient of the loss at the logits, of their shape."""
    places, count = outputs.shape[:-1], outputs.shape[-1]
    if isinstance(loss, CrossEntropy):
        require_classes(count)
    if not isinstance(y, Tensor):
        raise InputError(f"targets are a tensor of classes or of soft targets: got {type(y).__name__}")
    if weights is not None and not bool(torch.isfinite(weights).all()):
        raise InputError("weights are finite numbers: some are NaN or infinity")
    rows = outputs.reshape(-1, count)
    if y.is_floating_point():
        if y.shape != outputs.shape:
            raise InputError(f"soft targets have the shape of the logits, {tuple(outputs.shape)}: got {tuple(y.shape)}")
        targets, there = y.reshape(-1, count), torch.ones(len(rows), dtype=torch.bool)
    else:
        if y.shape != places:
            raise InputError(f"targets are classes of shape {tuple(places)}: got {tuple(y.shape)}")
        targets = y.reshape(-1).long()  # in uint8 the ignored -100 would be class 156
        there = targets.cpu() != IGNORED
    if not bool(there.any()):
        raise InputError(f"the update has no target: all are {IGNORED}")
    pull = torch.ones(places, dtype=rows.dtype, device=rows.device)
    if weights is not None:
        if weights.shape not in (places, places[:1]):
            raise InputError(
                f"weights have the shape {tuple(places[:1])} or {tuple(places)}: got {tuple(weights.shape)}"
            )
        pull = pull * weights.to(pull).reshape(weights.shape + (1,) * (len(places) - weights.ndim))
    pull = pull.reshape(-1, 1)[there] / (int(there.sum()) if mean else 1)
    found = torch.zeros_like(rows)
    found[there] = -loss.misfit(rows[there], targets.to(rows.device)[there]) * pull
    return found.view_as(outputs)


def _after(tangent: Tangent, change: Tensor, x: Any) -> Tensor:
    """Outputs of a copy of the network whose parameters have moved."""
    twin = copy.deepcopy(tangent.model)
    moved = dict(twin.named_parameters())
    with torch.no_grad():
        for name, part in zip(tangent.selection.names, tangent.selection.split(change), strict=True):
            moved[name].add_(part)
    return linearize(twin, readout=tangent.readout, parameters=lambda name, _: name in tangent.selection.names).outputs(
        x
    )


def _kernel(tangent: Tangent, rows: Any, cols: Any, scale: Tensor) -> Tensor:
    if bool((scale == scale[0]).all()):
        return TangentKernel(tangent, rows, cols).dense() * scale[0]
    return tangent.jacobian(rows) @ (tangent.jacobian(cols) * scale).T

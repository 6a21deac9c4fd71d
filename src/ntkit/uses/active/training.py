"""Ready answers to `fit(labels)`: a network trained afresh by an optimiser, or a scikit-learn or skorch classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ntkit.errors import InputError
from ntkit.solve.losses import CrossEntropy, Loss, as_loss
from ntkit.tangent.examples import Examples
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ntkit.tangent.examples import Batch
    from ntkit.tangent.readout import Select

# scikit-learn's names of what stands between the layers of its multi-layer perceptron.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


@dataclass(frozen=True, eq=False)
class Training:
    """Trains a new network from scratch, always with the same number of steps; the same labels give the same network.

    Attributes:
        X: all n points.
        network: makes a new one; what it draws at random follows `seed`.
        loss: cross-entropy or square loss.
        optimizer: from parameters to an optimiser; Adam by default, as torch has it.
        schedule: from that optimiser to a scheduler of its learning rate, stepped after every batch; none by default.
        steps: batches in all.
        batch_size: examples of one, all labelled points if they are fewer. What is left of them after the last whole
            batch is passed over, in every order others.
        seed: of initial weights, dropout and the order of examples.
        select: takes the (n, C) logits out of the network's output, if it is not a tensor.
    """

    X: Any
    network: Callable[[], nn.Module]
    loss: Loss = field(default_factory=CrossEntropy)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    steps: int = 1000
    batch_size: int = 64
    seed: int = 0
    select: Select | None = None

    def __post_init__(self) -> None:
        """Check the loss and the numbers.

        Raises:
            InputError: if the loss is none, or they are not positive.
        """
        object.__setattr__(self, "loss", as_loss(self.loss))
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise InputError(f"{name}: got {value!r}, expected a positive number")

    def __call__(self, labels: np.ndarray) -> nn.Module:
        """A network in evaluation mode.

        Args:
            labels: (n,), -1 where there is none.

        Raises:
            InputError: if there is no label, there are not n numbers, the network cannot take the points, has no output
                for a label, or has BatchNorm and a batch is one example.
            ModelError: if its outputs are not finite, or depend on other points in evaluation mode.
        """
        examples, known = Examples(self.X), _known(labels, len(Examples(self.X)))
        classes = torch.from_numpy(np.asarray(labels)[known.numpy()]).long()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.seed)
            model = self.network()
            self._check(model, examples.pick(known[:1].tolist()), int(classes.max()))
            model.train()
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            optimizer = self.optimizer(model.parameters())
            scheduler = None if self.schedule is None else self.schedule(optimizer)
            for some in self._batches(len(known)):
                batch = examples.batch(known[some].tolist(), device)
                optimizer.zero_grad()
                outputs = logits(_called(model, batch), self.select)
                self.loss.value(outputs, classes[some].to(device)).backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
        return model.eval()

    def _check(self, model: nn.Module, x: Any, largest: int) -> None:
        """What torch would say in its own words in the middle of training, on a GPU by taking the process down."""
        count = linearize(model.eval(), readout=Logits(self.select)).outputs(x).shape[1]
        if largest >= count:
            raise InputError(
                f"labels are classes from 0 to {count - 1}, one for each of the network's {count} outputs: got "
                f"{largest}"
            )

    def _batches(self, n: int) -> Iterator[torch.Tensor]:
        """Places of the examples of every step, in a random order; a new one where less than a batch is left of it."""
        generator, left = torch.Generator().manual_seed(self.seed), torch.empty(0, dtype=torch.int64)
        size = min(self.batch_size, n)
        for _ in range(self.steps):
            if len(left) < size:
                left = torch.randperm(n, generator=generator)
            some, left = left[:size], left[size:]
            yield some


def _called(model: nn.Module, batch: Batch) -> Any:
    """The output of a model in training mode; there BatchNorm may need more than one example."""
    try:
        return batch.call(model)
    except ValueError as error:
        if batch.size > 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise
        raise InputError(
            "BatchNorm cannot train on a batch of one example, got one label or batch_size=1: label two points first, "
            "or take a larger batch_size"
        ) from error


@dataclass(frozen=True, eq=False)
class Refit:
    """Fits a clone of a scikit-learn or skorch classifier, and gives it as a network of logits.

    skorch's `NeuralNetClassifier` (with nn.CrossEntropyLoss, so that its module gives logits), scikit-learn's
    `MLPClassifier` and `LogisticRegression`.

    Attributes:
        estimator: not changed. With a number for its `random_state` the same labels give the same network.
        X: all n points, as the estimator takes them; tensors and lists, too.
        classes: C; scikit-learn's estimators must have seen each once.
    """

    estimator: Any
    X: Any
    classes: int

    def __call__(self, labels: np.ndarray) -> nn.Module:
        """A network in evaluation mode.

        Raises:
            InputError: if there is no label, or the estimator cannot be made a network.
        """
        from sklearn.base import clone

        known, X = _known(labels, len(self.X)).numpy(), self.X
        if isinstance(X, torch.Tensor):
            X = X.detach().cpu()  # as an array the type of its numbers is kept: the network has the same
        if isinstance(X, (torch.Tensor, list)):
            X = np.asarray(X)
        fresh: Any = clone(self.estimator)
        return as_network(fresh.fit(X[known], np.asarray(labels)[known]), self.classes)


def as_network(fitted: Any, classes: int) -> nn.Module:
    """A fitted classifier as a network that gives its logits, (n, C), in evaluation mode.

    Raises:
        InputError: if it is none of those that are known here, or has not seen all classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    module = getattr(fitted, "module_", None)
    if isinstance(module, nn.Module):
        criterion = getattr(fitted, "criterion_", None)
        if isinstance(criterion, nn.NLLLoss):
            raise InputError(
                "the module of a skorch classifier gives probabilities where its criterion is NLLLoss, expected "
                "logits: use criterion=nn.CrossEntropyLoss and a module without softmax"
            )
        return module.eval()
    seen = getattr(fitted, "classes_", None)
    if seen is not None and not np.array_equal(seen, np.arange(classes)):
        raise InputError(
            f"{type(fitted).__name__} gives outputs for the classes that it has seen alone, {list(seen)} of "
            f"{classes}: label one point of each class first, or train with Training(...)"
        )
    if isinstance(fitted, MLPClassifier):
        weights, biases, between = list(fitted.coefs_), list(fitted.intercepts_), ACTIVATIONS[fitted.activation]
    elif isinstance(fitted, LogisticRegression):
        weights, biases, between = [fitted.coef_.T], [fitted.intercept_], nn.Identity
    else:
        raise InputError(
            f"cannot read a network out of {type(fitted).__name__}: expected a skorch NeuralNetClassifier, "
            "MLPClassifier or LogisticRegression; write fit(labels) yourself for others"
        )
    if weights[-1].shape[1] == 1:  # two classes by one output: the other's logit is 0
        weights[-1] = np.concatenate([np.zeros_like(weights[-1]), weights[-1]], 1)
        biases[-1] = np.concatenate([np.zeros_like(biases[-1]), biases[-1]])
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(*weight.shape)
        layer.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight.T)))
        layer.bias = nn.Parameter(torch.from_numpy(np.array(bias, dtype=weight.dtype)))
        layers += [layer, between()]
    return _Layers(*layers[:-1]).eval()


class _Layers(nn.Sequential):
    """Layers that take whole numbers as well, as scikit-learn does."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.dtype = next(self.parameters()).dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if input.is_floating_point() else input.to(self.dtype))


def _known(labels: np.ndarray, n: int) -> torch.Tensor:
    values = np.asarray(labels)
    if values.shape != (n,):
        raise InputError(f"labels: got shape {values.shape}, expected ({n},), -1 where there is none")
    known = torch.from_numpy(np.flatnonzero(values >= 0))
    if not len(known):
        raise InputError(
            "there is no label to train on: begin with some, chosen by Random() or TypiClust() with a network that is "
            "not trained"
        )
    return known

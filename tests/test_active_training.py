"""Ready fits: they train as a loop written by hand does, and give other people's classifiers as networks."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import nn
from torch.nn import functional

from ntkit.errors import InputError, ModelError
from ntkit.uses.active import CrossEntropy, Loss, SquareLoss
from ntkit.uses.active.loop import Loop, UntrainedWarning
from ntkit.uses.active.training import Refit, Training, as_network

N, C = 60, 3


def pool(classes: int = C) -> tuple[torch.Tensor, np.ndarray]:
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
    return x, x[:, :classes].argmax(1).numpy()


def some(classes: int = C) -> np.ndarray:
    y = np.full(N, -1)
    y[10:40] = pool(classes)[1][10:40]
    return y


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, C))


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()])
def test_training_is_the_loop_that_one_would_write(loss: Loss) -> None:
    x, _ = pool()
    y = some()
    state = torch.random.get_rng_state()
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    found = Training(x, network, loss=loss, optimizer=sgd, steps=7, batch_size=12, seed=5)(y)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = network().train()
        optimizer = sgd(model.parameters())
        generator = torch.Generator().manual_seed(5)
        order: list[int] = []
        for _ in range(7):
            if len(order) < 12:  # 30 labels: two batches of 12, and a new order
                order = torch.randperm(30, generator=generator).tolist()
            batch, order = [10 + k for k in order[:12]], order[12:]
            outputs, classes = model(x[batch]), torch.from_numpy(y[batch])
            if isinstance(loss, CrossEntropy):
                value = functional.cross_entropy(outputs, classes)
            else:
                value = ((outputs - functional.one_hot(classes, C)) ** 2).sum() / 12 / 2
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not found.training


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()])
def test_the_misfit_is_minus_the_gradient_of_the_value(loss: Loss) -> None:
    outputs = torch.randn(4, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    classes = torch.tensor([0, 2, 1, 2])
    (gradient,) = torch.autograd.grad(4 * loss.value(outputs, classes), outputs)
    torch.testing.assert_close(loss.misfit(outputs.detach(), classes), -gradient, rtol=1e-12, atol=1e-12)


def test_fewer_labels_than_a_batch_and_inputs_with_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, C)

        def forward(self, *, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.layer(x)}

    y = np.full(N, -1)
    y[[3, 7]] = [0, 2]
    fit = Training(
        {"x": pool()[0]},
        Named,
        steps=200,
        select=lambda out: out["logits"],
        optimizer=partial(torch.optim.Adam, lr=0.05),
    )
    said = fit(y)(x=pool()[0][[3, 7]])["logits"].argmax(1)
    assert said.tolist() == [0, 2]
    decayed = Training(
        pool()[0], network, steps=3, schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 0.0)
    )(some())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = network()
    for a, b in zip(decayed.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)  # a learning rate of 0 from the first step on


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(InputError, match="no label to train on"):
        Training(pool()[0], network)(np.full(N, -1))
    with pytest.raises(InputError, match=r"expected \(60,\)"):
        Training(pool()[0], network)(np.zeros(N - 1, dtype=int))
    with pytest.raises(InputError, match="steps"):
        Training(pool()[0], network, steps=0)
    y = some()
    y[39] = C  # one of thirty, whichever batch has it
    for loss in (CrossEntropy(), SquareLoss()):
        with pytest.raises(InputError, match=r"classes from 0 to 2.*got 3"):
            Training(pool()[0], network, loss=loss, steps=1, batch_size=1)(y)


def test_points_that_the_network_cannot_take_are_said_before_training() -> None:
    x, steps = pool()[0], []

    def counted(parameters: Any) -> torch.optim.Optimizer:
        steps.append(1)
        return torch.optim.Adam(parameters)

    for data, message in (
        (x.double(), r"parameters are torch.float32, the examples torch.float64: convert one"),
        (x.long(), r"fails on examples of shapes \[\(3, 5\)\].*Long and Float"),
        (x[:, :4], r"fails on examples of shapes \[\(3, 4\)\]"),
    ):
        with pytest.raises(InputError, match=message):
            Training(data, network, optimizer=counted)(some())
    with pytest.raises(ModelError, match=r"model\.eval"):  # no running statistics: it could not be asked afterwards
        Training(x, lambda: nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), network()))(some())
    assert not steps


def mixing() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, C))


def test_batch_norm_trains_on_two_labels_or_more() -> None:
    one = np.where(np.arange(N) == 7, 1, -1)
    for labels, size in ((one, 64), (some(), 1)):
        with pytest.raises(InputError, match="BatchNorm cannot train on a batch of one example"):
            Training(pool()[0], mixing, steps=1, batch_size=size)(labels)
    images = pool()[0].view(N, 1, 5, 1)  # with places enough one example will do
    made = Training(images, lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(5, C)), steps=1)(one)
    assert not made.training

    def failing() -> nn.Module:
        model = mixing()
        model.register_forward_pre_hook(lambda module, _: int("x") if module.training else None)
        return model

    with pytest.raises(ValueError, match="invalid literal"):  # of the user's own
        Training(pool()[0], failing, steps=1)(some())


@pytest.mark.parametrize("estimator", [LogisticRegression(), MLPClassifier((7,), random_state=0, max_iter=300, tol=1)])
def test_classifiers_take_points_in_every_form(estimator: Any) -> None:
    """And the network that is made takes them as well."""
    from ntkit.uses.active import Margin

    whole = (4 * pool()[0]).round()
    expected = Refit(estimator, whole.double().numpy(), C)(some())
    for data in (whole.double(), whole.long(), whole.long().numpy(), whole.long().tolist(), whole):
        model = Refit(estimator, data, C)(some())
        x = data if isinstance(data, torch.Tensor) else torch.as_tensor(data)
        tolerance = 1e-3 if x.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(model(x).double(), expected(whole.double()), rtol=tolerance, atol=tolerance)
        assert len(Margin(missing_label=-1).query(x, some(), model)) == 1


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(),
        LogisticRegression(fit_intercept=False),
        MLPClassifier((7, 4), activation="relu", random_state=0, max_iter=30),
        MLPClassifier((7, 4), activation="tanh", random_state=0, max_iter=30),
        MLPClassifier((7, 4), activation="logistic", random_state=0, max_iter=30),
        MLPClassifier((7, 4), activation="identity", random_state=0, max_iter=30),
    ],
)
def test_classifiers_as_networks(estimator: Any, classes: int) -> None:
    x = pool(classes)[0].double().numpy()
    before = copy.deepcopy(estimator.get_params())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, for few iterations
        model = Refit(estimator, x, classes)(some(classes))
        estimator_again = type(estimator)(**before).fit(x[10:40], some(classes)[10:40])
    assert estimator.get_params() == before
    assert not hasattr(estimator, "classes_")
    with torch.no_grad():
        p = model(torch.from_numpy(x)).softmax(1).numpy()
    np.testing.assert_allclose(p, estimator_again.predict_proba(x), rtol=1e-9, atol=1e-12)


def test_skorch(tmp_path: Path) -> None:
    skorch = pytest.importorskip("skorch")
    x = pool()[0].numpy()
    net = skorch.NeuralNetClassifier(
        network, criterion=nn.CrossEntropyLoss, max_epochs=3, verbose=0, train_split=None, iterator_train__shuffle=False
    )
    torch.manual_seed(0)
    model = Refit(net, x, C)(some())
    assert isinstance(model[3], nn.Linear)
    assert not model.training
    from ntkit.uses.active import LookAhead

    def fit(labels: np.ndarray) -> nn.Module:
        torch.manual_seed(0)
        return Refit(net, x, C)(labels)

    loop = Loop(pool()[0], LookAhead(), fit, journal=tmp_path / "s.jsonl", classes=C, y=some())
    asked = loop.step(lambda numbers: pool()[1][numbers].tolist(), 5)
    assert len(asked.numbers) == 5
    loop.query(5)
    probabilities = skorch.NeuralNetClassifier(network, max_epochs=1, verbose=0, train_split=None)
    with pytest.raises(InputError, match="CrossEntropyLoss"):
        Refit(probabilities, x, C)(some())


def test_classifiers_that_are_none_of_ours() -> None:
    from sklearn.ensemble import RandomForestClassifier

    x, y = pool()[0].numpy(), some()
    y[y == 2] = -1
    with pytest.raises(InputError, match="label one point of each class"):
        Refit(LogisticRegression(), x, C)(y)
    with pytest.raises(InputError, match="RandomForestClassifier"):
        as_network(RandomForestClassifier(3).fit(x[10:40], some()[10:40]), C)


def test_a_network_that_is_not_trained_is_noticed(tmp_path: Path) -> None:
    from ntkit.uses.active import LookAhead

    fixed = Training(pool()[0], network, steps=5)(some())
    loop = Loop(pool()[0], LookAhead(), lambda _: fixed, journal=tmp_path / "s.jsonl", classes=C, y=some())
    loop.step(lambda numbers: pool()[1][numbers].tolist(), 3)
    with pytest.warns(UntrainedWarning, match="does fit"):
        loop.query(3)

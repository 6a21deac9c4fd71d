"""Kernel functions as steps of a scikit-learn pipeline: its own laws, grids over kernels, no leakage between folds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import Features, RandomFourier
from ntkit.kernel.fully_connected import FullyConnected
from ntkit.kernel.function import Empirical
from ntkit.solve.conditioned import Posterior
from ntkit.solve.estimators import NTKRegressor, Precomputed
from ntkit.solve.ridge import Absolute
from ntkit.solve.transformers import KernelFeatures, KernelMatrix

X, Y = load_iris(return_X_y=True)
FOLDS = StratifiedKFold(4, shuffle=True, random_state=0)
FOURIER = RandomFourier(RBF(2.0), 10, generator=torch.Generator().manual_seed(0))


@parametrize_with_checks([
    KernelMatrix(), KernelMatrix(RBF(1.0) + DotProduct()), KernelFeatures(landmarks=5), KernelFeatures(FOURIER),
])  # fmt: skip
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


def test_the_matrix_is_the_kernel_with_the_examples_of_the_fit() -> None:
    step = KernelMatrix(RBF(1.5)).fit(X[:40])
    np.testing.assert_allclose(step.transform(X[40:60]), rbf_kernel(X[40:60], X[:40], gamma=0.5 / 1.5**2))
    np.testing.assert_allclose(KernelMatrix(RBF(1.5)).fit_transform(X[:40]), step.transform(X[:40]), atol=1e-14)
    assert list(step.get_feature_names_out())[-1] == "kernelmatrix39"
    assert KernelMatrix().fit(X).kernel_ == RBF.median(torch.tensor(X))
    single = KernelMatrix(RBF(1.5)).fit_transform(X.astype(np.float32))
    assert single.dtype == np.float32


@pytest.mark.parametrize(
    "step", [KernelMatrix(RBF(1.5)), KernelMatrix(), KernelFeatures(RBF(1.5), landmarks=20, random_state=0)]
)
@pytest.mark.parametrize("first", [np.float32, np.float64])
def test_examples_are_of_the_type_of_the_fit(step: Any, first: Any) -> None:
    second = np.float64 if first is np.float32 else np.float32
    fitted = clone(step).fit(X.astype(first))
    found = fitted.transform(X[:9].astype(second))
    assert found.dtype == first
    np.testing.assert_allclose(found, fitted.transform(X[:9].astype(np.float32).astype(first)), rtol=1e-5, atol=1e-5)
    again = fitted.fit(X.astype(second))  # the last fit counts
    assert again.transform(X[:9].astype(first)).dtype == second


def test_a_network_and_what_is_made_of_kernels_are_kernels_too() -> None:
    tangent = ntkit.linearize(network())
    x = torch.tensor(X[:20], dtype=torch.float32)
    step = KernelMatrix(Empirical(tangent), dtype=torch.float32)
    np.testing.assert_allclose(step.fit_transform(X[:20]), ntkit.TangentKernel(tangent, x).dense(), rtol=1e-6)
    copied = clone(step)
    assert copied.kernel.tangent.model is not tangent.model
    np.testing.assert_array_equal(copied.fit(X[:20]).transform(X[20:30]), step.fit(X[:20]).transform(X[20:30]))
    made = 2.0 * FullyConnected(2).normalised().centred(on=torch.tensor(X))
    np.testing.assert_allclose(
        KernelMatrix(made).fit_transform(X[:9]), made(torch.tensor(X[:9])).dense(), rtol=1e-10, atol=1e-10
    )
    posterior = Posterior(RBF(1.0), torch.tensor(X[:5]), ridge=Absolute(0.1))
    np.testing.assert_allclose(KernelMatrix(posterior).fit_transform(X[:9])[:5], posterior(
        torch.tensor(X[:5]), torch.tensor(X[:9])).dense(), atol=1e-12)  # fmt: skip


def test_images_are_reshaped() -> None:
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 1)).double()
    tangent = ntkit.linearize(images)
    x = torch.tensor(X[:10]).reshape(-1, 1, 2, 2)
    step = KernelMatrix(Empirical(tangent), shape=(1, 2, 2)).fit(X[:10])
    np.testing.assert_allclose(step.transform(X[:4]), ntkit.TangentKernel(tangent, x[:4], x).dense())
    with pytest.raises(InputError, match=r"X has 4 features, and they are to be examples of shape \(1, 3, 3\)"):
        KernelMatrix(Empirical(tangent), shape=(1, 3, 3)).fit(X)


def test_an_svm_on_the_matrix_is_the_svm_of_scikit_learn() -> None:
    ours = make_pipeline(StandardScaler(), KernelMatrix(RBF(1.5)), SVC(kernel="precomputed", C=2.0))
    theirs = make_pipeline(StandardScaler(), SVC(kernel="rbf", gamma=0.5 / 1.5**2, C=2.0))
    half = np.arange(len(X)) % 2 == 0
    np.testing.assert_allclose(
        ours.fit(X[half], Y[half]).decision_function(X[~half]),
        theirs.fit(X[half], Y[half]).decision_function(X[~half]), atol=1e-3,
    )  # fmt: skip
    assert list(cross_val_score(ours, X, Y, cv=FOLDS)) == list(cross_val_score(theirs, X, Y, cv=FOLDS))


def test_a_grid_of_kernels_is_searched_without_leaks() -> None:
    pipeline = make_pipeline(StandardScaler(), KernelMatrix(), SVC(kernel="precomputed"))
    assert not get_tags(pipeline).input_tags.pairwise  # rows are split, not columns
    kernels = [RBF(0.5), RBF(2.0), RBF(1.0) + DotProduct(), FullyConnected(3), RBF(2.0).normalised()]
    grid = {"kernelmatrix__kernel": kernels, "svc__C": [0.1, 10.0]}
    search = GridSearchCV(pipeline, grid, cv=FOLDS).fit(X, Y)
    assert search.best_score_ > 0.95
    assert search.best_estimator_[1].X_fit_.shape == (150, 4)
    # the same by hand: scaling, kernel and machine of a fold see its training examples alone
    for number, options in enumerate(search.cv_results_["params"]):
        k, scores = options["kernelmatrix__kernel"], []
        for train, test in FOLDS.split(X, Y):
            mean, deviation = X[train].mean(0), X[train].std(0)
            a, b = (torch.tensor((X[part] - mean) / deviation) for part in (train, test))
            machine = SVC(kernel="precomputed", C=options["svc__C"]).fit(k(a).dense().numpy(), Y[train])
            scores.append(machine.score(k(b, a).dense().numpy(), Y[test]))
        assert search.cv_results_["mean_test_score"][number] == pytest.approx(np.mean(scores), abs=1e-12)


def test_ridge_regression_behind_it() -> None:
    pipeline = make_pipeline(KernelMatrix(RBF(1.5)), NTKRegressor(Precomputed(), ridge=Absolute(0.3)))
    got = pipeline.fit(X[::2], Y[::2].astype(float)).predict(X[1::2])
    inner, cross = (rbf_kernel(a, X[::2], gamma=0.5 / 1.5**2) for a in (X[::2], X[1::2]))
    np.testing.assert_allclose(got, cross @ np.linalg.solve(inner + 0.3 * np.eye(75), Y[::2]), rtol=1e-8)


def test_features() -> None:
    np.testing.assert_allclose(KernelFeatures(FOURIER).fit_transform(X), FOURIER.features(torch.tensor(X)))
    step = KernelFeatures(RBF(1.5), landmarks=150).fit(X)
    theirs = Nystroem(gamma=0.5 / 1.5**2, n_components=150, random_state=0).fit(X).transform(X)
    np.testing.assert_allclose(step.transform(X) @ step.transform(X).T, theirs @ theirs.T, atol=1e-6)
    assert KernelFeatures(RBF(1.5), landmarks=999).fit(X).features_.size == step.features_.size
    first, again, other = (
        KernelFeatures(RBF(1.5), landmarks=10, random_state=seed).fit_transform(X) for seed in (0, 0, 1)
    )
    assert first.shape == (150, 10)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    hidden = KernelFeatures(Features(network()[0]), dtype=torch.float32).fit(X)
    assert hidden.transform(X).shape == (150, 8)
    assert hidden.get_feature_names_out()[0] == "kernelfeatures0"


def test_a_grid_over_landmarks() -> None:
    pipeline = make_pipeline(StandardScaler(), KernelFeatures(RBF(2.0), random_state=0), LogisticRegression())
    search = GridSearchCV(pipeline, {"kernelfeatures__landmarks": [1, 30]}, cv=FOLDS).fit(X, Y)
    assert search.best_params_ == {"kernelfeatures__landmarks": 30}
    assert search.best_score_ > 0.93


def test_refusals() -> None:
    with pytest.raises(NotFittedError):
        KernelMatrix().transform(X)
    with pytest.raises(InputError, match=r"got Tangent\. Of a network made by linearize take Empirical"):
        KernelMatrix(ntkit.linearize(network())).fit(X)
    for step in (KernelMatrix, KernelFeatures):
        several = step(Empirical(ntkit.linearize(network(2))), dtype=torch.float32)
        with pytest.raises(InputError, match="and this kernel has 2: take trace=True"):
            several.fit(X[:6]).transform(X[:6])
    for landmarks in (0, "many"):
        with pytest.raises(InputError, match="landmarks is a number of examples"):
            KernelFeatures(RBF(), landmarks=landmarks).fit(X)

from __future__ import annotations

import math
import pickle
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.fully_connected import FullyConnected
from ntkit.kernel.function import Empirical
from ntkit.solve.estimators import NTKClassifier, NTKRegressor, Precomputed
from ntkit.solve.mlp import MLP
from ntkit.solve.svm import DEFAULT_CS, SVM, Grid, search
from ntkit.solve.svm_search import NTKSVMSearch, held_out
from tests import oracles

D = 4
SMALL = MLP(width=16, depth=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(n: int, classes: int, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Classes that overlap, so that some examples end at their bound C."""
    x = normal(n, D, seed=seed)
    score = x[:, 0] + x[:, 1] ** 2 + 0.3 * normal(n, seed=seed + 1)
    return x, np.searchsorted(np.quantile(score.numpy(), np.arange(1, classes) / classes), score.numpy())


X, CODES = noisy(60, 3)
X_NEW, _ = noisy(25, 3, seed=5)
NAMES = np.array(["ash", "birch", "cedar"])
LABELS = NAMES[CODES]


def net(outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def theta(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    return oracles.entk(model, x1, x2, lambda output: output, list(model.parameters()))


# ---------------------------------------------------------------- scikit-learn's own laws


@parametrize_with_checks(
    [
        NTKClassifier(SMALL, head=SVM()),
        NTKClassifier(SMALL, head=SVM(10.0, class_weight="balanced"), readout=ntkit.SumOfLogits()),
        NTKClassifier(FullyConnected(3, 1), head=SVM(relative=False)),
        NTKClassifier(FullyConnected(2)),
        NTKRegressor(RBF(2.0)),
        NTKClassifier(Precomputed(), head=SVM()),
        NTKSVMSearch((1, 3), (0.1, 10.0), cv=2),
    ],
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# ---------------------------------------------------------------- a support vector machine as the head


@pytest.mark.parametrize(
    ("options", "reduce"),
    [({}, oracles.trace_kernel), ({"readout": ntkit.SumOfLogits()}, oracles.pntk)],
    ids=["trace", "sum of logits"],
)
@pytest.mark.parametrize("relative", [True, False])
def test_it_is_that_of_scikit_learn_on_the_kernel_of_the_oracle(options, reduce, relative):
    model = net()
    kernel, cross = (reduce(theta(model, x, X), 3).numpy() for x in (X, X_NEW))
    mean = float(np.diagonal(kernel).mean())
    c = 5.0 / mean if relative else 5.0
    expected = SVC(kernel="precomputed", C=c).fit(kernel, LABELS)
    fitted = NTKClassifier(model, head=SVM(5.0, relative), **options).fit(X, LABELS)
    assert list(fitted.predict(X_NEW)) == list(expected.predict(cross))
    np.testing.assert_allclose(fitted.decision_function(X_NEW), expected.decision_function(cross), rtol=1e-6, atol=1e-6)
    assert list(fitted.n_support_) == list(expected.n_support_)
    assert list(fitted.support_) == list(expected.support_)
    np.testing.assert_allclose(fitted.dual_coef_, expected.dual_coef_, rtol=1e-6)
    assert pytest.approx(c) == fitted.C_
    assert fitted.relative_C_ == pytest.approx(c * mean)
    assert list(fitted.classes_) == list(NAMES)
    assert not hasattr(fitted, "ridge_")


def test_the_last_layer_alone_is_a_machine_on_features():
    model = net(1)
    features, features_new = (torch.tanh(model[0](x)).detach().numpy() for x in (X, X_NEW))
    kernel, cross = features @ features.T + 1, features_new @ features.T + 1  # the bias is a feature too
    expected = SVC(kernel="precomputed", C=2.0).fit(kernel, LABELS)
    fitted = NTKClassifier(model, parameters=model[2], head=SVM(2.0, relative=False)).fit(X, LABELS)
    assert list(fitted.predict(X_NEW)) == list(expected.predict(cross))
    np.testing.assert_allclose(fitted.decision_function(X_NEW), expected.decision_function(cross), atol=1e-6)


def test_two_classes():
    model, labels = net(2), LABELS == "ash"
    kernel, cross = (oracles.trace_kernel(theta(model, x, X), 2).numpy() for x in (X, X_NEW))
    expected = SVC(kernel="precomputed", C=1.0).fit(kernel, labels).decision_function(cross)
    fitted = NTKClassifier(model, head=SVM(relative=False)).fit(X, labels)
    decision = fitted.decision_function(X_NEW)
    np.testing.assert_allclose(decision, expected, rtol=1e-6, atol=1e-6)
    assert list(fitted.predict(X_NEW)) == list(decision > 0)


def test_a_relative_C_does_not_see_the_scale_of_the_kernel():
    def machine(scale: float, relative: bool) -> NTKClassifier:
        return NTKClassifier(DotProduct(scale=scale), head=SVM(0.3, relative)).fit(X, LABELS)

    small, large = machine(1.0, True), machine(128.0, True)  # a power of two: LIBSVM takes the very same steps
    np.testing.assert_allclose(small.decision_function(X_NEW), large.decision_function(X_NEW), atol=1e-6)
    assert small.relative_C_ == large.relative_C_ == pytest.approx(0.3)
    assert pytest.approx(128 * large.C_) == small.C_
    assert list(machine(0.01, False).n_support_) != list(machine(100.0, False).n_support_)


@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        (LABELS, "balanced"),
        (LABELS, {"ash": 1.0, "birch": 20.0, "cedar": 1.0}),
        (LABELS, {"birch": 20.0}),
        (CODES + 1, {2: 20.0}),  # not the class of number 2
        (CODES == 1, {True: 20.0}),
    ],
)
def test_weights_of_classes(labels, weights):
    kernel = (X @ X.T).numpy()
    expected = SVC(kernel="precomputed", class_weight=weights).fit(kernel, labels)
    head = SVM(relative=False, class_weight=weights)
    fitted = NTKClassifier(DotProduct(), head=head).fit(X, labels)
    np.testing.assert_allclose(fitted.dual_coef_, expected.dual_coef_, rtol=1e-6)
    np.testing.assert_allclose(head.fit(kernel, labels).dual_coef_, expected.dual_coef_, rtol=1e-6)


def test_precomputed_and_cross_validation():
    matrix = FullyConnected(3)(X).dense().numpy()
    scores = [
        cross_val_score(NTKClassifier(model, head=SVM(10.0)), data, LABELS, cv=4)
        for model, data in ((Precomputed(), matrix), (FullyConnected(3), X.numpy()))
    ]
    np.testing.assert_array_equal(*scores)


def test_pipeline_grid_search_clone_and_pickle():
    x, y = load_iris(return_X_y=True)
    tried = {"ntkclassifier__head": [SVM(0.1), SVM(10.0), None], "ntkclassifier__model": [FullyConnected(3), RBF()]}
    machine = make_pipeline(StandardScaler(), NTKClassifier(FullyConnected(), head=SVM()))
    found = GridSearchCV(machine, tried, cv=3, error_score="raise").fit(x, y)
    assert found.best_score_ > 0.95
    assert list(pickle.loads(pickle.dumps(found)).predict(x)) == list(found.predict(x))
    assert clone(NTKClassifier(FullyConnected(2), head=SVM(3.0))).head == SVM(3.0)


def test_the_C_of_the_head_can_be_searched():
    given = SVM()
    machine = NTKClassifier(FullyConnected(2), head=given)
    found = GridSearchCV(machine, {"head__C": [1e-4, 10.0]}, cv=3, error_score="raise").fit(X, LABELS)
    expected = [cross_val_score(NTKClassifier(FullyConnected(2), head=SVM(c)), X, LABELS, cv=3) for c in (1e-4, 10.0)]
    np.testing.assert_allclose(found.cv_results_["mean_test_score"], np.mean(expected, axis=1))
    assert found.best_params_ == {"head__C": 10.0}
    assert found.best_estimator_.head == SVM(10.0)
    assert machine.head is given
    assert clone(machine).set_params(head=given, head__C=7.0).head == SVM(7.0)
    assert given == SVM()  # heads do not change: others may hold the same one
    steps = make_pipeline(StandardScaler(), clone(machine)).set_params(ntkclassifier__head__class_weight="balanced")
    assert steps[-1].head == SVM(class_weight="balanced")
    params = machine.get_params()
    assert {name: value for name, value in params.items() if name.startswith("head__")} == {
        "head__C": 1.0, "head__relative": True, "head__class_weight": None, "head__max_iter": -1,
    }  # fmt: skip
    assert not any("__" in name for name in machine.get_params(deep=False))
    assert machine.set_params(head__C=3.0, head=SVM(2.0, relative=False), ridge=0.5).head == SVM(3.0, relative=False)
    assert machine.ridge == 0.5
    assert not any("__" in name for name in machine.set_params(head=None).get_params())


# ---------------------------------------------------------------- kernel functions in the place of a network


@pytest.mark.parametrize("trace", [True, False])
def test_an_empirical_kernel_function_is_the_network_it_is_of(trace):
    model = net()
    expected = NTKClassifier(model, trace=trace).fit(X, LABELS)
    fitted = NTKClassifier(Empirical(ntkit.linearize(model), trace=trace)).fit(X.numpy(), LABELS)
    np.testing.assert_allclose(fitted.decision_function(X_NEW), expected.decision_function(X_NEW), rtol=1e-8)
    assert fitted.loo_ == pytest.approx(expected.loo_)


def test_a_kernel_function_regresses_around_zero():
    kernel, cross = ((FullyConnected(2, bias_std=0.3)(x, X)).dense() for x in (X, X_NEW))
    expected = oracles.kernel_regression(kernel, cross, X[:, :2], 0.1 * float(kernel.diagonal().mean()))
    fitted = NTKRegressor(FullyConnected(2, bias_std=0.3), ridge=0.1).fit(X, X[:, :2])
    assert oracles.relative_error(torch.from_numpy(fitted.predict(X_NEW)), expected) < 1e-7


def test_a_kernel_function_is_computed_in_the_type_that_is_asked_for():
    fitted = NTKRegressor(RBF(), ridge=0.1, dtype=torch.float32).fit(X.numpy(), X[:, 0])
    assert fitted.regression_.kernel_dtype == torch.float32
    assert NTKRegressor(RBF(), ridge=0.1).fit(X.numpy(), X[:, 0]).regression_.kernel_dtype == torch.float64


# ---------------------------------------------------------------- the search

DEPTHS, CS = (1, 2, 4), (0.01, 0.1, 1.0, 30.0, 1e3)


def by_hand(splits: Any, relative: bool, **convention: Any) -> dict[tuple[int, int, float], float]:
    """Every accuracy of the grid, one scikit-learn machine at a time."""
    found = {}
    for depth in DEPTHS:
        for fixed, c in product(range(depth), CS):
            matrix = FullyConnected(depth, fixed, **convention)(X).dense().numpy()
            scores = []
            for train, held in splits:
                unit = float(np.diagonal(matrix)[train].mean()) if relative else 1.0
                machine = SVC(kernel="precomputed", C=c / unit).fit(matrix[train][:, train], CODES[train])
                scores.append(float((machine.predict(matrix[held][:, train]) == CODES[held]).mean()))
            found[depth, fixed, c] = float(np.mean(scores))
    return found


HALVES = PredefinedSplit([-1] * 40 + [0] * 20)
THREE = [(np.arange(0, 30), np.arange(30, 60)), (np.arange(20, 60), np.arange(20)), (np.arange(59, 9, -1), [3, 4])]


@pytest.mark.parametrize("cv", [HALVES, THREE], ids=["one cut", "three cuts"])
@pytest.mark.parametrize(
    ("relative", "convention"),
    [(True, {}), (True, {"bias_std": 0.5}), (False, {"weight_std": 1.0, "scaled_inputs": False})],
)
def test_the_search_finds_what_loops_find(cv, relative, convention):
    splits = list(cv.split()) if cv is HALVES else cv
    expected = by_hand(splits, relative, **convention)
    told = []
    found = NTKSVMSearch(
        DEPTHS, CS, cv=cv, relative=relative, progress=lambda *done: told.append(done), **convention
    ).fit(X.numpy(), LABELS)
    for (depth, fixed, c), accuracy in expected.items():
        assert found.scores_[DEPTHS.index(depth), fixed, CS.index(c)] == pytest.approx(accuracy)
    assert np.isnan(found.scores_).sum() == (3 * 4 - 7) * len(CS)
    best = max(expected, key=lambda key: expected[key])  # the first of equal ones
    assert tuple(found.best_params_.values()) == best
    assert found.best_score_ == pytest.approx(expected[best])
    assert told == [(done, 7) for done in range(1, 8)]
    assert 7 * len(splits) < found.grid_.fits <= 7 * len(splits) * len(CS)
    whole = NTKClassifier(FullyConnected(*best[:2], **convention), head=SVM(best[2], relative)).fit(X, LABELS)
    np.testing.assert_array_equal(found.decision_function(X_NEW), whole.decision_function(X_NEW))
    assert list(found.predict(X_NEW)) == list(whole.predict(X_NEW))


def test_of_equal_ones_the_first_is_kept():
    grid = Grid(("a", "b"), (1.0, 2.0, 3.0), np.array([[0.1, 0.5, 0.7], [0.7, 0.7, 0.2]]))
    assert grid.best == ("a", 3.0)
    assert grid.best_accuracy == 0.7
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]]).repeat(5, 0)
    assert NTKSVMSearch(cv=2).fit(x, x[:, 0] > 0).best_params_ == {"depth": 1, "fixed": 0, "C": 0.01}


def test_a_machine_without_bounds_is_not_fitted_again():
    x, y = load_wine(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    matrix = FullyConnected(3)(torch.from_numpy(x)).dense().numpy()
    split = (np.arange(0, 178, 2), np.arange(1, 178, 2))
    grid = search([("k", matrix)], y, [split], (0.1, 1e3, 1e4, 1e5, 1e6), relative=False)
    assert grid.fits == 2
    assert len(set(grid.accuracies[0, 1:])) == 1


def test_fits_that_are_stopped_are_counted():
    kernel = (X @ X.T).numpy()
    split = (np.arange(40), np.arange(40, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = search([("k", kernel)], CODES, [split], (1.0, 1e4), relative=False, max_iter=2)
    assert (grid.fits, grid.stopped) == (2, 2)
    assert search([("k", kernel)], CODES, [split], (1.0,), relative=False).stopped == 0


def test_folds_are_stratified_and_fit_the_smallest_sets():
    codes = np.array([0] * 7 + [1] * 5 + [2])
    splits = held_out(5, np.zeros((13, 1)), codes)
    assert len(splits) == 5
    assert sorted(np.concatenate([held for _, held in splits])) == list(range(13))
    assert all((codes[held] == 1).sum() == 1 for _, held in splits)
    assert len(held_out(5, np.zeros((4, 1)), np.array([0, 0, 0, 1]))) == 2  # the third would train on one class


def test_no_cv_is_five_folds_and_integers_of_numpy_are_integers():
    expected = NTKSVMSearch((1, 2), (0.1, 1.0), cv=5).fit(X, LABELS)
    for cv in (None, np.int64(5)):
        found = NTKSVMSearch(np.arange(1, 3), np.array([0.1, 1.0]), cv=cv).fit(X, LABELS)
        np.testing.assert_array_equal(found.scores_, expected.scores_)
        assert found.best_params_ == expected.best_params_
        assert type(found.best_params_["depth"]) is int
    assert SVM(max_iter=np.int64(7)) == SVM(max_iter=7)


def test_a_splitter_may_score_what_it_trained_on():
    class Whole:
        def split(self, x, y):
            yield np.arange(len(x)), np.arange(len(x))

    found = NTKSVMSearch((3,), (1e4,), cv=Whole(), relative=False).fit(X, LABELS)
    assert found.best_score_ == found.classifier_.score(X, LABELS)


def test_random_state_shuffles():
    a, b, c = (NTKSVMSearch((2,), (1.0,), random_state=seed).fit(X, CODES).best_score_ for seed in (0, 0, 1))
    assert a == b
    assert a != c


def test_small_data_are_learned():
    x, y = load_wine(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:60], order[60:]
    machine = make_pipeline(StandardScaler(), NTKSVMSearch(cv=3)).fit(x[train], y[train])
    assert machine.score(x[test], y[test]) > 0.93


# ---------------------------------------------------------------- what is refused


def weighted(weights: dict[Any, float]) -> NTKClassifier:
    return NTKClassifier(RBF(), head=SVM(class_weight=weights))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SVM(0.0), "C is a positive number: got 0.0"),
        (lambda: SVM(math.inf), "C is a positive number"),
        (lambda: SVM(True), "C is a positive number"),
        (lambda: SVM(class_weight="even"), "class_weight is None, 'balanced'"),
        (lambda: SVM(class_weight={"ash": 0.0}), "weights of classes are positive numbers"),
        (lambda: SVM(class_weight={"ash": "much"}), "weights of classes are positive numbers"),
        (lambda: SVM(class_weight={"ash": math.nan}), "weights of classes are positive numbers"),
        (lambda: weighted({0: 1.0, 1: 2.0}).fit(X, LABELS), "class_weight names 0, and the classes are 'ash', 'birch'"),
        (lambda: weighted({"ash": 2.0, "elm": 1.0}).fit(X, LABELS), "class_weight names 'elm'"),
        (lambda: NTKClassifier(RBF(), head=SVM()).set_params(head__c=1.0), "no head__c .* has C, relative, class_w"),
        (lambda: NTKClassifier(RBF(), head=SVM()).set_params(head__C=0.0), "C is a positive number: got 0.0"),
        (lambda: NTKClassifier(RBF()).set_params(head__C=1.0), r"head__C needs head=SVM\(\): got None"),
        (lambda: SVM(max_iter="x"), "max_iter is a number of steps, 1 or more, or -1 for no limit: got 'x'"),
        (lambda: SVM(max_iter=0), "max_iter"),
        (lambda: SVM(max_iter=-2), "max_iter"),
        (lambda: SVM(max_iter=True), "max_iter"),
        (lambda: NTKClassifier(net(), head="svm").fit(X, LABELS), r"head is SVM\(C\)"),
        (lambda: NTKClassifier(net(), head=SVM(), trace=False).fit(X, LABELS), "180 rows and y 60 examples. Use trace"),
        (lambda: NTKClassifier(net(), head=SVM(), around_model=True).fit(X, LABELS), "leave around_model off"),
        (lambda: NTKClassifier(RBF(), head=SVM()).fit(X, LABELS[:9]), "60 examples and y has 9"),
        (lambda: NTKClassifier(RBF()).fit(X, LABELS[:9]), "60 examples and y has 9"),
        (lambda: NTKClassifier(RBF(), head=SVM()).fit(X, np.zeros(60)), "one class"),
        (lambda: NTKClassifier(Precomputed(), head=SVM()).fit(X, LABELS), "square|symmetric"),
        (lambda: NTKClassifier(Precomputed(), head=SVM()).fit(np.zeros((60, 60)), LABELS), "positive mean diagonal"),
        (lambda: NTKClassifier(Empirical(ntkit.linearize(net(2)))).fit(X, LABELS), "2 rows per example .* 3 columns"),
        (lambda: NTKClassifier(Empirical(ntkit.linearize(net())), head=SVM()).fit(X, LABELS), "180 rows"),
        (lambda: NTKSVMSearch(depths=(2, 1)).fit(X, LABELS), "ascending"),
        (lambda: NTKSVMSearch(Cs=(1.0, 0.1)).fit(X, LABELS), "values of C are ascending"),
        (lambda: NTKSVMSearch(Cs=()).fit(X, LABELS), "C is a positive number: got none"),
        (lambda: NTKSVMSearch(Cs=1.0).fit(X, LABELS), "values of C are a list of positive numbers: got 1.0"),
        (lambda: NTKSVMSearch(Cs="1").fit(X, LABELS), "values of C are a list"),
        (lambda: NTKSVMSearch(depths=3).fit(X, LABELS), "depths are ascending numbers .* got 3"),
        (lambda: NTKSVMSearch(depths="123").fit(X, LABELS), "depths are ascending numbers .* got '123'"),
        (lambda: NTKSVMSearch(depths=(1, 2.5)).fit(X, LABELS), "depths are ascending numbers"),
        (lambda: NTKSVMSearch(cv=True).fit(X, LABELS), "cv is a number of folds"),
        (lambda: NTKSVMSearch(cv=np.int64(1)).fit(X, LABELS), "cv is a number of folds, 2 or more"),
        (
            lambda: NTKSVMSearch(cv=[(range(40), range(40, 60)), (range(40), range(38, 60))]).fit(X, LABELS),
            "2 examples both to train on and held out, such as 38",
        ),
        (lambda: NTKSVMSearch(cv=1).fit(X, LABELS), "cv is a number of folds"),
        (lambda: NTKSVMSearch(cv=2).fit(X[:2], LABELS[:2]), "cv is a number of folds"),
        (lambda: NTKSVMSearch(cv="half").fit(X, LABELS), "cv is a number of folds, a scikit-learn splitter"),
        (lambda: NTKSVMSearch(cv=[]).fit(X, LABELS), "every split of cv has numbers"),
        (lambda: NTKSVMSearch(cv=[([0, 1], [])]).fit(X, LABELS), "every split of cv has numbers"),
        (lambda: NTKSVMSearch(cv=[([0, 1], [60])]).fit(X, LABELS), "not there: there are 60"),
        (lambda: NTKSVMSearch(cv=[(np.flatnonzero(CODES == 1), [0])]).fit(X, LABELS), "one class only"),
        (lambda: NTKSVMSearch().fit(X, np.zeros(60)), "one class"),
        (lambda: NTKSVMSearch(weight_std=-1.0).fit(X, LABELS), "weight_std"),
        (lambda: search([], CODES, [(np.arange(40), np.arange(40, 60))]), "at least one kernel"),
        (
            lambda: search([], CODES, [(np.arange(40), np.arange(40, 60))], columns=np.arange(39)),
            "not among the columns",
        ),
    ],
)  # fmt: skip
def test_unusable(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_unusable_new_data():
    with pytest.raises(InputError, match=r"shape \(3,\), .* shape \(4,\)"):
        NTKClassifier(RBF(), head=SVM()).fit(X, LABELS).predict(X_NEW[:, :3])
    matrix = (X @ X.T).numpy()
    with pytest.raises(ValueError, match="59 features, but NTKClassifier is expecting 60"):
        NTKClassifier(Precomputed(), head=SVM()).fit(matrix, LABELS).predict(matrix[:3, :59])
    with pytest.raises(NotFittedError):
        NTKClassifier(RBF(), head=SVM()).predict(X)
    with pytest.raises(NotFittedError):
        NTKSVMSearch().predict(X)


def test_defaults():
    assert SVM() == SVM(1.0, relative=True, class_weight=None, max_iter=-1)
    assert pytest.approx((1e-2, 1e-1, 1, 10, 100, 1e3, 1e4)) == DEFAULT_CS
    assert NTKSVMSearch().get_params() == {
        "depths": (1, 2, 3, 4, 5), "Cs": DEFAULT_CS, "cv": 5, "relative": True, "weight_std": math.sqrt(2),
        "bias_std": 0.0, "scaled_inputs": True, "max_iter": None, "random_state": 0, "progress": None,
    }  # fmt: skip

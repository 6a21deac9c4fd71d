from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import ntkit
from ntkit.errors import InputError, ModelError, NotPositiveDefiniteError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.closed import RBF
from ntkit.kernel.explicit import Features, Nystrom
from ntkit.solve.conditioned import Posterior
from ntkit.solve.estimators import NTKClassifier, NTKRegressor, Precomputed
from ntkit.solve.mlp import MLP
from ntkit.solve.ridge import GCV, Absolute, LeaveOneOut
from ntkit.solve.svm import SVM
from tests import oracles

N, M, D, C = 9, 5, 4, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(outputs: int = C, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


X, X_NEW, Y = normal(N, D, seed=1), normal(M, D, seed=2), normal(N, C, seed=3)
LABELS = np.array(["ash", "birch", "cedar"])[[0, 1, 2, 2, 1, 0, 0, 2, 1]]
ONE_HOT = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 2, 1, 0, 0, 2, 1]]

KERNELS = {
    "trace": ({}, oracles.trace_kernel),
    "sum of logits": ({"readout": ntkit.SumOfLogits()}, oracles.pntk),
    "sum of logits, no trace": ({"readout": ntkit.SumOfLogits(), "trace": False}, oracles.pntk),
    "one logit": ({"readout": ntkit.SingleLogit(1)}, lambda theta, c: oracles.single_logit(theta, c, 1)),
    "full": ({"trace": False}, lambda theta, c: theta),
    "full, said": ({"trace": False, "readout": ntkit.Logits()}, lambda theta, c: theta),
}
kernels = pytest.mark.parametrize(("options", "reduce"), KERNELS.values(), ids=KERNELS.keys())


def kernel_of(model: nn.Module, x1: Any, x2: Any) -> Tensor:
    return oracles.entk(model, x1, x2, lambda output: output, list(model.parameters()))


def truth(model: nn.Module, reduce: Any, targets: Tensor, *, around: bool, ridge: float = 1e-3) -> Tensor:
    """The predictions by the oracle, for a ridge relative to the mean diagonal."""
    kernel, cross = (reduce(kernel_of(model, x, X), C) for x in (X, X_NEW))
    f0, f0_new = (oracles.outputs(model, x, lambda output: output) if around else torch.zeros(1) for x in (X, X_NEW))
    y = targets - f0
    full = len(kernel) > N
    change = oracles.kernel_regression(
        kernel, cross, y.reshape(-1, 1) if full else y, ridge * float(kernel.diagonal().mean())
    )
    return f0_new + change.reshape(M, C)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_targets_of_any_precision(dtype: torch.dtype) -> None:
    """NumPy has no bfloat16."""
    got = NTKRegressor(net()).fit(X, Y.to(dtype)).predict(X_NEW)
    np.testing.assert_allclose(got, NTKRegressor(net()).fit(X, Y.to(dtype).double()).predict(X_NEW))


# ---------------------------------------------------------------- scikit-learn's own laws

SMALL = MLP(width=16, depth=1)
NOT_A_KERNEL = {
    "check_positive_only_tag_during_fit": "takes the mean off every entry, after which the matrix is not semidefinite",
    "check_estimators_dtypes": "cuts the entries to integers, after which the matrix is not semidefinite",
}


@parametrize_with_checks(
    [
        NTKRegressor(SMALL),
        NTKClassifier(SMALL),
        NTKRegressor(SMALL, ridge=LeaveOneOut(), readout=ntkit.SumOfLogits(), around_model=False),
        NTKClassifier(SMALL, ridge=GCV((1e-3, 1e-1)), trace=False, around_model=True),
        NTKRegressor(),
        NTKClassifier(),
        NTKRegressor(Precomputed()),
        NTKClassifier(Precomputed()),
    ],
    expected_failed_checks=lambda estimator: NOT_A_KERNEL if isinstance(estimator.model, Precomputed) else {},
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# ---------------------------------------------------------------- the formula


@kernels
@pytest.mark.parametrize("around", [False, True])
def test_regressor_follows_the_formula(options, reduce, around):
    model = net()
    fitted = NTKRegressor(model, around_model=around, ridge=0.01, **options).fit(X.numpy(), Y.numpy())
    got = torch.from_numpy(fitted.predict(X_NEW.numpy()))
    assert oracles.relative_error(got, truth(model, reduce, Y, around=around, ridge=0.01)) < 1e-9


@kernels
@pytest.mark.parametrize("around", [False, True])
def test_classifier_regresses_one_hot_targets(options, reduce, around):
    model = net()
    fitted = NTKClassifier(model, around_model=around, **options).fit(X.numpy(), LABELS)
    got = torch.from_numpy(fitted.decision_function(X_NEW.numpy()))
    expected = truth(model, reduce, ONE_HOT, around=around)
    assert oracles.relative_error(got, expected) < 1e-9
    assert list(fitted.classes_) == ["ash", "birch", "cedar"]
    assert list(fitted.predict(X_NEW.numpy())) == list(fitted.classes_[expected.argmax(1).numpy()])


def test_defaults():
    assert NTKRegressor().get_params() == {
        "model": None, "readout": None, "trace": True, "parameters": None, "ridge": 1e-3, "around_model": True,
        "dtype": None, "device": None, "memory": None, "random_state": None,
    }  # fmt: skip
    assert NTKClassifier().get_params() == NTKRegressor().get_params() | {"around_model": False, "head": None}


def test_a_linear_model_is_ridge_regression():
    model = nn.Linear(D, 1, bias=False).double()
    got = NTKRegressor(model, around_model=False, ridge=Absolute(0.7)).fit(X, Y[:, 0]).predict(X_NEW)
    weights = torch.linalg.solve(X.T @ X + 0.7 * torch.eye(D, dtype=torch.float64), X.T @ Y[:, 0])
    np.testing.assert_allclose(got, (X_NEW @ weights).numpy(), rtol=1e-9)


def test_decision_for_two_classes_is_a_difference():
    labels = LABELS == "ash"
    fitted = NTKClassifier(net(2)).fit(X, labels)
    decision = fitted.decision_function(X_NEW)
    assert decision.shape == (M,)
    assert list(fitted.predict(X_NEW)) == list(decision > 0)
    values = NTKRegressor(net(2), around_model=False).fit(X, np.stack([~labels, labels], 1)).predict(X_NEW)
    np.testing.assert_allclose(decision, values[:, 1] - values[:, 0])


def test_targets_keep_their_shape():
    model = net(1)
    shapes = {tuple(y.shape): NTKRegressor(model).fit(X, y).predict(X_NEW) for y in (Y[:, 0], Y[:, :1])}
    assert {shape: values.shape for shape, values in shapes.items()} == {(N,): (M,), (N, 1): (M, 1)}
    np.testing.assert_array_equal(shapes[N,], shapes[N, 1][:, 0])


def test_one_scalar_serves_any_number_of_classes():
    # the protocol of Wei, Hu and Steinhardt: one random logit of a network with other classes than ours
    fitted = NTKClassifier(net(7), readout=ntkit.SingleLogit(2)).fit(X, LABELS)
    assert fitted.decision_function(X_NEW).shape == (M, 3)


def test_random_logits_are_averaged():
    readout = ntkit.RandomLogits(5, torch.Generator().manual_seed(0))
    model = net()
    theta = kernel_of(model, X, X)
    signs = readout.signs(C)
    blocks = theta.reshape(N, C, N, C)
    expected = torch.einsum("ck,ncmd,dk->nm", signs, blocks, signs) / 5
    fitted = NTKRegressor(model, readout=readout, around_model=False, ridge=0.1).fit(X, Y)
    ridge = 0.1 * float(expected.diagonal().mean())
    coefficients = oracles.ridge_solve(expected, Y, ridge)
    assert oracles.relative_error(torch.from_numpy(fitted.dual_coef_), coefficients) < 1e-9


# ---------------------------------------------------------------- the evidence


@pytest.mark.parametrize("options", [{}, {"trace": False}])
@pytest.mark.parametrize("ridge", [0.01, GCV((0.01,))])
def test_evidence_is_that_of_refitting(options, ridge):
    model = net()
    fitted = NTKRegressor(model, ridge=ridge, **options).fit(X, Y)
    full = "trace" in options
    theta = kernel_of(model, X, X)
    kernel = theta if full else oracles.trace_kernel(theta, C)
    absolute = 0.01 * float(kernel.diagonal().mean())
    f0 = oracles.outputs(model, X, lambda output: output)
    flat = (lambda t: t.reshape(-1)) if full else (lambda t: t)
    refitted = oracles.leave_one_out(kernel, flat(Y), absolute, flat(f0), C if full else 1).reshape(N, C)
    gcv = oracles.generalized_cross_validation(kernel, flat(Y - f0), absolute) * (C if full else 1)
    assert oracles.relative_error(torch.from_numpy(fitted.loo_predictions_), refitted) < 1e-9
    assert fitted.loo_ == pytest.approx(float((Y - refitted).square().sum()) / N)
    assert fitted.gcv_ == pytest.approx(gcv)
    assert fitted.ridge_ == pytest.approx(absolute)
    assert fitted.relative_ridge_ == pytest.approx(0.01)
    assert fitted.dual_coef_.shape == (N, C)


def test_leave_one_out_accuracy():
    fitted = NTKClassifier(net()).fit(X, LABELS)
    found = [
        NTKClassifier(net(), ridge=Absolute(fitted.ridge_)).fit(X[keep], LABELS[keep]).predict(X[[n]])[0] == LABELS[n]
        for n in range(N)
        for keep in [[m for m in range(N) if m != n]]
    ]
    assert fitted.loo_accuracy_ == pytest.approx(np.mean(found))


def test_on_real_data_it_classifies_and_knows_how_well():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # as bundled, the writers of the last digits are others
    train, new = order[:500], order[500:]
    fitted = NTKClassifier(MLP(width=128), random_state=0, ridge=LeaveOneOut()).fit(images[train] / 16, labels[train])
    accuracy = fitted.score(images[new] / 16, labels[new])
    assert accuracy > 0.95
    assert abs(fitted.loo_accuracy_ - accuracy) < 0.04


# ---------------------------------------------------------------- the user's model stays the user's


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_never_changed(training):
    model = nn.Sequential(net(), nn.Dropout(0.5), nn.BatchNorm1d(C).double()).train(training)
    before = oracles.snapshot(model)
    fitted = NTKRegressor(model, dtype=torch.float32).fit(X, Y)
    fitted.predict(X_NEW)
    assert oracles.snapshot(model) == before


def test_training_goes_on_without_the_estimator():
    model = net()
    fitted = NTKRegressor(model).fit(X, Y)
    before = fitted.predict(X_NEW)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(fitted.predict(X_NEW), before)


def test_evaluation_mode_is_meant():
    model = nn.Sequential(net(), nn.Dropout(0.5))
    model.eval()
    expected = NTKRegressor(model).fit(X, Y).predict(X_NEW)
    np.testing.assert_array_equal(NTKRegressor(model.train()).fit(X, Y).predict(X_NEW), expected)


def test_a_model_that_cannot_be_copied():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no twins")

    with pytest.raises(ModelError, match=r"no twins.*pass a factory"):
        NTKRegressor(Stubborn(D, C)).fit(X, Y)


# ---------------------------------------------------------------- where the network comes from


def test_factories_are_asked_for_features_and_outputs():
    asked = []

    def make(features: Any, outputs: int) -> nn.Module:
        asked.append((features, outputs))
        return MLP(width=4)(features, outputs)

    NTKRegressor(make).fit(X, Y[:, 0])
    NTKRegressor(make).fit(X, Y)
    NTKClassifier(make).fit(X.numpy(), LABELS == "ash")
    NTKClassifier(make).fit(X.reshape(N, 2, 2), LABELS)
    assert asked == [(D, 1), (D, C), (D, 2), ((2, 2), 3)]


def test_random_state_decides_and_the_global_generator_does_not_move():
    def prediction(seed: Any) -> np.ndarray:
        return NTKRegressor(SMALL, random_state=seed).fit(X, Y).predict(X_NEW)

    before = torch.get_rng_state()
    first = prediction(0)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(prediction(0), first)
    np.testing.assert_array_equal(prediction(np.random.RandomState(3)), prediction(3))
    assert not np.allclose(prediction(1), first)
    assert not np.allclose(prediction(None), prediction(None))


def test_dtype_and_device():
    model = net()
    double = NTKRegressor(model, ridge=0.1).fit(X, Y)
    single = NTKRegressor(model, ridge=0.1, dtype=torch.float32, device="cpu").fit(X, Y)
    assert next(single.model_.parameters()).dtype == single.X_fit_.dtype == torch.float32
    assert single.regression_.kernel_dtype == torch.float32
    assert single.predict(X_NEW).dtype == np.float64
    np.testing.assert_allclose(single.predict(X_NEW), double.predict(X_NEW), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"trace": False}, {"ridge": LeaveOneOut()}])
def test_on_a_gpu_the_predictions_are_the_same(options):
    expected = NTKRegressor(net(), **options).fit(X, Y).predict(X_NEW)
    fitted = NTKRegressor(net(), device="cuda", **options).fit(X, Y)
    assert fitted.regression_.coefficients.is_cuda
    np.testing.assert_allclose(fitted.predict(X_NEW), expected, rtol=1e-8)


@pytest.mark.parametrize("parameters", ["2.*", lambda name, parameter: name.startswith("2."), "module"])
def test_some_parameters_only(parameters):
    model = net()
    estimator = NTKRegressor(model, parameters=model[2] if parameters == "module" else parameters, around_model=False)
    hidden, hidden_new = (torch.cat([torch.tanh(model[0](x)).detach(), torch.ones(len(x), 1)], 1) for x in (X, X_NEW))
    kernel = hidden @ hidden.T
    ridge = 1e-3 * float(kernel.diagonal().mean())
    expected = oracles.kernel_regression(kernel, hidden_new @ hidden.T, Y, ridge)
    for fitted in (estimator.fit(X, Y), clone(estimator).fit(X, Y), copy.deepcopy(estimator).fit(X, Y)):
        assert fitted.parameter_names_ == ("2.weight", "2.bias")
        assert oracles.relative_error(torch.from_numpy(fitted.predict(X_NEW)), expected) < 1e-9


@pytest.mark.parametrize(("depth", "layers"), [(0, 1), (1, 2), (3, 4)])
def test_mlp(depth, layers):
    network = MLP(width=8, depth=depth)((2, 3), 5)
    assert network(normal(7, 2, 3)).shape == (7, 5)
    assert sum(isinstance(module, nn.Linear) for module in network) == layers
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert sum(p.numel() for p in MLP(width=8)(6, 5).parameters()) == (6 * 8 + 8) + (8 * 8 + 8) + (8 * 5 + 5)


def test_mlp_keeps_the_size_of_the_signal():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(width=512, depth=3)(200, 400)
    assert float(network(normal(50, 200)).detach().var()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("sizes", [{"width": 0}, {"depth": -1}])
def test_mlp_checks_its_sizes(sizes):
    with pytest.raises(InputError, match="width >= 1"):
        MLP(**sizes)


# ---------------------------------------------------------------- data of many kinds


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(3, C)

    def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
        features = torch.tanh(self.convolution(images)).mean((2, 3))
        return self.head(features if scale is None else features * scale)


def images_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Images().double()


IMAGES, IMAGES_NEW, SCALES, SCALES_NEW = (
    normal(N, 1, 5, 5, seed=4), normal(M, 1, 5, 5, seed=5), normal(N, 1, seed=6), normal(M, 1, seed=7)
)  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda t: t.numpy(), lambda t: t, lambda t: t.tolist(), lambda t: TensorDataset(t)])
def test_the_same_images_in_any_form(wrap):
    expected = truth_of(images_net(), IMAGES, IMAGES_NEW)
    got = NTKRegressor(images_net()).fit(wrap(IMAGES), Y).predict(wrap(IMAGES_NEW))
    assert oracles.relative_error(torch.from_numpy(got), expected) < 1e-9


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: {"images": a, "scale": b}])
def test_several_inputs(wrap):
    data, new = wrap(IMAGES, SCALES), wrap(IMAGES_NEW, SCALES_NEW)
    got = NTKRegressor(images_net()).fit(data, Y).predict(new)
    assert oracles.relative_error(torch.from_numpy(got), truth_of(images_net(), data, new)) < 1e-9


def truth_of(model: nn.Module, x: Any, new: Any) -> Tensor:
    kernel, cross = (oracles.trace_kernel(kernel_of(model, a, x), C) for a in (x, new))
    f0, f0_new = (oracles.outputs(model, a, lambda output: output) for a in (x, new))
    return oracles.kernel_regression(kernel, cross, Y, 1e-3 * float(kernel.diagonal().mean()), f0, f0_new)


def test_token_ids_stay_integers():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, C)).double()
    ids = torch.randint(7, (N, 2), generator=torch.Generator().manual_seed(0))
    fitted = NTKRegressor(model).fit(ids, Y)
    assert fitted.X_fit_.dtype == torch.int64
    assert fitted.predict(ids).shape == (N, C)


def test_float32_tensors_meet_a_float64_network():
    got = NTKRegressor(net()).fit(X.float(), Y).predict(X_NEW.float())
    expected = NTKRegressor(net()).fit(X.float().double(), Y).predict(X_NEW.float().double())
    np.testing.assert_array_equal(got, expected)


def test_select_says_which_output():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(x)}

    expected = NTKRegressor(net(), readout=ntkit.SumOfLogits()).fit(X, Y).predict(X_NEW)
    readout = ntkit.SumOfLogits(select=pick_logits)
    np.testing.assert_allclose(NTKRegressor(Named(), readout=readout).fit(X, Y).predict(X_NEW), expected)


def pick_logits(output: dict[str, Tensor]) -> Tensor:
    return output["logits"]


# ---------------------------------------------------------------- kernels instead of networks


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("wrap", [lambda t: t.numpy(), lambda t: t, DenseKernel])
def test_precomputed_is_the_same_as_computed(full, wrap):
    model = net()
    kernel, cross = (kernel_of(model, x, X) for x in (X, X_NEW))
    if not full:
        kernel, cross = oracles.trace_kernel(kernel, C), oracles.trace_kernel(cross, C)
    network = NTKClassifier(model, trace=not full).fit(X, LABELS)
    got = NTKClassifier(Precomputed()).fit(wrap(kernel), LABELS)
    np.testing.assert_allclose(got.decision_function(wrap(cross)), network.decision_function(X_NEW), rtol=1e-8)
    assert got.loo_ == pytest.approx(network.loo_)
    regressed = NTKRegressor(Precomputed()).fit(wrap(kernel), ONE_HOT).predict(wrap(cross))
    np.testing.assert_allclose(regressed, got.decision_function(wrap(cross)))


def test_cross_validation_splits_rows_and_columns():
    x = normal(40, D)
    y = (x[:, 0] > 0).numpy()
    scores = [
        cross_val_score(estimator, data, y, cv=4)
        for estimator, data in (
            (NTKClassifier(Precomputed()), (x @ x.T).numpy()),
            (NTKClassifier(nn.Linear(D, 2, bias=False).double()), x),
        )
    ]
    np.testing.assert_array_equal(scores[0], scores[1])


# ---------------------------------------------------------------- at work with the rest of scikit-learn


@pytest.mark.parametrize("estimator", [NTKRegressor(SMALL, random_state=0), NTKRegressor(net(1))])
def test_pipeline_grid_search_and_pickle(estimator):
    x, y = normal(40, D), normal(40, D).sin().sum(1).numpy()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), estimator),
        {"ntkregressor__ridge": [1e-3, Absolute(1.0), LeaveOneOut()], "ntkregressor__trace": [True, False]},
        cv=3,
        error_score="raise",
    ).fit(x.numpy(), y)
    again = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(again.predict(x.numpy()), search.predict(x.numpy()))
    assert search.best_score_ > 0.3


def test_grid_search_over_tensors():
    x, y = normal(30, 1, 5, 5), normal(30)
    search = GridSearchCV(
        NTKRegressor(images_net(), around_model=False), {"ridge": [0.1, 1.0]}, cv=3, error_score="raise"
    )
    assert search.fit(x, y).predict(x).shape == (30,)


def test_clone_has_a_model_of_its_own():
    estimator = NTKClassifier(net(), ridge=GCV())
    twin = clone(estimator)
    assert twin.model is not estimator.model
    assert twin.ridge == estimator.ridge
    np.testing.assert_array_equal(twin.fit(X, LABELS).predict(X_NEW), estimator.fit(X, LABELS).predict(X_NEW))


# ---------------------------------------------------------------- what is refused


class Untold(Dataset):
    def __getitem__(self, index: int) -> Tensor:
        return X[index]

    def __len__(self) -> int:
        return N


NAN = torch.where(torch.arange(D) == 2, float("nan"), X)


@pytest.mark.parametrize(
    ("estimator", "x", "y", "words"),
    [
        (NTKRegressor("mlp"), X, Y, "model is a torch.nn.Module, a callable"),
        (NTKRegressor(lambda features, outputs: "net"), X, Y, "must return a torch.nn.Module: it returned str"),
        (NTKRegressor(), (X, X), Y, "got X of type tuple; pass model="),
        (NTKRegressor(), Untold(), Y, "got X of type Untold"),
        (NTKRegressor(net()), X, Y[:5], "9 examples and y has 5"),
        (NTKRegressor(net()), Untold(), Y[:5], "9 examples and y has 5"),
        (NTKRegressor(net()), X.numpy(), Y[:5], "9 examples and y has 5"),
        (NTKRegressor(net()), NAN, Y, "X contains NaN"),
        (NTKRegressor(net()), (NAN,), Y, "X contains NaN"),
        (NTKRegressor(net()), X, torch.full((N,), float("inf")), "infinity"),
        (NTKRegressor(net()), X, None, "requires y to be passed"),
        (NTKRegressor(net(2), trace=False, around_model=False), X, Y, "2 rows per example .* 3 columns"),
        (NTKRegressor(net(2)), X, Y, "the network has 2 and the targets 3"),
        (NTKClassifier(net(1), around_model=True), X, LABELS == "ash", "the network has 1 and the targets 2"),
        (NTKRegressor(net(), readout=ntkit.Loss(nn.functional.mse_loss)), X, Y, "Loss needs the targets"),
        (NTKRegressor(net(), readout="pntk"), X, Y, "read-out"),
        (
            NTKRegressor(net(), trace=False, readout=ntkit.RandomLogits(C, torch.Generator().manual_seed(0))),
            X,
            Y,
            "3 rows per example .* Use trace=True",
        ),
        (NTKRegressor(net(), ridge="auto"), X, Y, "ridge is a number"),
        (NTKRegressor(net(), ridge=-1.0), X, Y, "finite number >= 0"),
        (NTKClassifier(net()), X, np.zeros(N), "one class"),
        (NTKClassifier(net()), X, Y[:, 0], "Unknown label type"),
        (NTKRegressor(Precomputed()), X, Y, r"square|symmetric"),
        (NTKRegressor(Precomputed()), torch.eye(8), Y, "8"),
    ],
)
def test_unusable_fits(estimator, x, y, words):
    with pytest.raises(ValueError, match=words):
        estimator.fit(x, y)


def hidden() -> Features:
    return Features(net()[:2])


@pytest.mark.parametrize(
    "make",
    [hidden, lambda: hidden() + RBF(2.0), lambda: 2.0 * hidden() * RBF(2.0), lambda: Nystrom(hidden(), X[:4]),
     lambda: Nystrom(hidden() + RBF(2.0), X[:4]), lambda: Posterior(hidden(), X[:2], ridge=0.1)],
    ids=["features", "sum", "product", "Nystrom", "Nystrom of a sum", "posterior"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "y", "options"),
    [
        (NTKRegressor, Y, {}),
        (NTKRegressor, Y, {"ridge": GCV()}),
        (NTKClassifier, LABELS, {}),
        (NTKClassifier, LABELS, {"head": SVM(2.0)}),
    ],
    ids=["ridge", "search", "classes", "SVM"],
)
def test_kernel_functions_may_have_parameters_that_are_trained(make, kind, y, options):
    """Their matrices ask for gradients, and mean the same without."""
    function = make()
    assert function(X).dense().requires_grad
    found = clone(kind(function, **options)).fit(X, y)
    matrix, cross = (k.dense().detach() for k in (function(X), function(X_NEW, X)))
    plain = kind(Precomputed(), **options).fit(matrix, y)
    of = [kind.predict, *([NTKClassifier.decision_function] if kind is NTKClassifier else [])]
    for call in of:
        expected = call(plain, cross)
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(call(found, X_NEW), expected, rtol=1e-7, atol=1e-9)
        else:
            np.testing.assert_array_equal(call(found, X_NEW), expected)


def test_the_memory_budget_reaches_the_kernel():
    expected = NTKRegressor(net()).fit(X, Y).predict(X_NEW)
    np.testing.assert_allclose(NTKRegressor(net(), memory=2**20).fit(X, Y).predict(X_NEW), expected, rtol=1e-8)
    with pytest.raises(InputError, match="memory budget"):
        NTKRegressor(net(), memory=0).fit(X, Y)


def test_a_fit_that_is_singular_names_a_ridge_that_helps():
    doubled, labels = torch.cat([X, X]), np.concatenate([LABELS, LABELS])
    with pytest.raises(NotPositiveDefiniteError, match="ridge=Absolute") as caught:
        NTKClassifier(net(), ridge=0.0).fit(doubled, labels)
    fitted = NTKClassifier(net(), ridge=Absolute(caught.value.suggested_ridge)).fit(doubled, labels)
    assert fitted.score(doubled, labels) == 1


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X_NEW[:, :3].numpy(), "X has 3 features, but NTKRegressor is expecting 4"),
        (X_NEW[:, :3], r"shape \(3,\), .* shape \(4,\)"),
        (X_NEW[:, :, None], r"shape \(4, 1\), .* shape \(4,\)"),
        (X_NEW[:, :, None].numpy(), r"shape \(4, 1\), .* shape \(4,\)"),
        (torch.full((M, D), float("nan")), "NaN"),
        (np.full((M, D), np.nan), "NaN"),
    ],
)
def test_unusable_new_data(x, words):
    with pytest.raises(ValueError, match=words):
        NTKRegressor(net()).fit(X, Y).predict(x)


@pytest.mark.parametrize("method", ["predict", "decision_function"])
def test_not_fitted(method):
    with pytest.raises(NotFittedError):
        getattr(NTKClassifier(net()), method)(X)

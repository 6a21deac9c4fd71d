"""Kernel regression with the tangent kernel of a network, as scikit-learn estimators.

    f(x) = f0(x) + K(x, X) (K(X, X) + ridge I)^-1 (Y - f0(X))

Which kernel is used follows from `trace` and `readout`:

    trace=True (default)              (N, N)      the mean of the diagonal C x C blocks: of all kernels that treat every
                                                  output alike the one nearest to the full kernel, trained or not
    readout=SumOfLogits(), ...        (N, N)      one scalar per example (pNTK): C times cheaper to compute
    trace=False, readout=Logits()     (NC, NC)    the full kernel: exact, couples the outputs, C^2 times the memory

In the place of a network stands a function of examples as well (`InfiniteWidth(model)`, `FullyConnected(depth)`,
`RBF()`, what is made of them), or the kernel itself, `Precomputed()`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.utils.data import Dataset

from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import Kernel
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.function import KernelFunction
from ntkit.solve.mlp import MLP
from ntkit.solve.regression import RegressionFit, regress
from ntkit.solve.ridge import FixedRidge, SearchedRidge
from ntkit.solve.svm import SVM
from ntkit.solve.symmetric import as_kernel, symmetric_matrix
from ntkit.tangent.linearize import Tangent, linearize
from ntkit.tangent.readout import Logits, Readout

Factory = Callable[[Any, int], nn.Module]


@dataclass(frozen=True)
class Precomputed:
    """In the place of a model: X is the kernel itself.

    `fit` is given the kernel between the training examples, (N, N) or the full (N*C, N*C), and `predict` the kernel
    between new and training examples, (M, N) or (M*C, N*C): matrices or `Kernel` objects. There is no network, so f0 is
    zero. Matrices (N, N) work with scikit-learn's cross-validation, which then selects rows and columns.
    """


class _NTKEstimator(BaseEstimator):
    """What regressor and classifier share: data in, network, kernel, regression."""

    # set by the __init__ of the two estimators
    model: nn.Module | Factory | KernelFunction | Precomputed | None
    readout: Readout | None
    trace: bool
    parameters: Any
    ridge: float | FixedRidge | SearchedRidge
    around_model: bool
    dtype: torch.dtype | None
    device: torch.device | str | None
    memory: int | None
    random_state: int | np.random.RandomState | None

    # set by fit
    model_: nn.Module
    regression_: RegressionFit

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = isinstance(self.model, Precomputed)
        tags.input_tags.three_d_array = not tags.input_tags.pairwise
        return tags

    def __sklearn_clone__(self) -> _NTKEstimator:
        # All at once: `parameters` may be a submodule of `model`, and has to be one of the copied model.
        return type(self)(**copy.deepcopy(self.get_params(deep=False)))

    def _fit(self, x: Any, targets: np.ndarray) -> None:
        """Fit float targets (N, C) on data that have been read."""
        kernel, prior = self._training_kernel(x, *targets.shape)
        self.regression_ = regress(kernel, targets, self.ridge, prior=prior)
        fit = self.regression_
        self.dual_coef_ = fit.coefficients.cpu().numpy()
        self.ridge_, self.relative_ridge_ = fit.ridge, fit.relative_ridge
        self.loo_, self.gcv_ = fit.leave_one_out, fit.gcv
        self.loo_predictions_ = targets - fit.loo_residuals.cpu().numpy()

    def _values(self, X: Any) -> np.ndarray:
        """f(x), shape (M, C)."""
        check_is_fitted(self)
        kernel, prior = self._new_kernel(X, self.dual_coef_.shape[1], around=self.regression_.around)
        return self.regression_.predict(kernel, prior).detach().cpu().numpy()

    # ------------------------------------------------------------ kernels

    def _training_kernel(self, x: Any, examples: int, outputs: int) -> tuple[Any, Tensor | None]:
        """The kernel between the training examples and f0 on them, from data that have been read; remembers both."""
        if isinstance(self.model, Precomputed):
            return x, None
        if isinstance(self.model, KernelFunction):
            x = self._as_input_of_function(x)
            kernel, prior = self.model(x), None
            _check_examples(kernel.shape[0] // kernel.scalars, examples)
            if kernel.scalars not in (1, outputs):
                raise InputError(
                    f"the kernel function gives {kernel.scalars} rows per example and the targets have {outputs} "
                    "columns: it must be one row, or one for each column"
                )
        else:
            network, parameters = self._network(x, outputs)
            readout = self._readout()
            tangent = linearize(network, readout=readout, parameters=parameters)
            x = _as_input_of(network, x)
            kernel = self._kernel(tangent, x)
            _check_examples(len(tangent.examples(x)), examples)
            self._check_outputs(kernel.shape[0] // examples, outputs, readout)
            self.model_, self.parameter_names_ = network, tangent.parameter_names
            prior = self._prior(x, outputs) if self.around_model else None
        self.X_fit_ = x
        return kernel, prior

    def _new_kernel(self, X: Any, outputs: int, *, around: bool) -> tuple[Any, Tensor | None]:
        """The kernel between new and training examples, and f0 on the new ones."""
        x = self._read_inputs(X, reset=False)
        if isinstance(self.model, Precomputed):
            return x, None
        if isinstance(self.model, KernelFunction):
            return self.model(self._as_input_of_function(x), self.X_fit_), None
        x = _as_input_of(self.model_, x)
        tangent = linearize(self.model_, readout=self._readout(), parameters=self.parameter_names_)
        return self._kernel(tangent, x, self.X_fit_), self._prior(x, outputs) if around else None

    def _as_input_of_function(self, x: Any) -> Any:
        """Arrays as tensors of our type, float64 by default; what a kernel function takes else is its own business."""
        if isinstance(x, np.ndarray):
            return torch.tensor(x, dtype=self.dtype or torch.float64, device=self.device)
        if isinstance(x, Tensor):
            x = x.detach().to(device=self.device)
            return x.to(self.dtype or x.dtype) if x.is_floating_point() else x
        return x

    # ------------------------------------------------------------ the network and its kernel

    def _network(self, x: Any, outputs: int) -> tuple[nn.Module, Any]:
        """A network of our own in evaluation mode, and which of its parameters take part."""
        parameters = self.parameters
        if isinstance(self.model, nn.Module):
            try:
                # Together, so that a submodule among `parameters` is found again in the copy.
                network, parameters = copy.deepcopy((self.model, parameters))
            except Exception as error:
                raise ModelError(
                    f"the estimator keeps a copy of the model as it is now, and {type(self.model).__name__} cannot be "
                    f"copied ({error}): pass a factory, model=lambda n_features, n_outputs: ..., that makes it"
                ) from error
        elif self.model is None or callable(self.model):
            network = self._made(cast(Factory, MLP() if self.model is None else self.model), x, outputs)
        else:
            raise InputError(
                "model is a torch.nn.Module, a callable (n_features, n_outputs) -> Module, a KernelFunction, "
                f"Precomputed(), or None for an MLP: got {self.model!r}"
            )
        return network.to(device=self.device, dtype=self.dtype).eval(), parameters

    def _made(self, factory: Factory, x: Any, outputs: int) -> nn.Module:
        """The factory's network; torch's global generators are seeded for it and put back."""
        if not isinstance(x, (np.ndarray, Tensor)):
            raise InputError(
                f"a network can be made for arrays and tensors only, whose shape is known: got X of type "
                f"{type(x).__name__}; pass model=... as a torch.nn.Module"
            )
        features = x.shape[1] if x.ndim == 2 else tuple(x.shape[1:])
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            torch.manual_seed(seed)
            network = factory(features, outputs)
        if not isinstance(network, nn.Module):
            raise InputError(f"the model factory must return a torch.nn.Module: it returned {type(network).__name__}")
        return network

    def _readout(self) -> Readout:
        readout = Logits() if self.readout is None else self.readout
        if isinstance(readout, Readout) and readout.needs_targets:
            raise InputError(
                f"{type(readout).__name__} needs the targets of new examples too, so it cannot predict them: use "
                "Logits(), SumOfLogits(), SingleLogit(...) or RandomLogits(...)"
            )
        return readout

    def _kernel(self, tangent: Tangent, rows: Any, cols: Any = None) -> TangentKernel:
        return TangentKernel(tangent, rows, cols, trace=self.trace, memory=self.memory)

    @staticmethod
    def _check_outputs(scalars: int, outputs: int, readout: Readout) -> None:
        """A kernel with several rows per example is right only if these are the outputs themselves."""
        if scalars == 1 or (scalars == outputs and isinstance(readout, Logits)):
            return
        raise InputError(
            f"the kernel has {scalars} rows per example by {readout!r} and the targets have {outputs} columns: a full "
            "kernel couples outputs, so it needs Logits() of as many outputs as targets. Use trace=True, or a read-out "
            "of one scalar such as SumOfLogits(), for one kernel that is shared by all targets"
        )

    def _prior(self, x: Any, outputs: int) -> Tensor:
        """The network's own outputs, (N, C)."""
        logits = Logits(select=getattr(self._readout(), "select", None))
        prior = linearize(self.model_, readout=logits, parameters=self.parameter_names_).outputs(x)
        if prior.shape[1] != outputs:
            raise InputError(
                f"around_model=True starts from the network's outputs, one per target: the network has "
                f"{prior.shape[1]} and the targets {outputs} (classes, or columns of y); around_model=False starts "
                "from zero"
            )
        return prior

    # ------------------------------------------------------------ data

    def _read_inputs(self, X: Any, *, reset: bool) -> Any:
        """Check X without y and remember, or compare, its number of features."""
        if isinstance(self.model, Precomputed) and isinstance(X, Kernel):
            shape = X.shape
        elif _is_structured(X) and not isinstance(self.model, Precomputed):
            _require_finite(X)
            if not isinstance(X, Tensor) or X.ndim < 2:
                return X
            shape = tuple(X.shape)
        else:
            if isinstance(X, Tensor):
                X = as_array(X)
            X = validate_data(self, X, reset=reset, allow_nd=True, dtype=[np.float64, np.float32])
            shape = X.shape
        if reset:
            self.n_features_in_, self._input_shape = shape[1], tuple(shape[1:])
        elif tuple(shape[1:]) != getattr(self, "_input_shape", shape[1:]):
            raise InputError(
                f"X has examples of shape {tuple(shape[1:])}, and the fit was on examples of shape {self._input_shape}"
            )
        return X


class NTKRegressor(MultiOutputMixin, RegressorMixin, _NTKEstimator):
    """Kernel ridge regression with the tangent kernel of a network, around the network's own predictions.

    Args:
        model: a `torch.nn.Module`; a callable (n_features, n_outputs) -> Module (n_features is a tuple where X has more
            than two axes); a `KernelFunction`, such as `InfiniteWidth(module)`, around which f0 is zero and arrays
            become float64; `Precomputed()`, with which X is a kernel; or None for `MLP()`, a network of two hidden
            layers of 512 units. A module is copied by `fit` and put in evaluation mode there; yours is not changed.
        readout: which scalars of the output are differentiated, e.g. `SumOfLogits()`; None for `Logits()`.
        trace: whether to average the diagonal C x C blocks of the kernel, which leaves (N, N) for all outputs.
        parameters: which parameters take part, as in `linearize`; None for all that require gradients.
        ridge: a number, in units of the mean diagonal entry of the training kernel, or `Relative`, `Absolute`, `GCV`,
            `LeaveOneOut` of `ntkit.solve.ridge`.
        around_model: whether to regress what the network leaves of y, and add its predictions f0 back; False is f0 = 0.
        dtype: type of the network, and so of the kernel; None for the type it has. The solve is in float64 in any case.
        device: where the network, and so the kernel and the solve, are; None for where it is.
        memory: bytes of working space for computing the kernel, as for `TangentKernel`; matrix and solve come on top.
        random_state: seeds torch's generators while a callable makes the network.

    Attributes:
        model_: the network of the fit. parameter_names_: the parameters that take part. X_fit_: the training inputs.
        dual_coef_: coefficients, (N, C).
        ridge_, relative_ridge_: the ridge used, as added to the diagonal and in units of the mean diagonal.
        loo_: mean squared leave-one-out error, summed over outputs; exact, without refitting.
        loo_predictions_: prediction of each example by the fit without it, (N, C).
        gcv_: generalized cross-validation estimate of the same; see `KernelRegression.gcv` for the full kernel.
        regression_: all of the evidence, a `RegressionFit`.
        n_features_in_, feature_names_in_: as in scikit-learn.

    X is an array (N, features), or with more axes for images; it is cast to the network's type. Tensors likewise, but
    integer tensors stay integers (token ids). Also tuples and dicts of tensors and `torch.utils.data.Dataset`s, which
    scikit-learn's cross-validation cannot split. Cost: the kernel, then 2/3 n^3 and 16 n^2 bytes for the solve, with
    n = N, or NC for the full kernel; a search for the ridge takes about 9 n^3 and 24 n^2 bytes.
    """

    def __init__(  # noqa: PLR0913 (scikit-learn wants every parameter by name)
        self,
        model: nn.Module | Factory | KernelFunction | Precomputed | None = None,
        *,
        readout: Readout | None = None,
        trace: bool = True,
        parameters: Any = None,
        ridge: float | FixedRidge | SearchedRidge = 1e-3,
        around_model: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        memory: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.model = model
        self.readout = readout
        self.trace = trace
        self.parameters = parameters
        self.ridge = ridge
        self.around_model = around_model
        self.dtype = dtype
        self.device = device
        self.memory = memory
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> NTKRegressor:
        """Compute the kernel and solve for y of shape (N,) or (N, C).

        Raises:
            InputError: if data, targets or parameters do not fit each other.
            ModelError: if the network cannot be linearized.
            NotPositiveDefiniteError: if the ridge is too small, with one that helps.
        """
        y = validate_data(self, "no_validation", as_array(y), multi_output=True, y_numeric=True)
        x = self._read_inputs(X, reset=True)
        self._vector = y.ndim == 1
        self._fit(x, np.asarray(y, dtype=np.float64).reshape(len(y), -1))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """f(x), in the shape of y."""
        values = self._values(X)
        return values[:, 0] if self._vector else values


class NTKClassifier(ClassifierMixin, _NTKEstimator):
    """Classification with the tangent kernel of a network: regression on one-hot targets, or a support vector machine.

    Regression is the default. Its targets are 1 for the class and 0 for the others. With one kernel for all classes
    (the default) other codings, such as 1 - 1/C and -1/C, give the same decisions.

    `around_model` is off by default: the logits of a network that was trained with cross-entropy are defined up to a
    constant and of any size, so that "one-hot minus logits" is not a quantity that training left small. Switch it on
    for a network that was trained with squared loss on one-hot targets, whose outputs are already on that scale.

    There is no `predict_proba`: least-squares values are not probabilities. scikit-learn's `CalibratedClassifierCV`
    makes some from `decision_function`.

    Leave-one-out and GCV predict the squared error on the one-hot targets. They are honest only if the kernel has not
    seen the labels: not for a network that was trained on the same examples.

    `head=SVM(C)` puts a support vector machine in the place of the regression, on a kernel with one row per example:
    ridge and around_model play no part. `parameters` of the last layer alone give a machine on its features.

    Args:
        model: as for `NTKRegressor`; a callable is asked for one output per class, also for two classes.
        head: `SVM(C)` of `ntkit.solve.svm`, or None for ridge regression.
        readout: as for `NTKRegressor`.
        trace: as for `NTKRegressor`.
        parameters: as for `NTKRegressor`.
        ridge: as for `NTKRegressor`.
        around_model: whether to regress what the network leaves of the one-hot targets; see above.
        dtype: as for `NTKRegressor`.
        device: as for `NTKRegressor`.
        memory: as for `NTKRegressor`.
        random_state: as for `NTKRegressor`.

    Attributes:
        classes_: the labels, sorted; the columns of all (N, C) attributes.
        loo_accuracy_: share of the training examples whose class is found by the fit without them.
        machine_: with an SVM, scikit-learn's `SVC` on the kernel, for the numbers of the classes.
        n_support_: with an SVM, support vectors of each class. support_: their numbers among the training examples.
        C_, relative_C_: with an SVM, C as LIBSVM was given it, and in units of 1 / mean diagonal of the kernel.

    The other attributes are those of `NTKRegressor`; with an SVM, `dual_coef_` is that of `SVC` and what regression
    says of itself (ridge_, loo_, gcv_, ...) is not there.
    """

    def __init__(  # noqa: PLR0913 (scikit-learn wants every parameter by name)
        self,
        model: nn.Module | Factory | KernelFunction | Precomputed | None = None,
        *,
        head: SVM | None = None,
        readout: Readout | None = None,
        trace: bool = True,
        parameters: Any = None,
        ridge: float | FixedRidge | SearchedRidge = 1e-3,
        around_model: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        memory: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.model = model
        self.head = head
        self.readout = readout
        self.trace = trace
        self.parameters = parameters
        self.ridge = ridge
        self.around_model = around_model
        self.dtype = dtype
        self.device = device
        self.memory = memory
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments by name; with `deep` those of an SVM too, as head__C and so on."""
        found = super().get_params(deep=deep)
        if deep and isinstance(self.head, SVM):
            found |= {f"head__{part.name}": getattr(self.head, part.name) for part in fields(self.head)}
        return found

    def set_params(self, **params: Any) -> NTKClassifier:
        """Change arguments, as in scikit-learn; head__C and the others put a new SVM in the place of the old.

        Raises:
            InputError: if the head has no such argument, or cannot have this value.
        """
        of_head = {name.removeprefix("head__"): params.pop(name) for name in [*params] if name.startswith("head__")}
        super().set_params(**params)
        if not of_head:
            return self
        known = [part.name for part in fields(self.head)] if isinstance(self.head, SVM) else []
        unknown = [name for name in of_head if name not in known]
        if unknown:
            raise InputError(
                f"there is no head__{unknown[0]} of head={self.head!r}: an SVM has {', '.join(known)}"
                if known
                else f"head__{unknown[0]} needs head=SVM(): got {self.head!r}"
            )
        self.head = replace(cast(SVM, self.head), **of_head)
        return self

    def fit(self, X: Any, y: Any) -> NTKClassifier:
        """Compute the kernel and solve for the classes y of shape (N,).

        Raises:
            InputError: if data, targets or parameters do not fit each other, or there is one class only, or an SVM is
                asked for on a kernel with several rows per example, around the model, or with a weight of a class that
                is not there.
            ModelError: if the network cannot be linearized.
            NotPositiveDefiniteError: if the ridge is too small, with one that helps.
        """
        y = validate_data(self, "no_validation", as_array(y))
        x = self._read_inputs(X, reset=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"a classifier needs at least two classes: y has one class, {self.classes_[0]!r}")
        if self.head is not None:
            self._fit_machine(self.head, x, codes)
            return self
        self._fit(x, np.eye(len(self.classes_))[codes])
        self.loo_accuracy_ = float(np.mean(self.loo_predictions_.argmax(1) == codes))
        return self

    def _fit_machine(self, head: SVM, x: Any, codes: np.ndarray) -> None:
        if not isinstance(head, SVM):
            raise InputError(f"head is SVM(C) of ntkit.solve.svm, or None for ridge regression: got {head!r}")
        if self.around_model:
            raise InputError("an SVM does not start from the network's outputs: leave around_model off, or head out")
        kernel, _ = self._training_kernel(x, len(codes), len(self.classes_))
        rows = as_kernel(kernel).shape[0]
        if rows != len(codes):
            raise InputError(
                f"an SVM needs one number for each pair of examples: the kernel has {rows} rows and y {len(codes)} "
                "examples. Use trace=True, or a read-out of one scalar such as SumOfLogits()"
            )
        matrix = symmetric_matrix(kernel)
        self.machine_ = head.fit(matrix.values.cpu().numpy(), codes, self.classes_)
        self.C_, self.relative_C_ = self.machine_.C, self.machine_.C * matrix.mean_diagonal
        self.n_support_, self.support_ = self.machine_.n_support_, self.machine_.support_
        self.dual_coef_, self.intercept_ = self.machine_.dual_coef_, self.machine_.intercept_

    def _cross(self, X: Any) -> np.ndarray:
        """The kernel between new and training examples, for the machine."""
        kernel, _ = self._new_kernel(X, len(self.classes_), around=False)
        found = as_kernel(kernel)
        examples = self.machine_.shape_fit_[0]
        if found.shape[1] != examples:
            raise InputError(
                f"a kernel between new and training examples has shape (M, N) with N={examples}: got {found.shape}"
            )
        return found.dense().detach().double().cpu().numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """f(x), (M, C); for two classes f_1(x) - f_0(x), (M,). With an SVM, that of scikit-learn's `SVC`."""
        check_is_fitted(self)
        if self.head is not None:
            return self.machine_.decision_function(self._cross(X))
        values = self._values(X)
        return values[:, 1] - values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Any) -> np.ndarray:
        """The class with the largest f(x); with an SVM, that with the most votes of pairs."""
        check_is_fitted(self)
        if self.head is not None:
            return self.classes_[self.machine_.predict(self._cross(X))]
        values = self._values(X)
        return self.classes_[values.argmax(1)]


def _check_examples(given: int, targets: int) -> None:
    if given != targets:
        raise InputError(f"X has {given} examples and y has {targets}: they must be as many")


def _is_structured(X: Any) -> bool:
    """Whether X is data of torch rather than an array-like of scikit-learn."""
    if isinstance(X, tuple):
        return len(X) > 0 and all(isinstance(part, Tensor) for part in X)
    if isinstance(X, dict):
        return not issparse(X)  # one of SciPy's sparse matrices is a dict
    return isinstance(X, (Tensor, Dataset))


def _tensors(X: Any) -> list[Tensor]:
    parts = X.values() if isinstance(X, dict) else X if isinstance(X, tuple) else [X]
    return [part for part in parts if isinstance(part, Tensor)]


def _require_finite(X: Any) -> None:
    for part in _tensors(X):
        if part.is_floating_point() and not part.isfinite().all():
            raise InputError("X contains NaN or infinity")


def _as_input_of(network: nn.Module, x: Any) -> Any:
    """Data in the floating point type of the network; integer tensors and Datasets stay what they are."""
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())
    if isinstance(x, np.ndarray):
        return torch.tensor(x, dtype=dtype)
    if isinstance(x, Tensor):
        return x.detach().to(dtype) if x.is_floating_point() else x.detach()
    if isinstance(x, tuple):
        return tuple(_as_input_of(network, part) for part in x)
    if isinstance(x, dict):
        return {name: _as_input_of(network, part) for name, part in x.items()}
    return x


def as_array(values: Any) -> Any:
    """What came as a tensor, as an array."""
    if not isinstance(values, Tensor):
        return values
    values = values.float() if values.dtype == torch.bfloat16 else values  # which NumPy does not have
    return values.detach().cpu().numpy()

"""The tangent kernel of a PyTorch network, exact and fast, and what it says about the network.

The names below are the public ones. They are loaded on first use, so that `import ntkit` costs no more than torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ntkit.errors import (
    FidelityWarning,
    InputError,
    ModelError,
    NotPositiveDefiniteError,
    NtkitError,
    SlowRouteWarning,
    StoreError,
    StoreWarning,
    WorkerError,
)

if TYPE_CHECKING:
    from ntkit.kernel.base import DenseKernel, Kernel
    from ntkit.kernel.closed import RBF, DotProduct
    from ntkit.kernel.empirical import TangentKernel, empirical_ntk
    from ntkit.kernel.explicit import Nystrom, RandomFourier
    from ntkit.kernel.features import FeatureKernel, FeatureMap, features, open_features, size_for
    from ntkit.kernel.fully_connected import FullyConnected
    from ntkit.kernel.function import Empirical, KernelFunction
    from ntkit.kernel.infinite import InfiniteKernel, InfiniteWidth, infinite_ntk
    from ntkit.kernel.saved import SavedKernel, open_kernel
    from ntkit.solve.conditioned import Posterior
    from ntkit.solve.estimators import NTKClassifier, NTKRegressor
    from ntkit.solve.svm import SVM
    from ntkit.solve.svm_search import NTKSVMSearch
    from ntkit.solve.transformers import KernelFeatures, KernelMatrix
    from ntkit.tangent.leading import Leading
    from ntkit.tangent.linearize import Tangent, linearize
    from ntkit.tangent.readout import Logits, Loss, RandomLogits, SingleLogit, SumOfLogits

__version__ = "0.1.0"

__all__ = [
    "RBF",
    "SVM",
    "DenseKernel",
    "DotProduct",
    "Empirical",
    "FeatureKernel",
    "FeatureMap",
    "FidelityWarning",
    "FullyConnected",
    "InfiniteKernel",
    "InfiniteWidth",
    "InputError",
    "Kernel",
    "KernelFeatures",
    "KernelFunction",
    "KernelMatrix",
    "Leading",
    "Logits",
    "Loss",
    "ModelError",
    "NTKClassifier",
    "NTKRegressor",
    "NTKSVMSearch",
    "NotPositiveDefiniteError",
    "NtkitError",
    "Nystrom",
    "Posterior",
    "RandomFourier",
    "RandomLogits",
    "SavedKernel",
    "SingleLogit",
    "SlowRouteWarning",
    "StoreError",
    "StoreWarning",
    "SumOfLogits",
    "Tangent",
    "TangentKernel",
    "WorkerError",
    "__version__",
    "empirical_ntk",
    "features",
    "infinite_ntk",
    "linearize",
    "open_features",
    "open_kernel",
    "size_for",
]

_HOME = {
    "DenseKernel": "ntkit.kernel.base",
    "DotProduct": "ntkit.kernel.closed",
    "Empirical": "ntkit.kernel.function",
    "FeatureKernel": "ntkit.kernel.features",
    "FeatureMap": "ntkit.kernel.features",
    "FullyConnected": "ntkit.kernel.fully_connected",
    "InfiniteKernel": "ntkit.kernel.infinite",
    "InfiniteWidth": "ntkit.kernel.infinite",
    "Kernel": "ntkit.kernel.base",
    "KernelFeatures": "ntkit.solve.transformers",
    "KernelFunction": "ntkit.kernel.function",
    "KernelMatrix": "ntkit.solve.transformers",
    "Leading": "ntkit.tangent.leading",
    "Logits": "ntkit.tangent.readout",
    "Loss": "ntkit.tangent.readout",
    "NTKClassifier": "ntkit.solve.estimators",
    "NTKRegressor": "ntkit.solve.estimators",
    "NTKSVMSearch": "ntkit.solve.svm_search",
    "Nystrom": "ntkit.kernel.explicit",
    "Posterior": "ntkit.solve.conditioned",
    "RBF": "ntkit.kernel.closed",
    "RandomFourier": "ntkit.kernel.explicit",
    "RandomLogits": "ntkit.tangent.readout",
    "SVM": "ntkit.solve.svm",
    "SavedKernel": "ntkit.kernel.saved",
    "SingleLogit": "ntkit.tangent.readout",
    "SumOfLogits": "ntkit.tangent.readout",
    "Tangent": "ntkit.tangent.linearize",
    "TangentKernel": "ntkit.kernel.empirical",
    "empirical_ntk": "ntkit.kernel.empirical",
    "features": "ntkit.kernel.features",
    "infinite_ntk": "ntkit.kernel.infinite",
    "linearize": "ntkit.tangent.linearize",
    "open_features": "ntkit.kernel.features",
    "open_kernel": "ntkit.kernel.saved",
    "size_for": "ntkit.kernel.features",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module where it lives (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    """List the public names that are not loaded yet as well, so that completion finds them."""
    return sorted({*globals(), *__all__})

"""What can go wrong, in words: each message says what was got, what was expected and what to do about it."""

from __future__ import annotations

from numpy.linalg import LinAlgError


class NtkitError(Exception):
    """Base of every error that this package raises on purpose.

    Raised itself only when a promise of this package is broken from the inside; catch it to catch all the others.
    """


class InputError(NtkitError, ValueError):
    """Raised when an argument cannot be used: wrong type, shape, length, dtype or value of data, targets or options."""


class ModelError(NtkitError, ValueError):
    """Raised when a model cannot be linearized as it stands.

    Its examples are not independent (BatchNorm in training mode), it is random (Dropout in training mode), its output
    does not fit the read-out, it has no parameter that takes part, or its outputs or gradients are not finite.
    """


class NotPositiveDefiniteError(NtkitError, LinAlgError):
    """Raised when a kernel plus its ridge is singular or indefinite, so that it cannot be solved with.

    Attributes:
        smallest_eigenvalue: smallest eigenvalue of the matrix that failed, in its own units.
        suggested_ridge: absolute ridge that, added to the diagonal of the kernel, makes the solve safe.
    """

    smallest_eigenvalue: float
    suggested_ridge: float

    def __init__(self, message: str, smallest_eigenvalue: float, suggested_ridge: float) -> None:
        super().__init__(message)
        self.smallest_eigenvalue = float(smallest_eigenvalue)
        self.suggested_ridge = float(suggested_ridge)

    def __reduce__(self) -> tuple[type[NotPositiveDefiniteError], tuple[str, float, float]]:
        # The default would call the class with the message alone when a worker process hands the error back.
        return type(self), (str(self), self.smallest_eigenvalue, self.suggested_ridge)


class StoreError(NtkitError):
    """Raised when a matrix on disk cannot be read or written as it stands.

    It is damaged, unfinished, of another model or other data, in use by another run, or the disk is full. What is on
    disk is left as it is.
    """


class WorkerError(NtkitError):
    """Raised when worker processes die again and again; what they had finished is kept."""


class SlowRouteWarning(UserWarning):
    """Issued once when some parameter has no rule and goes through the generic route: exact, but slower."""


class FidelityWarning(UserWarning):
    """Issued when a reduced kernel is measurably a poor stand-in for the exact one, saying by how much."""


class StoreWarning(UserWarning):
    """Issued when a matrix on disk goes on in another way than a run without interruption would.

    A part of it is damaged and will be computed again, naming the file, or there is less memory than it was begun with.
    """

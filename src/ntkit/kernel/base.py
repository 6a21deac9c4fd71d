"""The one shape every kernel has: a 2-D matrix that is read in tiles.

Two things are required of a kernel, its `shape` and a `tile` of it. Everything else a user of a matrix expects is
derived from them here, and may be overridden where a kernel knows a faster way.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.tangent.identity import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scipy.sparse.linalg import LinearOperator

    from ntkit.kernel.saved import SavedKernel
    from ntkit.kernel.tasks import Workers

# Rows read at once by the derived methods. Large enough for a matrix product to be efficient, small enough that a
# strip of a tall matrix stays far from the size of the whole.
STRIP = 1024
# Most rows and columns of a tile on disk: 128 MB in float64.
EDGE = 4096


Solved = TypeVar("Solved", covariant=True)


class Solver(Protocol[Solved]):
    """What solves with a kernel; those of the library are in `ntkit.solve`."""

    def solve(self, kernel: Any, y: Any, ridge: Any) -> Solved:
        """(K + ridge I)^-1 y."""
        ...


class Kernel(ABC):
    """A matrix of inner products, example-major: row n*K + k is read-out scalar k of example n.

    Required: `shape`, `dtype`, `device` and `tile(rows, cols)`. Derived from those: `dense`, `diagonal`, `@`, `solve`,
    `to_scipy`, sums, products, scaling and centring.

    Attributes:
        scalars: rows per example, K.
    """

    scalars: int = 1

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating point type of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device on which tiles appear."""

    @property
    @abstractmethod
    def symmetric(self) -> bool:
        """Whether rows and columns stand for the same scalars, so that the matrix equals its transpose."""

    @abstractmethod
    def tile(self, rows: slice, cols: slice) -> Tensor:
        """The entries at `rows` x `cols` (slices with step 1, as for a NumPy array) as a dense tensor."""

    def dense(self) -> Tensor:
        """The whole matrix. Memory: rows * columns entries."""
        return self.tile(slice(None), slice(None))

    def diagonal(self) -> Tensor:
        """The main diagonal, shape (min(rows, columns),)."""
        size = min(self.shape)
        return torch.cat([self.tile(strip, strip).diagonal() for strip in strips(size)] or [self._empty(0)])

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """Product with a vector (columns,) or a block of right-hand sides (columns, R), strip by strip.

        Raises:
            InputError: if it is of another shape, or nothing that a kernel is multiplied by.
        """
        other = self._operand(other)
        products = [self.tile(strip, slice(None)).to(other.dtype) @ other for strip in strips(self.shape[0])]
        return torch.cat(products) if products else other.new_zeros(0, *other.shape[1:])

    def solve(self, y: Any, ridge: Any = 0.0, *, by: Solver[Solved]) -> Solved:
        """(K + ridge I)^-1 y, and how far to believe it: `kernel.solve(y, 1e-2, by=Cholesky())`.

        Args:
            y: right-hand sides (n,) or (n, R).
            ridge: a number is relative to the mean diagonal entry; `ntkit.solve.ridge.Absolute(...)` is not.
            by: `Cholesky`, `CholeskyInPlace`, `ConjugateGradients` of `ntkit.solve`, or anything that has such a
                `solve`. It decides the cost, and what comes back besides the `value`.

        Raises:
            InputError: if `by` is no solver, or as the solver says.
        """
        if isinstance(by, type) or not callable(getattr(by, "solve", None)):
            raise InputError(f"a kernel is solved by an object such as ConjugateGradients(): got by={by!r}")
        return by.solve(self, y, ridge)

    def to_scipy(self) -> LinearOperator:
        """The kernel as a SciPy `LinearOperator` (on the CPU), for SciPy's iterative solvers and eigensolvers."""
        from scipy.sparse.linalg import LinearOperator

        from ntkit.kernel.algebra import Transposed

        def product(kernel: Kernel, v: np.ndarray) -> np.ndarray:
            return (kernel @ torch.from_numpy(np.array(v))).cpu().numpy()

        transposed = self if self.symmetric else Transposed(self)
        return LinearOperator(
            # half precision is nothing that NumPy (bfloat16) or ARPACK (float16) could compute with
            dtype=torch.empty(0, dtype=torch.promote_types(self.dtype, torch.float32)).numpy().dtype,
            shape=self.shape,
            matvec=lambda v: product(self, v.reshape(-1)),  # pyright: ignore[reportCallIssue]
            rmatvec=lambda v: product(transposed, v.reshape(-1)),  # pyright: ignore[reportCallIssue]
            matmat=lambda v: product(self, v),  # pyright: ignore[reportCallIssue]
            rmatmat=lambda v: product(transposed, v),  # pyright: ignore[reportCallIssue]
        )

    def __add__(self, other: Kernel) -> Kernel:
        """Sum of two kernels on the same examples: the kernel of the concatenated features."""
        from ntkit.kernel.algebra import Sum

        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, factor: float | Kernel) -> Kernel:
        """The kernel scaled by a number, or entry by entry times another kernel: that of the products of features.

        Raises:
            InputError: if the number is not finite, or the other kernel has another shape.
        """
        from ntkit.kernel.algebra import Product, Scaled

        if isinstance(factor, Kernel):
            return Product(self, factor)
        return Scaled(self, float(factor)) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def centred(self) -> Kernel:
        """H K H with H = I - 11^T/n: the kernel of features whose mean over the examples has been removed."""
        from ntkit.kernel.algebra import Centred

        return Centred(self)

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:
        """Tiles of the same rows one after another, for kernels that can share work between them.

        Args:
            rows: of all the tiles.
            columns: of each tile.
            memory: bytes of working space; a kernel that needs none ignores it.
        """
        return (self.tile(rows, columns) for columns in columns)

    def examples(self, numbers: Sequence[int]) -> Tensor:
        """The rows of some examples by number, (len(numbers) * K, columns): neighbours are not asked for."""
        k = self.scalars
        rows = [self.tile(slice(i * k, (i + 1) * k), slice(None)) for i in numbers]
        return torch.cat(rows) if rows else self._empty(0, self.shape[1])

    def tile_rows(self, memory: int) -> int:
        """Rows and columns of a tile on disk such that computing and writing one stays within `memory` bytes."""
        return max(1, min(EDGE, math.isqrt(memory // 64)))  # four copies at once in float64 take half of it

    def identity(self) -> dict[str, str]:
        """What the entries depend on, in named parts: a matrix on disk is continued only if all are as they were.

        Raises:
            InputError: if the kernel does not say.
        """
        raise InputError(
            f"a {type(self).__name__} does not say what its entries depend on, so that a matrix on disk could be told "
            "from another: define identity() -> dict[str, str], with digests of its parameters and data"
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        workers: int | Workers | Any | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SavedKernel:
        """Compute the matrix tile by tile into a Zarr array on disk, or go on where a killed run has stopped.

        Of a symmetric kernel one half is computed and stored. A tile is written whole, with a checksum; tiles that are
        there are kept, damaged ones are announced and computed again.

        Args:
            path: the folder, for example "k.zarr".
            dtype: of the entries on disk (float16, float32, float64); the kernel's own by default.
            memory: bytes of working space, of all workers together; an eighth of the machine's memory by default. What
                a matrix was begun with decides its last bits: less is used, and said (`StoreWarning`), more is not.
            workers: None computes here; a number starts that many processes; a `concurrent.futures.Executor` or a
                `distributed.Client` is used as it is, and has to see the same disk.
            progress: called with (tiles done, tiles in all).

        Returns:
            The finished matrix, read from disk.

        Raises:
            InputError: if the arguments cannot be used, or `path` is something else.
            StoreError: if `path` holds a matrix of another model or other data, the disk is full, or another run is
                writing there.
        """
        from ntkit.kernel.saved import save_kernel

        return save_kernel(self, path, dtype=dtype, memory=memory, workers=workers, progress=progress)

    def _operand(self, other: Tensor | np.ndarray) -> Tensor:
        """What the kernel is multiplied by: on its device, in the wider type of the two.

        Raises:
            InputError: if it is of another shape, or no tensor or array.
        """
        if isinstance(other, np.ndarray):
            other = torch.from_numpy(np.array(other))  # a copy: torch warns of memory that cannot be written to
        if not isinstance(other, Tensor):
            raise InputError(f"a kernel is multiplied by a tensor or a NumPy array: got {type(other).__name__}")
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            raise InputError(
                f"cannot multiply a kernel of shape {self.shape} by a tensor of shape {tuple(other.shape)}: "
                f"expected ({self.shape[1]},) or ({self.shape[1]}, R)"
            )
        return other.to(self.device, torch.promote_types(self.dtype, other.dtype))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)


def strips(size: int, height: int = STRIP) -> Iterator[slice]:
    """Consecutive slices of at most `height` that cover range(size)."""
    return (slice(start, min(start + height, size)) for start in range(0, size, height))


def bounds(index: slice, size: int) -> tuple[int, int]:
    """Start and stop of a slice over `size` entries.

    Raises:
        InputError: if it is no slice, or has a step other than 1.
    """
    if not isinstance(index, slice):
        raise InputError(f"a tile is named by slices, as in tile(slice(0, 9), slice(30, 60)): got {index!r}")
    start, stop, step = index.indices(size)
    if step != 1:
        raise InputError(f"a kernel is read in tiles of neighbouring rows: got a slice with step {step}, expected 1")
    return start, max(start, stop)


class DenseKernel(Kernel):
    """A matrix that is already there, as a kernel."""

    def __init__(self, matrix: Tensor, *, symmetric: bool | None = None) -> None:
        """Wrap a 2-D floating point tensor; `symmetric` defaults to a comparison with the transpose."""
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise InputError(
                f"a kernel is a 2-D floating point tensor: got shape {tuple(matrix.shape)}, dtype {matrix.dtype}"
            )
        self._matrix = matrix
        square = matrix.shape[0] == matrix.shape[1]
        self._symmetric = square and torch.equal(matrix, matrix.T) if symmetric is None else symmetric

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self._matrix.shape[0], self._matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self._matrix.device

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self._symmetric

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        (a, b), (c, d) = bounds(rows, self.shape[0]), bounds(cols, self.shape[1])
        return self._matrix[a:b, c:d]

    def identity(self) -> dict[str, str]:
        """The entries themselves. Cost: reads them once."""
        return {"kernel": "dense", "entries": digest([self._matrix])}

"""The laws of a kernel as a matrix read in tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.base import Kernel
from ntkit.kernel.closed import RBF
from ntkit.kernel.empirical import by_module
from ntkit.kernel.explicit import Features
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.tangent.grain import CPU
from tests import oracles
from tests.cases import CASES, Net, mlp, normal, weight

quick = settings(max_examples=12, deadline=None)
N, M, C = 7, 4, 3


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, C),
    )  # fmt: skip


def tokens() -> nn.Module:
    return Net(
        lambda m, ids: m.head(m.layer(m.table(ids) + m.place).mean(1)), table=nn.Embedding(9, 8), place=weight(4, 8),
        layer=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), head=nn.Linear(8, C),
    )  # fmt: skip


def tied() -> nn.Module:
    table = weight(9, 6)
    return Net(lambda m, ids: (m.f(m.table[ids].sum(1)).tanh() @ m.table.T)[:, :C], table=table, f=nn.Linear(6, 6))


def integers(n: int, seed: int) -> Tensor:
    return torch.randint(9, (n, 4), generator=torch.Generator().manual_seed(seed))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "mlp": (mlp, lambda n, seed: normal(5, seed=seed)(n)),
    "cnn": (cnn, lambda n, seed: normal(2, 6, 6, seed=seed)(n)),
    "tokens": (tokens, integers),
    "tied": (tied, integers),
}
READOUTS = {"logits": ntkit.Logits(), "sum": ntkit.SumOfLogits()}
KINDS = [(name, readout, trace) for name in NETWORKS for readout, trace in (("logits", 0), ("logits", 1), ("sum", 0))]


@cache
def tangent(name: str, readout: str = "logits") -> ntkit.Tangent:
    torch.manual_seed(0)
    return ntkit.linearize(NETWORKS[name][0]().double().eval(), readout=READOUTS[readout])


def examples(name: str, n: int, seed: int = 1) -> Tensor:
    return NETWORKS[name][1](n, seed)


def kernel(kind: tuple[str, str, int], *, symmetric: bool, memory: int | None = None) -> ntkit.TangentKernel:
    name, readout, trace = kind
    x2 = None if symmetric else examples(name, M, 2)
    return ntkit.TangentKernel(tangent(name, readout), examples(name, N), x2, trace=bool(trace), memory=memory)


@cache
def truth(kind: tuple[str, str, int], symmetric: bool) -> Tensor:
    """The dense kernel from the library's Jacobian of one example at a time, which has its own test."""
    name, readout, trace = kind
    left = jacobian(name, readout, N, 1)
    right = left if symmetric else jacobian(name, readout, M, 2)
    theta = left @ right.T
    return oracles.trace_kernel(theta, C) if trace else theta


@cache
def jacobian(name: str, readout: str, n: int, seed: int) -> Tensor:
    model = tangent(name, readout).model
    return oracles.jacobian_rows(model, examples(name, n, seed), READOUTS[readout].scalars, list(model.parameters()))


kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k[0]}-{k[1]}{'-trace' if k[2] else ''}")
both = pytest.mark.parametrize("symmetric", [False, True], ids=["rectangular", "symmetric"])
BUDGETS = [1, 6_000, 60_000]


# ---------------------------------------------------------------- tiles and budgets


@kinds
@both
@pytest.mark.parametrize("memory", [*BUDGETS, None])
def test_any_budget_gives_the_same_matrix(kind: Any, symmetric: bool, memory: int | None) -> None:
    got = kernel(kind, symmetric=symmetric, memory=memory)
    assert got.shape == truth(kind, symmetric).shape
    assert (got.dtype, got.device, got.symmetric) == (torch.float64, torch.device("cpu"), symmetric)
    assert oracles.relative_error(got.dense(), truth(kind, symmetric)) <= 1e-12
    if symmetric:
        assert torch.equal(got.dense(), got.dense().T)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_tile_is_the_dense_block(data: st.DataObject) -> None:
    kind, symmetric = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    got = kernel(kind, symmetric=symmetric, memory=data.draw(st.sampled_from([*BUDGETS, None])))
    rows, cols = (slice(*data.draw(st.tuples(ends(size), ends(size)))) for size in got.shape)
    if symmetric and data.draw(st.booleans()):
        cols = rows
    expected = truth(kind, symmetric)
    tile = got.tile(rows, cols)
    assert tile.shape == expected[rows, cols].shape
    assert torch.allclose(tile, expected[rows, cols], rtol=0, atol=1e-12 * float(expected.abs().max()))


def ends(size: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(-size - 2, size + 2)


def test_tiles_have_no_steps() -> None:
    with pytest.raises(InputError, match="step 2, expected 1"):
        kernel(KINDS[0], symmetric=True).tile(slice(None, None, 2), slice(None))


def test_tiles_larger_than_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge of a tile is far above the sizes of tests: bring it down, so that several tiles meet."""
    monkeypatch.setattr("ntkit.tangent.grain.CPU", replace(CPU, tile=2 * C + 1))
    monkeypatch.setattr("ntkit.kernel.base.STRIP", 2 * C + 1)
    for kind in KINDS:
        for symmetric in (False, True):
            got = kernel(kind, symmetric=symmetric)
            assert oracles.relative_error(got.dense(), truth(kind, symmetric)) <= 1e-12
            v = normal(2, seed=3)(got.shape[1])
            assert oracles.relative_error(got @ v, truth(kind, symmetric) @ v) <= 1e-12


# ---------------------------------------------------------------- symmetry


@kinds
def test_the_same_examples_twice_are_symmetric_up_to_rounding(kind: Any) -> None:
    name, readout, trace = kind
    x = examples(name, N)
    twice = ntkit.TangentKernel(tangent(name, readout), x, x, trace=bool(trace))
    once = kernel(kind, symmetric=True)
    assert not twice.symmetric
    assert oracles.relative_error(twice.dense(), once.dense()) <= 1e-13


@kinds
def test_positive_semidefinite(kind: Any) -> None:
    values = torch.linalg.eigvalsh(kernel(kind, symmetric=True).dense())
    assert values[0] >= -1e-12 * values[-1]
    assert values[-1] > 0


@kinds
@both
def test_diagonal(kind: Any, symmetric: bool) -> None:
    got = kernel(kind, symmetric=symmetric)
    assert oracles.relative_error(got.diagonal(), truth(kind, symmetric).diagonal()) <= 1e-12


def test_diagonal_with_a_single_number_for_a_parameter() -> None:
    model = Net(lambda m, x: m.f(x) * m.scale, f=nn.Linear(5, 3), scale=nn.Parameter(torch.tensor(2.0))).double()
    got = ntkit.TangentKernel(ntkit.linearize(model), examples("mlp", 4))
    assert oracles.relative_error(got.diagonal(), got.dense().diagonal()) <= 1e-12


@given(data=st.data())
@quick
def test_permuting_examples_permutes_the_kernel(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    order = torch.tensor(data.draw(st.permutations(range(N))))
    name, readout, trace = kind
    permuted = ntkit.TangentKernel(
        tangent(name, readout), examples(name, N)[order], trace=bool(trace), memory=data.draw(st.sampled_from(BUDGETS))
    )
    k = permuted.scalars
    rows = (order[:, None] * k + torch.arange(k)).flatten()
    assert oracles.relative_error(permuted.dense(), truth(kind, True)[rows][:, rows]) <= 1e-12


@pytest.mark.parametrize(
    ("first", "second"), [(slice(0, 2), slice(1, 3)), (slice(0, 1), slice(0, 1)), (slice(0, 2),) * 2]
)
def test_slices_of_a_parameter_that_share_entries(first: slice, second: slice) -> None:
    """Two uses of one parameter have cross terms as soon as they have one entry in common."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: (
            F.linear(x[:, :1], m.w[first]).sum(1, True) + F.linear(x[:, 1:2], m.w[second]).square().sum(1, True)
        ),
        w=weight(3, 1),
    ).double()
    x = examples("mlp", 4)
    truth = oracles.entk(model, x, x, lambda y: y, list(model.parameters()))
    assert oracles.relative_error(ntkit.empirical_ntk(model, x), truth) <= 1e-12


def test_padding_counted_from_the_end() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, ids: F.embedding(ids, m.table, padding_idx=-1).square().sum(1), table=weight(9, 3)).double()
    ids = torch.tensor([[8, 8, 1], [0, 8, 1], [2, 3, 8]])
    truth = oracles.entk(model, ids, ids, lambda y: y, list(model.parameters()))
    assert oracles.relative_error(ntkit.empirical_ntk(model, ids), truth) <= 1e-12


# ---------------------------------------------------------------- reductions


@pytest.mark.parametrize("name", NETWORKS)
@both
def test_reduced_kernels_from_the_full_one(name: str, symmetric: bool) -> None:
    full = kernel((name, "logits", 0), symmetric=symmetric).dense()
    trace = kernel((name, "logits", 1), symmetric=symmetric).dense()
    pntk = kernel((name, "sum", 0), symmetric=symmetric).dense()
    assert oracles.relative_error(trace, oracles.trace_kernel(full, C)) <= 1e-12
    assert oracles.relative_error(pntk, oracles.pntk(full, C)) <= 1e-12


# ---------------------------------------------------------------- products


@kinds
@both
@pytest.mark.parametrize("memory", [1, None])
def test_products(kind: Any, symmetric: bool, memory: int | None) -> None:
    got, expected = kernel(kind, symmetric=symmetric, memory=memory), truth(kind, symmetric)
    for shape in ((), (4,)) if memory else ((), (4,), (1,), (0,)):
        v = normal(*shape, seed=3)(expected.shape[1])
        assert (got @ v).shape == (expected @ v).shape
        assert torch.allclose(got @ v, expected @ v, rtol=1e-11, atol=1e-11)


def test_products_take_the_wider_type() -> None:
    got = kernel(KINDS[0], symmetric=False)
    v = torch.ones(got.shape[1])
    assert (got @ v).dtype == torch.float64
    narrow = ntkit.TangentKernel(ntkit.linearize(mlp().eval()), torch.randn(4, 5))
    assert narrow.dense().dtype == torch.float32
    assert (narrow @ torch.ones(12, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("shape", [(N * C,), (M * C, 2, 2), (), (M,)])
def test_products_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    for got in (kernel(KINDS[0], symmetric=False), ntkit.DenseKernel(torch.eye(N * C, M * C))):
        with pytest.raises(InputError, match=r"cannot multiply a kernel of shape \(21, 12\).*expected \(12,\)"):
            got @ torch.zeros(shape)


class Mixed(nn.Module):
    """Two layers in two types."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 16, dtype=first), nn.Linear(16, 3, dtype=second)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.to(self.a.weight.dtype)).tanh().to(self.b.weight.dtype))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "scale"), [(torch.bfloat16, torch.float32, 1e-3), (torch.float32, torch.bfloat16, 1e3)]
)
def test_parameters_of_several_types_give_a_kernel_of_the_widest(
    first: torch.dtype, second: torch.dtype, scale: float, trace: bool
) -> None:
    """What the layer in float32 gives, here nearly all, is not rounded to the type of the other."""
    torch.manual_seed(0)
    model, x = Mixed(first, second), torch.randn(6, 5)
    with torch.no_grad():
        model.b.weight.mul_(scale)
    got = ntkit.TangentKernel(ntkit.linearize(model), x, trace=trace)
    rows = got.tangent.jacobian(x).double()
    truth = oracles.trace_kernel(rows @ rows.T, C) if trace else rows @ rows.T
    assert {got.dtype, got.dense().dtype, got.diagonal().dtype, (got @ got.dense()).dtype} == {torch.float32}
    assert oracles.relative_error(got.dense(), truth) <= 1e-5
    assert oracles.relative_error(got.diagonal(), truth.diagonal()) <= 1e-5
    assert got.tangent.vjp(x, torch.ones(6, 3)).dtype == torch.float32
    v = torch.ones(got.tangent.count)
    assert oracles.relative_error(got.tangent.jvp(x, v).double().reshape(-1), rows @ v.double()) <= 0.05


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_a_head_in_double_precision_has_the_rounding_of_what_is_below_it() -> None:
    """Which is no sign of examples that are mixed, nor of gradients that cannot be captured: no warning, no error."""
    for seed in range(5):
        torch.manual_seed(seed)
        below = nn.Sequential(nn.Linear(30, 300), nn.Tanh(), nn.LayerNorm(300))
        model = nn.Sequential(below, Widened(), nn.Linear(300, 3).double()).eval()
        x = torch.randn(4, 30)
        rows = oracles.jacobian_rows(model, x, lambda out: out, list(model.parameters())).double()
        assert oracles.relative_error(ntkit.empirical_ntk(model, x), rows @ rows.T) <= 1e-5


def every_kernel() -> dict[str, Kernel]:
    """One of each way to multiply and to read tiles, of nine columns."""
    tangent, x = ntkit.linearize(mlp().double().eval(), readout=ntkit.SumOfLogits()), normal(5)(9)
    exact = ntkit.TangentKernel(tangent, x)
    generator = torch.Generator().manual_seed(0)
    return {
        "tangent": exact,
        "matrix-free": MatrixFreeKernel(tangent, x),
        "dense": ntkit.DenseKernel(exact.dense()),
        "sum": exact + exact,
        "features": ntkit.features(tangent, x, size=16, generator=generator),
        "explicit": Features(lambda x: x)(x),
        "closed": RBF(1.0)(x),
    }


def test_every_kernel_multiplies_arrays() -> None:
    v = np.random.default_rng(0).standard_normal((9, 2))
    v.setflags(write=False)
    for name, got in every_kernel().items():
        for right in (v, v[:, 0], v[:, 0].astype(np.float32), np.arange(9)):
            product = got @ right
            assert product.dtype == torch.float64, name
            assert torch.allclose(product, got.dense() @ torch.from_numpy(np.array(right)).double(), rtol=1e-6), name
        with pytest.raises(InputError, match="multiplied by a tensor or a NumPy array: got list"):
            got @ [1.0] * 9  # pyright: ignore[reportOperatorIssue]
        with pytest.raises(InputError, match="cannot multiply a kernel of shape"):
            got @ v[:5]


def test_tiles_are_named_by_slices() -> None:
    for got in every_kernel().values():
        with pytest.raises(InputError, match=r"named by slices, as in tile\(slice\(0, 9\).*: got 0"):
            got.tile(0, slice(1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("examples", [0, -3, 2.5, True])
def test_a_plan_is_for_some_examples(examples: Any) -> None:
    with pytest.raises(InputError, match=f"positive number of examples: got {examples}"):
        every_kernel()["tangent"].plan(examples)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_kernel_is_scaled_by_a_finite_number(factor: float) -> None:
    for got in every_kernel().values():
        with pytest.raises(InputError, match="scaled by a finite number: got"):
            factor * got
        assert torch.equal((got * -2.0).dense(), -2.0 * got.dense())


@kinds
@both
def test_scipy(kind: Any, symmetric: bool) -> None:
    operator, expected = kernel(kind, symmetric=symmetric).to_scipy(), truth(kind, symmetric).numpy()
    assert operator.shape == expected.shape
    assert operator.dtype == np.float64
    rng = np.random.default_rng(0)
    v, w = rng.standard_normal(expected.shape[1]), rng.standard_normal(expected.shape[0])
    assert np.allclose(operator @ v, expected @ v)
    assert np.allclose(operator @ v[:, None], expected @ v[:, None])
    assert np.allclose(operator.rmatvec(w), expected.T @ w)
    assert np.allclose(operator @ np.stack([v, -v, 2 * v], 1)[:, ::2], expected @ np.stack([v, 2 * v], 1))
    assert np.allclose(operator.rmatmat(np.stack([w, -w], 1)), expected.T @ np.stack([w, -w], 1))


def test_scipy_takes_a_vector_that_cannot_be_written() -> None:
    v = np.ones(N * C)
    v.setflags(write=False)
    assert np.allclose(kernel(KINDS[0], symmetric=True).to_scipy() @ v, truth(KINDS[0], True).numpy() @ v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scipy_gets_half_precision_in_single(dtype: torch.dtype) -> None:
    matrix = truth(KINDS[0], True).to(dtype)
    operator = ntkit.DenseKernel(matrix, symmetric=True).to_scipy()
    assert operator.dtype == np.float32
    v = np.ones(len(matrix))
    assert np.allclose(operator @ v, matrix.double().numpy() @ v)
    largest = eigsh(operator, k=3, which="LM", return_eigenvectors=False, rng=np.random.default_rng(0))
    assert np.allclose(np.sort(largest), torch.linalg.eigvalsh(matrix.double())[-3:].numpy(), rtol=1e-4)


def test_scipy_eigensolver() -> None:
    got = kernel(KINDS[0], symmetric=True)
    largest = eigsh(got.to_scipy(), k=3, which="LM", return_eigenvectors=False, rng=np.random.default_rng(0))
    assert np.allclose(np.sort(largest), torch.linalg.eigvalsh(truth(KINDS[0], True))[-3:].numpy())


# ---------------------------------------------------------------- kernels made of kernels


@st.composite
def matrices(draw: st.DrawFn, *, square: bool = False) -> Tensor:
    rows = draw(st.integers(1, 9))
    cols = rows if square else draw(st.integers(1, 9))
    return torch.randn(
        rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )


def agrees(got: Kernel, expected: Tensor) -> None:
    """Every reading of a kernel against the same of a matrix."""
    assert got.shape == expected.shape
    assert torch.allclose(got.dense(), expected)
    assert torch.allclose(got.diagonal(), expected.diagonal())
    rows, cols = slice(1, None), slice(None, -1)
    assert torch.allclose(got.tile(rows, cols), expected[rows, cols])
    v = normal(2, seed=4)(expected.shape[1])
    assert torch.allclose(got @ v, expected @ v)
    assert torch.allclose(got @ v[:, 0], expected @ v[:, 0])
    operator = got.to_scipy()
    w = normal(seed=5)(expected.shape[0])
    assert np.allclose(operator.rmatvec(w.numpy()), (expected.T @ w).numpy())
    if got.symmetric:
        assert torch.allclose(expected, expected.T)


@given(matrix=matrices(), factor=st.floats(-3, 3))
@quick
def test_dense_scaled_and_summed(matrix: Tensor, factor: float) -> None:
    dense = ntkit.DenseKernel(matrix)
    agrees(dense, matrix)
    agrees(factor * dense, factor * matrix)
    agrees(dense * factor + 2 * dense, (factor + 2) * matrix)


@given(matrix=matrices(square=True))
@quick
def test_centred(matrix: Tensor) -> None:
    gram = matrix @ matrix.T
    n = len(gram)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    kernel = ntkit.DenseKernel((gram + gram.T) / 2)
    assert kernel.symmetric
    agrees(kernel.centred(), h @ gram @ h)
    agrees((2 * kernel).centred() + kernel, 2 * h @ gram @ h + gram)


def test_wrapped_tangent_kernels() -> None:
    got, expected = kernel(KINDS[0], symmetric=True), truth(KINDS[0], True)
    h = torch.eye(N * C, dtype=torch.float64) - 1 / (N * C)
    agrees(0.5 * got + got, 1.5 * expected)
    agrees(got.centred(), h @ expected @ h)
    rectangular = kernel(KINDS[0], symmetric=False)
    agrees(-1 * rectangular, -truth(KINDS[0], False))


def test_strips_of_tall_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ntkit.kernel.base.strips", lambda size: (slice(a, min(a + 2, size)) for a in range(0, size, 2))
    )
    matrix = normal(7)(7)
    agrees(ntkit.DenseKernel(matrix), matrix)
    agrees(
        ntkit.DenseKernel(matrix @ matrix.T, symmetric=True).centred() * 2,
        2 * centring(7) @ matrix @ matrix.T @ centring(7),
    )


def centring(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) - 1 / n


def test_dense_kernel_knows_symmetry() -> None:
    assert ntkit.DenseKernel(torch.eye(3)).symmetric
    assert not ntkit.DenseKernel(torch.eye(3, 4)).symmetric
    assert not ntkit.DenseKernel(torch.arange(9.0).view(3, 3)).symmetric
    assert ntkit.DenseKernel(torch.arange(9.0).view(3, 3), symmetric=True).symmetric


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.long)])
def test_dense_kernel_of_something_else(wrong: Tensor) -> None:
    with pytest.raises(InputError, match="2-D floating point tensor: got shape"):
        ntkit.DenseKernel(wrong)


def test_sums_and_scalings_of_something_else() -> None:
    square = ntkit.DenseKernel(torch.eye(3))
    with pytest.raises(InputError, match=r"different shapes: \(3, 3\) and \(3, 4\)"):
        square + ntkit.DenseKernel(torch.eye(3, 4))
    with pytest.raises(InputError, match="only a symmetric kernel can be centred"):
        ntkit.DenseKernel(torch.eye(3, 4)).centred()
    for wrong in (lambda: square + 1, lambda: square * torch.ones(3, 3), lambda: "a" * square):  # pyright: ignore
        with pytest.raises(TypeError):
            wrong()


def test_mixed_types_are_promoted() -> None:
    both_types = ntkit.DenseKernel(torch.eye(3)) + ntkit.DenseKernel(torch.eye(3, dtype=torch.float64))
    assert both_types.dtype == torch.float64 == both_types.dense().dtype


# ---------------------------------------------------------------- by parameter


@kinds
@both
@pytest.mark.parametrize("memory", [1, None])
def test_parts_sum_to_the_whole(kind: Any, symmetric: bool, memory: int | None) -> None:
    got = kernel(kind, symmetric=symmetric, memory=memory)
    parts = got.by_parameter()
    assert tuple(parts) == got.tangent.parameter_names
    assert oracles.relative_error(torch.stack(list(parts.values())).sum(0), truth(kind, symmetric)) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_are_the_kernels_of_the_parameters(name: str) -> None:
    got = kernel((name, "logits", 0), symmetric=False)
    parts = got.by_parameter()
    for parameter in got.tangent.parameter_names:
        one = ntkit.linearize(got.tangent.model, parameters=parameter)
        expected = ntkit.TangentKernel(one, examples(name, N), examples(name, M, 2)).dense()
        assert torch.allclose(parts[parameter], expected, rtol=1e-10, atol=1e-12)


def test_parts_by_module() -> None:
    got = kernel(("mlp", "logits", 0), symmetric=True)
    parts, modules = got.by_parameter(), got.by_parameter(by_module)
    assert list(modules) == ["0", "2", "4"]
    for name, part in modules.items():
        assert torch.allclose(part, parts[f"{name}.weight"] + parts[f"{name}.bias"])
    (everything,) = got.by_parameter(lambda name: "all").values()
    assert oracles.relative_error(everything, got.dense()) <= 1e-12


def test_a_parameter_without_influence_has_a_zero_part() -> None:
    model = Net(lambda m, x: m.f(x), f=nn.Linear(5, 3), unused=nn.Linear(2, 2)).double().eval()
    parts = ntkit.TangentKernel(ntkit.linearize(model), examples("mlp", 4)).by_parameter(by_module)
    assert parts["unused"].shape == (12, 12)
    assert not parts["unused"].any()
    assert parts["f"].any()


# ---------------------------------------------------------------- derivatives of a tangent

JACOBIAN = [
    "linear/mlp", "conv2d/everything", "conv_transpose2d/groups", "tied/embedding_and_head", "tied/two_linears",
    "repeated/linear_twice", "repeated/recurrent", "reparametrized/weight_norm", "reparametrized/symmetric",
    "attention/batch_second", "attention/other_key_sizes", "shape/windows_in_the_batch", "embedding/padding_idx",
    "bare/added_to_output", "parameters/unused", "parameters/one_layer_of_a_recurrence", "exotic/loop_over_examples",
]  # fmt: skip


def picked(prefix: str) -> Any:
    """The case of this name, or the first that begins so: families are renamed more often than these tests."""
    named = [case for case in CASES if case.name == prefix]
    return named[0] if named else next(case for case in CASES if case.name.startswith(prefix.partition("/")[0]))


@pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning")
@pytest.mark.parametrize("name", JACOBIAN)
def test_jacobian_and_its_products(name: str) -> None:
    case = picked(name)
    model = case.build()
    x = case.data(5)
    expected = oracles.jacobian_rows(model, x, case.scalars, case.chosen(model))
    t = ntkit.linearize(model, readout=ntkit.Logits(select=case.select), parameters=case.parameters)
    assert t.count == expected.shape[1]
    assert oracles.relative_error(t.jacobian(x), expected) <= 1e-11
    outputs = oracles.outputs(model, x, case.scalars)
    assert torch.allclose(t.outputs(x, batch=2), outputs)
    u, v = normal(outputs.shape[1], seed=8)(5), normal(seed=9)(t.count)
    for batch in (2, 256):
        pulled, pushed = t.vjp(x, u, batch=batch), t.jvp(x, v, batch=batch)
        assert oracles.relative_error(pulled, expected.T @ u.flatten()) <= 1e-11
        assert oracles.relative_error(pushed.flatten(), expected @ v) <= 1e-11
        assert abs(float((u * pushed).sum() - pulled @ v)) <= 1e-10 * float(pulled.norm() * v.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_jvp_is_the_directional_derivative(name: str) -> None:
    """By central differences, which know nothing of any derivative."""
    t, x = tangent(name), examples(name, 4)
    v = normal(seed=9)(t.count) / t.count**0.5
    step = 1e-5
    shifted = []
    for sign in (1, -1):
        values = dict(zip(t.parameter_names, t.selection.split(v), strict=True))
        moved = {key: p + sign * step * values[key] for key, p in t.model.named_parameters()}
        with torch.no_grad():
            shifted.append(torch.func.functional_call(t.model, moved, (x,)))
    assert torch.allclose(t.jvp(x, v), (shifted[0] - shifted[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 2), (4, 3), (15,), (3, 5)])
def test_vjp_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"cotangents have shape .*expected \(5, 3\)"):
        tangent("mlp").vjp(examples("mlp", 5), torch.zeros(shape))


def test_jvp_of_the_wrong_shape() -> None:
    t = tangent("mlp")
    with pytest.raises(InputError, match=rf"shape \({t.count},\): got \(3,\)"):
        t.jvp(examples("mlp", 5), torch.zeros(3))


# ---------------------------------------------------------------- progress


@both
@pytest.mark.parametrize("memory", [1, 30_000, None])
def test_progress_is_monotone_and_complete(symmetric: bool, memory: int | None) -> None:
    seen: list[tuple[int, int]] = []
    x2 = None if symmetric else examples("mlp", M, 2)
    got = ntkit.TangentKernel(
        tangent("mlp"), examples("mlp", N), x2, memory=memory, progress=lambda *step: seen.append(step)
    )
    for size, read in (
        (got.shape[0] * got.shape[1], got.dense),
        (6 * 9, lambda: got.tile(slice(3, 9), slice(0, 9))),
        (got.shape[0] * got.shape[1], lambda: got @ torch.ones(got.shape[1])),
    ):
        seen.clear()
        read()
        assert seen[-1] == (size, size)
        assert all(total == size for _, total in seen)
        done = [step for step, _ in seen]
        assert done == sorted(done)
        assert done[0] > 0


# ---------------------------------------------------------------- batches on different paths


def depends_on_values(m: Any, x: Tensor) -> Tensor:
    """A batch with a large first entry takes another layer: two batches, two sets of parameters."""
    return m.f(x) if float(x[:, 0].max()) < 10 else m.g(x).tanh()


@pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning")
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("memory", [1, None])
def test_batches_that_take_different_paths(trace: bool, memory: int | None) -> None:
    torch.manual_seed(0)
    model = Net(depends_on_values, f=nn.Linear(5, 3), g=nn.Linear(5, 3)).double().eval()
    x1, x2 = examples("mlp", 4), examples("mlp", 3, 2)
    x2[:, 0] = 20
    parameters = list(model.parameters())
    t = ntkit.linearize(model)

    def expected(a: Tensor, b: Tensor) -> Tensor:
        theta = oracles.entk(model, a, b, lambda y: y, parameters)
        return oracles.trace_kernel(theta, C) if trace else theta

    got = ntkit.TangentKernel(t, x1, x2, trace=trace, memory=memory)
    assert torch.allclose(got.dense(), expected(x1, x2))  # no parameter in common: zero
    mixed = torch.cat([x1, x2])
    rows = ntkit.TangentKernel(t, mixed, x1, trace=trace, memory=1)  # one example at a time: both paths among the rows
    assert oracles.relative_error(rows.dense(), expected(mixed, x1)) <= 1e-12
    parts = ntkit.TangentKernel(t, mixed, x1, trace=trace, memory=1).by_parameter()
    assert oracles.relative_error(torch.stack(list(parts.values())).sum(0), expected(mixed, x1)) <= 1e-12


def test_budget_must_be_positive() -> None:
    for wrong in (0, -5):
        with pytest.raises(InputError, match=f"positive number of bytes: got {wrong}"):
            ntkit.TangentKernel(tangent("mlp"), examples("mlp", 3), memory=wrong)


def test_lazy_tiles_hold_no_examples() -> None:
    """A kernel keeps no derivatives between calls: parameters that change show in the next tile."""
    torch.manual_seed(0)
    model = mlp().double().eval()
    got = ntkit.TangentKernel(ntkit.linearize(model), examples("mlp", 4))
    before = got.dense()
    with torch.no_grad():
        model[4].weight.mul_(2)
    after = got.dense()
    assert not torch.allclose(before, after)
    assert oracles.relative_error(after, ntkit.empirical_ntk(model, examples("mlp", 4))) <= 1e-13

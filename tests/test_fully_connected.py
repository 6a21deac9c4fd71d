from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel
from ntkit.kernel.fully_connected import FullyConnected, family
from ntkit.kernel.infinite.width import InfiniteWidth

# Of unit vectors with inner product rho, weights of variance 2 (the layer on the inputs: 1) and no bias: (NNGP, NTK)
# after 1, 2 and 3 hidden ReLU layers. Known values of the literature, checked against networks of finite width.
ANCHORS = {
    1.0: ((1.0, 2.0), (1.0, 3.0), (1.0, 4.0)),
    0.5: ((0.608998, 0.942331), (0.683906, 1.351480), (0.738128, 1.737845)),
    0.0: ((0.318310, 0.318310), (0.493731, 0.685709), (0.604826, 1.060388)),
    -0.5: ((0.108998, -0.057669), (0.374701, 0.343862), (0.528279, 0.742249)),
    -1.0: ((0.0, 0.0), (0.318310, 0.318310), (0.493731, 0.685709)),
}
CONVENTIONS = [
    {},
    {"weight_std": 1.0, "scaled_inputs": False},
    {"weight_std": 1.3, "bias_std": 0.4},
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_paths(x: Tensor, z: Tensor, depth: int, fixed: int, w: float, b: float, scaled: bool) -> float:
    """One entry as the sum over trained layers of what they pass on to the output, in scalars."""
    size = len(x) if scaled else 1
    xx, zz, xz = (w * w * float(p @ q) / size + b * b for p, q in ((x, x), (z, z), (x, z)))
    sigmas, slopes = [xz], [math.nan]
    for _ in range(depth - 1):
        n = math.sqrt(xx * zz)
        t = math.acos(max(-1.0, min(1.0, xz / n)))
        slopes.append(w * w * (math.pi - t) / (2 * math.pi))
        xz = w * w * n / (2 * math.pi) * (math.sin(t) + (math.pi - t) * math.cos(t)) + b * b
        xx, zz = (w * w * v / 2 + b * b for v in (xx, zz))
        sigmas.append(xz)
    return sum(sigmas[layer] * math.prod(slopes[layer + 1 :]) for layer in range(fixed, depth))


@pytest.mark.parametrize("rho", ANCHORS)
@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_anchors(rho, hidden):
    # two inputs: the layer on them has weights of variance 2 too, divided by 2
    x, z = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho * rho)]], dtype=torch.float64).split(1)
    for fixed, expected in zip((hidden, 0), ANCHORS[rho][hidden - 1], strict=True):
        assert float(FullyConnected(hidden + 1, fixed)(x, z).dense()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_member_is_the_sum_over_trained_layers(convention):
    x = normal(6, 5)
    w, b = convention.get("weight_std", math.sqrt(2)), convention.get("bias_std", 0.0)
    seen = []
    for function, matrix in family(x, **convention):
        seen.append((function.depth, function.fixed))
        size = (function.depth, function.fixed, w, b, function.scaled_inputs)
        expected = torch.tensor([[by_paths(p, q, *size) for q in x] for p in x], dtype=torch.float64)
        torch.testing.assert_close(matrix, expected, rtol=1e-7, atol=1e-7)  # acos of 1 there
        off = ~torch.eye(6, dtype=torch.bool)
        torch.testing.assert_close(matrix[off], expected[off], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(function(x).dense(), matrix, rtol=1e-13, atol=1e-13)
    assert seen == [(depth, fixed) for depth in range(1, 6) for fixed in range(depth)]


@pytest.mark.parametrize("biases", [0.0, 0.4])
def test_the_modules_of_these_depths_have_the_same_kernels(biases):
    x, z = normal(7, 5), normal(4, 5, seed=1)
    for depth, fixed in ((1, 0), (2, 0), (3, 0), (3, 2), (5, 3)):
        layers: list[nn.Module] = []
        for layer in range(depth):
            layers += [nn.Linear(5 if layer == 0 else 4, 4), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        trained = [f"{2 * layer}.*" for layer in range(fixed, depth)]
        module = InfiniteWidth(model, weight_std=1.2, bias_std=biases, parameters=trained)
        ours = FullyConnected(depth, fixed, 1.2, biases)
        torch.testing.assert_close(ours(x, z).dense(), module(x, z).dense(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours(x).dense(), module(x).dense(), rtol=1e-10, atol=1e-10)


def test_some_depths_and_columns():
    x, columns = normal(300, 5), torch.tensor([7, 299, 0, 256])
    whole = {(m.function.depth, m.function.fixed): m.matrix for m in family(x)}
    some = list(family(x, (2, 4), columns=columns))
    assert [(m.function.depth, m.function.fixed) for m in some] == [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    for function, matrix in some:
        torch.testing.assert_close(matrix, whole[function.depth, function.fixed][:, columns], rtol=1e-13, atol=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("depth", "fixed"), [(1, 0), (3, 0), (3, 1), (4, 3)])
def test_the_diagonal_is_exact(convention, depth, fixed):
    x = normal(40, 5, seed=1) * 10
    function = FullyConnected(depth, fixed, **convention)
    kernel = function(x)
    assert isinstance(kernel, Kernel)
    assert torch.equal(kernel.dense().diagonal(), kernel.diagonal())
    assert torch.equal(kernel.dense(), kernel.dense().T)
    torch.testing.assert_close(
        kernel.tile(slice(3, 9), slice(5, 40)), kernel.dense()[3:9, 5:40], rtol=1e-13, atol=1e-12
    )
    w, b = function.weight_std, function.bias_std
    expected = [_own(float(row @ row), depth, fixed, w, b, 5 if function.scaled_inputs else 1) for row in x]
    torch.testing.assert_close(kernel.diagonal(), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(function.diagonal(x), kernel.diagonal())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_diagonal_of_a_family_is_exact(convention):
    x = normal(300, 7, seed=2) * 10  # with many examples, some cosines of an example with itself are not 1
    columns = torch.arange(299, -1, -1)
    for function, matrix in family(x, columns=columns, **convention):
        diagonal, expected = matrix.flip(1).diagonal(), function.own(x)
        if function.depth == 1:
            assert torch.equal(diagonal, expected)
        torch.testing.assert_close(diagonal, expected, rtol=1e-15, atol=0)


def _own(square: float, depth: int, fixed: int, w: float, b: float, size: int) -> float:
    sigma = w * w * square / size + b * b
    theta = 0.0
    for layer in range(1, depth + 1):
        if layer > 1:
            sigma = w * w * sigma / 2 + b * b
        theta = w * w / 2 * theta + sigma if layer > fixed else 0.0
    return theta


def test_copies_and_zeros_keep_it_positive_semidefinite():
    x = normal(30, 4)
    x = torch.cat([x, x, -x, torch.zeros(3, 4, dtype=torch.float64), x * (1 + 1e-12)])
    for function, matrix in family(x):
        assert bool(matrix.isfinite().all())
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-7 * float(matrix.diagonal().max()), function
        torch.testing.assert_close(function(x).dense(), matrix, rtol=1e-7, atol=1e-7)


def test_examples_in_float32_lose_no_more_than_their_last_digit():
    x = normal(50, 4).float()
    single, double = FullyConnected(4)(x).dense(), FullyConnected(4)(x.double()).dense()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)


def test_images_are_flattened():
    x = normal(5, 2, 3)
    torch.testing.assert_close(FullyConnected()(x).dense(), FullyConnected()(x.reshape(5, 6)).dense())
    for (_, one), (_, other) in zip(family(x, (2,)), family(x.reshape(5, 6), (2,)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_gradients(fixed):
    function, z = FullyConnected(3, fixed, bias_std=0.1), normal(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: function(x, z).dense(), normal(4, 4).requires_grad_())
    # an example with itself: no gradient is lost, and none is NaN
    assert torch.autograd.gradcheck(lambda x: function(x).diagonal(), normal(4, 4).requires_grad_())
    x = normal(4, 4).requires_grad_()
    function(x).dense().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_scale_of_the_conventions():
    # without the factor 2, a layer halves the kernel; without the division by d, it is d times as large
    x = normal(5, 6)
    for depth, fixed in ((1, 0), (3, 0), (4, 2)):
        ours = FullyConnected(depth, fixed)(x).dense()
        theirs = FullyConnected(depth, fixed, weight_std=1.0, scaled_inputs=False)(x).dense()
        torch.testing.assert_close(theirs, ours * 6 / 2**depth)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 0}, "depth is a number of linear layers"),
        ({"depth": 2.0}, "depth is a number of linear layers"),
        ({"depth": 2, "fixed": 2}, "fixed one from 0 to depth - 1: got depth=2, fixed=2"),
        ({"fixed": -1}, "fixed"),
        ({"weight_std": 0.0}, "weight_std is a positive number"),
        ({"bias_std": -1.0}, "bias_std"),
        ({"bias_std": math.nan}, "bias_std"),
    ],
)
def test_no_network(options, words):
    with pytest.raises(InputError, match=words):
        FullyConnected(**options)


@pytest.mark.parametrize("depths", [(), (2, 1), (1, 1), (0, 1), (1.0,)])
def test_no_depths(depths):
    with pytest.raises(InputError, match="ascending"):
        family(normal(3, 2), depths)


@pytest.mark.parametrize("x", [normal(3), torch.ones(3, 2).long(), torch.full((3, 2), math.nan), [[1.0]]])
def test_no_examples(x):
    with pytest.raises(InputError, match="x holds examples"):
        family(x)


@pytest.mark.parametrize("columns", [torch.tensor([True, False, True]), torch.tensor([3]), torch.tensor([[0, 1]])])
def test_no_columns(columns):
    with pytest.raises(InputError, match="columns are numbers of examples, int64 from 0 to 2"):
        family(normal(3, 2), columns=columns)


def test_no_features():
    with pytest.raises(InputError, match="no features"):
        family(torch.zeros(3, 0))

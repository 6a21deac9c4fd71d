"""Infinite-width kernels: the published anchors, other ways to the same numbers, and laws."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import ntkit
from ntkit.kernel.infinite import NTK, InfiniteWidth, Standard, infinite_ntk
from ntkit.solve.inplace import CholeskyInPlace
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.regression import KernelRegression
from ntkit.solve.ridge import Relative
from tests import oracles_infinite as oracle

ROOT2 = math.sqrt(2)


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


def dense(depth, act=nn.ReLU, inputs=2, bias=False, width=4):
    layers, size = [], inputs
    for _ in range(depth):
        layers += [nn.Linear(size, width, bias=bias), act()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 1, bias=bias))


def at_angle(rho):
    """Two inputs whose first-layer kernel is rho, and 1 with themselves."""
    return ROOT2 * torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)


def images(n, channels=3, size=4, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cntk(depth, gap, size=4):
    layers, channels = [], 3
    for _ in range(depth - 1):
        layers += [nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.ReLU()]
        channels = 4
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if gap else [nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(4 if gap else 4 * size**2, 1, bias=False))


def released(depth, gap, fix, size=4):
    """The network whose limit the released code computes: sums in its first layer, a trace in its flat head."""
    net = cntk(depth, gap, size)
    names = [name for name, _ in net.named_parameters()]
    head = math.sqrt(2 / 9) * (1 if gap else size)
    stds = {names[0]: math.sqrt(27), names[-1]: head, "*": ROOT2}
    return InfiniteWidth(net, weight_std=stds, parameters=names[1:-1] if fix else names)


# ------------------------------------------------------------------------------------------------------------ anchors

RELU_TABLE = {
    1.0: [(1, 2), (1, 3), (1, 4)],
    0.5: [(0.608998, 0.942331), (0.683906, 1.351480), (0.738128, 1.737845)],
    0.0: [(0.318310, 0.318310), (0.493731, 0.685709), (0.604826, 1.060388)],
    -0.5: [(0.108998, -0.057669), (0.374701, 0.343862), (0.528279, 0.742249)],
    -1.0: [(0, 0), (0.318310, 0.318310), (0.493731, 0.685709)],
}


@pytest.mark.parametrize("rho", RELU_TABLE)
def test_the_table_of_relu_networks(rho):
    for depth, (nngp, ntk) in enumerate(RELU_TABLE[rho], 1):
        x = at_angle(rho)
        got = infinite_ntk(dense(depth), x[:1], x[1:], kind="both", weight_std={"0.weight": 1.0, "*": ROOT2})
        assert got.nngp.item() == pytest.approx(nngp, abs=1e-6)
        assert got.ntk.item() == pytest.approx(ntk, abs=1e-6)


ERF_TABLE = {
    1.0: [(0.464559, 1.033969), (0.319909, 1.098606)],
    0.5: [(0.216347, 0.441426), (0.144017, 0.442980)],
    0.0: [(0, 0), (0, 0)],
    -0.5: [(-0.216347, -0.441426), (-0.144017, -0.442980)],
}


@pytest.mark.parametrize("rho", ERF_TABLE)
def test_the_table_of_erf_networks(rho):
    for depth, (nngp, ntk) in enumerate(ERF_TABLE[rho], 1):
        x = at_angle(rho)
        got = infinite_ntk(dense(depth, Erf), x[:1], x[1:], kind="both", weight_std=1.0)
        assert got.nngp.item() == pytest.approx(nngp, abs=1e-6)
        assert got.ntk.item() == pytest.approx(ntk, abs=1e-6)


CNTK_TABLE = [
    (3, True, True, (0.150681, 0.112476, 0.157975)),
    (3, True, False, (0.593821, 0.475240, 0.606296)),
    (3, False, True, (12.593687, 1.298203, 12.775892)),
    (3, False, False, (37.781060, 5.849900, 38.327676)),
    (4, True, True, (0.219008, 0.166217, 0.229180)),
    (4, True, False, (0.573354, 0.469040, 0.589880)),
    (4, False, True, (19.139944, 3.165363, 19.416291)),
    (4, False, False, (38.279888, 8.151980, 38.832582)),
]


@pytest.mark.parametrize(("depth", "gap", "fix", "expected"), CNTK_TABLE)
def test_the_table_of_convolutional_networks(depth, gap, fix, expected):
    c, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (3, 4, 4)), indexing="ij")
    x = torch.stack([torch.sin(1 + c + 2 * i + 3 * j), torch.cos(2 + c + i * j)])
    got = released(depth, gap, fix)(x).dense()
    np.testing.assert_allclose([got[0, 0], got[0, 1], got[1, 1]], expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------- other ways to the same numbers


@settings(deadline=None, max_examples=30)
@given(
    depth=st.integers(0, 4),
    weight=st.floats(0.2, 2.0),
    bias=st.floats(0.0, 1.0),
    below=st.floats(-1.0, 1.0),
    seed=st.integers(0, 10**6),
)
def test_fully_connected_networks_follow_the_recursion(depth, weight, bias, below, seed):
    draw = np.random.default_rng(seed)
    x, z = draw.standard_normal((5, 3)), draw.standard_normal((4, 3))
    net = dense(depth, lambda: nn.LeakyReLU(below), inputs=3, bias=True)
    nngp, ntk = oracle.fully_connected(x, z, [(weight, bias)] * (depth + 1), below)
    got = infinite_ntk(net, torch.from_numpy(x), torch.from_numpy(z), kind="both", weight_std=weight, bias_std=bias)
    np.testing.assert_allclose(got.nngp, nngp, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.ntk, ntk, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gap", [True, False])
@pytest.mark.parametrize("fix", [True, False])
def test_convolutional_networks_follow_the_loops_over_pixels(gap, fix):
    x, z = images(2, seed=1), images(2, seed=2)
    got = released(3, gap, fix)(x, z).dense()
    for n, m in np.ndindex(2, 2):
        truth = oracle.released_cntk(x[n].numpy(), z[m].numpy(), 3, gap=gap, fix=fix)
        assert got[n, m].item() == pytest.approx(truth, rel=1e-10)


def test_one_pixel_makes_a_convolution_a_linear_layer():
    x = images(4, size=1)
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    got = infinite_ntk(conv, x, weight_std=1.3, bias_std=0.2)
    torch.testing.assert_close(
        got, infinite_ntk(dense(2, inputs=3, bias=True), x[:, :, 0, 0], weight_std=1.3, bias_std=0.2)
    )


# ------------------------------------------------------------------------------------- blocks, tiles, inputs, gradients


def test_tiles_are_blocks_of_the_whole():
    x = torch.randn(700, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # several blocks
    kernel = InfiniteWidth(dense(2, inputs=3), weight_std=ROOT2)(x)
    whole = kernel.dense()
    assert torch.equal(whole, whole.T)
    torch.testing.assert_close(
        kernel.tile(slice(3, 650), slice(100, 699)), whole[3:650, 100:699], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(kernel.diagonal(), whole.diagonal(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel @ x, whole @ x, rtol=1e-10, atol=1e-10)
    apart = InfiniteWidth(dense(2, inputs=3), weight_std=ROOT2)(x, x.clone()).dense()
    torch.testing.assert_close(apart, whole, rtol=1e-6, atol=1e-7)  # equal inputs, not known to be one example
    assert torch.linalg.eigvalsh(whole[:200, :200]).min() > -1e-10


@pytest.mark.parametrize("net", [cntk(3, True), cntk(3, False)])
def test_small_blocks_of_images_make_the_same_matrix(net, monkeypatch):
    x = images(7)
    function = InfiniteWidth(net, weight_std=ROOT2)
    whole = function(x).dense()
    monkeypatch.setattr("ntkit.kernel.infinite.width.BLOCK", 1)
    torch.testing.assert_close(function(x).dense(), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(x[:3], x[3:]).dense(), whole[:3, 3:], rtol=1e-12, atol=1e-12)


def test_flat_networks_hold_equal_positions_only():
    x = images(2, size=8)
    flat, pooled = (InfiniteWidth(cntk(3, gap, size=8), weight_std=1.0)(x).program for gap in (False, True))
    assert (flat.entries(), pooled.entries()) == (64, 64**2)
    assert pooled.entries(cross=False) == 64  # nothing is pooled before a nonlinearity
    inside = nn.Sequential(*cntk(2, True)[:2], nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten())
    assert InfiniteWidth(inside, weight_std=1.0)(x).program.entries(cross=False) == 64**2


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (dense(2, inputs=3, bias=True), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3) ** 2),
        (dense(2, nn.GELU, inputs=3, bias=True), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3) ** 2),
        (dense(1, nn.Tanh, inputs=3, bias=True), torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3) ** 2),
        (cntk(3, True, size=3), images(2, size=3)),
        (cntk(3, False, size=3), images(2, size=3)),
    ],
)
@pytest.mark.parametrize("with_itself", [True, False])
def test_kernels_are_differentiable_in_the_inputs(net, x, with_itself):
    function = InfiniteWidth(net, weight_std=1.2, bias_std=0.1)
    other = None if with_itself else x[:1] + 0.3

    def kernel(inputs):
        return function(inputs, other).dense()

    assert torch.autograd.gradcheck(kernel, (x.clone().requires_grad_(),), eps=1e-6, atol=1e-5)
    with torch.no_grad():
        plain = kernel(x)
    torch.testing.assert_close(kernel(x.clone().requires_grad_()).detach(), plain, rtol=1e-12, atol=1e-12)


def test_gradients_pass_through_several_blocks(monkeypatch):
    x = images(3, size=3).requires_grad_()
    function = InfiniteWidth(cntk(3, True, size=3), weight_std=1.2)
    (whole,) = torch.autograd.grad(function(x).dense().square().sum(), x)
    monkeypatch.setattr("ntkit.kernel.infinite.width.BLOCK", 1)
    (parts,) = torch.autograd.grad(function(x).dense().square().sum(), x)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_data_sets_and_float32_give_the_same_kernel():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    function = InfiniteWidth(dense(2, inputs=3), weight_std=1.0)
    whole = function(x.double()).dense()
    assert whole.dtype == torch.float64
    torch.testing.assert_close(function(x).dense(), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(TensorDataset(x, torch.zeros(6))).dense(), whole, rtol=1e-12, atol=1e-12)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 8), nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, a, b):
        return self.out(torch.relu(self.left(a.flatten(1)) + self.right(b)))


def test_several_arguments_and_preparations_of_the_inputs():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, k, generator=draw, dtype=torch.float64) for k in (3, 2))
    got = infinite_ntk(TwoInputs(), (a[:, None], b), weight_std=1.0)
    first = a @ a.T / 3 + b @ b.T / 2
    k, slope = oracle.relu_moments(first.numpy(), first.diagonal()[:, None].numpy(), first.diagonal()[None].numpy())
    np.testing.assert_allclose(got, k + slope * first.numpy(), atol=1e-7)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = dense(1, inputs=3)
            self.register_buffer("mean", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x):
            return self.net((x - self.mean) / 2)

    got = infinite_ntk(Scaled(), a, weight_std=1.0)
    mean = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(got, infinite_ntk(dense(1, inputs=3), (a - mean) / 2, weight_std=1.0))


# ----------------------------------------------------------------------------------------------- laws of the weights


def test_parts_by_parameter_sum_to_the_whole():
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for stds in ({}, {"weight_std": 1.1, "bias_std": 0.3}):
        parts = [infinite_ntk(net, x, parameters=name, **stds) for name, _ in net.named_parameters()]
        torch.testing.assert_close(sum(parts), infinite_ntk(net, x, **stds))
        assert all(part.diagonal().min() > 0 for part in parts)


def test_frozen_layers_take_no_part():
    net = dense(2, inputs=3)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = infinite_ntk(net, x, weight_std=ROOT2, parameters="4.*")
    torch.testing.assert_close(last, infinite_ntk(net, x, weight_std=ROOT2, kind="nngp"))  # of the last layer alone
    net[0].weight.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    torch.testing.assert_close(infinite_ntk(net, x, weight_std=ROOT2), last)


def test_widths_do_not_matter_in_the_ntk_parametrisation_and_do_in_the_standard_one():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    narrow, wide = dense(2, inputs=3, width=4), dense(2, inputs=3, width=32)
    torch.testing.assert_close(
        infinite_ntk(narrow, x, weight_std=1.0), infinite_ntk(wide, x, weight_std=1.0), rtol=1e-12, atol=0
    )
    by_weights = [
        infinite_ntk(net, x, weight_std=1.0, parametrization=Standard(), parameters=["2.weight", "4.weight"])
        for net in (narrow, wide)
    ]
    torch.testing.assert_close(8 * by_weights[0], by_weights[1])
    assert isinstance(InfiniteWidth(narrow).law.parametrization, Standard)
    assert isinstance(InfiniteWidth(narrow, bias_std=0.0).law.parametrization, NTK)


def test_variances_are_read_from_the_values():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 1, bias=False))
    steps = InfiniteWidth(net)(torch.ones(1, 50)).program.steps
    assert steps[1].weight_std == pytest.approx(math.sqrt(1 / 3), rel=1e-12)  # PyTorch's default, exactly
    assert steps[1].bias_std == pytest.approx(math.sqrt(1 / 150), rel=1e-12)
    nn.init.kaiming_normal_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    steps = InfiniteWidth(net)(torch.ones(1, 50)).program.steps
    assert steps[1].weight_std == pytest.approx(ROOT2, rel=0.02)
    assert steps[1].weight_std ** 2 == pytest.approx(
        50 * float(net[0].weight.detach().double().square().mean()), rel=1e-9
    )
    assert steps[1].bias_std == 0
    given = InfiniteWidth(net, weight_std={"0.*": 2.0})(torch.ones(1, 50)).program.steps
    assert (given[1].weight_std, given[1].bias_std) == (2.0, 0.0)
    assert given[-1].weight_std == pytest.approx(math.sqrt(1 / 3))  # not named, so read


def test_the_module_is_left_as_it_is():
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 1)).train()
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(ntkit.ModelError):  # ReLU behind dropout is not Gaussian
        infinite_ntk(net, torch.ones(2, 3))
    infinite_ntk(nn.Sequential(net[0], net[2], net[1], net[3]).train(), torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# ------------------------------------------------------------------------------------------------- as a kernel on disk


def test_a_matrix_on_disk_goes_on_with_the_same_limit_only(tmp_path):
    pytest.importorskip("zarr")
    x = images(6)
    function = InfiniteWidth(cntk(3, True), weight_std=ROOT2)
    kernel = function(x)
    saved = kernel.save(tmp_path / "k.zarr")
    torch.testing.assert_close(saved.dense(), kernel.dense(), rtol=1e-12, atol=1e-12)
    InfiniteWidth(cntk(3, True), weight_std=ROOT2)(x).save(tmp_path / "k.zarr")  # another module, one limit
    for other in (
        InfiniteWidth(cntk(3, True), weight_std=1.4)(x),
        InfiniteWidth(cntk(4, True), weight_std=ROOT2)(x),
        InfiniteWidth(cntk(3, True), weight_std=ROOT2, kind="nngp")(x),
        function(x + 1e-9),
    ):
        with pytest.raises(ntkit.StoreError):
            other.save(tmp_path / "k.zarr")


def test_settings_of_modules_before_the_first_weights_are_part_of_the_identity():
    def before(*modules):
        return InfiniteWidth(nn.Sequential(*modules, nn.Flatten(), nn.Linear(48, 1)), weight_std=1.0)(images(2))

    for one, other in (
        (nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        (nn.Hardtanh(-1, 1), nn.Hardtanh(-2, 2)),
        (nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, eps=0.1, elementwise_affine=False)),
    ):
        assert before(one).identity() != before(other).identity()
        assert before(one).identity() == before(one).identity()


def test_functions_without_a_closed_form_are_told_apart_by_their_values():
    x = torch.ones(2, 3)
    kernels = [InfiniteWidth(dense(1, lambda a=a: nn.ELU(a), inputs=3), weight_std=1.0)(x) for a in (1.0, 1.0, 1.001)]
    parts = [kernel.identity() for kernel in kernels]
    assert parts[0] == parts[1]
    assert parts[0] != parts[2]


def test_kernels_travel_to_other_processes():
    x = images(3)
    kernel = InfiniteWidth(cntk(3, True), weight_std=ROOT2)(x, images(2, seed=5))
    there = pickle.loads(pickle.dumps(kernel))
    assert torch.equal(there.dense(), kernel.dense())
    assert there.identity() == kernel.identity()


def test_tiles_of_expensive_pairs_are_small():
    cheap, dear = (
        InfiniteWidth(net, weight_std=1.0)(x)
        for net, x in ((dense(1), torch.ones(2, 2)), (cntk(3, True, 16), images(2, size=16)))
    )
    assert dear.tile_rows(2**30) < 400 < cheap.tile_rows(2**30)


@pytest.mark.parametrize("gap", [True, False])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_the_diagonal_costs_no_pairs(gap, kind, monkeypatch):
    x = images(5)
    function = InfiniteWidth(cntk(3, gap), kind=kind, weight_std=ROOT2, bias_std=0.1)
    whole = function(x).dense().diagonal()
    monkeypatch.setattr("ntkit.kernel.infinite.program.Program.covariance", None)
    torch.testing.assert_close(function(x).diagonal(), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function.diagonal(x), whole, rtol=1e-12, atol=1e-12)


def test_any_solver_takes_an_infinite_kernel():
    net = nn.Sequential(
        nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 1)
    )
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((30, 1, 6), (30, 2)))
    kernel = InfiniteWidth(net, weight_std=1.4, bias_std=0.2)(x)
    matrix = kernel.dense()
    wanted = torch.linalg.solve(matrix + 1e-3 * matrix.diagonal().mean() * torch.eye(30), y)
    for by in (CholeskyInPlace(), CholeskyInPlace(torch.float32), ConjugateGradients(1e-12, 1000)):
        found = kernel.solve(y, 1e-3, by=by)
        torch.testing.assert_close(found.value, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    fit = KernelRegression.decompose(kernel, y).fit(Relative(1e-3))
    torch.testing.assert_close(fit.predict(kernel), matrix @ wanted, rtol=1e-8, atol=1e-8)

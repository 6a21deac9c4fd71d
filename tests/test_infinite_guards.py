"""Modules that look as if they had a known infinite-width limit, and have another one: each is refused, or right."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkit
from ntkit.kernel.infinite import InfiniteWidth, infinite_ntk
from ntkit.kernel.infinite.hermite import HermiteSeries

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # (N, channels, positions)


def relu(x):
    """Not the one of torch."""
    return x * (x > 1)


torch.fx.wrap("relu")


class Net(nn.Module):
    """Layers a, b, c of five inputs and four units, a read-out, and a forward of one's own."""

    def __init__(self, forward, *, read=4, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(5, 1)
        self.conv, self.out = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(read, 1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.way = forward

    def forward(self, x):
        return self.out(self.way(self, x))


def unequal():
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.weight)
    return norm


def shifted():
    norm = nn.LayerNorm(4)
    nn.init.constant_(norm.bias, 2.0)
    norm.weight.requires_grad_(False)
    return norm


def constant():
    layer = nn.Linear(5, 4)
    nn.init.constant_(layer.bias, 1.0)
    return layer


def plain_weight():
    layer = nn.Linear(5, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


def without_gradients(s, x):
    with torch.no_grad():
        h = s.a(x)
    return F.relu(s.c(h))


def written(s, x):
    x = x * 1
    x.mul_(3.0)
    return s.a(x)


REFUSED = {
    "a number between": (lambda s, x: F.relu(0.7 * (s.b(x) + F.relu(s.a(x))) - 1), {}, X, "not Gaussian"),
    "an identity between": (
        lambda s, x: F.relu(s.i(F.relu(s.conv(x)).mean(-1)) - 1), {"i": nn.Identity()}, ROWS, "not Gaussian",
    ),
    "a square": (lambda s, x: (lambda h: h * h)(F.relu(s.conv(x)).mean(-1)), {}, ROWS, "not Gaussian"),
    "two normalisations": (
        lambda s, x: torch.tanh(s.m(s.n(s.a(x)))), {"n": nn.LayerNorm(4), "m": nn.LayerNorm(4)}, X,
        "freeze that weight",
    ),
    "a scaled sum": (lambda s, x: torch.tanh(0.8 * (s.n(s.a(x)) + 0.3 * s.b(x))), {"n": nn.LayerNorm(4)}, X, "freeze"),
    "a bias of its own": (
        lambda s, x: torch.tanh(s.n(s.a(x)) + s.p),
        {"n": nn.LayerNorm(4, bias=False), "p": nn.Parameter(torch.tensor([0.5, -0.3, 0.2, -0.4]))}, X, "freeze",
    ),
    "a number for each position": (
        lambda s, x: s.n(s.conv(x)).mean(-1), {"n": nn.LayerNorm([4, 4])}, ROWS, "each position",
    ),
    "unequal scales": (lambda s, x: torch.tanh(s.n(s.a(x))), {"n": unequal()}, X, "not all the same"),
    "shifted": (lambda s, x: torch.relu(s.n(s.a(x))), {"n": shifted()}, X, "biases are not zero"),
    "constant biases": (lambda s, x: torch.relu(s.e(x)), {"e": constant()}, X, "'e.bias' have a mean of 1"),
    "groups of positions": (
        lambda s, x: s.g(s.conv(x).transpose(1, 2)).mean(1), {"g": nn.GroupNorm(2, 4)}, ROWS,
        "channels must be on axis 1",
    ),
    "groups of kinds": (
        lambda s, x: s.g(torch.cat([s.a(x), 8 * s.b(x)], 1)), {"g": nn.GroupNorm(2, 8), "read": 8}, X,
        "different kinds",
    ),
    "an alias": (
        lambda s, x: (lambda h: h + s.c(s.r(s.p(h))))(s.a(x)), {"p": nn.Dropout(0.5).eval(),
        "r": nn.ReLU(inplace=True)}, X,
        "used elsewhere",
    ),
    "a view": (lambda s, x: (lambda h: h + s.c(h.view(-1, 4).relu_()))(s.a(x)), {}, X, "used elsewhere"),
    "written inputs": (written, {}, X, "writes into its inputs"),
    "inputs in place": (lambda s, x: s.a(s.r(x)), {"r": nn.ReLU(inplace=True)}, X, "writes into its inputs"),
    "no gradients": (without_gradients, {}, X, "without gradients"),
    "a jump": (lambda s, x: s.h(s.a(x)), {"h": nn.Hardshrink(0.5)}, X, "not among the modules"),
    "one bias for all": (lambda s, x: s.a(x) + s.p, {"p": nn.Parameter(torch.tensor([2.0]))}, X, "for each channel"),
    "one unit for all": (lambda s, x: s.a(x) + s.d(x), {}, X, "one of which is repeated"),
    "random inputs": (lambda s, x: s.a(F.dropout(x, 0.5)), {}, X, "random"),
    "data of a parameter": (lambda s, x: F.relu(F.linear(x, s.a.weight.data)), {}, X, "of a parameter"),
    "dropped inputs": (lambda s, x: s.a(s.p(x)), {"p": nn.Dropout(0.01)}, X, r"random \(.*bernoulli"),
    "noise on the inputs": (lambda s, x: s.a(x + 0.1 * torch.randn(5)), {}, X, r"random numbers of its own \(randn"),
    "layers left out at random": (
        lambda s, x: s.c(s.a(x)) if torch.rand(1) < 0.5 else s.a(x), {}, X, r"random numbers of its own \(rand",
    ),
    "drops in place": (
        lambda s, x: (lambda h: h + s.c(s.p(h)))(s.a(x)), {"p": nn.Dropout(0.5, inplace=True)}, X, "used elsewhere",
    ),
    "two of something": (lambda s, x: s.a(s.z), {"z": nn.Buffer(torch.ones(2, 5))}, X, "one by one"),
    "a pole": (lambda s, x: 1 / (1 + s.a(x)), {}, X, "not finite|infinite"),
    "a division by zero": (lambda s, x: s.a(x) / 0, {}, X, "divides by zero"),
    "no parameter": (lambda s, x: s.e(x), {"e": plain_weight()}, X, "weight is not a parameter"),
    "a number of the batch": (lambda s, x: s.a(x) * x.abs().max().item(), {}, X, "makes a number of the examples"),
    "a function of one's own": (lambda s, x: relu(s.a(x)), {}, X, "function of its own"),
    "a root": (lambda s, x: s.a(x) ** 0.5, {}, X, "not finite"),
    "dropped positions": (
        lambda s, x: s.p(s.conv(x).transpose(1, 2)).mean(1), {"p": nn.Dropout1d(0.4)}, ROWS, "not the channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_limits_are_refused(name):
    forward, modules, x, words = REFUSED[name]
    with pytest.raises(ntkit.ModelError, match=words):
        infinite_ntk(Net(forward, **modules), x)


def test_a_constant_for_all_examples_is_refused():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 4)
            self.register_buffer("z", torch.ones(1, 5))

        def forward(self, x):
            return self.a(self.z)

    with pytest.raises(ntkit.ModelError, match="the same for all examples"):
        infinite_ntk(Constant(), X)


def test_batch_statistics_are_seen_whatever_the_first_examples_are():
    net = Net(lambda s, x: F.relu(s.a(x - x.mean(0))))
    for x in (X[:1], X[[0, 0, 1]]):
        with pytest.raises(ntkit.ModelError, match="one by one"):
            infinite_ntk(net, x)


def test_a_zero_row_without_biases_has_the_derivative_that_pytorch_takes_there():
    x = X.clone()
    x[1] = 0
    for act in (nn.ReLU(), nn.LeakyReLU(0.3), nn.Tanh()):
        found = []
        for seed in range(40):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(5, 256), act, nn.Linear(256, 1, bias=False)).double()
            nn.init.zeros_(net[0].bias)
            nn.init.normal_(net[0].weight, std=0.5)
            nn.init.normal_(net[2].weight, std=1 / 16)
            found.append(ntkit.empirical_ntk(net, x, parameters="0.*"))
        law = {"weight_std": {"0.*": 0.5 * math.sqrt(5), "2.*": 1.0}, "bias_std": 0.0}
        limit = infinite_ntk(net, x, parameters="0.*", parametrization=ntkit.kernel.infinite.Standard(), **law)
        mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(40)
        assert bool(((mean - limit).abs() <= 5 * error + 0.01 * limit.max()).all()), (act, mean, limit)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_same_padding_of_an_even_kernel_is_longer_behind():
    torch.manual_seed(0)
    same = nn.Sequential(nn.Conv1d(2, 4, 4, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))
    padded = nn.Sequential(nn.ConstantPad1d((1, 2), 0.0), nn.Conv1d(2, 4, 4), *same[1:])
    found = [infinite_ntk(net, ROWS, weight_std=1.0, bias_std=0.1) for net in (same, padded)]
    torch.testing.assert_close(found[0], found[1])


def test_fast_waves_stay_finite():
    net = Net(lambda s, x: torch.sin(30 * s.a(x)))
    assert bool(infinite_ntk(net, X, weight_std=1.0).isfinite().all())


def test_exponentials_have_a_closed_form():
    net = Net(lambda s, x: torch.exp(s.a(x)))
    first = X @ X.T / 5
    own = first.diagonal()
    k = torch.exp((own[:, None] + own) / 2 + first)
    torch.testing.assert_close(infinite_ntk(net, X, weight_std=1.0), k + k * first)


def test_few_values_around_zero_are_taken_for_what_they_are():
    for seed in range(200):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
        for p in net.parameters():
            nn.init.normal_(p)
        InfiniteWidth(net)(X)


@pytest.mark.parametrize("size", [1, 5, 12, 40])
def test_biases_of_zero_are_zero_however_few_there_are(size):
    net = nn.Sequential(nn.Linear(5, size), nn.ReLU(), nn.Linear(size, size))
    for layer in (net[0], net[2]):
        nn.init.zeros_(layer.bias)
        nn.init.normal_(layer.weight, std=1.0)
    x = torch.zeros(1, 5, dtype=torch.float64)
    assert float(infinite_ntk(net, x, kind="nngp")) == 0


def test_a_bias_added_by_hand_has_its_own_values_for_its_variance():
    net = Net(lambda s, x: s.a(x) + s.p, p=nn.Parameter(0.01 * torch.tensor([1.0, -1.0, 1.0, -1.0])))
    limits = infinite_ntk(net, torch.zeros(1, 5, dtype=torch.float64), kind="nngp")
    del net.p
    net.way = lambda s, x: s.a(x)
    without = infinite_ntk(net, torch.zeros(1, 5, dtype=torch.float64), kind="nngp")
    # through the read-out of four inputs, of variance 1 / 12 each
    torch.testing.assert_close(limits - without, torch.full((1, 1), 1e-4 / 3, dtype=torch.float64), rtol=1e-5, atol=0)


def test_small_numbers_are_not_taken_for_a_default():
    net = nn.Sequential(nn.Linear(1, 10), nn.ReLU(), nn.Linear(10, 1))
    nn.init.normal_(net[0].weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(net[0].bias)
    x = torch.ones(1, 1, dtype=torch.float64)
    square = float(net[0].weight.detach().double().square().mean())
    found = float(infinite_ntk(net, x, kind="nngp", parametrization=ntkit.kernel.infinite.Standard()))
    net[2].requires_grad_(False)
    read_out = infinite_ntk(net, 0 * x, kind="nngp")  # the bias alone
    assert found - float(read_out) == pytest.approx(10 / 30 * square / 2, rel=1e-6)


def test_single_precision_inside_is_double_precision():
    """`.float() / 255`, as images of bytes are prepared."""
    images = torch.randint(0, 256, (4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    cast = Net(lambda s, x: F.relu(s.a(x.float() / 255)))
    written = Net(lambda s, x: F.relu(s.a(x.to(dtype=torch.float32) / 255)))
    plain = Net(lambda s, x: F.relu(s.a(x)))
    wanted = infinite_ntk(plain, images.double() / 255)
    for net in (cast, written):
        torch.testing.assert_close(infinite_ntk(net, images), wanted, rtol=1e-12, atol=0)


def test_the_error_of_a_series_is_that_of_its_derivative_and_said_for_rectangles():
    net = Net(lambda s, x: F.hardtanh(s.a(x)))
    with pytest.warns(ntkit.FidelityWarning, match=r"relative error of about [\d.]+e-0[123] "):
        found = InfiniteWidth(net, weight_std=1.0)(X, X.clone()).dense()
    with pytest.warns(ntkit.FidelityWarning):
        exact = InfiniteWidth(net, weight_std=1.0)(X).diagonal()  # by integrals, without the series
    error = ((found.diagonal() - exact) / exact).abs().max()
    assert 1e-4 < float(error) < 0.05
    with pytest.warns(ntkit.FidelityWarning, match=r"relative error of about [\d.]+e-0[3456] "):
        found = InfiniteWidth(net, kind="nngp", weight_std=1.0)(X, X.clone()).dense().diagonal()
    with pytest.warns(ntkit.FidelityWarning):
        exact = InfiniteWidth(net, kind="nngp", weight_std=1.0)(X).diagonal()
    assert float(((found - exact) / exact).abs().max()) < float(error) / 10


def test_a_jump_has_no_tangent_kernel():
    series, a = HermiteSeries(torch.sign, "sign"), torch.ones(1, dtype=torch.float64)
    with pytest.raises(ntkit.ModelError, match="it jumps"):
        series.check(a, derivative=True)
    with pytest.warns(ntkit.FidelityWarning, match="relative error"):
        series.check(a, derivative=False)


def test_a_row_of_zeros_under_a_series_is_the_limit_of_small_rows():
    net = nn.Sequential(nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1))
    law = {"weight_std": 1.0, "bias_std": 0.0, "parametrization": ntkit.kernel.infinite.Standard()}
    x = X.clone()
    x[1] = 0
    near = X.clone()
    near[1] *= 1e-4
    torch.testing.assert_close(infinite_ntk(net, x, **law), infinite_ntk(net, near, **law), rtol=1e-3, atol=1e-3)


def test_examples_and_kernels_that_are_not_finite_are_refused():
    x = X.clone()
    x[1, 2] = math.nan
    with pytest.raises(ntkit.InputError, match="NaN or infinite"):
        infinite_ntk(Net(lambda s, x: F.relu(s.a(x))), x)
    with pytest.raises(ntkit.ModelError, match="not finite"):
        infinite_ntk(Net(lambda s, x: torch.exp(40 * s.a(x))), X, weight_std=1.0)


def test_patterns_that_no_parameter_has_are_refused():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ntkit.InputError, match=r"weight_std has 'fc1\.\*', and no parameter is named so"):
        InfiniteWidth(net, weight_std={"fc1.*": 1.0, "*": 1.0})
    InfiniteWidth(net, weight_std={"0.*": 1.0, "2.*": 1.0}, bias_std={"*": 0.1})


def test_empty_tiles_are_empty():
    kernel = InfiniteWidth(Net(lambda s, x: F.relu(s.a(x))))(X)
    assert kernel.tile(slice(0, 0), slice(None)).shape == (0, 3)
    assert kernel.tile(slice(None), slice(2, 2)).shape == (3, 0)


def test_a_module_that_has_changed_is_read_again():
    net = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1)).eval()
    function = InfiniteWidth(net)
    before = function(X).dense()
    with torch.no_grad():
        net[3].weight.mul_(3.0)
    louder = function(X).dense()
    assert float(louder[0, 0]) > 1.5 * float(before[0, 0]) or not torch.allclose(louder, before)
    net.train()
    dropped = function(X).dense()
    assert not torch.allclose(dropped, louder)
    net[2].p = 0.9
    assert not torch.allclose(function(X).dense(), dropped)
    net[1] = nn.Tanh()
    net.eval()
    assert not torch.allclose(function(X).dense(), louder)
    before = function(X).dense()
    net[0].requires_grad_(False)
    assert float(function(X).dense()[0, 0]) < float(before[0, 0])


def test_tracing_leaves_nothing_on_the_module():
    net = Net(lambda s, x: F.relu(s.a(x * torch.ones(5, dtype=x.dtype))))
    before = set(vars(net)) | set(net._buffers)
    first = copy.deepcopy(X)
    infinite_ntk(net, X)
    assert set(vars(net)) | set(net._buffers) == before
    assert torch.equal(X, first)

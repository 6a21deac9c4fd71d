"""Each kind of layer at infinite width: its moments by quadrature, its mean kernel by finite networks, its refusals."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkit
from ntkit.kernel.infinite import InfiniteWidth, Standard, infinite_ntk
from ntkit.kernel.infinite.duals import GELU, Cosine, Erf, Linear, PiecewiseLinear, Rescaled, Sine
from ntkit.kernel.infinite.hermite import HermiteSeries
from ntkit.kernel.infinite.steps import Pooling
from tests import oracles_infinite as oracle

# ----------------------------------------------------------------------------------------- moments of nonlinearities

FUNCTIONS = {
    "linear": (Linear(1.5), lambda z: 1.5 * z),
    "leaky": (PiecewiseLinear(0.2, 1.0), lambda z: F.leaky_relu(z, 0.2)),
    "absolute": (PiecewiseLinear(-1.0, 1.0), torch.abs),
    "erf": (Erf(), torch.erf),
    "gelu": (GELU(), F.gelu),
    "sine": (Sine(), torch.sin),
    "cosine": (Cosine(), torch.cos),
    "rescaled": (Rescaled(GELU(), 0.7, -1.3), lambda z: -1.3 * F.gelu(0.7 * z)),
    "tanh": (HermiteSeries(torch.tanh, "tanh"), torch.tanh),
    "silu": (HermiteSeries(F.silu, "silu"), F.silu),
    "cube": (HermiteSeries(lambda z: z**3 - z, "cube"), lambda z: z**3 - z),
}


def as_numpy(function):
    return lambda z: function(torch.from_numpy(np.asarray(z, dtype=np.float64))).numpy()


def slope_of(function):
    return lambda z: torch.func.jvp(function, (z,), (torch.ones_like(z),))[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_agree_with_quadrature_on_the_plane(name):
    dual, function = FUNCTIONS[name]
    for a, b, c in ((0.7, 1.3, 0.5), (1.1, 0.4, -0.6), (0.9, 0.9, 0.0), (0.3, 2.0, 0.7)):
        k, slope = dual(*(torch.tensor([v], dtype=torch.float64) for v in (a, b, c)), derivative=True)
        truth = oracle.moments(as_numpy(function), as_numpy(slope_of(function)), a, b, c)
        kinks = 2e-2 if name in ("leaky", "absolute") else 1e-8  # the grid steps over jumps of the derivative
        assert k.item() == pytest.approx(truth[0], abs=1e-4 if kinks > 1e-3 else 1e-8)
        assert slope.item() == pytest.approx(truth[1], abs=kinks)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_of_one_variable_are_those_of_two_equal_ones(name):
    dual, _ = FUNCTIONS[name]
    a = torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64)
    for exact, near in zip(
        dual.coincident(a, derivative=True), dual(a, a, a * (1 - 1e-10), derivative=True), strict=True
    ):
        torch.testing.assert_close(exact, near, rtol=1e-4, atol=1e-6)


def test_functions_with_kinks_say_what_the_series_leaves_out():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(), nn.Linear(8, 1))
    with pytest.warns(ntkit.FidelityWarning, match=r"Hardtanh.*no closed form.*relative error"):
        infinite_ntk(net, x, weight_std=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infinite_ntk(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), x, weight_std=1.0)


def test_functions_that_grow_past_the_quadrature_say_so():
    """cosh at deviation 5: half of the second moment is of units further out than the rule goes."""
    x = torch.tensor([[1.0], [0.5]], dtype=torch.float64)

    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.Linear(1, 8, bias=False), nn.Linear(8, 1, bias=False)

        def forward(self, x):
            return self.out(torch.cosh(self.a(x)))

    def nngp(std):
        return infinite_ntk(Grows(), x, kind="nngp", weight_std={"a.*": std, "out.*": 1.0}, bias_std=0.0)

    def truth(std):
        k = std**2 * x @ x.T
        return torch.exp((k.diagonal()[:, None] + k.diagonal()) / 2) * torch.cosh(k)

    torch.testing.assert_close(nngp(1.5), truth(1.5), rtol=1e-9, atol=0)
    with pytest.warns(ntkit.FidelityWarning, match=r"cosh grows so fast.*10 standard deviations \(30\)"):
        found = nngp(3.0)
    torch.testing.assert_close(found, truth(3.0), rtol=1e-3, atol=0)
    for std in (5.0, 6.0, 20.0):
        with pytest.raises(ntkit.ModelError, match=r"cosh grows so fast.*smaller weights"):
            nngp(std)


def test_the_largest_and_the_smallest_variance_are_looked_at():
    a = torch.full((640,), 0.5, dtype=torch.float64)
    a[333] = 36.0  # not among the sixty-four that are picked
    with pytest.raises(ntkit.ModelError, match="grows so fast"):
        HermiteSeries(torch.cosh, "cosh").check(a, derivative=True)


def test_functions_written_out_are_the_functions():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x):
            h = self.a(x)
            return self.b(0.5 * h * (1 + torch.erf(h / math.sqrt(2))))

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    torch.testing.assert_close(
        infinite_ntk(Written(), x, weight_std=1.3), infinite_ntk(plain, x, weight_std=1.3), rtol=1e-9, atol=1e-9
    )


# ------------------------------------------------------------------------------- against finite networks, by parameter


class Residual(nn.Module):
    """Pre-activation blocks with a strided shortcut, in functional calls."""

    def __init__(self, n):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, n, 1)
        self.short, self.down, self.head = nn.Conv2d(n, n, 1, 2), nn.Conv2d(n, n, 3, 2, 1), nn.Linear(n, 3)

    def forward(self, x):
        h = self.stem(x)
        h = h + 0.5 * self.two(F.relu(self.one(F.relu(h))))
        h = self.short(h) + self.down(F.relu(h))
        return self.head(F.relu(h).mean((2, 3)))


class Branches(nn.Module):
    """Channels of three widths side by side, one branch upon another."""

    def __init__(self, n):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(5, n), nn.Linear(5, 2 * n), nn.Linear(n, n), nn.Linear(4 * n, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.out(torch.cat([F.relu(self.c(a)), a, torch.tanh(self.b(x))], 1))


class ClassToken(nn.Module):
    """One position is taken, others are added up, and an axis of one position goes."""

    def __init__(self, n):
        super().__init__()
        self.embed, self.up = nn.Conv1d(3, n, 3, padding=1), nn.Conv1d(n, n, 3, padding=1)
        self.first, self.all = nn.Linear(n, n), nn.Linear(n, n)
        self.head = nn.Linear(n, 3)

    def forward(self, x):
        h = F.relu(self.up(F.relu(self.embed(x.flatten(2)))))
        every = 0.25 * h.sum(-1, keepdim=True)
        return self.head(F.relu(self.first(h[..., 5]) + self.all(every.squeeze(-1))))


class Tokens(nn.Module):
    """Channels last: a normalised residual MLP on every position, as in a transformer without attention."""

    def __init__(self, n):
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Linear(3, n), nn.LayerNorm(n), nn.Linear(n, n), nn.Linear(n, n)
        self.head = nn.Linear(n, 3)

    def forward(self, x):
        h = self.embed(x.flatten(2).transpose(1, 2))
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h.mean(1))


class ByHand(nn.Module):
    """Products with parameters, (inputs, outputs), and biases added by hand."""

    def __init__(self, n):
        super().__init__()
        self.w, self.b, self.u, self.c = (nn.Parameter(torch.empty(*s)) for s in ((5, n), (n,), (n, n), (1, n)))
        self.v = nn.Parameter(torch.empty(3, n))

    def forward(self, x):
        h = torch.relu(x @ self.w + self.b)
        h = torch.relu(torch.matmul(h, self.u) + self.c)
        return h @ self.v.T / self.v.shape[0] ** 0.5


class Functional(nn.Module):
    """Parameters of its own in functional calls, scaled by hand."""

    def __init__(self, n):
        super().__init__()
        self.w, self.b, self.v = (
            nn.Parameter(torch.empty(n, 5)),
            nn.Parameter(torch.empty(n)),
            nn.Parameter(torch.empty(3, n)),
        )

    def forward(self, x):
        h = F.linear(x, self.w, self.b)
        return 2 * F.linear(h * torch.sigmoid(h), self.v)


class Ways(nn.Module):
    """1x1 convolutions beside others, before and after the same nonlinearity, and on the inputs themselves."""

    def __init__(self, n):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, n, 1), nn.Conv2d(3, n, 3, padding=1)
        self.c, self.d = nn.Conv2d(n, n, 1), nn.Conv2d(n, n, 3, padding=1)
        self.e, self.f = nn.Conv2d(n, n, 1, 2), nn.Conv2d(n, n, 3, 2, 1)
        self.head = nn.Linear(4 * n, 3)

    def forward(self, x):
        g = F.relu(self.a(x) + self.b(x))
        h = self.c(g) + self.d(g)
        return self.head((self.f(F.relu(h)) + self.e(h)).flatten(1))


def seq(*layers):
    return nn.Sequential(*layers)


NETWORKS = {
    "mlp": lambda n: seq(nn.Linear(5, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 3)),
    "smooth": lambda n: seq(nn.Linear(5, n), nn.GELU(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 3)),
    "slopes": lambda n: seq(nn.Linear(5, n), nn.PReLU(), nn.Linear(n, n), nn.LeakyReLU(0.3), nn.Linear(n, 3)),
    "normalised": lambda n: seq(
        nn.Linear(5, n), nn.LayerNorm(n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.RMSNorm(n), nn.Linear(n, 3)
    ),
    "normalised and smooth": lambda n: seq(
        nn.Linear(5, n), nn.LayerNorm(n), nn.GELU(), nn.Linear(n, n), nn.RMSNorm(n), nn.Tanh(), nn.Linear(n, 3)
    ),
    "branches": Branches,
    "functional": Functional,
    "by hand": ByHand,
    "strided": lambda n: seq(
        nn.Conv2d(3, n, 3, padding=1), nn.ReLU(), nn.Conv2d(n, n, 3, 2, 1, padding_mode="circular"), nn.GELU(),
        nn.Flatten(), nn.Linear(4 * n, 3),
    ),
    "pooled": lambda n: seq(
        nn.Conv2d(3, n, 3, padding="same", dilation=2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(n, n, 3, padding="same"),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 3),
    ),
    "reflected": lambda n: seq(
        nn.Conv2d(3, n, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(n, n, 3, padding=1, padding_mode="replicate", groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * n, 3),
    ),
    "groups": lambda n: seq(
        nn.Conv2d(3, n, 3, padding=1), nn.GroupNorm(2, n), nn.ReLU(), nn.Conv2d(n, n, 3),
        nn.LayerNorm([n, 2, 2], elementwise_affine=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * n, 3),
    ),
    "line": lambda n: seq(
        nn.Flatten(2), nn.Conv1d(3, n, 5, 2, 1), nn.ReLU(), nn.AvgPool1d(3, 2, 1, count_include_pad=False),
        nn.Conv1d(n, n, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * n, 3),
    ),
    "residual": Residual,
    "ways": Ways,
    "one pixel": lambda n: seq(
        nn.Conv2d(3, n, 4), nn.Conv2d(n, n, 1), nn.ReLU(), nn.Conv2d(n, n, 1), nn.Flatten(), nn.Linear(n, 3)
    ),
    "tokens": Tokens,
    "class token": ClassToken,
}  # fmt: skip
FLAT = {"mlp", "smooth", "slopes", "normalised", "normalised and smooth", "branches", "functional", "by hand"}


def inputs(name):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, *((5,) if name in FLAT else (3, 4, 4)), generator=draw, dtype=torch.float64)
    x[1] = x[0] + 0.4 * x[1]
    return x


def drawn(name, width, seed):
    """A network with Gaussian weights of PyTorch's variances: with few inputs, uniform ones are not yet Gaussian."""
    torch.manual_seed(seed)
    net = NETWORKS[name](width).double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                for p in (module.weight, module.bias):
                    p.normal_().mul_(1 / math.sqrt(3 * module.weight[0].numel()))
            if isinstance(module, Functional):
                module.w.normal_().mul_(0.6)
                module.b.normal_().mul_(0.3)
                module.v.normal_().mul_(1 / math.sqrt(width))
            if isinstance(module, ByHand):
                for p, std in zip(
                    module.parameters(), (0.6, 0.3, 1 / math.sqrt(width), 0.2, 1 / math.sqrt(width)), strict=True
                ):
                    p.normal_().mul_(std)
    return net


def law(net, name):
    """The same variances, for the limit."""
    if name == "functional":
        return {"weight_std": {"w": 0.6 * math.sqrt(5), "v": 1.0}, "bias_std": {"b": 0.3}}
    if name == "by hand":
        return {"weight_std": {"w": 0.6 * math.sqrt(5), "[uv]": 1.0}, "bias_std": {"b": 0.3, "c": 0.2}}
    biases = {
        f"{prefix}.bias" if prefix else "bias": 1 / math.sqrt(3 * module.weight[0].numel())
        for prefix, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    return {"weight_std": 1 / math.sqrt(3), "bias_std": biases}


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("name", NETWORKS)
def test_memory_that_is_used_again_changes_no_number(name, kind):
    """With gradients nothing is written in place; the diagonal has formulas of its own."""
    net = drawn(name, 4, 0)
    function = InfiniteWidth(net, kind=kind, **law(net, name))
    x = inputs(name)
    plain = function(x)
    torch.testing.assert_close(plain.dense(), function(x.clone().requires_grad_()).dense().detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(plain.diagonal(), plain.dense().diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(plain.dense(), function(x, x.clone()).dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_finite_networks_have_the_limit_as_their_mean_parameter_by_parameter(name):
    """Within 5 standard errors and a bias of order 1/width, both relative to the parameter's own part."""
    width, seeds, x = 96, 24, inputs(name)
    names = [n for n, _ in NETWORKS[name](2).named_parameters()]
    parts = {n: [] for n in names}
    for seed in range(seeds):
        net = drawn(name, width, seed)
        kernel = ntkit.TangentKernel(ntkit.linearize(net), x, trace=True)
        for n, part in kernel.by_parameter().items():
            parts[n].append(part)
    for n in names:
        limit = infinite_ntk(net, x, parameters=n, parametrization=Standard(), **law(net, name))
        found = torch.stack(parts[n])
        scale = torch.sqrt(torch.outer(limit.diagonal(), limit.diagonal()))
        error = found.std(0) / math.sqrt(seeds)
        off = (found.mean(0) - limit).abs()
        assert bool((off <= 5 * error + 4 / width * scale).all()), (n, off / scale, error / scale)
        assert error.max() < 0.25 * scale.max()  # or the comparison would say nothing


def test_networks_approach_their_limit_as_the_root_of_the_width():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    widths, seeds, errors, biases = [32, 64, 128, 256, 512], 10, [], []
    for width in widths:
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = seq(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)).double()
            for p in net.parameters():
                nn.init.zeros_(p) if p.ndim == 1 else nn.init.kaiming_normal_(p)
            found.append(ntkit.empirical_ntk(net, x, trace=True))
        limit = infinite_ntk(net, x, weight_std=math.sqrt(2), bias_std=0.0, parametrization=Standard())
        errors.append(math.sqrt(sum(float((k - limit).square().sum()) for k in found) / seeds) / float(limit.norm()))
        biases.append(float((sum(found) / seeds - limit).norm() / limit.norm()))
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.4, (slope, errors)
    assert biases[-1] < 0.6 * errors[-1], (biases, errors)  # its expectation is 0.32, of ten networks


@pytest.mark.parametrize("name", ["residual", "pooled"])
def test_each_layer_of_a_convolutional_network_approaches_its_limit_as_the_root_of_the_width(name):
    x, widths, seeds, errors = inputs(name), [16, 32, 64, 128], 12, []
    for width in widths:
        nets, parts = [drawn(name, width, seed) for seed in range(seeds)], {}
        for net in nets:
            for part, kernel in ntkit.TangentKernel(ntkit.linearize(net), x, trace=True).by_parameter().items():
                parts.setdefault(part, []).append(kernel)
        each = []
        for part in (part for part in parts if part.endswith("weight")):
            limit = infinite_ntk(nets[0], x, parameters=part, parametrization=Standard(), **law(nets[0], name))
            squares = (torch.stack(parts[part]) - limit).square().sum((1, 2))
            each.append(math.log(float(squares.mean().sqrt() / limit.norm())))
        errors.append(sum(each) / len(each))
    slope = np.polyfit(np.log(widths), errors, 1)[0]
    assert -0.65 < slope < -0.35, (slope, errors)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_meets_itself_with_one_mask_and_others_with_their_own(kind):
    width, seeds, x = 96, 40, inputs("strided")
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = seq(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), kind(0.4), nn.Conv2d(width, width, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(4 * width, 1),
        ).double()  # fmt: skip
        rows = []
        for one in x:
            (out,) = net(one[None])[0]
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(out, list(net.parameters()))]))
        found.append(torch.stack(rows) @ torch.stack(rows).T)
    limit = infinite_ntk(net.train(), x)
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(seeds)
    assert bool(((mean - limit).abs() <= 5 * error + 0.02 * limit.diagonal().max()).all())
    kept = infinite_ntk(net.eval(), x)
    assert bool((limit.diagonal() > 1.15 * kept.diagonal()).all())


# ------------------------------------------------------------------------------------------- other words for the same


class Says(nn.Module):
    """A convolution, a function of it, and a linear layer."""

    def __init__(self, function, kernel=3, volume=False):
        super().__init__()
        conv = nn.Conv3d if volume else nn.Conv2d
        size = (1, kernel, kernel) if volume else kernel
        self.a, self.out = conv(3, 8, size, padding="same"), nn.Linear(8, 1)
        self.function = function

    def forward(self, x):
        return self.out(self.function(torch.relu(self.a(x))))


def test_functions_are_read_as_modules_are():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 2), nn.Linear(8, 4)

        def forward(self, x):
            h = torch.relu(F.conv2d(x, self.a.weight, self.a.bias, stride=1, padding=2, dilation=2))
            h = F.adaptive_avg_pool2d(F.avg_pool2d(h, 2, 1), 2)
            h = F.dropout2d(F.relu(F.conv2d(h, self.b.weight, self.b.bias)), 0.3, self.training)
            return torch.addmm(self.out.bias, h.flatten(1), self.out.weight.T)

    modules = seq(
        nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2),
        nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    x = inputs("strided")
    for mode in (True, False):
        both = [infinite_ntk(net.train(mode), x, weight_std=1.2, bias_std=0.3) for net in (Functions(), modules)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


def test_a_volume_of_one_plane_is_the_plane():
    x = inputs("strided")
    flat = seq(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 1)
    )
    volume = seq(
        nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.AvgPool3d((1, 2, 2)), nn.Conv3d(8, 8, (1, 2, 2)),
        nn.Flatten(), nn.Linear(8, 1),
    )  # fmt: skip
    found = [infinite_ntk(net, at, weight_std=1.2, bias_std=0.3) for net, at in ((flat, x), (volume, x[:, :, None]))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_an_image_of_one_row_is_the_line():
    x = inputs("strided").flatten(2)
    line = seq(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Dropout1d(0.4), nn.AvgPool1d(2), nn.Conv1d(8, 8, 2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(16, 1),
    )  # fmt: skip
    image = seq(
        nn.Conv2d(3, 8, (1, 3)), nn.ReLU(), nn.Dropout2d(0.4), nn.AvgPool2d((1, 2)), nn.Conv2d(8, 8, (1, 2)),
        nn.ReLU(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(16, 1),
    )  # fmt: skip
    found = [infinite_ntk(net, at, weight_std=1.2, bias_std=0.3) for net, at in ((line, x), (image, x[:, :, None]))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


SAME = {
    "a sum over all": lambda h: h.sum((2, 3)) / 16,
    "one axis after the other": lambda h: h.mean(-1).sum(2) * 0.25,
    "squeezed twice": lambda h: h.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "squeezed": lambda h: F.adaptive_avg_pool2d(h, 1).squeeze(),
    "squeezed where nothing is to go": lambda h: h.squeeze(1).mean((2, 3)),
    "the only position": lambda h: F.avg_pool2d(h, 4)[:, :, 0, 0],
}


@pytest.mark.parametrize("name", SAME)
def test_a_mean_in_other_words(name):
    x = inputs("strided")
    found = infinite_ntk(Says(SAME[name]), x, weight_std=1.2, bias_std=0.3)
    torch.testing.assert_close(
        found, infinite_ntk(Says(lambda h: h.mean((2, 3))), x, weight_std=1.2, bias_std=0.3), rtol=1e-12, atol=1e-12
    )


def test_one_position_is_what_a_convolution_sees_there():
    """The unit at (1, 2) of a padded image is the only one of a convolution without padding on its patch."""
    x = inputs("strided")
    at = infinite_ntk(Says(lambda h: h[:, :, 1, 2]), x, weight_std=1.2, bias_std=0.3)
    patch = seq(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    torch.testing.assert_close(
        at, infinite_ntk(patch, x[:, :, 0:3, 1:4], weight_std=1.2, bias_std=0.3), rtol=1e-12, atol=1e-12
    )


def test_padding_beside_the_only_position_makes_it_smaller():
    """A mean over one position and two padded ones is a third of it, also where equal positions are all there is."""
    x = inputs("strided")[:, :, :1, :1]
    layers = (nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    plain = seq(*layers)
    padded = seq(*layers[:2], nn.AvgPool2d((3, 1), 1, (1, 0)), *layers[2:])
    third, whole = (infinite_ntk(net, x, weight_std=1.2, bias_std=0.0, parameters="0.*") for net in (padded, plain))
    torch.testing.assert_close(third, whole / 9, rtol=1e-12, atol=1e-12)


def test_single_positions_do_not_need_all_pairs(monkeypatch):
    """An axis of one position goes before a flatten: equal positions are enough, whose memory is far smaller."""
    pairs, run = [], Pooling.run

    def watched(self, found, block, sides):
        pairs.append(found[0].full)
        return run(self, found, block, sides)

    monkeypatch.setattr(Pooling, "run", watched)
    x = inputs("strided")[:, :, None]  # one plane

    class Planes(Says):
        def forward(self, x):
            return self.out(self.function(torch.relu(self.a(x))).flatten(1))

    nets = [Planes(function, volume=True) for function in (lambda h: h.squeeze(2), lambda h: h)]
    for net in nets:
        net.out = nn.Linear(8 * 16, 1)
    kernels = [InfiniteWidth(net, weight_std=1.2, bias_std=0.3)(x) for net in nets]
    torch.testing.assert_close(kernels[0].dense(), kernels[1].dense(), rtol=1e-12, atol=1e-12)
    assert pairs
    assert not any(pairs)


# ------------------------------------------------------------------------------------------------------- refusals


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.shared(torch.relu(self.shared(self.first(x)))))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.a(x) * torch.sigmoid(self.b(x)))


class Correlated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 1)

    def forward(self, x):
        h = self.a(x)
        return self.out((F.avg_pool2d(h, 3, 1, 1) + torch.relu(h)).mean((2, 3)))


class TwoMeans(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(torch.relu(self.a(x)) + torch.relu(self.b(x)))


class NormalisedSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.out = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.a(x)) + self.b(x)))


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 8)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.a(x)
        return self.out(h + self.b(F.relu(h, inplace=True)))


class BatchMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 1)

    def forward(self, x):
        return self.a(x - x.mean(0))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.out = (
            nn.Linear(3, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 1),
        )

    def forward(self, x):
        h = self.embed(x[:, None])
        return self.out(self.attend(h, h, h)[0].mean(1))


class TokensOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 8)

    def forward(self, x):
        return self.a(x[:, None])


class Written(nn.Module):
    """A convolution of three positions, and a function of it."""

    def __init__(self, function, inputs=24):
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(1, 8, 3, padding=1), nn.Linear(inputs, 1)
        self.function = function

    def forward(self, x):
        self.x = x[:, None]
        return self.function(self, self.a(x[:, None]))


def scores(net, h):
    return net.out((torch.softmax(h @ net.b(net.x).transpose(1, 2), -1) @ h).flatten(1))


def einsum(net, h):
    return net.out(torch.einsum("nct,ndt->nct", h, net.b(net.x)).flatten(1))


def counted(net, h):
    return net.out(torch.relu(h).mean(-1) / net.x.shape[0])


def two_orders(net, h):
    return net.out(h.flatten(1) + h.transpose(1, 2).flatten(1))


def parametrized():
    return seq(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 1))


def hooked():
    net = seq(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    net[1].register_forward_hook(lambda *_: None)
    return net


def conv(*layers):
    return seq(nn.Conv2d(3, 8, 3, padding=1), *layers)


REFUSALS = {
    "max pooling": (lambda: conv(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 1)), r"MaxPool2d '1'.*average pooling"),
    "batch norm": (lambda: conv(nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 1)), r"BatchNorm2d.*LayerNorm"),
    "instance norm": (lambda: conv(nn.InstanceNorm2d(8), nn.Flatten(), nn.Linear(128, 1)), "InstanceNorm2d.*random"),
    "one channel": (lambda: conv(nn.GroupNorm(8, 8), nn.Flatten(), nn.Linear(128, 1)), "GroupNorm.*one channel"),
    "positions": (lambda: conv(nn.LayerNorm(4), nn.Flatten(), nn.Linear(128, 1)), "without the channels"),
    "depthwise": (lambda: conv(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 1)), "depthwise"),
    "groups of inputs": (lambda: seq(nn.Conv2d(3, 9, 3, groups=3), nn.Flatten(), nn.Linear(36, 1)), "groups of input"),
    "mixing": (lambda: conv(nn.Linear(4, 4), nn.Flatten(), nn.Linear(128, 1)), "mixes positions"),
    "softmax": (lambda: seq(nn.Linear(3, 8), nn.Softmax(-1), nn.Linear(8, 1)), "Softmax.*couples the channels"),
    "recurrent": (lambda: seq(nn.Linear(3, 8), nn.LSTM(8, 8)), "LSTM"),
    "attention": (Attends, "MultiheadAttention 'attend'.*softmax"),
    "twice": (Twice, "'shared.weight' is used again.*share"),
    "gate": (Gate, "product of two layers"),
    "correlated": (Correlated, "correlated"),
    "two means": (TwoMeans, "mean that is not zero"),
    "not Gaussian": (lambda: seq(nn.Linear(3, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1)), "not Gaussian"),
    "mean": (lambda: seq(nn.Linear(3, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 1)), "LayerNorm.*RMSNorm"),
    "scale in a sum": (NormalisedSum, "ReLU is applied to a sum.*freeze that weight"),
    "decides": (Decides, "traced"),
    "overwrites": (Overwrites, "used elsewhere"),
    "batch mean": (BatchMean, "one by one"),
    "weight norm": (parametrized, "function of other parameters"),
    "hooks": (hooked, "forward hooks"),
    "tokens": (TokensOut, r"output has positions of shape \(1,\)"),
    "no weights": (lambda: nn.Flatten(), "no parameter"),
    "wrong shape": (lambda: nn.Linear(4, 1), "fails on 2 of the examples"),
    "attention by hand": (lambda: Written(scores), "matmul.*product of two layers.*softmax"),
    "products as einsum": (lambda: Written(einsum), "einsum.*product of two layers"),
    "examples counted": (lambda: Written(counted, 8), r"truediv.*how many examples there are"),
    "flattened in two orders": (lambda: Written(two_orders, 24), "flattened in different orders"),
    "one of the examples": (lambda: Written(lambda net, h: net.out(h[0].T), 8), "getitem.*only positions may be"),
    "some positions": (lambda: Written(lambda net, h: net.out(h[:, :, 1:].flatten(1)), 16), "only single positions"),
    "a sum of all": (lambda: Written(lambda net, h: h.sum(), 8), "takes in all channels"),
    "channels added": (lambda: Written(lambda net, h: h.sum(1), 8), "channels or examples"),
    "unknown": (lambda: seq(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 1)), "not among the modules whose limit is known"),
}  # fmt: skip


OF_IMAGES = {
    "max pooling", "batch norm", "instance norm", "one channel", "positions", "depthwise", "mixing", "groups of inputs",
    "correlated",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_limit_is_refused_with_its_node(name):
    make, words = REFUSALS[name]
    x = torch.randn(4, *((3, 4, 4) if name in OF_IMAGES else (3,)), generator=torch.Generator().manual_seed(0))
    with pytest.raises((ntkit.ModelError, ntkit.InputError), match=words):
        infinite_ntk(make(), x)


def test_a_frozen_scale_may_go_into_a_sum():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    net = NormalisedSum()
    net.norm.weight.requires_grad_(False)
    assert infinite_ntk(net, x).shape == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "both?"}, "kind"),
        ({"weight_std": -1.0}, "weight_std is a standard deviation"),
        ({"bias_std": {"*": math.inf}}, "bias_std is a standard deviation"),
        ({"weight_std": True}, "weight_std"),
        ({"parametrization": "ntk"}, "parametrization"),
        ({"parameters": "nothing.*"}, "selects no parameter"),
    ],
)
def test_arguments_are_checked_first(arguments, words):
    with pytest.raises(ntkit.InputError, match=words):
        infinite_ntk(nn.Linear(3, 1), torch.ones(2, 3), **arguments)


def test_examples_are_checked():
    with pytest.raises(ntkit.InputError, match="got function"):
        infinite_ntk(lambda x: x, torch.ones(2, 3))
    with pytest.raises(ntkit.InputError, match="dict"):
        infinite_ntk(nn.Linear(3, 1), {"input": torch.ones(2, 3)})
    with pytest.raises(ntkit.InputError, match="one shape and type"):
        infinite_ntk(nn.Linear(3, 1), torch.ones(2, 3), torch.ones(2, 2, 3))
    with pytest.raises(ntkit.InputError, match="kind"):
        InfiniteWidth(nn.Linear(3, 1), kind="both")
    with pytest.raises(ntkit.InputError, match="kind 'nngp'"):
        InfiniteWidth(nn.Linear(3, 1), kind="nngp")(torch.ones(2, 3)).both()

"""Kernel functions in a Gaussian process of GPyTorch, the tangent kernel first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import Features, RandomFourier
from ntkit.kernel.fully_connected import FullyConnected
from ntkit.kernel.function import Empirical, KernelFunction
from ntkit.kernel.infinite import InfiniteWidth
from ntkit.solve.conditioned import Posterior
from ntkit.solve.ridge import Absolute
from tests.cases import normal

gpytorch = pytest.importorskip("gpytorch")
gp = pytest.importorskip("ntkit.kernel.gp")


def tangent(outputs: int = 1) -> ntkit.Tangent:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, outputs)).double()
    return ntkit.linearize(model)


def inputs(n: int = 10, seed: int = 0) -> Tensor:
    return normal(6, seed=seed)(n).double()


def test_entries_are_those_of_the_kernel() -> None:
    for outputs, trace in ((1, False), (3, False), (3, True)):
        kernel = gp.NTKGPKernel(tangent(outputs), shape=(1, 6), trace=trace)
        x, other = inputs(), inputs(4, 1)
        for pair in ((x,), (x, other), (x, x.clone())):
            images = [t.view(-1, 1, 6) for t in pair[: 1 if len(pair) == 2 and len(pair[1]) == 10 else 2]]
            expected = ntkit.TangentKernel(tangent(outputs), *images, trace=trace).dense()
            torch.testing.assert_close(kernel(*pair).to_dense(), expected)
        torch.testing.assert_close(kernel(x, diag=True), kernel(x).to_dense().diagonal())
        assert kernel.num_outputs_per_input(x, x) == (1 if trace else outputs)


class Regression(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: object) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gp.NTKGPKernel(tangent(), shape=(1, 6)))

    def forward(self, x: Tensor) -> object:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_a_gaussian_process_predicts_what_the_regression_does_and_learns_its_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, new = inputs(), inputs(4, 1)
    y = torch.sin(3 * x).sum(1)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Regression(x, y, likelihood).double()
    model.covar_module.outputscale = 1.0
    likelihood.noise = 0.1
    model.eval()
    likelihood.eval()
    with torch.no_grad():
        mean = model(new).mean
    kernel = ntkit.TangentKernel(tangent(), x.view(-1, 1, 6)).dense()
    cross = ntkit.TangentKernel(tangent(), new.view(-1, 1, 6), x.view(-1, 1, 6)).dense()
    torch.testing.assert_close(mean, cross @ torch.linalg.solve(kernel + 0.1 * torch.eye(10).double(), y))

    model.train()
    likelihood.train()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    before = float(evidence(model(x), y).detach())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    dense: list[int] = []
    original = ntkit.TangentKernel.dense
    monkeypatch.setattr(ntkit.TangentKernel, "dense", lambda self: [original(self), dense.append(1)][0])
    for _ in range(20):
        optimizer.zero_grad()
        loss = -evidence(model(x), y)
        loss.backward()
        optimizer.step()
    assert float(-loss.detach()) > before
    assert len(dense) <= 1  # the network does not change
    assert all("tangent" not in name for name, _ in model.named_parameters())  # the network is not the process's


def test_a_network_that_is_trained_on_has_another_kernel() -> None:
    kernel, x = gp.NTKGPKernel(tangent(), shape=(1, 6)), inputs()
    before = kernel(x).to_dense()
    with torch.no_grad():
        kernel.tangent.model[3].weight.mul_(2.0)
    after = ntkit.TangentKernel(kernel.tangent, x.view(-1, 1, 6)).dense()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(kernel(x).to_dense(), after)


def test_several_outputs_are_tasks() -> None:
    kernel, x = gp.NTKGPKernel(tangent(3), shape=(1, 6)), inputs()
    covariance = kernel(x)
    assert covariance.shape == (30, 30)
    process = gpytorch.distributions.MultitaskMultivariateNormal(
        torch.zeros(10, 3).double(), covariance.add_jitter(1e-6)
    )
    assert process.sample().shape == (10, 3)
    torch.testing.assert_close(process.variance.reshape(-1), kernel(x, diag=True) + 1e-6)


def test_refusals() -> None:
    kernel = gp.NTKGPKernel(tangent(), shape=(1, 6))
    with pytest.raises(InputError, match="without batches"):
        kernel(inputs().expand(2, 10, 6)).to_dense()
    with pytest.raises(InputError, match=r"the inputs of torch\.float32"):
        kernel(inputs().float()).to_dense()
    with pytest.raises(InputError, match="no derivative"):
        kernel(inputs().requires_grad_()).to_dense()


# --- any kernel function ----------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, KernelFunction] = {
    "rbf": RBF(1.5),
    "infinite width": FullyConnected(depth=3, bias_std=0.3),
    "infinite width of a module": InfiniteWidth(
        nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), weight_std=1.2
    ),
    "made of kernels": (0.5 * FullyConnected(depth=2) * RBF(2.0) + DotProduct(1.0)).normalised(),
    "posterior": Posterior(RBF(1.5), inputs(3, 5), ridge=0.1),
    "random features": RandomFourier(RBF(1.5), 16, generator=torch.Generator().manual_seed(0)),
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@each
def test_any_function_is_a_kernel_with_gradients(function: KernelFunction) -> None:
    kernel, x, other = gp.FunctionGPKernel(function), inputs(), inputs(4, 1)
    torch.testing.assert_close(kernel(x).to_dense(), function(x).dense())
    torch.testing.assert_close(kernel(x, other).to_dense(), function(x, other).dense())
    torch.testing.assert_close(kernel(x, diag=True), function.diagonal(x))
    torch.testing.assert_close(kernel(x, x.flip(0), diag=True), function(x, x.flip(0)).dense().diagonal())
    assert kernel(x).dtype == torch.float64
    few, others = x[:3].clone().requires_grad_(), other[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kernel(a, b).to_dense(), (few, others))
    assert torch.autograd.gradcheck(lambda a: kernel(a).to_dense() + a.sum(), few)
    assert torch.autograd.gradcheck(lambda a: kernel(a, diag=True) + a.sum(), few)
    # the same values twice: either side has its part of the gradient
    weights, copy = normal(3, seed=7)(3).double(), few.detach().clone().requires_grad_()
    (whole,) = torch.autograd.grad((kernel(few).to_dense() * weights).sum(), few)
    parts = torch.autograd.grad((kernel(few, copy).to_dense() * weights).sum(), (few, copy))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-6, atol=1e-6)


class Wide(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: object, function: KernelFunction) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gp.FunctionGPKernel(function))

    def forward(self, x: Tensor) -> object:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_a_process_of_infinite_width_learns_its_scale_and_predicts_with_gradients() -> None:
    x, new = inputs(), inputs(4, 1)
    y = torch.sin(3 * x).sum(1)
    function = FullyConnected(depth=3, bias_std=0.3)
    calls: list[int] = []

    class Counted(KernelFunction):
        def __call__(self, x1: Tensor, x2: Tensor | None = None) -> ntkit.Kernel:
            kernel = function(x1, x2)
            original = kernel.dense
            kernel.dense = lambda: [original(), calls.extend([1] * (len(x1) == 10))][0]
            return kernel

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Wide(x, y, likelihood, Counted()).double()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -evidence(model(x), y)
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]
    assert len(calls) == 1  # the function does not change
    model.eval()
    likelihood.eval()
    scale, noise = model.covar_module.outputscale.item(), likelihood.noise.item()
    moved = new.clone().requires_grad_()
    prediction = model(moved)
    expected = Posterior(scale * function, x, ridge=Absolute(noise))
    torch.testing.assert_close(prediction.mean, expected.mean(new, y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction.covariance_matrix, expected(new).dense(), rtol=1e-6, atol=1e-6)
    (found,) = torch.autograd.grad(prediction.mean.sum(), moved)
    again = new.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(expected.mean(again, y).sum(), again)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_entries_are_computed_again_when_what_they_depend_on_has_changed() -> None:
    net, x = nn.Linear(6, 3).double(), inputs()
    net.requires_grad_(False)
    kernel = gp.FunctionGPKernel(Features(net))
    before = kernel(x).to_dense()
    with torch.no_grad():
        net.weight.mul_(2.0)
    after = kernel(x).to_dense()
    torch.testing.assert_close(after, net(x) @ net(x).T)
    assert not torch.allclose(before, after)
    net.requires_grad_(True)
    for _ in range(2):  # its graph is made anew
        kernel(x).to_dense().sum().backward()
    assert bool(net.weight.grad.any())


def test_images_scalars_and_refusals_of_functions() -> None:
    several = gp.FunctionGPKernel(Empirical(tangent(3)), shape=(1, 6))
    x = inputs()
    torch.testing.assert_close(several(x).to_dense(), gp.NTKGPKernel(tangent(3), shape=(1, 6))(x).to_dense())
    assert several(x).shape == (30, 30)
    half = gp.FunctionGPKernel(RBF(1.5))(x.float())
    assert half.dtype == half.to_dense().dtype == torch.float32
    with pytest.raises(InputError, match=r"function is a KernelFunction .* got Tangent"):
        gp.FunctionGPKernel(tangent())
    with pytest.raises(InputError, match="without batches"):
        gp.FunctionGPKernel(RBF())(inputs().expand(2, 10, 6)).to_dense()
    with pytest.raises(InputError, match="no derivative with respect to its inputs"):
        several(x.clone().requires_grad_()).to_dense()

    class Silent(KernelFunction):
        def __call__(self, x1: Tensor, x2: Tensor | None = None) -> ntkit.Kernel:
            return RBF()(x1.detach(), None if x2 is None else x2.detach())

        def __repr__(self) -> str:
            return "Silent"

    with pytest.raises(InputError, match="Silent has no derivative"):
        gp.FunctionGPKernel(Silent())(x.clone().requires_grad_()).to_dense()

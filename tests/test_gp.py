"""The tangent kernel in a Gaussian process of GPyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
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

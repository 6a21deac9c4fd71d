"""The oracle and the table of cases are checked themselves, without anything of the library."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests import oracles
from tests.cases import CASES, Case

# Said once per process, and only of the kernels that it concerns.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

BY_NAME = {case.name: case for case in CASES}


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=lambda case: case.name)


# ---------------------------------------------------------------- the table


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_is_sound(case: Case) -> None:
    model, x = case.build(), case.data(5)
    before = oracles.snapshot(model)
    together = oracles.outputs(model, x, case.scalars)
    assert oracles.snapshot(model) == before

    assert not any(module.training for module in model.modules())
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert case.chosen(model)
    assert together.ndim == 2
    assert together.shape[0] == oracles.count(x) == 5
    assert together.dtype == torch.float64
    assert together.isfinite().all()
    assert together.std() > 1e-3
    # the same again, by the same model and by another build; and every example alone
    assert torch.equal(oracles.outputs(model, x, case.scalars), together)
    assert torch.equal(oracles.outputs(case.build(), case.data(5), case.scalars), together)
    assert oracles.relative_error(oracles.outputs_alone(model, x, case.scalars), together) < 1e-10


# ---------------------------------------------------------------- derivatives


@some(
    "linear/mlp",
    "linear/bilinear",
    "conv2d/net",
    "bare/inplace_add",
    "tied/embedding_and_head",
    "repeated/recurrent",
    "attention/padded_causal_weights",
    "parameters/frozen_but_chosen",
    "forward/dict_inputs",
    "network/vision_transformer",
)
def test_jacobian_agrees_with_jacrev(case: Case) -> None:
    model, x = case.build(), case.data(4)
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in case.chosen(model))
    }

    def scalars(parameters: dict[str, Tensor]) -> Tensor:
        args = x if isinstance(x, tuple) else () if isinstance(x, dict) else (x,)
        return case.scalars(functional_call(model, parameters, args, x if isinstance(x, dict) else {})).flatten()

    with oracles.differentiable():
        blocks = jacrev(scalars, chunk_size=1)({name: parameter.detach() for name, parameter in chosen.items()})
    expected = torch.cat([blocks[name].flatten(1) for name in chosen], dim=1).detach()
    got = oracles.jacobian_rows(model, x, case.scalars, list(chosen.values()))
    assert oracles.relative_error(got, expected) < 1e-12


@some("norm/layer", "recurrent/lstm")
def test_jacobian_agrees_with_finite_differences(case: Case) -> None:
    model, x, step = case.build(), case.data(2), 1e-6
    parameters = case.chosen(model)
    columns = []
    for parameter in parameters:
        entries = parameter.detach().view(-1)  # shares memory: writing here moves the model
        for index in range(entries.numel()):
            value = entries[index].item()
            entries[index] = value + step
            above = oracles.outputs_alone(model, x, case.scalars)
            entries[index] = value - step
            below = oracles.outputs_alone(model, x, case.scalars)
            entries[index] = value
            columns.append((above - below).flatten() / (2 * step))
    got = oracles.jacobian_rows(model, x, case.scalars, parameters)
    assert oracles.relative_error(got, torch.stack(columns, dim=1)) < 1e-8


def test_jacobian_leaves_the_model_alone() -> None:
    case = BY_NAME["parameters/frozen_but_chosen"]
    model, x = case.build(), case.data(2)
    before = oracles.snapshot(model)
    oracles.jacobian_rows(model, x, case.scalars, case.chosen(model))
    assert oracles.snapshot(model) == before

    def fails(output: Any) -> Tensor:
        raise RuntimeError("no scalars")

    with pytest.raises(RuntimeError, match="no scalars"):
        oracles.jacobian_rows(model, x, fails, case.chosen(model))
    assert oracles.snapshot(model) == before


def test_unused_parameters_give_zero_columns() -> None:
    case = BY_NAME["parameters/unused"]
    model = case.build()
    unused = [*model.get_submodule("never").parameters(), model.get_parameter("bare")]
    assert not oracles.jacobian_rows(model, case.data(2), case.scalars, unused).any()


def test_snapshot_sees_every_kind_of_change() -> None:
    def changes(model: nn.Sequential) -> list[Any]:
        weight = model[0].weight
        return [
            lambda: weight.data.view(-1)[0].mul_(1 + 1e-15),
            lambda: weight.requires_grad_(False),
            lambda: setattr(weight, "grad", torch.zeros_like(weight)),
            lambda: weight.register_hook(lambda g: g),
            lambda: setattr(model[0], "weight", nn.Parameter(weight.detach().clone())),
            lambda: setattr(model[0], "captured", 1),
            lambda: model[0].register_forward_hook(lambda *_: None),
            lambda: model[0].register_full_backward_hook(lambda *_: None),
            lambda: model[1].train(),
        ]

    for index in range(len(changes(BY_NAME["linear/mlp"].build()))):
        model = BY_NAME["linear/mlp"].build()
        before = oracles.snapshot(model)
        assert oracles.snapshot(model) == before
        changes(model)[index]()
        assert oracles.snapshot(model) != before


@some("linear/mlp", "network/vision_transformer")
def test_reductions_are_kernels_of_their_own_scalars(case: Case) -> None:
    model, x1, x2 = case.build(), case.data(3), case.data(2)
    parameters = case.chosen(model)
    theta = oracles.entk(model, x1, x2, case.scalars, parameters)
    c = theta.shape[0] // 3

    def kernel_of(scalars: oracles.Scalars) -> Tensor:
        return oracles.entk(model, x1, x2, scalars, parameters)

    summed = kernel_of(lambda output: case.scalars(output).sum(1, keepdim=True) / math.sqrt(c))
    assert oracles.relative_error(oracles.pntk(theta, c), summed) < 1e-12
    each = [kernel_of(lambda output, k=k: case.scalars(output)[:, k : k + 1]) for k in range(c)]
    assert oracles.relative_error(oracles.trace_kernel(theta, c), sum(each, torch.zeros(3, 2)) / c) < 1e-12
    for k in range(c):
        assert oracles.relative_error(oracles.single_logit(theta, c, k), each[k]) < 1e-12


# ---------------------------------------------------------------- dense algebra


def problem(n: int = 12, features: int = 5, outputs: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(n, features), normal(4, features), normal(n, outputs)


def test_kernel_regression_is_ridge_regression_on_the_features() -> None:
    phi, phi_test, y = problem()
    ridge, start, start_test = 0.3, 0.1 * y.flip(0), torch.full((4, 2), 0.7, dtype=torch.float64)
    theta = torch.linalg.solve(phi.T @ phi + ridge * torch.eye(5, dtype=torch.float64), phi.T @ (y - start))
    got = oracles.kernel_regression(phi @ phi.T, phi_test @ phi.T, y, ridge, start, start_test)
    assert oracles.relative_error(got, start_test + phi_test @ theta) < 1e-10


@pytest.mark.parametrize("rows", [1, 3])
def test_leave_one_out_agrees_with_its_closed_form(rows: int) -> None:
    """Block i of the residual is (M_ii)^-1 (M Y)_i with M = (K + ridge I)^-1, for examples of one or several rows."""
    phi, _, y = problem()
    kernel, ridge, start = phi @ phi.T, 0.2, 0.1 * y.flip(0)
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=torch.float64))
    weighted = inverse @ (y - start)
    expected = torch.cat(
        [
            y[i : i + rows] - torch.linalg.solve(inverse[i : i + rows, i : i + rows], weighted[i : i + rows])
            for i in range(0, len(kernel), rows)
        ]
    )
    got = oracles.leave_one_out(kernel, y, ridge, start, rows_per_example=rows)
    assert oracles.relative_error(got, expected) < 1e-10


def test_gcv_agrees_with_its_form_in_the_smoother() -> None:
    """(1/n) ||S Y||^2 / (tr S / n)^2 with S = ridge (K + ridge I)^-1."""
    phi, _, y = problem()
    n, ridge = len(phi), 0.2
    smoother = ridge * torch.linalg.inv(phi @ phi.T + ridge * torch.eye(n, dtype=torch.float64))
    expected = (smoother @ y).square().sum() / n / (smoother.trace() / n) ** 2
    got = oracles.generalized_cross_validation(phi @ phi.T, y, ridge)
    assert got == pytest.approx(float(expected), rel=1e-10)


def test_relative_error_refuses_other_shapes() -> None:
    with pytest.raises(AssertionError, match="expected"):
        oracles.relative_error(torch.ones(3), torch.ones(3, 1))

"""Which parameters take part, and what identifies their content."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ntkit
from ntkit.errors import InputError, ModelError
from tests import oracles
from tests.cases import Net, mlp, normal

X = normal(5)(4)
ALL = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp().double().eval()


CHOICES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "default": (lambda m: None, ALL),
    "predicate on the name": (lambda m: lambda name, p: name.endswith("bias"), ("0.bias", "2.bias", "4.bias")),
    "predicate on the parameter": (lambda m: lambda name, p: p.numel() > 30, ("0.weight", "2.weight")),
    "pattern": (lambda m: "2.*", ("2.weight", "2.bias")),
    "pattern with a set": (lambda m: "[04].weight", ("0.weight", "4.weight")),
    "full name": (lambda m: "4.bias", ("4.bias",)),
    "module": (lambda m: m[4], ("4.weight", "4.bias")),
    "whole model": (lambda m: m, ALL),
    "parameter": (lambda m: m[2].weight, ("2.weight",)),
    "list": (lambda m: ["4.*", m[0], m[2].bias], ("0.weight", "0.bias", "2.bias", "4.weight", "4.bias")),
    "overlapping": (lambda m: ("0.*", m[0], m[0].weight), ("0.weight", "0.bias")),
    "generator": (lambda m: (p for p in m[4].parameters()), ("4.weight", "4.bias")),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_choice(kind: str) -> None:
    model = network()
    choose, names = CHOICES[kind]
    tangent = ntkit.linearize(model, parameters=choose(model))
    assert tangent.parameter_names == names  # in the model's order, each once
    chosen = [dict(model.named_parameters())[name] for name in names]
    assert tangent.count == sum(p.numel() for p in chosen)
    truth = oracles.entk(model, X, X, lambda y: y, chosen)
    assert oracles.relative_error(ntkit.TangentKernel(tangent, X).dense(), truth) <= 1e-12
    assert oracles.relative_error(tangent.jacobian(X), oracles.jacobian_rows(model, X, lambda y: y, chosen)) <= 1e-12


def test_default_is_what_requires_gradients() -> None:
    model = network()
    model[2].requires_grad_(False)
    assert ntkit.linearize(model).parameter_names == ("0.weight", "0.bias", "4.weight", "4.bias")
    assert ntkit.linearize(model, parameters="2.*").parameter_names == ("2.weight", "2.bias")
    assert not model[2].weight.requires_grad


def test_tied_parameters_count_once() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    b.weight = a.weight
    model = Net(lambda m, x: m.b(m.a(x).tanh()), a=a, b=b).double().eval()
    assert ntkit.linearize(model).parameter_names == ("a.weight", "a.bias", "b.bias")
    by_module = ntkit.linearize(model, parameters=model.b)
    assert by_module.parameter_names == ("a.weight", "b.bias")
    truth = oracles.entk(model, X, X, lambda y: y, [a.weight, b.bias])
    assert oracles.relative_error(ntkit.TangentKernel(by_module, X).dense(), truth) <= 1e-12


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("decoder.*", r"'decoder\.\*' selects no parameter.*begin: \['0\.weight'"),
        (["0.*", "nope"], "'nope' selects no parameter"),
        (lambda name, p: False, "no parameter takes part.*nothing matches.*begin: 0.weight"),
        ([], r"no parameter takes part.*nothing matches \[\]"),
        (nn.Linear(5, 3), "'Linear' selects no parameter of this model"),
        (nn.Parameter(torch.zeros(3)), "'Parameter' selects no parameter of this model"),
        (3, "selected by name pattern, module, parameter or predicate: got 3"),
        (1.5, "selected by name pattern, module, parameter or predicate: got 1.5"),
        ([3], "selected by name pattern, module, parameter or predicate: got 3"),
        ("", "selects no parameter"),
    ],
)
def test_nothing_selected(choice: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ntkit.linearize(network(), parameters=choice)


def test_everything_frozen() -> None:
    with pytest.raises(InputError, match="no parameter requires gradients"):
        ntkit.linearize(network().requires_grad_(False))


def test_a_model_without_parameters() -> None:
    with pytest.raises(InputError, match=r"no parameter requires gradients.*begin: none"):
        ntkit.linearize(nn.Flatten())


@pytest.mark.parametrize("wrong", [lambda x: x, None, 3, nn.Linear])
def test_a_model_is_a_module(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"expects a torch\.nn\.Module: got"):
        ntkit.linearize(wrong)


def quantized() -> nn.Module:
    torch.manual_seed(0)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.f(x) @ (m.weight.double() * 0.1)

    return Net(
        forward, f=nn.Linear(5, 4), weight=nn.Parameter(torch.arange(12, dtype=torch.int8).view(4, 3), False)
    ).double()


def test_integer_parameters() -> None:
    model = quantized().eval()
    assert model.weight.dtype == torch.int8
    assert ntkit.linearize(model).parameter_names == ("f.weight", "f.bias")
    truth = oracles.entk(model, X, X, lambda y: y, list(model.f.parameters()))
    assert oracles.relative_error(ntkit.empirical_ntk(model, X), truth) <= 1e-12
    with pytest.raises(ModelError, match=r"'weight' has dtype torch\.int8.*parameters=.*dequantize"):
        ntkit.linearize(model, parameters="*")


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 3).double()).eval()
    with pytest.raises(ModelError, match=r"'0\.weight' is not initialised: run the lazy module once"):
        ntkit.linearize(model)
    assert ntkit.linearize(model, parameters="2.*").parameter_names == ("2.weight", "2.bias")
    model(X)
    assert ntkit.empirical_ntk(model, X).shape == (12, 12)


# ---------------------------------------------------------------- fingerprints


def with_buffers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()


def flip_a_bit(values: torch.Tensor) -> None:
    words = values.detach().view(torch.int64)
    words.view(-1)[-1] ^= 1


def test_fingerprint_is_that_of_the_content() -> None:
    model = with_buffers()
    fingerprint = ntkit.linearize(model).fingerprint()
    assert re.fullmatch(r"[0-9a-f]{64}.*", fingerprint)
    assert fingerprint == ntkit.linearize(copy.deepcopy(model)).fingerprint()
    tangent = ntkit.linearize(model)
    ntkit.TangentKernel(tangent, X).dense()
    assert tangent.fingerprint() == fingerprint


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var", "2.weight"])
def test_fingerprint_sees_one_bit(name: str) -> None:
    model = with_buffers()
    before = ntkit.linearize(model, parameters="2.*").fingerprint()
    flip_a_bit(model.state_dict()[name])
    assert ntkit.linearize(model, parameters="2.*").fingerprint() != before


def test_fingerprint_sees_the_selection_the_type_and_the_readout() -> None:
    model = with_buffers()
    found = {
        ntkit.linearize(model).fingerprint(),
        ntkit.linearize(model, parameters="2.*").fingerprint(),
        ntkit.linearize(model, parameters="2.weight").fingerprint(),
        ntkit.linearize(model, readout=ntkit.SumOfLogits()).fingerprint(),
        ntkit.linearize(model, readout=ntkit.SingleLogit(0)).fingerprint(),
        ntkit.linearize(model, readout=ntkit.SingleLogit(1)).fingerprint(),
        ntkit.linearize(copy.deepcopy(model).float()).fingerprint(),
    }
    assert len(found) == 7


def test_fingerprint_sees_a_transposed_weight() -> None:
    """The same bytes in another shape are another network."""
    square = nn.Linear(4, 6, bias=False).double()
    other = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        other.weight.copy_(square.weight.reshape(4, 6))
    assert ntkit.linearize(square).fingerprint() != ntkit.linearize(other).fingerprint()


def test_fingerprint_of_a_weight_that_is_not_contiguous() -> None:
    model = nn.Linear(4, 4).double()
    strided = copy.deepcopy(model)
    strided.weight = nn.Parameter(model.weight.detach().T.contiguous().T)
    assert ntkit.linearize(model).fingerprint() == ntkit.linearize(strided).fingerprint()

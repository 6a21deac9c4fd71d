"""Read-outs: which scalars they give, and what they say about outputs that do not fit."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ntkit
from ntkit.errors import InputError
from tests import oracles
from tests.cases import Net, mlp, normal

X1, X2 = normal(5)(6), normal(5, seed=2)(4)
TARGETS = torch.tensor([0, 2, 1, 1, 0, 2])
READOUTS = [
    ntkit.Logits(),
    ntkit.SumOfLogits(),
    ntkit.SingleLogit(1),
    ntkit.RandomLogits(5, torch.Generator().manual_seed(3)),
]


def network(c: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return mlp(c=c).double().eval()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


# ---------------------------------------------------------------- values


def test_scalars_by_definition() -> None:
    output = normal(3)(4)
    assert torch.equal(ntkit.Logits().scalars(output), output)
    assert torch.allclose(ntkit.SumOfLogits().scalars(output), output.sum(1, keepdim=True) / math.sqrt(3))
    assert torch.equal(ntkit.SingleLogit(1).scalars(output), output[:, 1:2])
    assert torch.equal(ntkit.SingleLogit(-1).scalars(output), output[:, 2:])


@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("trace", [False, True])
def test_kernel_of_every_readout(readout: Any, trace: bool) -> None:
    model = network()
    truth = oracles.entk(model, X1, X2, readout.scalars, parameters(model))
    k = readout.scalars(model(X1)).shape[1]
    got = ntkit.empirical_ntk(model, X1, X2, readout=readout, trace=trace)
    assert oracles.relative_error(got, oracles.trace_kernel(truth, k) if trace else truth) <= 1e-12


def test_reductions_of_the_full_kernel() -> None:
    model = network()
    theta = ntkit.empirical_ntk(model, X1, X2)
    pntk = ntkit.empirical_ntk(model, X1, X2, readout=ntkit.SumOfLogits())
    single = ntkit.empirical_ntk(model, X1, X2, readout=ntkit.SingleLogit(2))
    assert oracles.relative_error(pntk, oracles.pntk(theta, 3)) <= 1e-12
    assert oracles.relative_error(single, oracles.single_logit(theta, 3, 2)) <= 1e-12


@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: type(r).__name__)
def test_one_column_output_may_be_flat(readout: Any) -> None:
    if isinstance(readout, ntkit.SingleLogit):
        readout = ntkit.SingleLogit(0)
    output = normal()(4)
    assert torch.equal(readout.scalars(output), readout.scalars(output[:, None]))


# ---------------------------------------------------------------- random signs


@given(draws=st.integers(1, 40), outputs=st.integers(1, 12), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_signs_are_signs_and_fixed(draws: int, outputs: int, seed: int) -> None:
    readout = ntkit.RandomLogits(draws, torch.Generator().manual_seed(seed))
    signs = readout.signs(outputs)
    assert signs.shape == (outputs, draws)
    assert torch.allclose(signs.abs(), torch.full_like(signs, 1 / math.sqrt(outputs)))
    assert torch.equal(signs, readout.signs(outputs))
    again = ntkit.RandomLogits(draws, torch.Generator().manual_seed(seed))
    assert again == readout
    assert torch.equal(signs, again.signs(outputs))


def test_signs_are_balanced_and_independent() -> None:
    signs = ntkit.RandomLogits(4000, torch.Generator().manual_seed(0)).signs(4)
    covariance = signs @ signs.T / 4000 * 4
    assert (signs.mean(1) * 2).abs().max() < 4 / math.sqrt(4000)
    assert (covariance - torch.eye(4)).abs().max() < 4 / math.sqrt(4000)


def test_two_readouts_from_one_generator_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = ntkit.RandomLogits(20, generator), ntkit.RandomLogits(20, generator)
    assert not torch.equal(first.signs(5), second.signs(5))


def test_making_random_logits_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    ntkit.RandomLogits(3, torch.Generator().manual_seed(0)).scalars(normal(3)(2))
    assert torch.equal(before, torch.get_rng_state())


def test_random_logits_are_unbiased_for_the_trace_kernel() -> None:
    """The mean over draws tends to the trace kernel, as 1/sqrt(draws), entry by entry."""
    model = network(c=4)
    theta = oracles.entk(model, X1, X2, lambda y: y, parameters(model))
    truth = oracles.trace_kernel(theta, 4)
    errors = []
    for draws in (16, 4096):
        readout = ntkit.RandomLogits(draws, torch.Generator().manual_seed(5))
        estimate = readout.signs(4)  # the kernel is bilinear in the signs: no need to run the network 4096 times
        blocks = theta.view(6, 4, 4, 4)
        errors.append(oracles.relative_error(torch.einsum("ck,ncmd,dk->nm", estimate, blocks, estimate) / draws, truth))
        if draws == 16:
            got = ntkit.empirical_ntk(model, X1, X2, readout=readout, trace=True)
            expected = torch.einsum("ck,ncmd,dk->nm", estimate, blocks, estimate) / draws
            assert oracles.relative_error(got, expected) <= 1e-12
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 4


def test_random_logits_agree_across_batches_and_calls() -> None:
    model = network()
    readout = ntkit.RandomLogits(2, torch.Generator().manual_seed(1))
    whole = ntkit.empirical_ntk(model, X1, X2, readout=readout)
    pieces = [ntkit.empirical_ntk(model, X1[n : n + 1], X2, readout=readout) for n in range(6)]
    assert oracles.relative_error(torch.cat(pieces), whole) <= 1e-12
    tight = ntkit.TangentKernel(ntkit.linearize(model, readout=readout), X1, X2, memory=1)
    assert oracles.relative_error(tight.dense(), whole) <= 1e-12


@pytest.mark.parametrize("draws", [0, -3, 2.5, 3.0, "4", None, True])
def test_random_logits_need_a_draw(draws: Any) -> None:
    with pytest.raises(InputError, match=f"at least one draw: got {draws!r}"):
        ntkit.RandomLogits(draws, torch.Generator())


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("form", ["tuple", "dataset"])
def test_loss_against_the_oracle(form: str) -> None:
    model = network()
    cross_entropy = nn.CrossEntropyLoss(reduction="none")
    data: Any = (X1, TARGETS) if form == "tuple" else TensorDataset(X1, TARGETS)
    got = ntkit.empirical_ntk(model, data, readout=ntkit.Loss(cross_entropy))
    rows = [
        oracles.jacobian_rows(
            model, X1[n : n + 1], lambda y, n=n: cross_entropy(y, TARGETS[n : n + 1])[:, None], parameters(model)
        )
        for n in range(6)
    ]
    jacobian = torch.cat(rows)
    assert oracles.relative_error(got, jacobian @ jacobian.T) <= 1e-12


def test_loss_with_other_targets_on_the_columns() -> None:
    model = network()
    loss = ntkit.Loss(lambda y, t: (y - t).square().sum(1))
    t1, t2 = normal(3, seed=5)(6), normal(3, seed=6)(4)
    got = ntkit.empirical_ntk(model, (X1, t1), (X2, t2), readout=loss)
    tangent = ntkit.linearize(model, readout=loss)
    # d loss = 2 (f - t) . d f
    theta = ntkit.empirical_ntk(model, X1, X2).view(6, 3, 4, 3)
    with torch.no_grad():
        left, right = 2 * (model(X1) - t1), 2 * (model(X2) - t2)
        assert torch.allclose(tangent.outputs((X1, t1))[:, 0], (model(X1) - t1).square().sum(1))
    assert oracles.relative_error(got, torch.einsum("nc,ncmd,md->nm", left, theta, right)) <= 1e-12


def test_loss_of_several_inputs_and_select() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, a, b: {"out": m.f(a) * m.g(b)}, f=mlp(), g=mlp()).double().eval()
    data = (X1, normal(5, seed=7)(6), TARGETS)
    loss = ntkit.Loss(nn.CrossEntropyLoss(reduction="none"), select=lambda output: output["out"])
    outputs = ntkit.linearize(model, readout=loss).outputs(data)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(*data[:2])["out"], TARGETS, reduction="none")
    assert torch.allclose(outputs, expected[:, None])


def test_loss_may_keep_its_last_axis() -> None:
    readout = ntkit.Loss(lambda y, t: (y - t).square())
    assert readout.scalars(normal(1)(4), normal(1, seed=3)(4)).shape == (4, 1)


def test_targets_are_dropped_where_no_loss_is_asked_for() -> None:
    model = network()
    assert torch.equal(
        ntkit.empirical_ntk(model, TensorDataset(X1, TARGETS), X2), ntkit.empirical_ntk(model, TensorDataset(X1), X2)
    )


def test_mean_loss_is_refused() -> None:
    with pytest.raises(InputError, match=r"one loss per example.*reduction='none'"):
        ntkit.empirical_ntk(network(), (X1, TARGETS), readout=ntkit.Loss(nn.CrossEntropyLoss()))


@pytest.mark.parametrize("data", [X1, {"x": X1}, (X1,)], ids=["tensor", "dict", "single"])
def test_loss_without_targets_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match=r"needs targets.*\(inputs, targets\)"):
        ntkit.empirical_ntk(network(), data, readout=ntkit.Loss(nn.CrossEntropyLoss(reduction="none")))


# ---------------------------------------------------------------- outputs of other kinds


@dataclass
class ModelOutput(OrderedDict):
    """As Hugging Face makes them: a dict whose entries are attributes too."""

    logits: Tensor


def selecting(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    forms: dict[str, tuple[Any, Any]] = {
        "dict": (lambda m, x: {"logits": m.f(x), "other": x}, lambda out: out["logits"]),
        "tuple": (lambda m, x: (x, m.f(x)), lambda out: out[1]),
        "list": (lambda m, x: [m.f(x)], lambda out: out[0]),
        "attribute": (lambda m, x: ModelOutput(m.f(x)), lambda out: out.logits),
        "sequence": (lambda m, x: m.f(torch.stack([x, 2 * x], 1)), lambda out: out[:, -1]),
    }
    function, select = forms[kind]
    return Net(function, f=mlp()).double().eval(), select


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "attribute", "sequence"])
@pytest.mark.parametrize("make", [ntkit.Logits, ntkit.SumOfLogits, lambda **k: ntkit.SingleLogit(2, **k)])
def test_select(kind: str, make: Any) -> None:
    model, select = selecting(kind)
    readout = make(select=select)
    truth = oracles.entk(model, X1, X2, readout.scalars, parameters(model))
    assert oracles.relative_error(ntkit.empirical_ntk(model, X1, X2, readout=readout), truth) <= 1e-12


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("dict", r"dict with keys \['logits', 'other'\]"),
        ("tuple", "tuple"),
        ("list", "list"),
        ("attribute", "ModelOutput"),
        ("sequence", r"a tensor of shape \(\d, 2, 3\)"),
    ],
)
@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: type(r).__name__)
def test_other_outputs_are_refused_with_advice(kind: str, found: str, readout: Any) -> None:
    model, _ = selecting(kind)
    with pytest.raises(InputError, match=rf"the model's output is .*{found}.*expected.*\(N, C\).*select=lambda"):
        ntkit.empirical_ntk(model, X1, readout=readout)


def test_select_that_takes_the_wrong_thing_is_named() -> None:
    with pytest.raises(InputError, match=r"what `select` took from the model's output is a tensor of shape \(\)"):
        ntkit.empirical_ntk(network(), X1, readout=ntkit.Logits(select=lambda y: y.sum()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.f(x).sum(), r"shape \(\).*expected.*\(N, C\)"),
        (lambda m, x: m.f(x).sum(0), r"has shape \(3, 1\), expected \(\d, K\)"),
        (lambda m, x: m.f(x)[:1], r"has shape \(1, 3\), expected \(\d, K\)"),
        (lambda m, x: m.f(x).argmax(1), r"torch.int64.*expected a floating point"),
        (lambda m, x: m.f(x)[:, :0], r"shape \(\d, 0\).*expected"),
        (lambda m, x: None, "NoneType"),
    ],
    ids=["scalar", "summed over examples", "one example", "integers", "no outputs", "nothing"],
)
def test_outputs_without_rows_per_example(function: Any, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match=message):
        ntkit.empirical_ntk(Net(function, f=mlp()).double().eval(), X1)


@pytest.mark.parametrize("index", [3, -4, 100])
def test_single_logit_out_of_range(index: int) -> None:
    with pytest.raises(InputError, match=rf"the model has 3 outputs: got SingleLogit\({index}\)"):
        ntkit.empirical_ntk(network(), X1, readout=ntkit.SingleLogit(index))


@pytest.mark.parametrize("wrong", ["pntk", ntkit.Logits, 3])
def test_readout_must_be_a_readout(wrong: Any) -> None:
    with pytest.raises(InputError, match="readout must be a read-out"):
        ntkit.linearize(network(), readout=wrong)

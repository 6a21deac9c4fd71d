"""Examples in every form, read without being changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import ntkit
from ntkit.errors import InputError
from ntkit.tangent.examples import Examples
from tests import oracles
from tests.cases import Net, mlp, normal

X, Z = normal(5)(6), normal(5, seed=2)(6)


class Listed(Dataset):
    """Items from a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.items[index]


def network() -> nn.Module:
    torch.manual_seed(0)
    return mlp().double().eval()


def two_inputs() -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda m, left, right: m.f(left) * m.g(right), f=mlp(), g=mlp()).double().eval()


def truth(model: nn.Module, x: Any) -> Tensor:
    return oracles.entk(model, x, x, lambda y: y, list(model.parameters()))


FORMS: dict[str, Any] = {
    "tensor": X,
    "tuple of one": (X,),
    "dict": {"input": X},
    "tensors": Listed(list(X)),
    "singles": TensorDataset(X),
    "pairs": TensorDataset(X, torch.arange(6)),
    "pairs of numbers": Listed([(x, i) for i, x in enumerate(X)]),
    "dicts": Listed([{"input": x} for x in X]),
    "dicts with targets": Listed([({"input": x}, i) for i, x in enumerate(X)]),
    "numpy items": Listed([x.numpy() for x in X]),
    "subset": Subset(TensorDataset(torch.cat([Z, X])), range(6, 12)),
    "not contiguous": X.T.contiguous().T,
    "every second": torch.stack([X, Z], 1).flatten(0, 1)[::2],
    "requires grad": X.clone().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_input(form: str) -> None:
    model, data = network(), FORMS[form]
    wanted = truth(model, X)
    if form == "dict" or "dicts" in form:
        assert oracles.relative_error(ntkit.empirical_ntk(model, data), wanted) <= 1e-12
        return
    tangent = ntkit.linearize(model)
    assert oracles.relative_error(ntkit.TangentKernel(tangent, data).dense(), wanted) <= 1e-12
    assert oracles.relative_error(ntkit.TangentKernel(tangent, data, X, memory=1).dense(), wanted) <= 1e-12
    with torch.no_grad():
        assert torch.allclose(tangent.outputs(data, batch=4), model(X))


@pytest.mark.parametrize(
    "data",
    [
        (X, Z),
        {"right": Z, "left": X},
        TensorDataset(X, Z, torch.arange(6)),
        Listed([((x, z), i) for i, (x, z) in enumerate(zip(X, Z, strict=True))]),
        Listed([{"left": x, "right": z} for x, z in zip(X, Z, strict=True)]),
    ],
    ids=["tuple", "dict", "dataset with a target", "dataset of pairs with a target", "dataset of dicts"],
)
def test_two_inputs(data: Any) -> None:
    model = two_inputs()
    assert oracles.relative_error(ntkit.empirical_ntk(model, data), truth(model, (X, Z))) <= 1e-12


LABELS = torch.arange(6) % 3


@pytest.mark.parametrize(
    "data",
    [
        ({"left": X, "right": Z}, LABELS),
        (X, Z, LABELS),
        TensorDataset(X, Z, LABELS),
        Listed([((x, z), y) for x, z, y in zip(X, Z, LABELS, strict=True)]),
        Listed([({"left": x, "right": z}, y) for x, z, y in zip(X, Z, LABELS, strict=True)]),
    ],
    ids=["dict", "tuple", "dataset", "dataset of pairs", "dataset of dicts"],
)
def test_inputs_and_targets(data: Any) -> None:
    model, loss = two_inputs(), nn.CrossEntropyLoss(reduction="none")
    tangent = ntkit.linearize(model, readout=ntkit.Loss(loss))
    parameters = list(model.parameters())
    rows = []
    for n in range(6):
        gradients = torch.autograd.grad(loss(model(X[n : n + 1], Z[n : n + 1]), LABELS[n : n + 1])[0], parameters)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    wanted = torch.stack(rows) @ torch.stack(rows).T
    kernel = ntkit.TangentKernel(tangent, data)
    assert oracles.relative_error(kernel.dense(), wanted) <= 1e-12
    assert oracles.relative_error(kernel.examples([4, 1]), wanted[[4, 1]]) <= 1e-12
    assert kernel.identity()["rows"]


def test_a_dict_with_targets_of_another_length() -> None:
    tangent = ntkit.linearize(two_inputs(), readout=ntkit.Loss(nn.CrossEntropyLoss(reduction="none")))
    with pytest.raises(InputError, match=r"got lengths \{'left': 6, 'right': 6, 'the targets': 5\}"):
        ntkit.TangentKernel(tangent, ({"left": X, "right": Z}, LABELS[:5]))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_examples(n: int) -> None:
    model = network()
    for m in (1, 2):
        got = ntkit.empirical_ntk(model, X[:n], Z[:m])
        assert oracles.relative_error(
            got, oracles.entk(model, X[:n], Z[:m], lambda y: y, list(model.parameters()))
        ) <= (1e-12)
    assert oracles.relative_error(ntkit.empirical_ntk(model, X[:n]), truth(model, X[:n])) <= 1e-12


def test_integer_inputs_are_left_integers() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, ids, mask: (m.e(ids) * mask[..., None]).sum(1), e=nn.Embedding(7, 3)).double().eval()
    ids, mask = torch.randint(7, (4, 3)), torch.rand(4, 3) > 0.3
    assert oracles.relative_error(ntkit.empirical_ntk(model, (ids, mask)), truth(model, (ids, mask))) <= 1e-12


# ---------------------------------------------------------------- what is refused


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(X)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X[:0], "at least one example: got 0"),
        (TensorDataset(X[:0]), "at least one example: got 0"),
        ((X, Z[:4]), r"share their first axis: got lengths \{0: 6, 1: 4\}"),
        ({"left": X, "right": Z[:5]}, r"got lengths \{'left': 6, 'right': 5\}"),
        (X.numpy(), r"got ndarray.*torch\.from_numpy"),
        ((X, Z.numpy()), "member 1 of the examples must be a tensor with a first axis: got ndarray"),
        ([X, Z], "got list.*tuple"),
        ({}, "got dict"),
        ((), "got tuple"),
        (3.0, "got float"),
        ("data.npz", "got str"),
        (torch.tensor(1.0), "got a scalar tensor"),
        ({"x": X, "flag": True}, "member 'flag' of the examples must be a tensor.*got bool"),
        (Endless(), "must have a length.*__len__"),
        (None, "got NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused(data: Any, message: str) -> None:
    tangent = ntkit.linearize(network())
    with pytest.raises(InputError, match=message):
        ntkit.TangentKernel(tangent, data)
    if data is not None:
        with pytest.raises(InputError, match=message):
            ntkit.TangentKernel(tangent, X, data)
    for use in (tangent.outputs, tangent.jacobian):
        with pytest.raises(InputError, match=message):
            use(data)


@pytest.mark.parametrize("wrong", [np.zeros((3, 5)), [1, 2], X[:0]], ids=["numpy", "list", "empty"])
def test_refused_by_products(wrong: Any) -> None:
    tangent = ntkit.linearize(network())
    with pytest.raises(InputError):
        tangent.vjp(wrong, torch.zeros(3, 3))
    with pytest.raises(InputError):
        tangent.jvp(wrong, torch.zeros(tangent.count))


# ---------------------------------------------------------------- the user's data stay theirs


def in_place(m: Any, x: Tensor) -> Tensor:
    x.mul_(2).add_(1)
    x[:, 0] = 0
    return m.f(x)


@pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning")
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "dataset", "items"])
def test_data_are_not_changed_by_a_model_that_writes_into_its_input(form: str) -> None:
    torch.manual_seed(0)
    model = Net(in_place, f=mlp()).double().eval()
    x = X.clone()
    keyword = Net(lambda m, *, x: in_place(m, x), f=model.f).double().eval()
    data: Any = {"tensor": x, "tuple": (x,), "dict": {"x": x}, "dataset": TensorDataset(x), "items": Listed(list(x))}
    chosen = keyword if form == "dict" else model
    before = x._version
    tangent = ntkit.linearize(chosen)
    kernel = ntkit.TangentKernel(tangent, data[form], memory=1)
    kernel.dense()
    kernel.diagonal()
    kernel.by_parameter()
    tangent.outputs(data[form])
    tangent.jacobian(data[form])
    tangent.vjp(data[form], torch.ones(6, 3, dtype=torch.float64))
    tangent.jvp(data[form], torch.ones(tangent.count, dtype=torch.float64))
    assert torch.equal(x, X)
    assert x._version == before
    fresh = X.mul(2).add(1)
    fresh[:, 0] = 0
    assert oracles.relative_error(kernel.dense(), truth(model.f, fresh)) <= 1e-12


def merged_in_place(m: Any, x: Tensor) -> Tensor:
    """Steps are merged with examples behind a write into the input: (N, T, 5) -> (T*N, 5)."""
    x.add_(1)
    steps = x.shape[1]
    return m.f(x.transpose(0, 1).flatten(0, 1)).view(steps, -1, 3).sum(0)


@pytest.mark.parametrize("function", [in_place, merged_in_place])
def test_a_model_that_writes_into_its_input_keeps_the_fast_route(function: Any) -> None:
    """Every run of a batch must begin with the batch as it was (a SlowRouteWarning is an error here)."""
    torch.manual_seed(0)
    model = Net(function, f=mlp()).double().eval()
    x = X if function is in_place else normal(4, 5)(6)
    wanted = torch.cat(
        [oracles.jacobian_rows(model, x[n : n + 1].clone(), lambda y: y, list(model.parameters())) for n in range(6)]
    )
    assert oracles.relative_error(ntkit.empirical_ntk(model, x), wanted @ wanted.T) <= 1e-12


def test_gradients_do_not_reach_the_data() -> None:
    x = X.clone().requires_grad_()
    kernel = ntkit.empirical_ntk(network(), x)
    assert not kernel.requires_grad
    assert x.grad is None


def test_a_dataset_is_read_only_as_far_as_it_is_needed() -> None:
    data = Listed(list(X))
    kernel = ntkit.TangentKernel(ntkit.linearize(network()), data, X)
    assert set(data.asked) <= {0, 1, 2}
    kernel.tile(slice(12, 15), slice(0, 3))
    assert set(data.asked) <= {0, 1, 2, 4}


def test_a_trial_is_made_of_examples_that_differ() -> None:
    x, y = X.clone(), torch.arange(6)
    assert Examples(x).for_a_trial(3) == [0, 1, 2]
    x[1] = x[0]
    assert Examples(x).for_a_trial(3) == [0, 5, 1]
    assert Examples(x).contrast == (5, {0})
    assert Examples((x, y), with_targets=True).for_a_trial(2) == [0, 5]
    assert Examples((x, y > 3), with_targets=True).contrast == (5, {0, 1})
    assert Examples((X, torch.zeros(6)), with_targets=True).contrast == (1, {0})
    assert Examples({"x": X, "mask": torch.ones(6)}).contrast == (1, {0})
    assert Examples(X[:1].expand(4, 5)).for_a_trial(3) == [0, 1, 2]
    assert Examples(X[:1].expand(4, 5)).contrast == (1, set())
    for few, numbers in ((1, [0, 0, 0]), (2, [0, 1, 0])):
        assert Examples(X[:few]).for_a_trial(3) == numbers
    many = torch.zeros(1000)
    many[400:] = 1
    assert many[Examples(many).for_a_trial(2)].tolist() == [0, 1]


def test_few_examples_are_looked_at_for_one_that_differs() -> None:
    data = Listed([X[0]] * 1000)
    assert Examples(data).contrast == (1, set())
    assert len(data.asked) <= 20


def test_examples_of_examples() -> None:
    assert len(Examples(Examples(X))) == 6

"""What a network says, the cheap way: the same numbers, and nothing of the network is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.tangent.examples import Examples
from ntkit.uses.dynamics.looking import channels_last, said


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 3),
    )  # fmt: skip


def test_filters_in_another_order_say_the_same() -> None:
    model, x = network().double(), torch.randn(7, 1, 8, 8, dtype=torch.float64)
    nn.functional.cross_entropy(model(x), torch.zeros(7).long()).backward()
    before = [(p, p.data_ptr(), p.stride(), p._version) for p in model.parameters()]
    strides: list[tuple[int, ...]] = []
    handle = model[4].register_forward_hook(lambda _module, _inputs, output: strides.append(output.stride()))
    found = said(model, Examples(x), None, 4)
    handle.remove()
    assert all(stride[1] == 1 for stride in strides)  # channels came last
    assert model.training
    for (p, place, stride, version), now in zip(before, model.parameters(), strict=True):
        assert p is now
        assert (now.data_ptr(), now.stride(), now._version) == (place, stride, version)
    assert not found.requires_grad
    torch.testing.assert_close(found, model.eval()(x).detach(), rtol=0, atol=1e-12)
    assert channels_last(nn.Linear(3, 2)) is not None


def test_models_without_plain_filters_are_run_as_they_are() -> None:
    line = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))
    assert channels_last(line) is line
    weighed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), nn.Flatten())
    assert channels_last(weighed) is weighed


def test_a_filter_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 2, 3, padding=1)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).flatten(1)[:, :5]

    model, x = Twice(), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(said(model, Examples(x), None, 8), model(x).detach())
    with pytest.raises(InputError, match=r"shape \(3, 1, 4, 4\), expected"):
        said(model, Examples(x[:, :1]), None, 8)


def test_two_modules_share_a_filter() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten())
    model[1].weight = model[0].weight
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(said(model, Examples(x), None, 8), model(x).detach())

"""Convolutions of images by oneDNN: the same values, whatever the order in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ntkit
from ntkit.tangent import images
from ntkit.tangent.factors import Convolution, Geometry
from ntkit.tangent.workspace import Workspace
from tests import oracles

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_images_with_channels_innermost() -> None:
    """Small weights have their images rearranged, large ones do not; the values are the same."""
    x, small, large = random(4, 8, 6, 6), random(5, 8, 3, 3, seed=1), random(160, 8, 3, 3, seed=2)
    got, plain = images.conv2d(x, small, small[:, 0, 0, 0], padding=1), images.conv2d(x, large, None, 2, 1)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    for some in (x[:1], x.repeat(50, 1, 1, 1)):  # whatever the size of the batch
        assert images.conv2d(some, small).stride(1) == 1
        assert images.conv2d(some, large).is_contiguous()
    assert torch.allclose(got, F.conv2d(x, small, small[:, 0, 0, 0], padding=1), atol=1e-5)
    assert torch.allclose(plain, F.conv2d(x, large, None, 2, 1), atol=1e-5)
    assert images.conv2d(x.double(), small.double()).is_contiguous()
    assert images.conv2d(x[0], small).shape == (5, 4, 4)


@pytest.mark.parametrize("readout", [ntkit.SumOfLogits(), ntkit.Logits()])
def test_a_convolutional_network_in_float32(readout: ntkit.Readout) -> None:
    """Channels innermost and not, within a whole kernel: float32 against float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(2), torch.nn.Conv2d(8, 6, 3, stride=2),
        torch.nn.GroupNorm(2, 6), torch.nn.Conv2d(6, 200, 2), torch.nn.ReLU(), torch.nn.Conv2d(200, 12, 1, groups=4),
        torch.nn.Flatten(), torch.nn.LazyLinear(3),
    ).eval()  # fmt: skip
    x = random(9, 3, 16, 16)
    model(x)
    single = ntkit.empirical_ntk(model, x, readout=readout)
    double = ntkit.empirical_ntk(model.double(), x.double(), readout=readout)
    assert oracles.relative_error(single.double(), double) <= 1e-5


PLAIN = Geometry(window=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1)


@pytest.mark.parametrize(
    "geometry",
    [
        PLAIN,
        replace(PLAIN, window=(5, 5)),
        replace(PLAIN, window=(2, 2), padding=((0, 0), (0, 0))),
        replace(PLAIN, stride=(2, 2)),
        replace(PLAIN, dilation=(2, 2)),
        replace(PLAIN, window=(3, 1), padding=((1, 1), (0, 0))),
        replace(PLAIN, stride=(1, 2), dilation=(2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("scalars", [1, 3])
@pytest.mark.parametrize("innermost", [True, False])
def test_rows_as_one_gradient_in_groups(
    geometry: Geometry, scalars: int, innermost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast rows, several groups of examples of them, are those of unfolded patches in float64."""
    monkeypatch.setattr(images, "outdoes_mkl", lambda: True)
    x, weight = random(5, 16, 50, 47), random(6, 16, *geometry.window, seed=1)
    padding = [before for before, _ in geometry.padding]
    shape = F.conv2d(x, weight, None, geometry.stride, padding, geometry.dilation).shape[2:]
    g = random(5, scalars, 6, *shape, seed=2)
    if innermost:
        x, g = x.contiguous(memory_format=torch.channels_last), g.movedim(2, -1).contiguous().movedim(-1, 2)
    factor = Convolution(x, g, tuple(weight.shape), geometry)
    calls: list[int] = []
    original = torch.ops.aten.convolution_backward
    monkeypatch.setattr(images, "_TOGETHER", 2 * (x[0].nbytes + g[0].nbytes))
    monkeypatch.setattr(images, "_gradient", lambda *a: calls.append(a[-2]) or original(*a))
    rows = factor.rows()
    assert calls == [2, 2, 1]  # groups
    expected = Convolution(x.double(), g.double(), tuple(weight.shape), geometry).rows()
    assert oracles.relative_error(rows.double(), expected) <= 1e-5
    # the next block is in the same memory
    blocks = [left.clone() for left, _ in factor.blocks(factor, Workspace(rows.nbytes // 3))]
    assert len(blocks) >= 3
    assert oracles.relative_error(torch.cat(blocks, 3).double(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"groups": 2}, False),
        ({"transposed": True}, False),
        ({"window": (1, 1)}, False),
        ({"padding": ((1, 0), (1, 0))}, False),
    ],
)
def test_when_rows_are_fast(change: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "outdoes_mkl", lambda: True)
    x, g, geometry = random(2, 16, 20, 20), random(2, 1, 4, 20, 20), replace(PLAIN, **change)
    assert images.has_fast_rows(x, g, geometry) is expected
    assert not images.has_fast_rows(x.double(), g.double(), geometry)
    assert not images.has_fast_rows(x[..., :10], g[..., :10], geometry)  # too few positions
    assert not images.has_fast_rows(x, g.expand(2, 65, 4, 20, 20), geometry)
    assert not images.has_fast_rows(x[..., 0], g[..., 0], geometry)
    monkeypatch.setattr(images, "outdoes_mkl", lambda: False)
    assert not images.has_fast_rows(x, g, geometry)

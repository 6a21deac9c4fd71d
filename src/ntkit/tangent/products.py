"""Products of large matrices: the one place that knows how the machine multiplies fastest.

PyTorch hands float32 products on a CPU to MKL, which keeps to its AVX2 code on processors of other makers. oneDNN,
which is inside PyTorch too, uses what the processor has: measured 1.3 to 2.4 times faster on an AMD EPYC with
AVX-512, but 0.2 to 1.2 times on an Intel Xeon with AVX-512, where MKL does its best. Where oneDNN does not pay, or its
operation is missing, and for any other type, device or size, these functions are the plain products.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.tangent.grain import CPU, Grain, grain

# FLOPs from which the detour pays.
_LARGE = 2**23
# Rows below which a product is bound by reading the other matrix, which oneDNN would also rearrange.
_FEW = 10


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, a @ b.T, shape (rows of a, rows of b)."""
    if _onednn_pays(a, b):
        return _onednn(a.contiguous(), b.contiguous(), None)
    return a @ b.T


def gram(a: Tensor) -> Tensor:
    """Inner products of the rows of a matrix with each other, a @ a.T; of many rows little more than half.

    Strips of rows are multiplied with what is behind them, and mirrored.
    """
    out = a.new_empty(a.shape[0], a.shape[0])
    for start, stop in _strips(a.shape[0], grain(a.device)):
        part = inner(a[start:stop], a[start:])
        out[start:stop, start:] = part
        out[stop:, start:stop] = part[:, stop - start :].T
    return out


def symmetric_entries(rows: int, pace: Grain = CPU) -> int:
    """How many of the products of so many rows `gram` computes on a device of this grain."""
    return sum((stop - start) * (rows - start) for start, stop in _strips(rows, pace))


def _strips(rows: int, pace: Grain) -> list[tuple[int, int]]:
    """A quarter of the rows at a time, in sizes that suit the processor's vectors and caches (measured best)."""
    step = rows if rows < pace.halved else min(pace.strip, rows // 64 * 16)
    return [(start, min(start + step, rows)) for start in range(0, rows, max(1, step))]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for a weight and bias that need no gradients."""
    if weight.ndim == 2 and input.ndim >= 2 and _onednn_pays(input, weight):
        return _Linear.apply(input, weight, bias)
    return F.linear(input, weight, bias)


class _Linear(torch.autograd.Function):
    """y = x W^T + b, differentiable in x alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(input.contiguous(), weight, bias)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return _Times.apply(cotangent, weight), None, None


class _Times(torch.autograd.Function):
    """x W by oneDNN, which has no batching rule of its own: one more axis of rows is what it takes."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> Tensor:
        return _onednn(rows.contiguous(), weight.T, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, rows: Tensor, weight: Tensor) -> tuple[Tensor, int]:  # pyright: ignore
        return _onednn(rows.movedim(in_dims[0], 0).contiguous(), weight.T, None), 0


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def is_plain(a: Tensor) -> bool:
    """Whether oneDNN computes with it: a float32 tensor on a CPU."""
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and type(a) is Tensor
        and torch.backends.mkldnn.is_available()
    )


def _onednn_pays(a: Tensor, b: Tensor) -> bool:
    return (
        is_plain(a)
        and is_plain(b)
        and 2 * a.numel() * b.shape[0] >= _LARGE
        and min(a.numel() // a.shape[-1], *b.shape) >= _FEW
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and outdoes_mkl()
    )


@cache
def outdoes_mkl() -> bool:
    """Whether oneDNN multiplies faster than what torch would call: where that is MKL on another maker's processor."""
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        maker = platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" not in maker

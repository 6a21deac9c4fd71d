"""Convolutions of images on a CPU: the one place that knows how oneDNN likes them.

oneDNN computes with the channels innermost in memory. Images that come in torch's usual order it rearranges in every
call, and the result back again; images that have them innermost already it takes as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ntkit.errors import ModelError
from ntkit.tangent.products import is_plain, outdoes_mkl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ntkit.tangent.factors import Geometry

# Examples for which a convolution's weights count as small.
_BATCH = 32
# Why a run is not to be believed.
OVERWRITTEN = "it writes into a view of an image, which shares no memory with the image where channels are innermost"
# What minds the order in memory.
_ORDERED = {Tensor.view, Tensor.view_as}

_gradient = torch.ops.aten.convolution_backward

# Positions from which unfolding patches costs more than rearranging images, and scalars times outputs up to which it
# does (both measured).
_MANY = 400
_FEW = 256
# Bytes of images and cotangents rearranged at a time.
_TOGETHER = 2 * 2**20


def conv2d(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.conv2d`, with the channels innermost where that is faster.

    The operations behind then keep that order (measured: a quarter less time for small weights). Large weights would
    be rearranged in every call, which costs more than it gains: their images are put back into torch's usual order.
    """
    if is_plain(input) and input.ndim == 4:
        # whatever the size of the batch: what a trial on a few examples finds has to hold for all
        small = _BATCH * input.shape[1:].numel() >= weight.numel()
        input = input.contiguous(memory_format=torch.channels_last if small else torch.contiguous_format)
    return F.conv2d(input, weight, *args, **kwargs)


def matters(parameters: Sequence[Tensor]) -> bool:
    """Whether a network with these parameters can have convolutions that are faster here."""
    return any(is_plain(p.detach()) and p.ndim == 4 for p in parameters)


class Order:
    """Calls operations; those that mind the order of images in memory get copies in torch's usual one where need be.

    A copy is no longer the same memory as the image. What comes of a model that writes into one of the two and reads
    the other is not what the model means, and `overwritten` says so.
    """

    def __init__(self) -> None:
        """Nothing has been copied."""
        self._apart: list[tuple[Tensor, int]] = []

    def call(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call an operation."""
        try:
            return function(*args, **kwargs)
        except RuntimeError:
            if function not in _ORDERED or args[0].is_contiguous():
                raise
        copy = args[0].contiguous()
        self._apart += [(tensor, tensor._version) for tensor in (args[0], copy)]
        return function(copy, *args[1:], **kwargs)

    @property
    def overwritten(self) -> bool:
        """Whether an image or its copy has been written into since they are two."""
        return any(tensor._version != version for tensor, version in self._apart)


class Innermost(TorchFunctionMode):
    """Runs a model with `conv2d` of this module in place of torch's."""

    def __init__(self) -> None:
        """Prepare for one run."""
        super().__init__()
        self.order = Order()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercept one call of a torch operation."""
        if func is F.conv2d:
            return conv2d(*args, **(kwargs or {}))
        return self.order.call(func, args, kwargs or {})

    def __exit__(self, *error: Any) -> None:
        """End the run.

        Raises:
            ModelError: if it is not to be believed.
        """
        super().__exit__(*error)
        if error[0] is None and self.order.overwritten:
            raise ModelError(OVERWRITTEN)


def has_fast_rows(images: Tensor, cotangents: Tensor, geometry: Geometry) -> bool:
    """Whether `weight_gradients` takes less time than unfolding patches and multiplying.

    Not where MKL does its best (`outdoes_mkl`): there unfolding takes a tenth less, and half for three channels.

    Args:
        images: (n, c, height, width).
        cotangents: (n, k, o, height, width).
        geometry: of the convolution.
    """
    return (
        outdoes_mkl()
        and is_plain(images)
        and is_plain(cotangents)
        and images.ndim == 4
        and geometry.groups == 1
        and not geometry.transposed
        and max(geometry.window) > 1
        and all(before == behind for before, behind in geometry.padding)
        and cotangents.shape[3:].numel() >= _MANY
        and cotangents.shape[1:3].numel() <= _FEW
    )


def weight_gradients(images: Tensor, cotangents: Tensor, geometry: Geometry, out: Tensor) -> None:
    """The rows (n, k, o, *window, c) of a convolution, as the gradient of one convolution in groups.

    A few examples at a time become the channel groups of a single image, so that every group's weight is an example's.

    Args:
        images: (n, c, height, width).
        cotangents: (n, k, o, height, width).
        geometry: one that `has_fast_rows`.
        out: where the rows go.
    """
    n, c = images.shape[:2]
    outputs = cotangents.shape[1:3].numel()
    step = max(1, _TOGETHER // (images[0].nbytes + cotangents[0].nbytes))
    for first in range(0, n, step):
        here = slice(first, first + step)
        count = len(images[here])
        weight = images.new_empty(1).expand(count * outputs, c, *geometry.window)  # only its shape is looked at
        _, rows, _ = _gradient(
            _side_by_side(cotangents[here].permute(3, 4, 0, 1, 2)),
            _side_by_side(images[here].permute(2, 3, 0, 1)),
            weight,
            None,
            geometry.stride,
            [before for before, _ in geometry.padding],
            geometry.dilation,
            False,
            [0, 0],
            count,
            [False, True, False],
        )
        out[here].view(count, outputs, *geometry.window, c).copy_(rows.unflatten(0, (count, outputs)).movedim(2, -1))


def _side_by_side(images: Tensor) -> Tensor:
    """(height, width, n, ...) as one image (1, channels, height, width), whose channels are innermost in memory."""
    # by this way the first stride, of a single image, is as torch expects it
    return images.flatten(2).unsqueeze(0).permute(0, 3, 1, 2)

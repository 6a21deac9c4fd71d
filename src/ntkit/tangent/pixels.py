"""Inner products of patches from those of pixels: convolutions with few positions, without unfolding anything.

A patch's inner product with another is the sum over the window of inner products of pixels, and every pair of pixels
serves as many pairs of patches as the window has entries. So A A^T of a 3x3 convolution takes a ninth of the products,
and sums along diagonals, one axis of the image after the other: the step of a convolution in the recursions of
infinite width. Index letters as in `factors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkit.tangent.contract import mirrored
from ntkit.tangent.products import inner

if TYPE_CHECKING:
    from torch import Tensor

    from ntkit.tangent.factors import Convolution, Geometry
    from ntkit.tangent.workspace import Workspace


def pixel_gram(left: Convolution, right: Convolution, *, trace: bool, workspace: Workspace) -> Tensor:
    """sum_ts (a_t . a_s)(g_t . g_s) of convolutions in one group, (n, k, m, l) or with `trace` (n, m).

    A strip of left examples at a time, so that the pairs fit the workspace. Examples are innermost in every array that
    has pairs of positions: what is added up then lies side by side in memory.
    """
    same = left is right
    x, g = _pixels(left), _positions(left, trace=trace)
    y, h = (x, g) if same else (_pixels(right), _positions(right, trace=trace))
    (t, k, n, o), (s, l, m, _) = g.shape, h.shape  # noqa: E741
    out = x.new_empty(n, k, m, l)
    room = workspace.nbytes // (3 * x.element_size())
    for start, stop in left.work.strips(right.work, trace=trace, same=same, entries=room):
        first = start if same else 0  # pairs with the examples before are in earlier strips
        count, others = stop - start, m - first
        aa = _patch_products(x[..., start:stop, :], y[..., first:, :], left, right).view(t, 1, count, s, 1, others)
        gg = inner(g[:, :, start:stop].reshape(-1, o), h[:, :, first:].reshape(-1, o))
        gg = gg.view(t, k, count, s, l, others).mul_(aa)
        out[start:stop, :, first:] = gg.sum((0, 3)).permute(1, 0, 3, 2)
    out = mirrored(out) if same else out
    return out[:, 0, :, 0] if trace else out


def _pixels(convolution: Convolution) -> Tensor:
    """Its images as (*space, n, c)."""
    images = convolution.inputs
    return images.permute(*range(2, images.ndim), 0, 1).contiguous()


def _positions(convolution: Convolution, *, trace: bool) -> Tensor:
    """Its cotangents as (t, k, n, o); with `trace` the scalars, which are summed over, are more features of one."""
    g = convolution.cotangents.flatten(3)
    if trace:
        return g.permute(3, 0, 1, 2).flatten(2)[:, None].contiguous()
    return g.permute(3, 1, 0, 2).contiguous()


def _patch_products(x: Tensor, y: Tensor, left: Convolution, right: Convolution) -> Tensor:
    """Inner products of all patches of images (*space, n, c) and (*space', m, c): (*places, n, *places', m)."""
    products = inner(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])).view(*x.shape[:-1], *y.shape[:-1])
    ends = zip(left.cotangents.shape[3:], right.cotangents.shape[3:], strict=True)
    for axis, (places, others) in enumerate(ends):
        products = _summed(products, axis, x.ndim - 1 + axis, places, others, left.geometry)
    return products


def _summed(products: Tensor, first: int, second: int, places: int, others: int, geometry: Geometry) -> Tensor:
    """Sums over the window's entries along one axis of the images, which is two of the array's."""
    axis = first  # the images' axes stand first
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    shape = list(products.shape)
    sizes = shape[first], shape[second]
    shape[first], shape[second] = places, others
    out = products.new_zeros(shape)
    for entry in range(geometry.window[axis]):
        offset = entry * dilation - geometry.padding[axis][0]
        # positions whose entry lies inside the image: 0 <= position * stride + offset < size
        start = max(0, -(offset // stride))
        stops = [
            min(count, (size - 1 - offset) // stride + 1) for count, size in zip((places, others), sizes, strict=True)
        ]
        if min(stops) <= start:
            continue
        target, source = out, products
        for where, stop in zip((first, second), stops, strict=True):
            target = target.narrow(where, start, stop - start)
            here = [slice(None)] * source.ndim
            here[where] = slice(start * stride + offset, (stop - 1) * stride + offset + 1, stride)
            source = source[tuple(here)]
        target += source
    return out

"""Kernels of infinite width by other means: numpy recursions written out, and two-dimensional quadrature.

Nothing here imports ntkit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def relu_moments(
    cov: np.ndarray, left: np.ndarray, right: np.ndarray, below: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """E[g g] and E[g' g'] of leaky ReLU, by the angle (arc-cosine kernels of degree 1 and 0)."""
    norm = np.sqrt(left * right)
    rho = np.clip(cov / norm, -1, 1)
    angle = np.arccos(rho)
    degree1 = norm * (np.sqrt(1 - rho**2) + (np.pi - angle) * rho) / (2 * np.pi)
    degree0 = (np.pi - angle) / (2 * np.pi)
    return (1 - below) ** 2 * degree1 + below * cov, (1 - below) ** 2 * degree0 + below


def fully_connected(
    x: np.ndarray, z: np.ndarray, stds: list[tuple[float, float]], below: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """NNGP and NTK of a leaky ReLU network in the NTK parametrisation, (weight std, bias std) layer by layer."""
    dim = x.shape[1]
    cov, left, right = x @ z.T / dim, (x**2).sum(1) / dim, (z**2).sum(1) / dim
    tangent = np.zeros_like(cov)
    for number, (weight, bias) in enumerate(stds):
        slope = np.ones_like(cov)
        if number:
            cov, slope = relu_moments(cov, left[:, None], right[None], below)
            left, right = (1 + below**2) / 2 * left, (1 + below**2) / 2 * right
        cov, left, right = (weight**2 * v + bias**2 for v in (cov, left, right))
        tangent = cov + weight**2 * slope * tangent
    return cov, tangent


def released_cntk(x: np.ndarray, z: np.ndarray, depth: int, *, gap: bool, fix: bool) -> float:
    """One entry of the kernel of Arora et al. (2019) as their released code has it, in loops over pixels."""

    def conv3(s: np.ndarray) -> np.ndarray:
        size = s.shape[0]
        out = np.zeros_like(s)
        for i, j, k, m in np.ndindex(*s.shape):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if all(0 <= v < size for v in (i + a, j + b, k + a, m + b)):
                        out[i, j, k, m] += s[i + a, j + b, k + a, m + b]
        return out

    def first(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return conv3(np.einsum("cij,ckl->ijkl", u, v))

    def trans(s: np.ndarray, t: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        norm = left[:, :, None, None] * right[None, None]
        rho = np.clip(s / norm, -1, 1)
        bs = norm * (rho * (np.pi - np.arccos(rho)) + np.sqrt(1 - rho**2)) / (9 * np.pi)
        return bs, t * (np.pi - np.arccos(rho)) / (9 * np.pi) + bs

    size = x.shape[1]
    pixels = np.ix_(range(size), range(size))

    def root(s: np.ndarray) -> np.ndarray:
        i, j = pixels
        return np.sqrt(s[i, j, i, j])

    s, sx, sz = first(x, z), first(x, x), first(z, z)
    t = np.zeros_like(s) if fix else s
    for step in range(depth - 1):
        left, right = root(sx), root(sz)
        s, t = trans(s, t, left, right)
        sx, sz = trans(sx, sx, left, left)[0], trans(sz, sz, right, right)[0]
        if step < depth - 2:
            s, t, sx, sz = conv3(s), conv3(t), conv3(sx), conv3(sz)
    if fix:
        t = t - s
    i, j = pixels
    return float(t.mean() if gap else t[i, j, i, j].sum())


def moments(
    g: Callable[[np.ndarray], np.ndarray], slope: Callable[[np.ndarray], np.ndarray], a: float, b: float, c: float
) -> tuple[float, float]:
    """E[g(u) g(v)] and E[g'(u) g'(v)] on a fine square grid."""
    nodes = np.linspace(-8.5, 8.5, 681)
    weights = np.exp(-(nodes**2) / 2) * (nodes[1] - nodes[0]) / math.sqrt(2 * math.pi)
    u = math.sqrt(a) * nodes
    v = c / math.sqrt(a) * nodes[:, None] + math.sqrt(max(0.0, b - c * c / a)) * nodes[None]
    return tuple(float((weights * f(u)) @ (f(v) @ weights)) for f in (g, slope))  # pyright: ignore[reportReturnType]

"""The two ways to an empirical tangent kernel that people write by hand with `torch.func`.

Both hold per-example gradients of all P parameters. `chunk` is how many examples are differentiated at a time, `block`
how many examples' gradients are held at a time. With `block` below N the matrix is made block by block: the gradients
of block i stay, those of the blocks j >= i are computed again for every i, and the rest follows by symmetry.
Letters: N examples, C outputs, K scalars per example, P parameters. Matrices are example-major: row n*K + k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Scalars = Callable[[Tensor], Tensor]  # (N, C) outputs -> (N, K)
Parameters = dict[str, Tensor]


def logits(output: Tensor) -> Tensor:
    """The scalars of the full kernel: (N, C) -> (N, C)."""
    return output


def sum_of_logits(output: Tensor) -> Tensor:
    """The scalar of the pNTK (1/C) 1^T Theta 1: (N, C) -> (N, 1)."""
    return output.sum(dim=1, keepdim=True) / output.shape[1] ** 0.5


@contextlib.contextmanager
def composable_attention() -> Iterator[None]:
    """Attention in plain operations: the fused kernels have no batching rule, and a Python loop would stand in."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def tutorial(
    model: nn.Module, x: Tensor, scalars: Scalars, *, chunk: int | None = None, block: int | None = None
) -> Tensor:
    """The official tutorial: vmap(jacrev) for both sides, then one einsum per parameter, summed: (N*K, N*K).

    https://pytorch.org/tutorials/intermediate/neural_tangent_kernels.html (method 1, "Jacobian contraction").
    As written there, the Jacobians of the two sides are computed separately even where the sides are the same.
    """
    n = len(x)
    block = n if block is None else block
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def single(parameters: Parameters, example: Tensor) -> Tensor:
        return scalars(functional_call(model, parameters, (example.unsqueeze(0),))).squeeze(0)

    def jacobians(examples: Tensor) -> list[Tensor]:
        by_name = vmap(jacrev(single), (None, 0), chunk_size=chunk)(parameters, examples)
        return [jacobian.flatten(2) for jacobian in by_name.values()]  # each (n, K, P of this parameter)

    def contracted(left: list[Tensor], right: list[Tensor]) -> Tensor:
        return torch.stack([torch.einsum("Naf,Mbf->NMab", a, b) for a, b in zip(left, right, strict=True)]).sum(0)

    with composable_attention():
        if block >= n:
            theta = contracted(jacobians(x), jacobians(x))
            return theta.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        kernel = None
        for i in range(0, n, block):
            left = jacobians(x[i : i + block])
            k = left[0].shape[1]
            if kernel is None:
                kernel = left[0].new_empty(n * k, n * k)
            for j in range(i, n, block):
                right = jacobians(x[j : j + block])
                theta = contracted(left, right).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
                del right  # or the next one would be made beside it
                _place(kernel, theta, i * k, j * k)
            del left
    assert kernel is not None
    return kernel


def rows(
    model: nn.Module, x: Tensor, scalars: Scalars, *, chunk: int | None = None, block: int | None = None
) -> Tensor:
    """Per-example gradients written into one (n*K, P) matrix, then one matrix product with itself: (N*K, N*K).

    One scalar per example: vmap(grad). Several: vmap over the K one-hot cotangents of one vjp per example.
    """
    n = len(x)
    block = n if block is None else block
    chunk = block if chunk is None else chunk
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    p = sum(parameter.numel() for parameter in parameters.values())

    def single(parameters: Parameters, example: Tensor) -> Tensor:
        return scalars(functional_call(model, parameters, (example.unsqueeze(0),))).squeeze(0)

    with torch.no_grad():
        values = single(parameters, x[0])
    k = len(values)
    one_hot = torch.eye(k, dtype=values.dtype, device=values.device)

    def one(parameters: Parameters, example: Tensor) -> Parameters:
        return grad(lambda at: single(at, example).sum())(parameters)

    def several(parameters: Parameters, example: Tensor) -> Parameters:
        pull = vjp(lambda at: single(at, example), parameters)[1]
        return vmap(pull)(one_hot)[0]

    gradients = one if k == 1 else several

    def matrix(examples: Tensor) -> Tensor:
        out = values.new_empty(len(examples) * k, p)
        for first in range(0, len(examples), chunk):
            by_name = vmap(gradients, (None, 0))(parameters, examples[first : first + chunk])
            column = 0
            for name, parameter in parameters.items():
                size = parameter.numel()
                piece = by_name.pop(name).reshape(-1, size)
                out[first * k : first * k + len(piece), column : column + size] = piece
                column += size
        return out

    with composable_attention():
        if block >= n:
            whole = matrix(x)
            return whole @ whole.T
        kernel = values.new_empty(n * k, n * k)
        for i in range(0, n, block):
            left = matrix(x[i : i + block])
            _place(kernel, left @ left.T, i * k, i * k)
            for j in range(i + block, n, block):
                right = matrix(x[j : j + block])
                _place(kernel, left @ right.T, i * k, j * k)
                del right
            del left
    return kernel


def _place(kernel: Tensor, tile: Tensor, row: int, column: int) -> None:
    """Write a tile and its mirror image."""
    kernel[row : row + tile.shape[0], column : column + tile.shape[1]] = tile
    kernel[column : column + tile.shape[1], row : row + tile.shape[0]] = tile.T

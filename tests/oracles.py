"""The slow, obviously right truth that everything else is checked against.

It imports torch and nothing of the library: a double loop of `torch.autograd.grad` over examples and scalars, and plain
dense algebra that follows each definition to the letter. Letters: N, M examples, C outputs, K scalars per example,
P parameters, R right-hand sides. Matrices are example-major: row n*K + k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Data = Any  # a tensor, or a tuple or dict of tensors with a common first axis
Scalars = Callable[[Any], Tensor]  # the model's raw output for N examples -> (N, K)


# ---------------------------------------------------------------- data: tensor, tuple or dict, one first axis


def call(model: nn.Module, x: Data) -> Any:
    """The model's raw output: `model(x)`, `model(*x)` for a tuple, `model(**x)` for a dict."""
    if isinstance(x, tuple):
        return model(*x)
    if isinstance(x, dict):
        return model(**x)
    return model(x)


def take(x: Data, rows: slice) -> Data:
    """The examples `rows` of x, in x's own form."""
    if isinstance(x, tuple):
        return tuple(part[rows] for part in x)
    if isinstance(x, dict):
        return {name: part[rows] for name, part in x.items()}
    return x[rows]


def count(x: Data) -> int:
    """The number of examples N."""
    if isinstance(x, tuple):
        return len(x[0])
    if isinstance(x, dict):
        return len(next(iter(x.values())))
    return len(x)


# ---------------------------------------------------------------- derivatives: one example, one scalar at a time


@contextlib.contextmanager
def differentiable(parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Gradients on, for frozen `parameters` too; all switches are put back on the way out.

    The fused attention path is off: it has no derivative, and torch takes it by looking at `requires_grad` of some of
    the parameters only (a `TransformerEncoder` with a frozen first layer and a padding mask then fails outright).
    """
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(fused)


def outputs(model: nn.Module, x: Data, scalars: Scalars) -> Tensor:
    """The scalars of all examples, run as one batch: (N, K)."""
    with differentiable():
        return scalars(call(model, x)).detach()


def outputs_alone(model: nn.Module, x: Data, scalars: Scalars) -> Tensor:
    """The scalars of all examples, each run as a batch of one: (N, K)."""
    return torch.cat([outputs(model, take(x, slice(n, n + 1)), scalars) for n in range(count(x))])


def jacobian_rows(model: nn.Module, x: Data, scalars: Scalars, parameters: Sequence[nn.Parameter]) -> Tensor:
    """d scalar(n, k) / d parameters, (N*K, P): every example alone in its batch, every scalar by its own backward pass.

    Columns are the flattened parameters in the order given; a parameter that a scalar does not depend on gives zeros.
    """
    rows = []
    with differentiable(parameters):
        for n in range(count(x)):
            values = scalars(call(model, take(x, slice(n, n + 1))))
            if values.ndim != 2 or values.shape[0] != 1:
                raise AssertionError(f"scalars of one example must be (1, K), got {tuple(values.shape)}")
            for value in values[0]:
                gradients: Sequence[Tensor | None] = [None] * len(parameters)
                if value.requires_grad:
                    gradients = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat(
                        [
                            torch.zeros_like(p).flatten() if g is None else g.flatten()
                            for p, g in zip(parameters, gradients, strict=True)
                        ]
                    )
                )
    return torch.stack(rows).detach()


def entk(model: nn.Module, x1: Data, x2: Data, scalars: Scalars, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The empirical tangent kernel J(x1) J(x2)^T, (N*K, M*K)."""
    return jacobian_rows(model, x1, scalars, parameters) @ jacobian_rows(model, x2, scalars, parameters).T


# ---------------------------------------------------------------- reductions of the full kernel


def trace_kernel(theta: Tensor, c: int) -> Tensor:
    """(1/C) sum_c Theta_cc(x, x') from the full kernel, (N*C, M*C) -> (N, M)."""
    n, m = theta.shape[0] // c, theta.shape[1] // c
    kernel = theta.new_zeros(n, m)
    for i in range(n):
        for j in range(m):
            kernel[i, j] = theta[i * c : (i + 1) * c, j * c : (j + 1) * c].trace() / c
    return kernel


def pntk(theta: Tensor, c: int) -> Tensor:
    """(1/C) 1^T Theta(x, x') 1 from the full kernel, (N*C, M*C) -> (N, M)."""
    n, m = theta.shape[0] // c, theta.shape[1] // c
    kernel = theta.new_zeros(n, m)
    for i in range(n):
        for j in range(m):
            kernel[i, j] = theta[i * c : (i + 1) * c, j * c : (j + 1) * c].sum() / c
    return kernel


def single_logit(theta: Tensor, c: int, index: int) -> Tensor:
    """Theta_cc(x, x') for the one output c = index from the full kernel, (N*C, M*C) -> (N, M)."""
    return theta[index::c, index::c]


# ---------------------------------------------------------------- dense algebra


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth||_F / ||truth||_F; shapes must agree."""
    if got.shape != truth.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    return float(torch.linalg.norm(got - truth) / torch.linalg.norm(truth))


def ridge_solve(kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """(kernel + ridge I)^-1 targets, with an absolute ridge, in float64: (n, n), (n,) or (n, R) -> like targets."""
    kernel = kernel.double()
    return torch.linalg.solve(kernel + ridge * torch.eye(len(kernel), dtype=torch.float64), targets.double())


def kernel_regression(
    kernel: Tensor,
    cross: Tensor,
    targets: Tensor,
    ridge: float,
    f0: Tensor | float = 0.0,
    f0_cross: Tensor | float = 0.0,
) -> Tensor:
    """f(x) = f0(x) + K(x, X) (K(X, X) + ridge I)^-1 (Y - f0(X)).

    kernel (n, n) over the training rows, cross (m, n) from test to training rows, targets and f0 (n,) or (n, R),
    f0_cross (m,) or (m, R). For a full kernel the rows are the n = N*C scalars and targets are (N*C,).
    """
    return f0_cross + cross.double() @ ridge_solve(kernel, targets - f0, ridge)


def leave_one_out(
    kernel: Tensor, targets: Tensor, ridge: float, f0: Tensor | float = 0.0, rows_per_example: int = 1
) -> Tensor:
    """The prediction of every example by a regression refitted without it, like targets.

    An example owns `rows_per_example` consecutive rows, which leave together (C for the full kernel).
    """
    targets = targets.double()
    start = torch.zeros_like(targets) + f0
    predictions = torch.empty_like(targets)
    everything = torch.arange(len(kernel))
    for first in range(0, len(kernel), rows_per_example):
        out = everything[first : first + rows_per_example]
        rest = torch.cat([everything[:first], everything[first + rows_per_example :]])
        predictions[out] = kernel_regression(
            kernel[rest][:, rest], kernel[out][:, rest], targets[rest], ridge, start[rest], start[out]
        )
    return predictions


def generalized_cross_validation(kernel: Tensor, targets: Tensor, ridge: float) -> float:
    """GCV = [(1/n) sum_i ||y_i - f(x_i)||^2] / [(1/n) tr(I - H)]^2 with the hat matrix H = K (K + ridge I)^-1.

    `ridge` is absolute and positive (at zero the ratio is 0/0); targets are (n,) or (n, R) with f0 already taken off.
    """
    n = len(kernel)
    identity = torch.eye(n, dtype=torch.float64)
    hat = kernel.double() @ torch.linalg.inv(kernel.double() + ridge * identity)
    residual = targets.double() - hat @ targets.double()
    return float((residual.square().sum() / n) / ((identity - hat).trace() / n) ** 2)


# ---------------------------------------------------------------- "the model is unchanged afterwards"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, and about torch's own switches, that a read-only use must leave as it was.

    Compare two of them with `==`. Tensors enter as bytes, so equality is bit for bit.
    """
    hook_tables = [
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ]
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    return {
        "values": {name: (value.dtype, _bits(value)) for name, value in tensors.items()},
        "state_dict": list(model.state_dict()),
        "identity": {name: id(value) for name, value in tensors.items()},
        "requires_grad": {name: value.requires_grad for name, value in tensors.items()},
        "grad": {name: None if value.grad is None else _bits(value.grad) for name, value in parameters.items()},
        "tensor_hooks": {name: len(value._backward_hooks or ()) for name, value in parameters.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, table, ())) for table in hook_tables] for name, module in modules.items()},
        "grad_enabled": torch.is_grad_enabled(),
        "fused_attention": torch.backends.mha.get_fastpath_enabled(),
        "default_dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "generator": _bits(torch.get_rng_state()),
    }


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()

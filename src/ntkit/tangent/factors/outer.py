"""Sums of outer products over positions: linear layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.tangent.contract import contract, single_products
from ntkit.tangent.factors.factor import Factor
from ntkit.tangent.grain import grain
from ntkit.tangent.work import OuterWork, Way
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False)
class Outer(Factor):
    """R[n, k] = sum_t g[n, k, t, :] (outer) a[n, t, :], per group: linear layers, and convolutions over patches.

    Groups are independent blocks of output features with inputs of their own; a plain linear layer has one.
    """

    inputs: Tensor  # (n, groups, t, i)
    cotangents: Tensor  # (n, k, groups, t, o)
    shape: tuple[int, ...]  # of the parameter: groups*o entries by i, in whatever axes
    inputs_first: bool = False  # the parameter is stored (i, o)

    @property
    def positions(self) -> int:
        """Number of positions t that are summed over."""
        return self.inputs.shape[2]

    @property
    def arrays(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.inputs, self.cotangents

    def of(self, *arrays: Tensor) -> Outer:  # noqa: D102
        return replace(self, inputs=arrays[0], cotangents=arrays[1])

    @property
    def scalar_nbytes(self) -> int:  # noqa: D102
        return self.cotangents.nbytes

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.inputs

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        n, k, groups = self.examples, self.scalars, self.inputs.shape[1]
        stop = self.shape[0] if stop is None else stop
        if groups > 1:
            letters = "nkgto,ngti->nkgio" if self.inputs_first else "nkgto,ngti->nkgoi"
            rows = torch.einsum(letters, self.cotangents, self.inputs)
            return rows.reshape(n, k, *self.shape)[:, :, start:stop]
        if out is None:
            out = self.inputs.new_empty(n, k, stop - start, *self.shape[1:])
        if self.inputs_first:
            a = self.inputs[:, :, :, start:stop].expand(n, k, -1, -1).flatten(0, 1)
            g = self.cotangents[:, :, 0].flatten(0, 1)
            torch.bmm(a.transpose(1, 2), g, out=out.view(n * k, stop - start, -1))
        else:
            g = self.cotangents[:, :, 0, :, start:stop].transpose(2, 3).reshape(n, k * (stop - start), -1)
            torch.bmm(g, self.inputs[:, 0], out=out.view(n, k * (stop - start), -1))
        return out

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """left R right^T for every row, (n, k, d1, d2), which is not formed: of one group.

        Args:
            left: (d1, o).
            right: (d2, i).
        """
        return (self.cotangents[:, :, 0] @ left.T).mT @ (self.inputs @ right.T)

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        g = torch.einsum("nk,nkgto->gnto", weights, self.cotangents).flatten(1, 2)
        a = self.inputs.transpose(0, 1).flatten(1, 2)
        total = a.transpose(1, 2) @ g if self.inputs_first else g.transpose(1, 2) @ a
        return total.reshape(self.shape)

    def weighted_product(self, weights: Tensor, direction: Tensor) -> Tensor:  # noqa: D102
        weighted = torch.einsum("nk,nkgto->ngto", weights, self.cotangents)
        if self.inputs_first:
            return torch.einsum("ngti,ngt->gi", self.inputs, weighted @ direction).reshape(-1)
        return torch.einsum("ngto,ngt->go", weighted, self.inputs @ direction).reshape(-1)

    def gram(self, other: Factor, *, trace: bool = False, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        workspace = workspace or Workspace()
        way = self.work.way(other.work, trace=trace, same=other is self) if isinstance(other, Outer) else Way.ROWS
        if way is Way.ROWS or not isinstance(other, Outer):
            return super().gram(other, trace=trace, workspace=workspace)
        return contract(self, other, way, trace=trace, workspace=workspace)

    def gram_factors(  # noqa: D102
        self, other: Factor, *, trace: bool, workspace: Workspace
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(other, Outer) and self.work.single and other.work.single:
            return single_products(self, other, trace=trace, workspace=workspace)
        return super().gram_factors(other, trace=trace, workspace=workspace)

    @cached_property
    def work(self) -> OuterWork:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: D102
        _, groups, t, i = self.inputs.shape
        return OuterWork(
            self.examples, self.scalars, t, i, self.cotangents.shape[4], groups, grain(self.inputs.device)
        )  # fmt: skip

    def squared_norms(self, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        if self.positions == 1:
            a = self.inputs[:, :, 0].square().sum(2)  # n, groups
            return torch.einsum("ng,nkgo->nk", a, self.cotangents[:, :, :, 0].square())
        i, o = self.inputs.shape[3], self.cotangents.shape[4]
        if self.positions * (i + self.scalars * o) > self.scalars * i * o:
            return super().squared_norms(workspace)
        aa = self.inputs @ self.inputs.transpose(2, 3)
        gg = self.cotangents @ self.cotangents.transpose(3, 4)
        return torch.einsum("ngts,nkgts->nk", aa, gg)

"""A first batch, before any label: the most typical points of clusters that have none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ntkit.errors import InputError
from ntkit.kernel.features import FeatureKernel
from ntkit.uses.active.geometry import Geometry, LastLayer
from ntkit.uses.active.picks import Picked
from ntkit.uses.active.strategy import Round, Strategy

if TYPE_CHECKING:
    from torch import Tensor

# Of the paper: neighbours that make a point typical, clusters with fewer points are left out, and most clusters.
NEIGHBOURS, FEWEST, MOST = 20, 5, 500


@dataclass(frozen=True)
class TypiClust(Strategy):
    """The most typical point of each of the largest clusters without labels (Hacohen, Dekel & Weinshall 2022).

    Typical is a point whose neighbours in its cluster are near. With few labels, features of a network trained without
    labels serve best; give them with `Given`.

    Attributes:
        kernel: features of points.
    """

    kernel: Geometry = field(default_factory=LastLayer)

    def choose(self, now: Round) -> Picked:
        """Cost: that of k-means with as many clusters as labels and picks, and the square of the largest cluster.

        Raises:
            InputError: if there is not one row of finite features for each point.
        """
        from sklearn.cluster import KMeans, MiniBatchKMeans

        kernel, n = now.kernel(self.kernel), len(now.labels)
        if not isinstance(kernel, FeatureKernel) or kernel.shape[0] != n:
            raise InputError(
                f"TypiClust needs one row of features for each point: got {type(kernel).__name__} of "
                f"{kernel.shape[0]} rows for {n} points"
            )
        phi = kernel.features().cpu().double()
        bad = (~phi.isfinite().all(1)).nonzero()[:, 0]
        if len(bad):
            raise InputError(
                f"TypiClust needs finite features: those of {len(bad)} points are not, point {int(bad[0])} among them"
            )
        count = min(len(now.labelled) + now.size, MOST, n)
        kind = KMeans if count <= 50 else MiniBatchKMeans
        seed = int(torch.randint(2**31, (1,), generator=now.generator))
        cluster = torch.from_numpy(kind(count, random_state=seed).fit_predict(phi.numpy())).long()
        sizes = torch.bincount(cluster, minlength=count)
        known = torch.bincount(cluster[now.labelled], minlength=count)
        large = [c for c in range(count) if int(sizes[c]) > FEWEST] or list(range(count))
        order = sorted(large, key=lambda c: (int(known[c]), -int(sizes[c])))
        typical = torch.zeros(n, dtype=torch.float64)
        for c in range(count):
            members = (cluster == c).nonzero()[:, 0]
            typical[members] = _typicality(phi[members])
        free = torch.zeros(n, dtype=torch.bool)
        free[now.candidates] = True
        numbers, utilities, turn = [], [], 0
        while len(numbers) < now.size:
            mine = free & (cluster == order[turn % len(order)])
            turn += 1
            if not bool(mine.any()):
                if turn > len(order) and not bool((free & torch.isin(cluster, torch.tensor(order))).any()):
                    order = list(range(count))  # only small clusters are left
                continue
            scores = torch.where(mine, typical, -torch.inf)
            numbers.append(int(scores.argmax()))
            utilities.append(torch.where(free, typical, -torch.inf)[now.candidates])
            free[numbers[-1]] = False
        return Picked(torch.tensor(numbers), torch.stack(utilities))


def _typicality(points: Tensor) -> Tensor:
    """One over the mean distance to the nearest neighbours, (n,)."""
    neighbours = min(NEIGHBOURS, len(points) // 2)
    if neighbours < 1:
        return torch.ones(len(points), dtype=torch.float64)
    found = [torch.cdist(some, points).topk(neighbours + 1, largest=False).values for some in points.split(1024)]
    return 1 / (torch.cat(found)[:, 1:].mean(1) + 1e-5)

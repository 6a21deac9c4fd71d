"""Learning paths: what a network said about some probes, step after step of its training, and what that tells."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError, StoreError
from ntkit.solve.losses import require_classes

# Corners of the triangle on which three classes are drawn.
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(0.75)))
# Weight of a new point in the smoothed path of Ren et al. 2022.
SMOOTHING = 0.1
# What is left of a smoothed path's past when it counts as forgotten.
FORGOTTEN = 1e-7


@dataclass(frozen=True, eq=False)
class Paths:
    """The recorded outputs of n probes at T steps.

    Attributes:
        steps: numbers of updates done, ascending, (T,).
        logits: (T, n, C), float32.
        labels: classes that the probes are trained to, or were given, (n,); None where there are none.
        probes: digest of the probes, so that only what belongs together is put together.
    """

    steps: Tensor
    logits: Tensor
    labels: Tensor | None
    probes: str

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            InputError: if they do not fit, are of one class, or steps do not ascend.
        """
        if self.logits.ndim != 3 or self.steps.shape != self.logits.shape[:1] or 0 in self.logits.shape:
            got = f"{tuple(self.logits.shape)} and {tuple(self.steps.shape)}"
            raise InputError(f"paths are logits (T, n, C) at steps (T,): got {got}")
        if bool((self.steps[1:] <= self.steps[:-1]).any()):
            raise InputError("steps of a path have to ascend: merge recordings with merge(...)")
        count, classes = self.logits.shape[1:]
        require_classes(classes)
        if self.labels is not None:
            if self.labels.shape != (count,) or self.labels.is_floating_point():
                raise InputError(f"labels are {count} classes: got {tuple(self.labels.shape)}, {self.labels.dtype}")
            if int(self.labels.min()) < 0 or int(self.labels.max()) >= classes:
                raise InputError(f"labels are classes from 0 to {classes - 1}: got {self.labels.tolist()[:8]}")

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, (T, n, C)."""
        return self.logits.softmax(2)

    def smoothed(self, weight: float = SMOOTHING) -> Tensor:
        """Exponential averages along the paths: s <- (1 - weight) s + weight q at every step of training, (T, n, C).

        Every step counts, not every record: between two records q is taken to go in a straight line, so that a sparse
        schedule says what a dense one does, but for what happened and was undone in between. Late in training the
        averages are what Filter-KD takes for better labels (Ren et al. 2022).

        Raises:
            InputError: if the weight is not in (0, 1].
        """
        return torch.stack([self.probabilities[0], *(inner[-1] for inner in self._between(weight, ends=True))])

    def _between(self, weight: float, *, ends: bool = False) -> Iterator[Tensor]:
        """For every two records in a row the smoothed path at the steps after the first, up to the second: (k, n, C).

        Where the past is forgotten the smoothed path is straight, so that of a long way the last step alone is left.

        Args:
            weight: of a new point.
            ends: the last step alone.

        Raises:
            InputError: if the weight is not in (0, 1].
        """
        if not 0 < weight <= 1:
            raise InputError(f"weight of a new point: got {weight!r}, expected 0 < weight <= 1")
        q, kept = self.probabilities, 1 - weight
        bends = 1 if not kept else math.ceil(math.log(FORGOTTEN) / math.log(kept))
        now = q[0]
        for before, after, gap in zip(q[:-1], q[1:], self.steps.diff().tolist(), strict=True):
            if gap == 1:
                inner = (kept * now + weight * after)[None]
            else:
                steps = [gap] if ends else [*range(1, min(gap - 1, bends) + 1), gap]
                count = torch.tensor(steps, dtype=torch.float64)
                past = kept**count
                way = (count - kept * (1 - past) / weight) / gap  # of the straight line, as far as it is averaged in
                past, way = past.to(q)[:, None, None], way.to(q)[:, None, None]
                inner = past * now + (1 - past) * before + way * (after - before)
            yield inner
            now = inner[-1]

    def average(self) -> Tensor:
        """Mean over the steps of the probabilities, (n, C), float64.

        The mean is over steps of training, not over records, so that a sparse schedule says the same.
        """
        return self._over_training(self.probabilities)

    def area(self) -> Tensor:
        """The same of the label alone, (n,): low for what is learned late or never.

        Raises:
            InputError: if there are no labels.
        """
        return self._over_training(self._of_label())

    def learned_at(self) -> Tensor:
        """The first recorded step from which on the label is the likeliest class; -1 where it is not at the end, (n,).

        Raises:
            InputError: if there are no labels.
        """
        right = self.logits.argmax(2) == self._labels()
        stays = right.flip(0).cummin(0).values.flip(0)
        first = stays.int().argmax(0)
        return torch.where(stays.any(0), self.steps[first], -1)

    def forgotten(self) -> Tensor:
        """How often the likeliest class was the label and then was not, (n,) (Toneva et al. 2019).

        Raises:
            InputError: if there are no labels.
        """
        right = self.logits.argmax(2) == self._labels()
        return (right[:-1] & ~right[1:]).sum(0)

    def detour(self) -> Tensor:
        """How far a path goes for how far it gets: length over distance from start to end, at least 1, (n,).

        Our own measure of zig-zag, of the paths smoothed as `smoothed`; infinite for one that comes back to its start.
        """
        start = now = self.probabilities[0].double()
        length = torch.zeros(len(now), dtype=torch.float64)
        for inner in self._between(SMOOTHING):
            way = torch.cat([now[None], inner.double()])
            length, now = length + way.diff(dim=0).norm(dim=2).sum(0), way[-1]
        chord = (now - start).norm(dim=1)
        return torch.where(chord > 0, length / chord, torch.where(length > 0, math.inf, 1.0))

    def astray(self) -> Tensor:
        """The most that the smoothed path ever says for one other class, above what it says at its ends, (n,).

        Our own measure: a wrong label lets a path first go to the true class, which similar examples pull it to, and
        then bend away to the label (Ren et al. 2022, figure 1).

        Raises:
            InputError: if there are no labels.
        """
        first = last = most = self.probabilities[0]
        label = torch.nn.functional.one_hot(self._labels(), first.shape[1]).bool()
        for inner in self._between(SMOOTHING):
            last, most = inner[-1], torch.maximum(most, inner.amax(0))
        above = most.double() - torch.maximum(first, last).double()
        return above.masked_fill(label, 0.0).amax(1).clamp_min(0)

    def reduced(self, probe: int, weight: float = 1.0) -> Tensor:
        """One path for a triangle: the probabilities of its label, of the runner-up and of all the rest, (T, 3).

        With three classes they stand in their own order. The runner-up is the other class with the largest `average`.

        Args:
            probe: its number.
            weight: of a new point, to smooth the path; 1 leaves it as it is.

        Raises:
            InputError: if there is no such probe, fewer than three classes, or no label where it is needed.
        """
        self.corners(probe)
        q = self.probabilities[:, probe] if weight == 1 else self.picked([probe]).smoothed(weight)[:, 0]
        return self.reduce(probe, q)

    def reduce(self, probe: int, points: Tensor) -> Tensor:
        """Other probabilities (..., C) on the triangle of a probe, (..., 3): a target, the true p*.

        Raises:
            InputError: as `reduced`, or if they are not of C classes.
        """
        named = self.corners(probe)
        if points.shape[-1] != self.logits.shape[2]:
            raise InputError(f"probabilities of {self.logits.shape[2]} classes are expected: got {points.shape[-1]}")
        if len(named) == 3:
            return points
        first, second = (points[..., c] for c in named)
        return torch.stack([first, second, (1 - first - second).clamp_min(0)], -1)

    def corners(self, probe: int) -> tuple[int, ...]:
        """The classes at the corners of a probe's triangle: all three, or the label and the runner-up (and the rest).

        Raises:
            InputError: as `reduced`.
        """
        count, classes = self.logits.shape[1:]
        if not 0 <= probe < count:
            raise InputError(f"probes have numbers from 0 to {count - 1}: got {probe}")
        if classes < 3:
            raise InputError(f"a triangle needs three classes: the network has {classes} outputs")
        if classes == 3:
            return 0, 1, 2
        label = int(self._labels()[probe])
        means = self._over_training(self.logits[:, probe].softmax(1))
        return label, int(means.index_fill(0, torch.tensor([label]), -1.0).argmax())

    def picked(self, numbers: Sequence[int]) -> Paths:
        """Some probes alone.

        Raises:
            InputError: if a number is out of range.
        """
        index = torch.as_tensor(numbers, dtype=torch.int64)
        count = self.logits.shape[1]
        if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= count:
            raise InputError(f"probes have numbers from 0 to {count - 1}: got {numbers!r}")
        labels = None if self.labels is None else self.labels[index]
        some = ",".join(map(str, index.tolist()))
        return replace(self, logits=self.logits[:, index], labels=labels, probes=f"{self.probes}[{some}]")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed .npz file, whole or not at all.

        Raises:
            StoreError: if it cannot be written.
        """
        target = Path(path)
        part = target.with_name(target.name + ".part")
        arrays: dict[str, Any] = {
            "steps": self.steps.numpy(), "logits": self.logits.numpy(), "probes": np.array(self.probes)
        }  # fmt: skip
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            part.replace(target)
        except OSError as error:
            raise StoreError(f"{target}: cannot write the paths ({error})") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Paths:
        """Read what `save` has written.

        Raises:
            StoreError: if it is not such a file.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # numpy leaves it open else
                labels = torch.from_numpy(file["labels"]) if "labels" in file else None
                return cls(
                    torch.from_numpy(file["steps"]), torch.from_numpy(file["logits"]), labels, str(file["probes"])
                )
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise StoreError(f"{path}: no recorded paths, or damaged ({error})") from error

    def _labels(self) -> Tensor:
        if self.labels is None:
            raise InputError("this needs the probes' labels: record with PathRecorder(..., labels=classes)")
        return self.labels

    def _over_training(self, values: Tensor) -> Tensor:
        """Mean over the steps of what has been recorded, (T, ...): between two records it goes in a straight line."""
        if len(self.steps) == 1:
            return values[0].double()
        halves, shares = self.steps.double().diff() / 2, torch.zeros(len(self.steps), dtype=torch.float64)
        shares[:-1] += halves
        shares[1:] += halves
        return torch.tensordot(shares / shares.sum(), values.double(), 1)

    def _of_label(self) -> Tensor:
        index = self._labels().expand(len(self.steps), -1)[..., None]
        return self.probabilities.gather(2, index)[..., 0]


def merge(*recordings: Paths) -> Paths:
    """Recordings of the same probes at other steps in one, or of other probes at the same steps.

    Raises:
        InputError: if they are neither, or labels of the same probes differ.
    """
    if not recordings:
        raise InputError("merge needs at least one recording: got none")
    first = recordings[0]
    if any(one.logits.shape[2] != first.logits.shape[2] for one in recordings):
        raise InputError(f"recordings of networks with {[one.logits.shape[2] for one in recordings]} outputs")
    if all(one.probes == first.probes for one in recordings):
        if any(not _same(one.labels, first.labels) for one in recordings):
            raise InputError("recordings of the same probes have other labels: which of them are meant?")
        steps = torch.cat([one.steps for one in recordings])
        order = steps.argsort(stable=True)
        if bool((steps[order].diff() == 0).any()):
            raise InputError("recordings of the same probes have steps in common: keep one of them")
        return replace(first, steps=steps[order], logits=torch.cat([one.logits for one in recordings])[order])
    if any(not torch.equal(one.steps, first.steps) for one in recordings):
        raise InputError("recordings of other probes have to be at the same steps")
    if len({one.labels is None for one in recordings}) > 1:
        raise InputError("either all recordings have labels or none")
    labels = None if first.labels is None else torch.cat([one._labels() for one in recordings])
    return Paths(
        first.steps,
        torch.cat([one.logits for one in recordings], 1),
        labels,
        "+".join(one.probes for one in recordings),
    )


def _same(labels: Tensor | None, others: Tensor | None) -> bool:
    return labels is others or (labels is not None and others is not None and torch.equal(labels, others))


def triangle(points: Tensor) -> Tensor:
    """Three probabilities (..., 3) as places in the plane, (..., 2): the corners are (0,0), (1,0) and (1/2, sqrt(3/4)).

    Raises:
        InputError: if there are not three.
    """
    if points.shape[-1] != 3:
        raise InputError(f"a triangle has three corners: got {points.shape[-1]} numbers for each point")
    return points @ torch.tensor(CORNERS, dtype=points.dtype)


def ranking_quality(scores: Tensor, wrong: Tensor) -> float:
    """AUROC: how well scores that are low for suspicious examples find the wrong ones; 1/2 is chance.

    Args:
        scores: for example `paths.area()`, (n,).
        wrong: whether each label is wrong, (n,).

    Raises:
        InputError: if shapes differ, scores are not finite, or all or none are wrong.
    """
    from sklearn.metrics import roc_auc_score

    if scores.shape != wrong.shape or scores.ndim != 1:
        raise InputError(f"scores and wrong are of the same length: got {tuple(scores.shape)}, {tuple(wrong.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise InputError("scores are finite numbers: some are NaN or infinity")
    if bool(wrong.all()) or not bool(wrong.any()):
        raise InputError("an AUROC needs wrong labels and right ones")
    return float(roc_auc_score(wrong.numpy().astype(bool), -scores.double().numpy()))

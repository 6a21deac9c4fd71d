"""The results of a sweep over lengths of probing: a table, and what to do in plain words."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.uses.finetune.change import FeatureChange
from ntkit.uses.finetune.split import Split

# The distance that features move may rise so much from one tau to the next, while the energy falls, before it is said.
SURPRISE = 1.25


@dataclass(frozen=True)
class Row:
    """Fine-tuning from one length of probing; all but the energy and the training accuracy on validation examples.

    Attributes:
        tau: epochs of probing.
        energy: average initial energy of the training examples, against the targets of fine-tuning.
        speed: mean length of the features' change in the first full-batch step, for each unit of learning rate:
            foreseen, before fine-tuning.
        change: of the features, by fine-tuning.
        probed_accuracy: before fine-tuning; NaN where targets do not say classes, as the other accuracies.
        probed_loss: the same.
        accuracy: after fine-tuning.
        loss: the same, against the targets as given, not smoothed.
        train_accuracy: after fine-tuning.
    """

    tau: int
    energy: float
    speed: float
    change: FeatureChange
    probed_accuracy: float
    probed_loss: float
    accuracy: float
    loss: float
    train_accuracy: float


@dataclass(frozen=True, eq=False)
class Sweep:
    """All rows.

    Attributes:
        rows: one for each tau that was fine-tuned from, ascending.
        energies: average initial energy after every epoch of the one probing run, the first before it.
        validation: number of validation examples.
        stopped: whether probing ended by the energy before the last tau.
        start: the network that fine-tuning began from, its head not yet probed.
        weights: of the fine-tuned network of every tau, without what stood still: in memory, or the file they are in.
    """

    rows: tuple[Row, ...]
    energies: tuple[float, ...]
    validation: int
    stopped: bool
    start: Split
    weights: Mapping[int, Path | Mapping[str, Tensor]]

    @property
    def best(self) -> Row:
        """The row with the largest validation accuracy, of equals the one with the smallest loss."""
        if math.isnan(self.rows[0].accuracy):
            return min(self.rows, key=lambda row: row.loss)
        return max(self.rows, key=lambda row: (row.accuracy, -row.loss))

    @property
    def best_probed(self) -> Row:
        """The row whose probed head alone, before any fine-tuning, is best, by the same measure as `best`."""
        if math.isnan(self.rows[0].probed_accuracy):
            return min(self.rows, key=lambda row: row.probed_loss)
        return max(self.rows, key=lambda row: (row.probed_accuracy, -row.probed_loss))

    @property
    def as_good(self) -> tuple[Row, ...]:
        """Rows whose accuracy is within one standard error of the best: which of them is best is not known."""
        best = self.best
        if math.isnan(best.accuracy):
            return (best,)
        error = math.sqrt(max(best.accuracy * (1 - best.accuracy), 1 / self.validation) / self.validation)
        return tuple(row for row in self.rows if row.accuracy >= best.accuracy - error)

    def network(self, tau: int | None = None) -> nn.Module:
        """A fine-tuned network, in evaluation mode: that of `tau`, or the best.

        Raises:
            InputError: if there is none for this tau.
        """
        tau = self.best.tau if tau is None else tau
        if tau not in self.weights:
            raise InputError(f"no network was fine-tuned from tau={tau!r}: expected one of {sorted(self.weights)}")
        found = self.weights[tau]
        model = copy.deepcopy(self.start.model)
        model.load_state_dict(load_file(found) if isinstance(found, Path) else dict(found), strict=False)
        return model.eval()

    @property
    def recommendation(self) -> str:
        """What to do, in a few sentences."""
        best = self.best
        if math.isnan(best.accuracy):
            found = f"validation loss {best.loss:.4g}"
        else:
            found = (
                f"validation accuracy {best.accuracy:.1%}, {best.accuracy - best.probed_accuracy:+.1%} by fine-tuning"
            )
        said = [
            f"Probe the head for {_epochs(best.tau)} (tau = {best.tau}), then fine-tune: {found}; the energy at that "
            f"point is {best.energy:.3g}, {_part(best.energy, self.energies[0])} of that without probing."
        ]
        others = [str(row.tau) for row in self.as_good if row is not best]
        if others:
            said.append(
                f"With {self.validation} validation examples tau = {', '.join(others)} cannot be told from it (one "
                "standard error)."
            )
        said += self._of_lengths()
        probed = self.best_probed
        if probed.probed_loss <= best.loss if math.isnan(best.accuracy) else probed.probed_accuracy >= best.accuracy:
            said.append(
                f"Fine-tuning does not beat the probed head here: that of tau = {probed.tau} alone is cheaper and as "
                "good."
            )
        jumps = [
            (before, after)
            for before, after in zip(self.rows, self.rows[1:], strict=False)
            if after.energy < before.energy and after.change.distance > SURPRISE * before.change.distance
        ]
        if jumps:
            before, after = jumps[0]
            said.append(
                f"From tau = {before.tau} to {after.tau} the features move farther although the energy falls: steps "
                "that are too large for the head do that, above all when it has grown. Try a smaller learning rate of "
                "fine-tuning."
            )
        return " ".join(said)

    def _of_lengths(self) -> list[str]:
        """What the lengths of probing, compared, say about the features."""
        best, first, last = self.best, self.rows[0], self.rows[-1]
        if first is last:
            return []
        if first in self.as_good and last in self.as_good:
            return ["How long the head is probed matters little here."]
        if best is first:
            return [
                "The features want to move: more energy helps. Try a head with re-initialised last layers "
                "(Reinitialised), label smoothing while probing, or a larger learning rate."
            ]
        if best is last:
            return [
                "The features are good as they are: less energy helps. Try to probe longer, a larger head (MLPHead), "
                "or a smaller learning rate of fine-tuning."
            ]
        return []

    def __str__(self) -> str:
        """The table, and the recommendation."""
        lines = [
            "| tau | energy | speed | distance | cosine | dot | norm | CKA | probed | fine-tuned | loss |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            change = row.change
            lines.append(
                f"| {row.tau} | {row.energy:.3g} | {row.speed:.3g} | {change.distance:.3g} | {change.cosine:.3f} | "
                f"{change.dot:.4g} | {change.norm_after:.4g} | {change.cka:.3f} | {_share(row.probed_accuracy)} | "
                f"{_share(row.accuracy)} | {row.loss:.4g} |"
            )
        return "\n".join([*lines, "", self.recommendation])


def _epochs(tau: int) -> str:
    return f"{tau} epoch{'' if tau == 1 else 's'}"


def _part(value: float, whole: float) -> str:
    return f"{value / whole:.0%}" if whole else "all"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"

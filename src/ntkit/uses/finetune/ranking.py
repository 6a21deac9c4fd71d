"""Backbones in the order of their predicted loss, in a table and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import spearmanr

from ntkit.errors import InputError
from ntkit.uses.finetune.powerlaw import PowerLaw


@dataclass(frozen=True)
class Ranked:
    """One candidate.

    Attributes:
        name: of the candidate.
        predicted: squared error on new examples, summed over the outputs, of N training examples: GCV, or what
            rows miss that are left out where GCV cannot be believed (`KernelRegression.expected_error`).
        leave_one_out: the same by leaving out each example, exactly.
        relative_ridge: that was chosen.
        law: how the prediction falls with the number of examples; None where there are too few of them.
        extrapolated: prediction at the number of examples that was asked for; `predicted` if none was.
        parameters: P that take part, the random head's included.
        seen: whether its kernel may have seen the labels.
    """

    name: str
    predicted: float
    leave_one_out: float
    relative_ridge: float
    law: PowerLaw | None
    extrapolated: float
    parameters: int
    seen: bool


@dataclass(frozen=True)
class Ranking:
    """All candidates, best first.

    Attributes:
        rows: ascending by the extrapolated loss.
        examples: N, without copies.
        at: number of examples that the loss is predicted for.
        trivial: squared error of always saying how frequent the classes are.
    """

    rows: tuple[Ranked, ...]
    examples: int
    at: int
    trivial: float

    @property
    def names(self) -> list[str]:
        """Best first."""
        return [row.name for row in self.rows]

    @property
    def best(self) -> Ranked:
        """The first."""
        return self.rows[0]

    def spearman(self, truth: Mapping[str, float]) -> float:
        """Rank correlation of the predicted losses with true ones, by name: losses, not accuracies.

        Raises:
            InputError: if a candidate has no truth, or there are fewer than three.
        """
        missing = [name for name in self.names if name not in truth]
        if missing or len(self.rows) < 3:
            raise InputError(f"a rank correlation needs the truth of three candidates or more: missing {missing}")
        found = spearmanr([row.extrapolated for row in self.rows], [truth[name] for name in self.names])
        return float(found.statistic)  # pyright: ignore[reportAttributeAccessIssue]

    def __str__(self) -> str:
        """The table in words."""
        lines = [
            f"Predicted squared error on new examples, from {self.examples} labels; always saying the frequencies of "
            f"the classes gives {self.trivial:.4f}.",
            "",
            f"| candidate | loss with {self.examples} | leave-one-out | loss with {self.at} | falls as | parameters |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            law = "" if row.law is None else f"{row.law.floor:.3f} + {row.law.scale:.2f} n^-{row.law.exponent:.2f}"
            name = f"{row.name} (has seen the labels)" if row.seen else row.name
            lines.append(
                f"| {name} | {row.predicted:.4f} | {row.leave_one_out:.4f} | {row.extrapolated:.4f} | {law} | "
                f"{row.parameters:,} |"
            )
        return "\n".join(lines)

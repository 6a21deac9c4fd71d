"""The steps of a network in order, run for blocks of examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ntkit.kernel.infinite.pairs import Block, Covariance
from ntkit.kernel.infinite.steps import Inputs, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

# Variances by step, (examples, positions).
Variances = dict[int, "Tensor"]


class Program:
    """A network at infinite width, read from a module by `ntkit.kernel.infinite.reader`."""

    def __init__(
        self,
        steps: Sequence[Step],
        output: int,
        prepare: Callable[..., tuple[Tensor, ...]],
        positions: Sequence[tuple[int, ...]],
        *,
        tangent: bool = True,
    ) -> None:
        """Find out what each step needs.

        Args:
            steps: each takes the results of earlier ones.
            output: number of the step that is the network's output.
            prepare: the tensors that `Inputs` take, from the arguments of the model.
            positions: the shape of each step's positions.
            tangent: whether the tangent kernel will be asked for.
        """
        self.tangent = tangent
        self.steps = tuple(steps)
        self.output = output
        self.prepare = prepare
        self.positions = tuple(positions)
        self._cross = self._needed([output])
        self._diagonal = self._needed([output, *self._inputs_by_variance()])
        self._self = self._needed(self._inputs_by_variance())

    def _inputs_by_variance(self) -> list[int]:
        """The steps whose variances others go by."""
        return [self.steps[n].inputs[0] for n in self._cross if self.steps[n].by_variance]

    def _needed(self, wanted: Sequence[int]) -> dict[int, bool]:
        """Which steps have to run for these, and whether with all pairs of positions."""
        needs: dict[int, bool] = dict.fromkeys(wanted, False)
        for number in reversed(range(len(self.steps))):
            if number in needs:
                step = self.steps[number]
                for source in step.inputs:
                    needs[source] = needs.get(source, False) or step.needs_pairs(needs[number])
        return needs

    def entries(self, *, cross: bool = True) -> int:
        """Most numbers that one step holds for a pair of examples (or for one example with itself)."""
        needs = self._cross if cross else self._self
        return max((math.prod(self.positions[n]) ** (2 if pairs else 1) for n, pairs in needs.items()), default=1)

    def variances(self, x: Sequence[Tensor]) -> Variances:
        """What the steps that go by variances need of some examples."""
        block = Block(1, tangent=False)
        results = self._run(self._self, lambda step, pairs: step.products(x[step.number], None, pairs), block, None)
        return self._checked(results)

    def _checked(self, results: dict[int, Covariance]) -> Variances:
        """The variances by which steps go, after a look at them."""
        found = {
            number: results[step.inputs[0]].at_equal_positions().nngp
            for number, step in enumerate(self.steps)
            if step.by_variance and number in self._cross
        }
        for number, variances in found.items():
            self.steps[number].check(variances, tangent=self.tangent)
        return found

    def diagonal(self, x: Sequence[Tensor], *, tangent: bool) -> Covariance:
        """Of the output, for examples with themselves."""
        block = Block(1, tangent=tangent)
        products = self._run(
            self._diagonal, lambda step, pairs: step.products(x[step.number], None, pairs), block, None
        )
        self._checked(products)
        return products[self.output]

    def covariance(
        self,
        x1: Sequence[Tensor],
        x2: Sequence[Tensor],
        sides: tuple[Variances, Variances],
        block: Block,
    ) -> Covariance:
        """Of the output, for pairs of examples."""
        results = self._run(
            self._cross, lambda step, pairs: step.products(x1[step.number], x2[step.number], pairs), block, sides
        )
        return results[self.output]

    def _run(
        self,
        needs: dict[int, bool],
        products: Callable[[Inputs, bool], Covariance],
        block: Block,
        sides: tuple[Variances, Variances] | None,
    ) -> dict[int, Covariance]:
        results: dict[int, Covariance] = {}
        last = {source: number for number in sorted(needs) for source in self.steps[number].inputs}
        kept = {self.output, *self._inputs_by_variance()} if sides is None else {self.output}
        for number in sorted(needs):
            step = self.steps[number]
            if isinstance(step, Inputs):
                results[number] = products(step, needs[number])
                continue
            found = [results[source] for source in step.inputs]
            if not step.needs_pairs(needs[number]):
                found = [one.at_equal_positions() for one in found]
            around = None
            if step.by_variance:
                if sides is None:
                    variance = results[step.inputs[0]].at_equal_positions().nngp
                    around = variance, variance
                else:
                    around = sides[0][number], sides[1][number]
            results[number] = step.run(found, block, around)
            for source in step.inputs:  # blocks of pairs are large: let go of what nobody asks for any more
                if last[source] == number and source not in kept:
                    results.pop(source, None)
        return results

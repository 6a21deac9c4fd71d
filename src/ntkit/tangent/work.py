"""The arithmetic of contracting sums of outer products: how many FLOPs each way takes, and which is the cheapest.

R[n, k] = sum_t g[n, k, t, :] (outer) a[n, t, :] has inner products with R[m, l] that can be taken in three ways, here
in FLOPs for one pair of examples with T positions, I input and O output features, and K scalars:

    rows       form R, then multiply           2 K^2 I O, beside 2 K T I O for forming each example's rows
    pairs      (A A^T) * (G G^T), summed       2 T^2 (I + K^2 O)
    carried    (A A^T) G, then times G         2 T^2 (I + K O) + 2 K^2 T O

Where the inputs are patches of images with Q pixels, I = W C for a window of W entries, the pairs' A A^T takes 2 Q^2 C
(`pixels`).

Rows win with many positions and small weights (convolutions), pairs with a single position (plain linear layers) or a
single scalar and few positions, carrying with several scalars and few positions (transformers, the last stages of a
convolutional network).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from ntkit.tangent.grain import CPU, Grain
from ntkit.tangent.products import symmetric_entries

# Writing and reading an entry of an intermediate result costs as much time as so many FLOPs of a matrix product.
TOUCH = 16


class Way(Enum):
    """A way to contract two sums of outer products."""

    ROWS = "rows"
    PAIRS = "pairs"
    CARRIED = "carried"


@dataclass(frozen=True)
class OuterWork:
    """The sizes of a batch of sums of outer products.

    Attributes:
        examples: N.
        scalars: K.
        positions: T.
        inputs: I, of one group.
        outputs: O, of one group.
        groups: independent blocks of features.
        grain: of the device that does it.
        pixels: places of the image whose patches the inputs are; 0 where they are not.
        window: entries of a patch along each axis of the image.
    """

    examples: int
    scalars: int
    positions: int
    inputs: int
    outputs: int
    groups: int = 1
    grain: Grain = CPU
    pixels: int = 0
    window: tuple[int, ...] = ()

    def of(self, examples: int) -> OuterWork:
        """The same for another number of examples."""
        return replace(self, examples=examples)

    @property
    def row_size(self) -> int:
        """Entries of one row."""
        return self.groups * self.inputs * self.outputs

    @property
    def single(self) -> bool:
        """Whether there is nothing to sum over: one position, one group."""
        return self.positions == self.groups == 1

    def way(self, other: OuterWork, *, trace: bool, same: bool) -> Way:
        """The cheapest way to contract with other examples, or with themselves.

        Args:
            other: the other side.
            trace: whether the products are summed over equal scalars.
            same: whether the other side is this one, so that half of the products is enough.
        """
        if self.single and other.single:
            return Way.PAIRS
        ways = [Way.ROWS, Way.PAIRS] if trace or self.scalars == 1 else list(Way)
        return min(ways, key=lambda way: self._effort(way, other, trace, same))

    def _effort(self, way: Way, other: OuterWork, trace: bool, same: bool) -> int:
        forming = self.forming() + (0 if same else other.forming()) if way is Way.ROWS else 0
        return forming + self.products(way, other, trace=trace, same=same) + TOUCH * self._touched(way, other, trace)

    def forming(self) -> int:
        """FLOPs of forming all rows."""
        return 2 * self.row_size * self.examples * self.scalars * self.positions

    def products(self, way: Way, other: OuterWork, *, trace: bool, same: bool) -> int:
        """FLOPs of the matrix products of one contraction; those that form rows are not included."""
        n, m = self.examples, other.examples
        heads = self.scalars if trace else self.scalars * other.scalars
        if way is Way.ROWS:
            return 2 * self.row_size * self.entries(other, trace=trace, same=same)
        if way is Way.PAIRS and self.single and other.single:
            inputs = symmetric_entries(n, self.grain) if same else n * m
            # the bias's input is one everywhere, which is no matrix product
            return 2 * self.outputs * self.entries(other, trace=trace, same=same) + (
                2 * self.inputs * inputs if self.inputs > 1 else 0
            )
        places = self.positions * other.positions * self.groups
        if way is Way.PAIRS:
            pairs = sum((b - a) * (n - a) for a, b in self.strips(other, trace=trace, same=same)) if same else n * m
            inputs = self._pixel_products(other) if self.by_pixels(other) else places * self.inputs
            return 2 * pairs * (inputs + heads * places * self.outputs)
        pairs = n * (n + 1) // 2 if same else n * m
        carried = places * (self.inputs + self.scalars * self.outputs)
        return 2 * pairs * (carried + heads * other.positions * self.groups * self.outputs)

    def entries(self, other: OuterWork, *, trace: bool, same: bool) -> int:
        """Products of rows that are computed, with `trace` each of them for every scalar."""
        n, m, k = self.examples, other.examples, self.scalars
        if trace:
            return k * (symmetric_entries(n, self.grain) if same else n * m)
        return symmetric_entries(n * k, self.grain) if same else n * k * m * other.scalars

    def _touched(self, way: Way, other: OuterWork, trace: bool) -> int:
        """Entries of intermediate results, for all pairs."""
        pairs = self.examples * other.examples * self.groups
        if way is Way.PAIRS:
            heads = 1 if trace else self.scalars * other.scalars
            summed = sum(self.window) if self.by_pixels(other) else 0
            return pairs * self.positions * other.positions * (heads + summed)
        if way is Way.CARRIED:
            return pairs * self.scalars * other.positions * self.outputs
        return 0

    def by_pixels(self, other: OuterWork) -> bool:
        """Whether pairs of patches are had from pairs of pixels: one group, and less work than by unfolding them."""
        if not (self.pixels and other.pixels and self.groups == 1):
            return False
        places = self.positions * other.positions
        return 2 * self._pixel_products(other) + TOUCH * sum(self.window) * places < 2 * self.inputs * places

    def _pixel_products(self, other: OuterWork) -> int:
        """Multiplications for all pairs of pixels of two examples."""
        return self.pixels * other.pixels * (self.inputs // prod(self.window))

    def strips(
        self, other: OuterWork, *, trace: bool, same: bool, entries: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Start and stop of the examples whose pairs with all others are held at a time.

        Args:
            other: the other side.
            trace: whether the products are summed over equal scalars.
            same: whether the other side is this one; then strips are short, so that little is computed twice.
            entries: how many pairs of positions and scalars may be held; a workspace's, in float32, three times over.
        """
        entries = self.grain.scratch // 12 if entries is None else entries
        places = self.positions * other.positions
        if self.by_pixels(other):
            places = max(places, self.pixels * other.pixels)
        each = other.examples * places
        each *= 1 if trace else self.scalars * other.scalars
        step = max(1, min(self.examples, entries // max(1, each)))
        if same:
            step = min(step, max(1, self.grain.efficient // self.positions))
        return ((a, min(a + step, self.examples)) for a in range(0, self.examples, step))

"""How much a processor wants to do at a time.

A CPU wants pieces that stay in its cache; a GPU pieces that are large beside the time it takes to start an operation
(some microseconds, in which it could do a hundred million FLOPs). Those of a CPU were measured best on two cores with
AVX-512, `scratch` and `capture` on an Intel Xeon alone; those of a GPU are one choice, seen to be several times faster
than a CPU's on an H200 and not tuned further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grain:
    """Sizes of pieces of work.

    Attributes:
        scratch: bytes of temporary memory that one contraction may use when nothing else is said: large enough for
            efficient matrix products, small beside the activations of the batches it serves.
        unfolded: bytes of patches of images unfolded at a time.
        carried: bytes of cotangents carried between positions at a time.
        capture: bytes of a capture that is large enough for efficient products; more gains little and costs memory.
        roomy: bytes held at once of more examples than a tile has, where capturing the others again costs little.
        tile: rows of the widest tile that is contracted in one go.
        efficient: rows of a strip of pairs from which matrix products are efficient.
        halved: rows from which computing one half of a symmetric product and copying it pays.
        strip: the most rows of a strip of one; more of them compute more that is known already, and no faster.
        together: bytes of cotangents that go back through the network together.
    """

    scratch: int
    unfolded: int
    carried: int
    capture: int
    roomy: int
    tile: int
    efficient: int
    halved: int
    strip: int
    together: int


CPU = Grain(
    scratch=40 * 2**20, unfolded=5 * 2**20, carried=4 * 2**20, capture=96 * 2**20, roomy=256 * 2**20, tile=2048,
    efficient=128, halved=64, strip=128, together=64 * 2**20,
)  # fmt: skip
GPU = Grain(
    scratch=2**30, unfolded=2**30, carried=2**28, capture=2**31, roomy=2**33, tile=8192,
    efficient=8192, halved=8192, strip=2048, together=2**30,
)  # fmt: skip


def grain(device: torch.device) -> Grain:
    """That of a device's kind."""
    return CPU if device.type == "cpu" else GPU

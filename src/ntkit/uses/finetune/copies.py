"""Examples that stand more than once: whoever is left out is still there, and no estimate of new examples sees that."""

from __future__ import annotations

import warnings
from hashlib import blake2b

import torch
from torch import Tensor

from ntkit.kernel.base import strips
from ntkit.tangent.examples import Examples


class RepeatedExamplesWarning(UserWarning):
    """Copies of examples are left out of an estimate of the error on new ones."""


def without_copies(examples: Examples, y: Tensor) -> list[int]:
    """Numbers of the examples that are no copies of earlier ones, with the same inputs and the same target.

    Copies with another target are kept: they say how noisy targets are. Cost: one pass over the data.
    """
    seen: set[bytes] = set()
    kept = []
    for strip in strips(len(examples), 256):
        members = [_bytes(t) for t in (*examples.batch(strip).tensors(), y[strip])]
        for k in range(strip.stop - strip.start):
            digest = blake2b(b"".join(member[k] for member in members), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(strip.start + k)
    if len(kept) < len(examples):
        warnings.warn(
            f"{len(examples) - len(kept)} of {len(examples)} examples are copies of others, targets included: they are "
            "left out, because what is predicted of new examples is not what is known of copies",
            RepeatedExamplesWarning,
            stacklevel=3,
        )
    return kept


def _bytes(t: Tensor) -> list[bytes]:
    rows = (t.detach().cpu() + 0).reshape(len(t), -1).contiguous()  # + 0 makes one zero of two
    return [row.numpy().tobytes() for row in rows.view(torch.uint8)] if rows.numel() else [b""] * len(t)

"""Memory that one batch after another uses again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Megabytes of new pages that a process takes for the third of three equal batches of activations.
BATCHES = """
import resource, sys, torch
from ntkit.tangent.workspace import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(int(size) * 2**18) for size in sys.argv[1:]]
    del activations
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 2**20)
"""


def new_megabytes(batch: list[int], **settings: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "LD_", "GLIBC"))}
    run = subprocess.run(
        [sys.executable, "-c", BATCHES, *map(str, batch)],
        capture_output=True, text=True, check=True, env=environment | settings,
    )  # fmt: skip
    return int(run.stdout)


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="rules of the GNU C library")


@pytest.mark.parametrize("batch", [[4] * 12, [4] * 12 + [40] * 2, [4] * 60], ids=["small", "large", "many"])
def test_a_batch_uses_the_memory_of_the_one_before(batch: list[int]) -> None:
    """All but a block or two, where something small has come to lie between; without the call all pages are new."""
    assert new_megabytes(batch) < sum(batch) / 2


def test_settings_of_the_user_stand() -> None:
    batch = [4] * 12 + [40] * 2
    assert new_megabytes(batch, MALLOC_MMAP_THRESHOLD_=str(2**20)) > sum(batch) / 2

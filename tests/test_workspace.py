"""Memory that one batch after another uses again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# New pages that a process takes for the third of three equal batches of activations, twelve of 4 MB each.
BATCHES = """
import resource, torch
from ntkit.tangent.workspace import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(12)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a rule of the GNU C library")
def test_a_batch_uses_the_memory_of_the_one_before() -> None:
    """Without the call all 12,288 pages are new, but for when something small happens to lie behind them."""
    run = subprocess.run([sys.executable, "-c", BATCHES], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 12_288 / 2

"""Memory that one batch after another uses again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# New pages that a process takes for the third of three equal batches of activations: twelve of 4 MB each, and two that
# the C library would give back at once.
BATCHES = """
import resource, torch
from ntkit.tangent.workspace import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(12)] + [torch.ones(10 * 2**20) for _ in range(2)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


PAGES = (12 * 4 + 2 * 40) * 2**20 // 4096


def new_pages(**settings: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "LD_", "GLIBC"))}
    run = subprocess.run(
        [sys.executable, "-c", BATCHES], capture_output=True, text=True, check=True, env=environment | settings
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a rule of the GNU C library")
def test_a_batch_uses_the_memory_of_the_one_before() -> None:
    """Without the call all pages are new, but for when something small happens to lie behind them."""
    assert new_pages() < PAGES / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a rule of the GNU C library")
def test_settings_of_the_user_stand() -> None:
    assert new_pages(MALLOC_MMAP_THRESHOLD_=str(2**20)) > PAGES / 2

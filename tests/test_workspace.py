"""Memory that one batch after another uses again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# New pages that a process takes for the third of three equal batches of activations of 4 MB.
BATCHES = """
import resource, sys, torch
from ntkit.tangent.workspace import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(12)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a rule of the GNU C library")
def test_a_batch_uses_the_memory_of_the_one_before() -> None:
    def pages(how: str) -> int:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        run = subprocess.run([sys.executable, "-c", BATCHES, how], capture_output=True, text=True, check=True, env=plain)
        return int(run.stdout)

    assert pages("kept") < pages("given back") / 4

"""With what a result was made."""

from __future__ import annotations

import os
import platform

import torch

import ntkit


def provenance() -> dict[str, str]:
    """Versions, and the size of the machine, without its name."""
    return {
        "ntkit": ntkit.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }

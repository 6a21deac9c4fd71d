"""The infinite-width limit of a module: its steps are read with torch.fx and run on pairs of examples."""

from ntkit.kernel.infinite.laws import NTK, Standard
from ntkit.kernel.infinite.width import Both, InfiniteKernel, InfiniteWidth, infinite_ntk

__all__ = ["NTK", "Both", "InfiniteKernel", "InfiniteWidth", "Standard", "infinite_ntk"]

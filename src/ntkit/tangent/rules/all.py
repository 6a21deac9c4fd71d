"""Importing this module registers every rule of the library. `local` comes first: later rules replace its entries."""

from ntkit.tangent.rules import local  # isort: skip
from ntkit.tangent.rules import convolution, embedding, linear, normalization

__all__ = ["convolution", "embedding", "linear", "local", "normalization"]

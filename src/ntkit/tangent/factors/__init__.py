"""Per-example gradients of one use of one parameter, kept in factored form and contracted without being formed.

Index letters in these files: n, m examples; k, l read-out scalars; t, s positions (tokens, pixels, calls); i input
features; o output features. A factor stands for the rows R[n, k] = d f_k(x_n) / d W, one array of W's shape each.
"""

from ntkit.tangent.factors.combined import PulledBack, Total
from ntkit.tangent.factors.convolution import Convolution, Geometry
from ntkit.tangent.factors.factor import Factor, Rows, as_matrix
from ntkit.tangent.factors.lookup import Lookup
from ntkit.tangent.factors.outer import Outer

__all__ = ["Convolution", "Factor", "Geometry", "Lookup", "Outer", "PulledBack", "Rows", "Total", "as_matrix"]

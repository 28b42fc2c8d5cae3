"""The inner loops of the pursuits on a CPU, compiled by numba: one row of activations at a time.

Which atom correlates best is found in two stages. Correlations in float32, updated with a Gram matrix in
16-bit fixed point, come with a bound on their error; the atoms that the bound leaves in question, about
one, are settled by inner products in float64 with the true residual. So picks and coefficients are those
of a float64 pursuit, though nearly all of the memory traffic is in half precision; and a row's code does
not depend, bit for bit, on its batch, its chunk or the number of threads.
"""

from itda_lens.pursuit.kernels.gram import GRAM_SCALE, quantize
from itda_lens.pursuit.kernels.matching import matching_rows
from itda_lens.pursuit.kernels.orthogonal import orthogonal_rows

__all__ = ["GRAM_SCALE", "matching_rows", "orthogonal_rows", "quantize"]

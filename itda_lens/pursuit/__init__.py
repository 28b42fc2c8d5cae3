"""Pure tensor functions: activations and atoms in, sparse codes out."""

from itda_lens.pursuit.calibration import calibrate_out_of_fold, calibrate_threshold, check_l0
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.encode import DEFAULT_RTOL, Method, check_sign, encode
from itda_lens.pursuit.finite import first_nonfinite_row
from itda_lens.pursuit.gram import (
    GRAM_BUDGET_BYTES,
    GramMatrix,
    gram_dtype,
    gram_fits,
    gram_matrix,
    inner_products,
)
from itda_lens.pursuit.gram_rows import GramRows

__all__ = [
    "DEFAULT_RTOL",
    "GRAM_BUDGET_BYTES",
    "GramMatrix",
    "GramRows",
    "Method",
    "SparseCodes",
    "calibrate_out_of_fold",
    "calibrate_threshold",
    "check_l0",
    "check_sign",
    "encode",
    "first_nonfinite_row",
    "gram_dtype",
    "gram_fits",
    "gram_matrix",
    "inner_products",
]

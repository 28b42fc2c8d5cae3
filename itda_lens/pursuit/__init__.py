"""Pure tensor functions: activations and atoms in, sparse codes out."""

from itda_lens.pursuit.calibration import (
    calibrate_out_of_fold,
    calibrate_threshold,
    check_l0,
    threshold_for_l0,
)
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.coding import DEFAULT_RTOL, Coding, Method, check_sign
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
from itda_lens.pursuit.methods import PURSUITS
from itda_lens.pursuit.precision import FLOATS, check_fits, check_floats
from itda_lens.pursuit.prepared import PreparedAtoms, encode
from itda_lens.pursuit.transforms import beneath

__all__ = [
    "DEFAULT_RTOL",
    "FLOATS",
    "GRAM_BUDGET_BYTES",
    "PURSUITS",
    "Coding",
    "GramMatrix",
    "GramRows",
    "Method",
    "PreparedAtoms",
    "SparseCodes",
    "beneath",
    "calibrate_out_of_fold",
    "calibrate_threshold",
    "check_fits",
    "check_floats",
    "check_l0",
    "check_sign",
    "encode",
    "first_nonfinite_row",
    "gram_dtype",
    "gram_fits",
    "gram_matrix",
    "inner_products",
    "threshold_for_l0",
]

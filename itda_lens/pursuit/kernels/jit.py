"""How the kernels are compiled."""

from typing import Any

import numba

# No infinities or NaN get here, sums may be reordered (always in the same way), products may be fused.
_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}


def jit(function: Any) -> Any:
    """Compile on first use, without the interpreter's lock; keep the result on disk where possible."""
    try:
        return numba.njit(nogil=True, fastmath=_FAST, cache=True)(function)
    except RuntimeError:  # no writable place for the cache
        return numba.njit(nogil=True, fastmath=_FAST)(function)

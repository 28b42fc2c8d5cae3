"""Matrix products in float32 that are just that, whatever precision the user allows elsewhere."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT32_UNIT = 2.0**-24

_switching = threading.RLock()
"""Held while torch's setting, which is the process's, is another than the user's."""


def float32_products(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], out: Float[Tensor, "m n"] | None = None
) -> Float[Tensor, "m n"]:
    """`a @ b.T` in float32, under autocast and with TF32 or bfloat16 products allowed too."""
    with torch.autocast(a.device.type, enabled=False), _full_precision(a.device):
        return torch.mm(a.float(), b.float().T, out=out)


def product_error(d: int) -> float:
    """Bound on the error of a product of two unit vectors of `d` numbers in `float32_products`.

    Rounding errors behave as independent ones: one product is off by more than 8 sqrt(d) units with a
    probability of at most 2 d exp(-32) (Higham & Mary 2019). The vectors themselves were rounded too.
    """
    return 8 * d**0.5 * FLOAT32_UNIT + 2 * FLOAT32_UNIT


def _after_fork() -> None:
    global _switching
    _switching = threading.RLock()  # a thread that the child does not have may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    backends: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    backend: Any = getattr(backends, "matmul", None)
    with _switching:
        if hasattr(backend, "fp32_precision"):
            # Not the older functions: they raise an error once anyone has used these settings.
            allowed = backend.fp32_precision
            backend.fp32_precision = "none"
            inherited = backend.fp32_precision == allowed  # from a wider setting, and must go on so
            backend.fp32_precision = "ieee"
            try:
                yield
            finally:
                backend.fp32_precision = "none" if inherited else allowed
        else:
            allowed = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(allowed)

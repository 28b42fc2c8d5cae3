"""Arithmetic in the precision that is stated, whatever precision the user allows elsewhere."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.transforms import rowwise

FLOAT32_UNIT = 2.0**-24

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that activations and atoms may have."""

_switching = threading.Lock()
"""Held while torch's settings, which are the process's, are looked at and changed."""

_inside: dict[str, int] = {}
"""How many blocks of `full_precision` are open, by the setting that they need."""

_restore: dict[str, Callable[[], None]] = {}
"""Functions that give an open setting its former value, by setting."""


def check_floats(name: str, tensor: object) -> None:
    """Refuse anything but a dense tensor of one of `FLOATS`.

    Raises:
        TypeError: it is another kind of thing; the message says of which.
    """
    allowed = "a dense tensor of float16, bfloat16, float32 or float64"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {allowed}, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be {allowed}, got a nested tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be {allowed}, got the layout {tensor.layout}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")


def check_fits(name: str, x: Float[Tensor, "*batch m"], atoms: Float[Tensor, "n d"]) -> None:
    """Refuse numbers that the dtype of the atoms cannot hold, if they have another dtype.

    Single numbers that are too small for it may become zero there.

    Raises:
        ValueError: a number is too large, or all that are not zero are too small.
    """
    dtype = atoms.dtype
    if dtype not in FLOATS or x.dtype == dtype or not x.numel():  # the former is told elsewhere
        return
    if torch.promote_types(x.dtype, dtype) == dtype:
        return

    def check(x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        largest = float(x.abs().max())
        limits = torch.finfo(dtype)
        short = str(dtype).removeprefix("torch.")
        advice = f"for a dictionary in {short}, got {largest:.3g}; convert it, as by itda.float()"
        if limits.max < largest < torch.inf:
            raise ValueError(f"{name} must be at most {limits.max:.3g} in size {advice}")
        if 0 < largest < limits.smallest_normal:
            raise ValueError(f"{name} must be at least {limits.smallest_normal:.3g} in size {advice}")
        return (x.new_empty(len(x), 0),)

    rowwise(check, x.reshape(-1, x.shape[-1]), shared=atoms)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pursuits compute with numbers of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def float32_products(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], out: Float[Tensor, "m n"] | None = None
) -> Float[Tensor, "m n"]:
    """`a @ b.T` in float32, under autocast and with TF32 or bfloat16 products allowed too."""
    with full_precision(a.device):
        return torch.mm(a.float(), b.float().T, out=out)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within, products on `device` are computed in their own dtype: no autocast, no TF32, no bfloat16.

    Autocast is a thread's setting. The others are the process's: while a block is open in one thread,
    products of other threads are of full precision too. Blocks of several threads may overlap; when the
    last one ends, the setting is what it was before the first.
    """
    with torch.autocast(device.type, enabled=False), _strict_products(device):
        yield


def product_error(d: int) -> float:
    """Bound on the error of a product of two unit vectors of `d` numbers in `float32_products`.

    Rounding errors behave as independent ones: one product is off by more than 8 sqrt(d) units with a
    probability of at most 2 d exp(-32) (Higham & Mary 2019). The vectors themselves were rounded too.
    """
    return 8 * d**0.5 * FLOAT32_UNIT + 2 * FLOAT32_UNIT


def _after_fork() -> None:
    """Reset the settings in a forked process, since it lacks the threads that were at work."""
    global _switching
    _switching = threading.Lock()
    for restore in _restore.values():
        restore()
    _restore.clear()
    _inside.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _strict_products(device: torch.device) -> Iterator[None]:
    backends: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    backend: Any = getattr(backends, "matmul", None)
    newer = hasattr(backend, "fp32_precision")
    key = device.type if newer else "all"  # the older setting is one for all devices
    with _switching:
        if not _inside.get(key):
            _restore[key] = _switch(backend) if newer else _switch_older()
        _inside[key] = _inside.get(key, 0) + 1
    try:
        yield
    finally:
        with _switching:
            _inside[key] -= 1
            if not _inside[key]:
                _restore.pop(key)()


def _switch(backend: Any) -> Callable[[], None]:
    """Demand full precision of `backend`; returns a function that gives back the former setting.

    Torch's older functions do not serve here: they raise an error once anyone has used these settings.
    """
    allowed = backend.fp32_precision
    backend.fp32_precision = "none"
    inherited = backend.fp32_precision == allowed  # from a wider setting, and must go on so
    backend.fp32_precision = "ieee"

    def restore() -> None:
        backend.fp32_precision = "none" if inherited else allowed

    return restore


def _switch_older() -> Callable[[], None]:
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(allowed)

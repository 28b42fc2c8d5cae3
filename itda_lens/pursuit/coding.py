"""How activations are coded: the settings of a pursuit, checked here and nowhere else."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from itda_lens.pursuit.methods import PURSUITS, pursuit_named

Method = Literal["mp", "omp", "ols"]
"""The names of the pursuits in `PURSUITS`."""

DEFAULT_RTOL = 1e-3
"""A row stops once |residual| <= rtol * |x|. An activation that is itself an atom leaves a residual of
rounding errors, which must not become coefficients. Stopping there gives up at most 1e-6 of the
energy."""


@dataclass(frozen=True)
class Coding:
    """The settings of a pursuit. numpy's numbers are converted to Python's.

    Raises:
        ValueError: a setting is of the wrong type or out of range.
    """

    k: int
    """Most nonzeros of a code, at least 1."""

    method: Method = "ols"
    """"mp", matching pursuit (Mallat & Zhang, 1993), takes `k` steps, and may pick an atom again. "omp",
    orthogonal matching pursuit (Pati et al., 1993), solves for all coefficients again at each step; its
    codes are better, and it is slower. "ols", orthogonal least squares (Chen, Billings & Luo, 1989),
    picks the atom that leaves the least error once all coefficients are solved for. It makes a quarter
    more than `k` picks, then drops those that matter least; its codes are better still, and it is slower
    still."""

    signed: bool = True
    """Whether coefficients may be negative. "ols" has no form for non-negative ones."""

    rtol: float = DEFAULT_RTOL
    """A row stops once |residual| <= rtol |x|. At least 0, which never stops early, and below 1."""

    threshold: float = 0.0
    """A row stops before it picks an atom whose correlation with the residual is smaller. At least 0, in
    the units of the activations. Rows that need few atoms then take few. The next pick of MP removes the
    square of its correlation from the squared error, and that of OMP removes at least that square. Under
    "ols" every atom of a code removes at least the square of `threshold`. There a row also tries atoms
    that remove somewhat less, since some of these may be worth it once others are dropped. See
    `calibrate_threshold`."""

    def __post_init__(self) -> None:
        def convert(name: str, kinds: tuple[type, ...], kind: type, allowed: str) -> Any:
            value = getattr(self, name)
            if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
            object.__setattr__(self, name, kind(value))
            return kind(value)

        if convert("k", (Integral,), int, "a whole number, at least 1") < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        pursuit_named(self.method)
        if not convert("signed", (bool, np.bool_), bool, "True or False"):
            check_sign(self.method, signed=False)
        if not 0 <= convert("rtol", (Real,), float, "a number, at least 0 and below 1") < 1:
            raise ValueError(f"rtol must be at least 0 and below 1, got {self.rtol}")
        if not 0 <= convert("threshold", (Real,), float, "a number, at least 0 and finite") < math.inf:
            raise ValueError(f"threshold must be at least 0 and finite, got {self.threshold}")

    def check_atoms(self, n_atoms: int, name: str | None = None) -> None:
        """Refuse a dictionary that has fewer atoms than a code may have nonzeros.

        Args:
            name: the argument or field that says how many atoms there are, for the message.

        Raises:
            ValueError: `k` is more than `n_atoms`.
        """
        if self.k > n_atoms:
            most = f"the number of atoms ({n_atoms})" if name is None else f"{name}={n_atoms}"
            raise ValueError(f"k must be between 1 and {most}, got {self.k}")


def check_sign(method: str, signed: bool) -> None:
    """Refuse non-negative codes for a pursuit that has no form for them.

    Raises:
        ValueError: `signed` is False, and the pursuit has only a signed form.
    """
    if not signed and not pursuit_named(method).nonnegative:
        able = " or ".join(repr(name) for name, pursuit in PURSUITS.items() if pursuit.nonnegative)
        raise ValueError(f"method must be {able} for signed=False, got {method!r}")

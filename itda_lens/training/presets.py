"""The presets: a rule for choosing atoms and the encoder that goes with it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from itda_lens.dictionary import (
    DEFAULT_LEAST_COSINE,
    DEFAULT_LOSS_THRESHOLD,
    Dictionary,
    EnergySelector,
    GreedySelector,
    Selector,
)
from itda_lens.pursuit import (
    DEFAULT_RTOL,
    Method,
    calibrate_out_of_fold,
    check_l0,
    check_sign,
)
from itda_lens.sae import ITDA, assemble

Preset = Literal["best", "thorough", "paper"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which atoms are chosen and how they encode, checked on construction.

    Attributes:
        d_sae: atoms; for preset "paper" the most atoms, or None to let `loss_threshold` decide alone.
        k: most nonzeros per code.
        preset: "best", "thorough" or "paper".
        seed: of the samples that "best" and "thorough" draw; "paper" is deterministic without one.
        method: encoder, "mp", "omp" or "ols"; None takes the preset's.
        signed: whether coefficients may be negative.
        loss_threshold: tau of preset "paper"; None takes its default.
        l0: mean nonzeros per code, met by a threshold; None gives every code k. Not of preset "paper".
        update: whether a least-squares update moves the chosen atoms. Not of preset "paper".
        least_cosine: of an updated atom to its activation; None takes its default. Of `update`.
        rtol: a code ends once the residual is at most this, relative to the activation.
    """

    d_sae: int | None
    k: int
    preset: Preset = "best"
    seed: int = 0
    method: Method | None = None
    signed: bool = True
    loss_threshold: float | None = None
    l0: float | None = None
    update: bool = False
    least_cosine: float | None = None
    rtol: float = DEFAULT_RTOL

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {get_args(Preset)}, got {self.preset!r}")
        if self.d_sae is None and self.preset != "paper":
            raise ValueError(f"d_sae must be given for preset={self.preset!r}")
        if self.d_sae is not None and self.d_sae < 1:
            raise ValueError(f"d_sae must be at least 1, got {self.d_sae}")
        if self.k < 1 or (self.d_sae is not None and self.k > self.d_sae):
            raise ValueError(f"k must be between 1 and d_sae={self.d_sae}, got {self.k}")
        if self.method not in (None, *get_args(Method)):
            raise ValueError(f"method must be one of {get_args(Method)}, got {self.method!r}")
        check_sign(self.encoder, self.signed)
        if self.loss_threshold is not None and self.preset != "paper":
            raise ValueError("loss_threshold is a setting of preset='paper' only")
        if self.loss_threshold is not None and not 0 < self.loss_threshold < 1:
            raise ValueError(
                f"loss_threshold must be between 0 and 1 (both excluded), got {self.loss_threshold}"
            )
        for name, given in (("l0", self.l0 is not None), ("update", self.update)):
            if given and self.preset == "paper":
                raise ValueError(f"{name} is no setting of preset='paper'")
        if self.least_cosine is not None and not self.update:
            raise ValueError("least_cosine is a setting of update=True only")
        if self.least_cosine is not None and not 0 <= self.least_cosine <= 1:
            raise ValueError(f"least_cosine must be between 0 and 1, got {self.least_cosine}")
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must be at least 0 and below 1, got {self.rtol}")
        if self.l0 is not None:
            check_l0(self.l0, self.k)
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    @property
    def encoder(self) -> Method:
        """`method`, or the preset's: the best there is for such codes, or the paper's."""
        if self.method is not None:
            return self.method
        if self.preset == "paper":
            return "mp"
        return "ols" if self.signed else "omp"

    @property
    def tau(self) -> float:
        """`loss_threshold`, or its default."""
        return DEFAULT_LOSS_THRESHOLD if self.loss_threshold is None else float(self.loss_threshold)

    @property
    def bound(self) -> float:
        """`least_cosine`, or its default."""
        return DEFAULT_LEAST_COSINE if self.least_cosine is None else float(self.least_cosine)

    def record(self) -> dict[str, Any]:
        """The settings that count, with the values that defaults stand for."""
        return asdict(self) | dict(
            method=self.encoder,
            loss_threshold=self.tau if self.preset == "paper" else None,
            least_cosine=self.bound if self.update else None,
        )

    def selector(self, d_in: int, dtype: torch.dtype, device: torch.device) -> Selector:
        """A fresh run of the preset's rule."""
        if self.preset == "paper":
            return GreedySelector(
                d_in, self.d_sae, self.k, signed=self.signed, loss_threshold=self.tau,
                dtype=dtype, device=device,
            )  # fmt: skip
        assert self.d_sae is not None  # checked on construction
        return EnergySelector(
            d_in,
            self.d_sae,
            self.k if self.l0 is None else max(1, round(self.l0)),
            signed=self.signed,
            thorough=self.preset == "thorough",
            update=self.update,
            least_cosine=self.bound,
            sample=self.l0 is not None,
            seed=self.seed,
            dtype=dtype,
            device=device,
        )

    def assemble(
        self, dictionary: Dictionary, metadata: Mapping[str, Any], reshape_activations: str = "none"
    ) -> ITDA:
        """The chosen atoms as an ITDA, in their dtype."""
        atoms, method = dictionary.atoms, self.encoder
        k, threshold = min(self.k, len(atoms)), 0.0
        if self.l0 is not None:
            assert dictionary.sample is not None  # of `selector`
            threshold = calibrate_out_of_fold(
                dictionary.sample.rows - dictionary.mean,
                dictionary.sample.folds,
                atoms,
                dictionary.sample.atom_folds,
                self.l0,
                k,
                method=method,
                signed=self.signed,
                rtol=self.rtol,
            )
        return assemble(
            atoms,
            dictionary.mean,
            k=k,
            method=method,
            signed=self.signed,
            rtol=self.rtol,
            threshold=threshold,
            l0=self.l0,
            labels=dictionary.labels,
            metadata=metadata,
            reshape_activations=reshape_activations,
        )

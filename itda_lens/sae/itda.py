"""ITDA as a SAELens SAE: configuration, hooks, dtypes and files; the mathematics is in `pursuit`."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig
from sae_lens.constants import DTYPE_MAP, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from typing_extensions import override

from itda_lens.dictionary import more_atoms
from itda_lens.pursuit import (
    DEFAULT_RTOL,
    Coding,
    Method,
    PreparedAtoms,
    SparseCodes,
    beneath,
    check_fits,
    check_floats,
    first_nonfinite_row,
    threshold_for_l0,
)
from itda_lens.records import (
    GivenLabel,
    Label,
    Labels,
    Places,
    Provenance,
    at_least,
    checked,
    label_from,
    replacing,
    without_paths,
)
from itda_lens.sae.normalization import NORMALIZATIONS
from itda_lens.sae.prepared import Prepared, prepare, same_bits, unit_up_to_rounding
from itda_lens.sae.saved import (
    WEIGHTS_KEY,
    check_config,
    check_digests,
    digests,
    header_of,
    write_local,
    write_tensors,
)

if TYPE_CHECKING:
    from itda_lens.sae.from_atoms import Duplicates, Zeros
    from itda_lens.sae.hub import Exposed

LABELS_KEY = "itda_labels"
"""Where the labels live in `cfg.metadata`: SAELens saves, loads and uploads that, and casts no integer
in it, which it would do to a tensor of the weights file."""

_WRITTEN = frozenset(
    {"apply_b_dec_to_input", "normalize_activations", "reshape_activations", "mirrored"}
)
"""Fields that every file has: a call with some of them, and with metadata as a dict, loads a file."""

EXTENDED_KEY = "extended"
"""The entry of the build record that says which atoms `ITDA.extended` added."""

RANDOM_ATOMS = 6174
"""Seed of the atoms that a new dictionary holds until it is given others. Any but those that people
choose: data drawn with the same one would be multiples of these atoms."""


@dataclass
class ITDAConfig(SAEConfig):
    """Configuration of an `ITDA`.

    Attributes:
        k: most nonzeros per code, 1 <= k <= d_sae.
        signed: whether coefficients may be negative.
        method: "mp" (matching pursuit), "omp" (orthogonal matching pursuit) or "ols" (orthogonal least
            squares with a backward pass; of signed codes).
        rtol: a row stops once |residual| <= rtol * |x|. Where the atoms are stored in half
            precision, their rounding error (`torch.finfo(dtype).eps`) is used if it is larger.
        threshold: a row stops before it picks an atom whose correlation with the residual is smaller
            ("ols": it has no atom that explains less than this squared), in the units of the
            activations; with one above 0 easy rows take fewer than k atoms. What `ITDA.calibrate` sets.
        l0: a record: the mean nonzeros that `threshold` was calibrated for; None if it was not.
        mirrored: whether the second half of the atoms are the negatives of the first half. Pursuits run
            on the first half; a negative coefficient goes, with its sign changed, to the mirror image
            of its atom. What `ITDA.nonnegative` sets.

    The other fields, `d_in`, `d_sae`, `dtype`, `device`, `apply_b_dec_to_input`,
    `normalize_activations`, `reshape_activations` and `metadata`, are SAELens's.

    Raises:
        ValueError: a field is out of range; the message says which and what is allowed.
    """

    k: int = 32
    signed: bool = True
    method: Method = "mp"
    rtol: float = DEFAULT_RTOL
    threshold: float = 0.0
    l0: float | None = None
    mirrored: bool = False

    @property
    def coding(self) -> Coding:
        """The settings of the pursuit.

        Raises:
            ValueError: one is out of range.
        """
        return Coding(self.k, self.method, self.signed, self.rtol, self.threshold)

    @property
    def n_pursued(self) -> int:
        """How many atoms pursuits choose from: all, or the first half of a mirrored dictionary."""
        return self.d_sae // 2 if self.mirrored else self.d_sae

    @override
    @classmethod
    def architecture(cls) -> str:
        return "itda"

    def __new__(cls, *args: Any, **values: Any) -> "ITDAConfig":
        """Refuse a saved configuration that is not complete, whoever loads it.

        SAELens's loaders call the class with the fields that a file has, and with its metadata as a dict
        where everybody else passes `SAEMetadata`. A missing field would take its default.
        """
        if isinstance(values.get("metadata"), dict) and not _WRITTEN.isdisjoint(values):
            check_config(values, [field.name for field in fields(cls)])
        return super().__new__(cls)

    @override
    def to_dict(self) -> dict[str, Any]:
        """The configuration as SAELens writes it to `cfg.json`, which travels with uploads.

        Names stand in place of the paths of this machine that the metadata may hold;
        `ITDA.save_model` keeps the paths in a file of their own.
        """
        config = super().to_dict()
        return config | {"metadata": without_paths(config["metadata"])}

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "ITDAConfig":
        """The configuration that `to_dict` gave, or that `cfg.json` holds.

        One with an entry "metadata" is a saved one, which must be complete; others may leave fields to
        their defaults.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of range; it is named.
        """
        if "metadata" in config_dict and config_dict["architecture"] == cls.architecture():
            check_config(config_dict, [field.name for field in fields(cls)])
        return super().from_dict(config_dict)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("apply_b_dec_to_input", "mirrored"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        for name, allowed in (("dtype", tuple(DTYPE_MAP)), ("reshape_activations", ("none", "hook_z"))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(self.metadata, Mapping):  # as SAELens's from_dict passes it
            self.metadata = SAEMetadata(**self.metadata)
        if not isinstance(self.metadata, SAEMetadata):
            raise ValueError(f"metadata must be a SAEMetadata, got {type(self.metadata).__name__}")
        if not isinstance(self.device, str):
            raise ValueError(f"device must be a string such as 'cpu' or 'cuda:0', got {self.device!r}")
        for name in ("d_in", "d_sae"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be at least 1 and a whole number, got {value!r}")
            setattr(self, name, int(value))
        if self.mirrored and self.d_sae % 2:
            raise ValueError(f"d_sae must be even for mirrored=True, got {self.d_sae}")
        coding = self.coding
        coding.check_atoms(self.n_pursued, "d_sae / 2" if self.mirrored else "d_sae")
        # numpy's numbers have become Python's, which cfg.json can hold.
        self.k, self.signed = coding.k, coding.signed
        self.rtol, self.threshold = coding.rtol, coding.threshold
        if self.l0 is not None:
            number = isinstance(self.l0, Real) and not isinstance(self.l0, bool)
            if not number or not 0 < self.l0 < math.inf:
                raise ValueError(f"l0 must be above 0 and finite, or None, got {self.l0!r}")
            self.l0 = float(self.l0)


class NoLabelsError(AttributeError, ValueError):
    """A dictionary without labels was asked for them. `hasattr` and `getattr` with a default know it for
    an attribute that is not there."""


class ITDA(SAE[ITDAConfig]):
    """A dictionary of real activations that decomposes others by matching pursuit.

    Codes are `pursuit.encode(x - b_dec, W_dec)`, reconstructions `codes @ W_dec + b_dec`. There is no
    encoder to train: `W_enc` is a view of `W_dec.T`. `encode` passes the code through
    `hook_sae_acts_pre` and `hook_sae_acts_post` and is differentiable given its support.
    """

    def __init__(self, cfg: ITDAConfig, use_error_term: bool = False) -> None:
        if not isinstance(cfg, ITDAConfig):
            raise TypeError(f"cfg must be an ITDAConfig, got {type(cfg).__name__}")
        if not isinstance(use_error_term, bool):
            raise TypeError(f"use_error_term must be True or False, got {use_error_term!r}")
        super().__init__(cfg, use_error_term)
        # Neither buffers nor parameters: SAELens builds models on device "meta" and assigns weights.
        self._prepared: Prepared | None = None
        self._labels: tuple[str, Labels] | None = None
        # Of the files that weights are about to be loaded from: those in memory may be edited.
        self._saved_digests: dict[str, str] | None = vars(cfg.metadata).pop(WEIGHTS_KEY, None)

    @override
    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[ITDAConfig]:
        return ITDAConfig

    @override
    @torch.inference_mode(False)
    def initialize_weights(self) -> None:
        """Random unit atoms, the same ones each time; torch's global random state is left alone."""
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, dtype=self.dtype, device=self.device))
        shape = (self.cfg.d_sae, self.cfg.d_in)
        if self.device.type == "meta":  # SAELens replaces these at once
            atoms = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            generator = torch.Generator("cpu").manual_seed(RANDOM_ATOMS)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            atoms = torch.nn.functional.normalize(drawn, dim=-1).to(self.device, self.dtype)
        self.W_dec = nn.Parameter(atoms)

    @override
    def _setup_activation_normalization(self) -> None:
        super()._setup_activation_normalization()
        if self.cfg.normalize_activations in NORMALIZATIONS:
            into, back = NORMALIZATIONS[self.cfg.normalize_activations](self)
            self.run_time_activation_norm_fn_in, self.run_time_activation_norm_fn_out = into, back

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """View of `W_dec.T`, for tools that read encoder directions (SAEBench takes their norms).

        It may be assigned only what it is already.
        """
        return self.W_dec.T

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "W_enc":
            if not isinstance(value, Tensor) or not same_bits(value, self.W_enc):
                raise ValueError("W_enc must be W_dec.T, of which it is a view; assign W_dec instead")
            return
        if name == "W_dec":
            if not isinstance(value, Tensor):
                raise TypeError(f"W_dec must be a Parameter, got {type(value).__name__}")
            self._check_atoms(value)
        super().__setattr__(name, value)

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "labels":  # its property raised an AttributeError, for which Python looks here
            raise NoLabelsError("this dictionary carries no labels")
        return super().__getattr__(name)

    @override
    def __repr__(self) -> str:
        cfg = self.cfg
        shown: dict[str, Any] = dict(d_in=cfg.d_in, d_sae=cfg.d_sae, k=cfg.k, method=cfg.method)
        shown |= dict(signed=cfg.signed, dtype=str(self.W_dec.dtype).removeprefix("torch."))
        shown |= dict(device=str(self.W_dec.device))
        further = dict(l0=cfg.l0, mirrored=cfg.mirrored or None, hook_name=cfg.metadata.hook_name)
        shown |= {name: value for name, value in further.items() if value is not None}
        return f"ITDA({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    # encoding and decoding

    @override
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Dense codes of `x`, at most `cfg.k` nonzeros each, in the dictionary's dtype.

        Raises:
            ValueError: as `encode_sparse`, or a coefficient is too large for the dictionary's dtype.
        """
        sparse = self.encode_sparse(x)
        check_fits("coefficients", sparse.values, self.W_dec)
        codes = sparse.to_dense(self.cfg.d_sae).to(self.dtype)
        return self.hook_sae_acts_post(self.hook_sae_acts_pre(codes))

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        """Codes of `x` as (indices, values), `cfg.k` slots each, unused ones of value 0.

        With hook_z reshaping `x` is [*batch, n_heads, d_head]. Values are float32 (float64 for a
        float64 dictionary). Activations are cast to the dictionary's dtype first.

        Raises:
            ValueError: `x` has the wrong width, NaN or infinite values, or is too large for the
                dictionary's dtype; or it is so small that all of it would be zero there.
        """
        check_fits("x", self._check_width(x), self.W_dec)
        sae_in = self.process_sae_in(x)
        atoms, norms = self._prepare(self.cfg.coding)
        codes = atoms.encode(sae_in)
        if norms is not None:
            codes = codes._replace(values=codes.values / norms[codes.indices])
        return codes.mirrored(self.cfg.n_pursued) if self.cfg.mirrored else codes

    @checked
    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "*batch d_in"], l0: float, k: int | None = None) -> float:
        """Let codes have `l0` nonzeros on average instead of `cfg.k` each.

        A row then stops at the first atom that would explain too little, whatever its batch. On average
        codes have the length that they have with k = l0, but rows that need more get more.

        Args:
            x: activations like those to encode, some thousands, of texts that atoms are not from: codes
                of an atom's own text have fewer. The mean is met on these, to half a per cent or so.
            l0: mean number of nonzeros, 0 < l0 <= k.
            k: most nonzeros of a code from now on; default: `cfg.k` stays.

        Returns:
            `cfg.threshold`, as it is now; 0 where l0 is k, or where no threshold gives l0.

        Raises:
            ValueError: l0 or k is out of range; `x` is empty, of another width, NaN or infinite.
        """
        most = self.cfg.k if k is None else k
        check_fits("x", self._check_width(x), self.W_dec)
        sae_in = self.process_sae_in(x).reshape(-1, self.cfg.d_in)
        coding = replace(self.cfg.coding, k=most)
        atoms, _ = self._prepare(coding)
        threshold = threshold_for_l0(sae_in, atoms, l0)
        self.cfg.k, self.cfg.threshold, self.cfg.l0 = coding.k, threshold, float(l0)
        self._forget_usual_residual()
        return threshold

    def _forget_usual_residual(self) -> None:
        """Drop the record of how much other codes left."""
        known = Provenance.of(self.cfg.metadata)
        if known.unexplained is not None:
            replace(known, unexplained=None).into(self.cfg.metadata)

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction from dense codes.

        Raises:
            TypeError: `feature_acts` is no dense tensor of a floating dtype.
            ValueError: it has another width than d_sae.
        """
        check_floats("feature_acts", feature_acts)
        if not feature_acts.ndim or feature_acts.shape[-1] != self.cfg.d_sae:
            raise ValueError(
                f"feature_acts must have d_sae={self.cfg.d_sae} numbers per row, got "
                f"{tuple(feature_acts.shape)}"
            )
        return self._finish_decoding(feature_acts @ self._checked_atoms())

    @checked
    def decode_sparse(self, codes: SparseCodes) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction from sparse codes, read by gather; equal to that of `decode` up to rounding.

        Raises:
            ValueError: `codes` has indices and values of different shapes.
        """
        if codes.indices.shape != codes.values.shape:
            raise ValueError(
                "codes must have indices and values of one shape, got "
                f"{tuple(codes.indices.shape)} and {tuple(codes.values.shape)}"
            )
        return self._finish_decoding(codes.decode(self._checked_atoms()).to(self.dtype))

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of `x`, with the error added where `use_error_term` is set.

        The dense code is only made where a hook is there to see it. Without one, the reconstruction is
        summed from the atoms of the code alone, and equals `decode(encode(x))` up to the rounding of a
        sum in another order (in float32 some 1e-7 of the norm of x); with one, bit for bit.

        Raises:
            ValueError: `x` has the wrong width, NaN or infinite values.
        """
        # With the error term SAELens runs twice, the second time without hooks: any hook matters then.
        hooks = self.hook_dict if self.use_error_term else ("hook_sae_acts_pre", "hook_sae_acts_post")
        if any(_has_hooks(getattr(self, name)) for name in hooks):
            return super().forward(x)
        sae_out = self.decode_sparse(self.encode_sparse(x))
        if self.use_error_term:
            sae_out = sae_out + self.hook_sae_error((x - sae_out).detach())
        return self.hook_sae_output(sae_out)

    def _finish_decoding(self, atoms_sum: Tensor) -> Tensor:
        sae_out = atoms_sum
        if self.cfg.apply_b_dec_to_input:
            sae_out = sae_out + self.b_dec
        sae_out = self.hook_sae_recons(sae_out)
        sae_out = self.run_time_activation_norm_fn_out(sae_out)
        return self.reshape_fn_out(sae_out, self.d_head)

    def _check_atoms(self, atoms: Tensor) -> None:
        wanted = (self.cfg.d_sae, self.cfg.d_in)
        if tuple(atoms.shape) != wanted:
            raise ValueError(
                f"W_dec must have the shape (d_sae, d_in) = {wanted} of the configuration, got "
                f"{tuple(atoms.shape)}; fewer atoms give other codes, see `prefix`"
            )

    def _checked_atoms(self) -> Tensor:
        """`W_dec`, which other code may have replaced through `.data` or in another configuration.

        Raises:
            ValueError: its shape is not that of the configuration.
        """
        self._check_atoms(self.W_dec)
        return self.W_dec

    def _check_width(self, x: Tensor) -> Tensor:
        check_floats("x", x)
        width = x.shape[-1] if x.ndim else 0
        if self.hook_z_reshaping_mode:
            width = x.shape[-1] * x.shape[-2] if x.ndim >= 2 else width
        if width != self.cfg.d_in:
            raise ValueError(f"x must have d_in={self.cfg.d_in} numbers per row, got {tuple(x.shape)}")
        if x.device != self.W_dec.device:
            raise ValueError(
                f"x must be on the device of the dictionary, {self.W_dec.device}, got {x.device}"
            )
        return x

    def _prepare(self, coding: Coding) -> tuple[PreparedAtoms, Tensor | None]:
        """Unit atoms, ready for this coding, and their norms where those were not 1.

        Norms and Gram matrix are computed anew when `W_dec` has changed.

        Raises:
            ValueError: `W_dec` has NaN or infinite values, norms that no arithmetic serves, or another
                shape than the configuration says; or `b_dec` has NaN or infinite values.
        """
        if not beneath(lambda plain: bool(torch.isfinite(plain).all()), self.b_dec):
            raise ValueError("b_dec has NaN or infinite values")
        atoms = self._checked_atoms()[: self.cfg.n_pursued]
        self._prepared = beneath(lambda plain: prepare(plain, coding, self._prepared), atoms)
        norms = self._prepared.norms
        if norms is not None:
            atoms = atoms.to(norms.dtype) / norms[:, None]
        rtol = max(coding.rtol, torch.finfo(self.W_dec.dtype).eps)
        coding = replace(coding, rtol=rtol)
        return PreparedAtoms.with_gram(atoms, coding, self._prepared.gram), norms

    # labels

    @property
    def labels(self) -> Labels:
        """Where each atom came from, in the order of the atoms.

        Raises:
            NoLabelsError: the dictionary carries none; an AttributeError and a ValueError.
            ValueError: they are damaged.
        """
        compact = self.cfg.metadata[LABELS_KEY]
        if compact is None:
            raise NoLabelsError("this dictionary carries no labels")
        if self._labels is None or self._labels[0] != compact:
            self._labels = (compact, Labels.from_compact(compact, self.cfg.d_sae))
        return self._labels[1]

    @checked
    def prefix(self, m: int) -> "ITDA":
        """The dictionary of the first `m` atoms, a copy.

        Presets "best" and "thorough" order atoms by importance: a prefix of 64 atoms or more is a few
        per cent worse than a dictionary that was built with `m` atoms. Preset "paper" orders them as
        they were admitted. `cfg.k` becomes `m` where it was more. A threshold stays as it is, and gives
        another mean L0: calibrate again.

        Raises:
            ValueError: `m` is not between 1 and d_sae, or this is a non-negative view.
        """
        if self.cfg.mirrored:
            raise ValueError(
                "take the prefix first, then its non-negative view: here the signs come in halves"
            )
        if not 1 <= m <= self.cfg.d_sae:
            raise ValueError(f"m must be between 1 and d_sae={self.cfg.d_sae}, got {m}")
        labels = None if self.cfg.metadata[LABELS_KEY] is None else self.labels[:m]
        made = self.with_atoms(self.W_dec[:m], labels, k=min(m, self.cfg.k), l0=None)
        made._forget_usual_residual()
        return made

    # non-negative codes

    def nonnegative(self) -> "ITDA":
        """A view of the dictionary with non-negative codes: atoms `[D, -D]`, `d_sae` doubled.

        For tools that take a coefficient for an activation and test `> 0`. Reconstructions, supports and
        L0 are those of this dictionary: coefficient c of atom i becomes c at i where c > 0, and -c at
        `d_sae + i` where c < 0. Atom `d_sae + i` keeps the label of atom i with its cosine negated. A
        copy: later edits of one do not reach the other. Returns the dictionary itself where codes are
        non-negative already.
        """
        if self.cfg.mirrored or not self.cfg.signed:
            return self
        labels = None
        if self.cfg.metadata[LABELS_KEY] is not None:
            opposite = [replace(label, cosine=-label.cosine) for label in self.labels]
            labels = Labels([*self.labels, *opposite])
        return self.with_atoms(torch.cat([self.W_dec, -self.W_dec]), labels, mirrored=True)

    @torch.no_grad()
    def with_atoms(
        self, atoms: Float[Tensor, "n d_in"], labels: Labels | None, **changes: Any
    ) -> "ITDA":
        """A copy with other atoms and their labels, and some fields of the configuration changed.

        Args:
            atoms: rows of any norm; a copy of them is stored in the dictionary's dtype.
            labels: a label for each atom; None keeps the metadata as they are.
            changes: fields of `ITDAConfig` with their new values; `d_sae` follows from `atoms`.
        """
        cfg = copy.deepcopy(self.cfg)
        for name, value in {"d_sae": len(atoms), **changes}.items():
            setattr(cfg, name, value)
        if labels is not None:
            cfg.metadata[LABELS_KEY] = labels.to_compact()
        made = ITDA(cfg)
        made.W_dec.copy_(atoms)
        made.b_dec.copy_(self.b_dec)
        return made

    # other ways to a dictionary

    @classmethod
    def from_atoms(
        cls,
        vectors: Float[Tensor, "n d_in"],
        labels: Sequence[GivenLabel] | None = None,
        *,
        k: int,
        b_dec: Float[Tensor, " d_in"] | None = None,
        kind: str = "vector",
        method: Method | None = None,
        signed: bool = True,
        rtol: float = DEFAULT_RTOL,
        zeros: "Zeros" = "refuse",
        duplicates: "Duplicates" = "keep",
        metadata: dict[str, Any] | None = None,
    ) -> "ITDA":
        """The dictionary whose atoms are these vectors, scaled to norm 1, each with a label.

        Vectors may be anything of the width of an activation: unembedding rows
        (`itda_lens.sources.unembedding`), class means, probe directions, another SAE's decoder. The
        arguments are described at `itda_lens.sae.from_atoms`.

        Examples:
            >>> directions = torch.eye(3)
            >>> itda = ITDA.from_atoms(directions, ["north", "east", "up"], k=2, kind="direction")
            >>> print(itda.labels[1])
            direction 1: east

        Raises:
            ValueError, TypeError: as `itda_lens.sae.from_atoms`.
        """
        from itda_lens.sae.from_atoms import from_atoms  # which imports this module

        return from_atoms(
            vectors, labels, k=k, b_dec=b_dec, kind=kind, method=method, signed=signed, rtol=rtol,
            zeros=zeros, duplicates=duplicates, metadata=metadata,
        )  # fmt: skip

    @torch.no_grad()
    @checked
    def extended(
        self,
        activations: Float[Tensor, "*batch d_in"],
        n: int,
        *,
        labels: Sequence[GivenLabel] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> "ITDA":
        """The dictionary with `n` more atoms, chosen for the error that it leaves; a copy.

        The new atoms are activations. They are chosen as by preset "best", but beside the old atoms: an
        activation counts for the energy that no old atom explains better.

        The old atoms come first, with their labels, and do not change by a bit; neither do `b_dec`, k
        and the threshold. So a code stays the same where no step of its pursuit prefers a new atom. With
        a threshold, mean L0 becomes another one, and `cfg.l0` becomes None: calibrate again if it
        matters.

        Args:
            activations: some thousands, such as those of a domain that is new to the dictionary.
            n: how many atoms to add.
            labels: where each activation came from; strings, ints, `Label`s, triples or `Places`.
                Default: row i is labelled row=i, of kind "row". The numbers of texts that are not those
                of the first build say nothing beside the old ones: give such labels a kind of their own.
            seed: seed of the samples that candidates are drawn from and scored on.
            progress: show a progress bar.

        Raises:
            ValueError: this is a non-negative view; `activations` are none, of another width, NaN or
                infinite; or fewer than `n` of them point where no atom does.
            TypeError: a label is of none of these kinds.

        See also:
            docs/extending.md, which measures it against building anew.
        """
        at_least(1, n=n)
        at_least(0, seed=seed)
        if self.cfg.mirrored:
            raise ValueError("extend the dictionary first, then take its non-negative view")
        rows = self.process_sae_in(self._check_width(activations)).reshape(-1, self.cfg.d_in)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if labels is not None and len(labels) != len(rows):
            raise ValueError(f"labels must be one per row: {len(labels)} labels for {len(rows)} rows")
        if n > len(rows):
            raise ValueError(f"n must be at most the number of activations, {len(rows)}, got {n}")
        bad = first_nonfinite_row(rows)
        if bad is not None:
            raise ValueError(f"activations must be finite, but row {bad} has NaN or infinite values")
        if labels is None:
            places = Places.numbered(0, len(rows))
        elif isinstance(labels, Places):
            places = labels
        else:
            places = Places.of([label_from(one, i, "row") for i, one in enumerate(labels)])
        coding = self.cfg.coding
        if self.cfg.l0 is not None:
            coding = replace(coding, k=max(1, round(self.cfg.l0)))
        atoms = self._prepare(self.cfg.coding)[0].atoms
        more, own = more_atoms(rows, places, atoms, n, coding, seed=seed, progress=progress)
        if self.cfg.metadata[LABELS_KEY] is None:
            old = [Label(row=i, kind="atom") for i in range(self.cfg.d_sae)]
        else:
            old = list(self.labels)
        made = self.with_atoms(
            torch.cat([self.W_dec, more.to(self.W_dec)]), Labels([*old, *own]), l0=None
        )
        provenance = Provenance.of(made.cfg.metadata)
        step = {"first": self.cfg.d_sae, "n": n, "rows": len(rows), "seed": seed}
        steps = [*provenance.others.get(EXTENDED_KEY, []), step]
        others = {**provenance.others, EXTENDED_KEY: steps}
        replace(provenance, others=others).into(made.cfg.metadata)
        return made

    def push_to_hub(
        self,
        repo: str,
        *,
        name: str | None = None,
        labels: "Exposed" = "full",
        private: bool = False,
        figures: Mapping[str, float] | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the dictionary to a repository on the Hugging Face hub, with a card.

        Then `itda_lens.load(repo)` loads it, and so does SAELens once `itda_lens` is imported.

        Args:
            repo: "org/name"; it is made if it does not exist.
            name: its folder in the repository; default: the hook name, or "dictionary".
            labels: "full", "places" (without any text) or "none".
            private: make the repository a private one.
            figures: figures by name for the card, such as FVU and L0 on held-out text.
            token: of the hub; default: the one that you are logged in with.

        Returns:
            The address of the commit.

        Raises:
            ValueError, OSError: as `itda_lens.sae.push`, which uploads several.
        """
        from itda_lens.sae.hub import push  # which imports this module

        name = self.cfg.metadata.hook_name or "dictionary" if name is None else name
        return push(
            {name: self}, repo, labels=labels, private=private, token=token,
            figures=None if figures is None else {name: figures},
        )  # fmt: skip

    # what SAELens does to weights and files

    @override
    @checked
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Divide the weights, and the threshold, by a factor that activations were multiplied by.

        Raises:
            TypeError: the factor is no number.
            ValueError: it is not above 0 and finite.
        """
        if not 0 < scaling_factor < math.inf:
            raise ValueError(f"scaling_factor must be above 0 and finite, got {scaling_factor}")
        self.W_dec.div_(scaling_factor)
        self.b_dec.div_(scaling_factor)
        self.cfg.threshold /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(
            "an ITDA has no encoder weights to fold a whitening into; fit it on raw activations"
        )

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Scale atoms to unit norm: reconstructions stay as they are, codes are multiplied by the norms.

        Atoms that are of unit norm already, up to the rounding of their dtype, stay bit for bit.

        Returns:
            The factors of the codes: norms of the atoms as they were, or ones.
        """
        atoms = self._checked_atoms()
        norms = atoms.to(torch.promote_types(atoms.dtype, torch.float32)).norm(dim=-1)
        if unit_up_to_rounding(norms, atoms.dtype):
            return torch.ones_like(norms, dtype=atoms.dtype)
        norms = norms.clamp(min=1e-8)  # as SAELens does for atoms that are zero
        atoms.copy_(atoms / norms[:, None])
        return norms.to(atoms.dtype)

    @override
    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ITDA":
        """Apply `.to`, `.bfloat16`, `.cuda` and the like to weights, and tell the configuration."""
        super()._apply(fn, recurse)
        self.dtype, self.device = self.W_dec.dtype, self.W_dec.device
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")
        self.cfg.device = str(self.device)
        return self

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Check weights that were read from a file.

        Rows may be of any norm: folding, training and half precision change them, and encoding takes
        them into account. Weights that were damaged differ from the digests that were saved with them.

        Raises:
            ValueError: they are not of the save that the configuration is of, do not fit it, or are not
                finite.
        """
        if self._saved_digests is not None:
            check_digests(state_dict, self._saved_digests)
            self._saved_digests = None
        expected = {"W_dec": (self.cfg.d_sae, self.cfg.d_in), "b_dec": (self.cfg.d_in,)}
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if found != expected:
            raise ValueError(f"weights do not fit the config: expected {expected}, found {found}")
        for name, tensor in state_dict.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has NaN or infinite values")
            if tensor.is_inference():  # it could never be trained, cast or folded
                with torch.inference_mode(False):
                    state_dict[name] = tensor.clone()
        if self.cfg.mirrored and not torch.equal(*_halves(state_dict["W_dec"])):
            raise ValueError("W_dec's second half must be the negative of the first: mirrored is set")

    @override
    @checked
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write `sae_weights.safetensors` and `cfg.json` into the folder `path`, made if need be.

        Files of these names are replaced, as by every SAELens SAE, but only once both new ones are
        complete: an interrupt or a full disk leaves both as they were. So does a kill between the two
        renames, for `itda_lens.load`: the header of the weights holds their own configuration, and a
        digest of the weights in `cfg.json` (`itda_weights` in its metadata) shows when that is needed.
        A `sparsity.safetensors` of the weights that were there is removed.

        Folders of the model and the texts go into `itda_local.json`, which SAELens does not upload, and
        from which `itda_lens.load` reads them.

        Returns:
            Paths of the weights and of the config.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        self.process_state_dict_for_saving(state_dict)
        config = self.cfg.to_dict()
        config["metadata"] = config["metadata"] | {WEIGHTS_KEY: digests(state_dict)}
        text = json.dumps(config)
        write_local(folder, Provenance.of(self.cfg.metadata))
        weights, cfg = folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME
        # The configuration first: its digests tell that earlier weights are not its own, whoever wrote
        # these. The save is done once the weights are renamed.
        with replacing(cfg, weights) as (new_cfg, new_weights):
            write_tensors(state_dict, new_weights, header_of(text))
            new_cfg.write_text(text)
            (folder / SPARSITY_FILENAME).unlink(missing_ok=True)
        return weights, cfg


def _halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    half = len(weights) // 2
    return weights[:half], -weights[half:]


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks)
    return any(kinds) or any((module._backward_hooks, module._backward_pre_hooks))

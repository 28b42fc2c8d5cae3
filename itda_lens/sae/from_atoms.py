"""A dictionary of vectors that the user has already, such as unembedding rows or class means."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda_lens.dictionary import SAME_DIRECTION, first_of_direction
from itda_lens.pursuit import DEFAULT_RTOL, Coding, Method, first_nonfinite_row
from itda_lens.records import GivenLabel, HookPoint, Provenance, checked, label_from, versions
from itda_lens.sae.assembly import assemble
from itda_lens.sae.itda import ITDA

logger = logging.getLogger(__name__)

Zeros = Literal["refuse", "drop"]
"""How to treat vectors of norm zero, which have no direction."""

Duplicates = Literal["keep", "drop", "refuse"]
"""How to treat vectors that point where an earlier one does."""

UNIT_UP_TO = 16
"""A norm counts as 1 if it differs from 1 by at most this many units of rounding."""


@checked
def from_atoms(
    vectors: Float[Tensor, "n d_in"],
    labels: Sequence[GivenLabel] | None = None,
    *,
    k: int,
    b_dec: Float[Tensor, " d_in"] | None = None,
    kind: str = "vector",
    method: Method | None = None,
    signed: bool = True,
    rtol: float = DEFAULT_RTOL,
    zeros: Zeros = "refuse",
    duplicates: Duplicates = "keep",
    metadata: dict[str, Any] | None = None,
) -> ITDA:
    """The dictionary whose atoms are these vectors, scaled to norm 1; `ITDA.from_atoms` is its face.

    Only a vector's direction counts. A vector of norm 1 stays as it is, bit for bit, so that the atoms
    of another dictionary give the codes that they gave there.

    Args:
        vectors: one atom a row, of any floating dtype; half precision becomes float32.
        labels: a name for each vector (a string), its number in some list (an int), or a `Label` or
            (row, chunk, position) triple. Default: vector i is labelled row=i.
        k: most nonzeros per code.
        b_dec: what is subtracted from an activation before it is coded; default: zeros. Vectors that are
            differences from a mean, such as class means less the mean of all, want that mean here.
        kind: the kind of thing that strings, ints and default labels count, such as "class" or "latent".
        method, signed, rtol: as in `fit`. Directions that say how much of something is there, such as
            unembedding rows, are mostly read with signed=False.
        zeros: "refuse" vectors of norm zero, or "drop" them with their labels.
        duplicates: "keep" vectors that point where an earlier one does, "drop" them with their labels,
            or "refuse" them. Kept duplicates never share a code under "omp" and "ols". If codes are
            signed, the negative of a vector is a duplicate of it too. Looking for duplicates compares
            all pairs of vectors.
        metadata: entries for `cfg.metadata`, such as model_name and hook_name.

    Raises:
        ValueError: there is no vector, one is zero, NaN or infinite (the first is named), k is more than
            their number, the number of labels is another one, or b_dec has another width.
        TypeError: `vectors` is no floating-point tensor, or a label is of none of these kinds.
    """
    rows = _usable(vectors, b_dec)
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"labels must be one per vector: {len(labels)} labels for {len(rows)} vectors")
    unit, keep = _unit(rows), rows.abs().amax(dim=1) > 0
    _act_on(zeros, "zeros", ~keep, "has norm zero: it has no direction")
    if duplicates != "keep":
        first = torch.zeros_like(keep)
        first[keep] = first_of_direction(unit[keep], SAME_DIRECTION, signed)
        _act_on(duplicates, "duplicates", keep & ~first, "points where an earlier one does")
        keep = first
    kept = keep.nonzero().flatten().tolist()
    if not kept:
        raise ValueError("vectors must have at least one row that is not zero, got none")
    given = range(len(rows)) if labels is None else labels
    own = [label_from(given[i], i, kind) for i in kept]
    coding = Coding(k, method or ("ols" if signed else "omp"), signed, rtol)
    coding.check_atoms(len(kept), "the number of vectors")
    metadata = metadata or {}
    provenance = Provenance.of(metadata)
    itda = assemble(
        unit[keep],
        unit.new_zeros(unit.shape[1]) if b_dec is None else b_dec.detach().to(unit),
        coding=coding,
        labels=own,
        metadata=metadata,
        reshape_activations=HookPoint.parse(provenance.hook_name or "").reshape_activations,
    )
    recipe = {"rule": {"name": "from_atoms", "kind": kind, "n_vectors": len(rows)}}
    known = {"recipe": provenance.recipe or recipe, "versions": versions()}
    Provenance(**{**vars(provenance), **known}).into(itda.cfg.metadata)
    return itda


def _usable(vectors: Tensor, b_dec: Tensor | None) -> Float[Tensor, "n d_in"]:
    if not len(vectors) or not vectors.shape[1]:
        raise ValueError(
            f"vectors must have at least one row and one column, got shape {tuple(vectors.shape)}"
        )
    rows = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    bad = first_nonfinite_row(rows)
    if bad is not None:
        raise ValueError(f"vectors must be finite, but row {bad} has NaN or infinite values")
    if b_dec is not None:
        if b_dec.shape != rows.shape[1:]:
            raise ValueError(f"b_dec must have {rows.shape[1]} numbers, got {tuple(b_dec.shape)}")
        if not torch.isfinite(b_dec).all():
            raise ValueError("b_dec must be finite, but has NaN or infinite values")
    return rows


def _unit(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """Rows scaled to norm 1, whatever their size; zeros stay zeros."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows.double() / largest.double().masked_fill(largest == 0, 1)
    unit = torch.nn.functional.normalize(scaled, dim=1).to(rows.dtype)
    off = (rows.double().norm(dim=1, keepdim=True) - 1).abs()
    return torch.where(off <= UNIT_UP_TO * torch.finfo(rows.dtype).eps, rows, unit)


def _act_on(choice: str, argument: str, found: Bool[Tensor, " n"], fault: str) -> None:
    """Refuse the vectors that were found, or say that they are dropped."""
    n = int(found.sum())
    if not n:
        return
    first = int(found.nonzero()[0])
    if choice == "refuse":
        raise ValueError(
            f"vectors must be usable, but row {first} {fault} ({n} such rows); pass "
            f"{argument}='drop' to leave them out"
        )
    logger.info("%d vectors are dropped; the first, row %d, %s", n, first, fault)

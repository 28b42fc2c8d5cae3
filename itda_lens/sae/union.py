"""One dictionary of several."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import Method
from itda_lens.records import Label, Labels, Provenance, agreed, checked, versions
from itda_lens.sae.itda import ITDA, LABELS_KEY
from itda_lens.sae.provenance import provenance_of

AGREED = ("model_name", "hook_name")
"""Facts in which the dictionaries must agree, where they record them."""

KEPT = (
    "model_class_name", "model", "loader", "context_size", "prepend_bos", "keep_special_tokens",
    "vocabulary_sha256",
)  # fmt: skip
"""Further facts that the union records if all that record them say the same."""


@checked
def union(
    a: ITDA,
    b: ITDA,
    *more: ITDA,
    k: int | None = None,
    method: Method | None = None,
    signed: bool | None = None,
    b_dec: Float[Tensor, " d_in"] | None = None,
) -> ITDA:
    """One dictionary with the atoms of several, in their order, and the labels of all.

    A code over it says how much of an activation each dictionary explains once the others have their
    share. With a dictionary of activations and one of unembedding rows, for example, it says which
    contexts a token resembles and which tokens the model is about to say.

    Atoms are not changed, and duplicates are kept: an atom that an earlier dictionary holds too, bit for
    bit, is never used under "omp" and "ols". The atoms of a dictionary without labels are labelled by
    their number, such as "dictionary 2, atom 5".

    Args:
        a, b, more: dictionaries of one hook point, of one model and width.
        k, method, signed: of the new codes; default: those of `a`. `a`'s threshold stays as it is and
            gives another mean L0: calibrate again.
        b_dec: what is subtracted from activations; default: the `b_dec` of `a`, also where that of
            others differs. Put the dictionary of activations first: its mean is then taken off, and
            unembedding rows, whose `b_dec` is zero, explain what is left.

    Raises:
        ValueError: the dictionaries are of other widths, hook points, models or shapes of activations;
            one is a non-negative view; or a setting is out of range.
    """
    several = (a, b, *more)
    for i, itda in enumerate(several):
        if itda.cfg.mirrored:
            raise ValueError(f"take the union first, then its non-negative view: number {i + 1} is one")
        if itda.cfg.d_in != a.cfg.d_in:
            raise ValueError(
                f"dictionaries must have one width, got d_in={a.cfg.d_in} and d_in={itda.cfg.d_in}"
            )
        if (found := _input(itda)) != _input(a):
            raise ValueError(
                f"dictionaries must take activations in one form, got {_input(a)} and {found}"
            )
    if b_dec is not None and b_dec.shape != a.b_dec.shape:
        raise ValueError(f"b_dec must have {a.cfg.d_in} numbers, got {tuple(b_dec.shape)}")
    if b_dec is not None and not torch.isfinite(b_dec).all():
        raise ValueError("b_dec must be finite, but has NaN or infinite values")
    records = [provenance_of(itda) for itda in several]
    known = {name: getattr(agreed(records, *AGREED), name) for name in AGREED}
    known |= {name: _common(records, name) for name in KEPT}
    settings = {"k": k, "method": method, "signed": signed}
    given = {name: value for name, value in settings.items() if value is not None}
    coding = replace(a.cfg.coding, **given)
    atoms = torch.cat([itda.W_dec.detach().to(a.device, a.W_dec.dtype) for itda in several])
    coding.check_atoms(len(atoms), "the number of atoms")
    labels = Labels([label for i, itda in enumerate(several) for label in _labels(itda, i)])
    made = a.with_atoms(atoms, labels, l0=None, **given)
    if b_dec is not None:
        with torch.no_grad():
            made.b_dec.copy_(b_dec)
    made.cfg.metadata.dataset_path = _common(records, "dataset_path")
    parts = [_part(itda, record) for itda, record in zip(several, records, strict=True)]
    recipe = {"rule": {"name": "union", "parts": parts}}
    Provenance(**known, recipe=recipe, versions=versions()).into(made.cfg.metadata)
    return made


def _input(itda: ITDA) -> Mapping[str, Any]:
    names = ("normalize_activations", "apply_b_dec_to_input", "reshape_activations")
    return {name: getattr(itda.cfg, name) for name in names}


def _common(records: Sequence[Provenance], name: str) -> Any:
    values = {value for record in records if (value := getattr(record, name)) is not None}
    return values.pop() if len(values) == 1 else None


def _labels(itda: ITDA, number: int) -> Sequence[Label]:
    if itda.cfg.metadata[LABELS_KEY] is not None:
        return itda.labels
    kind = f"dictionary {number + 1}, atom"
    return [Label(row=i, kind=kind) for i in range(itda.cfg.d_sae)]


def _part(itda: ITDA, record: Provenance) -> dict[str, Any]:
    return {"d_sae": itda.cfg.d_sae, "recipe": dict(record.recipe)}

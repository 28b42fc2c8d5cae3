"""Codes and reconstructions of any SAE of SAELens, a slice of activations at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from torch import Tensor

from itda_lens.pursuit import SparseCodes
from itda_lens.pursuit.finite import first_nonfinite_row
from itda_lens.records import checked
from itda_lens.sae.itda import ITDA

ARCHITECTURES = frozenset(
    {"itda", "standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit"}
)
"""SAEs that code one activation at a time and give it back. Others, such as transcoders, do not."""

NORMALIZED_BY_ITSELF = ("none", "constant_norm_rescale", "layer_norm")
"""Values of `normalize_activations` that an SAE applies itself as it runs."""

ROWS = 4096
"""Activations encoded at once, unless the caller says otherwise."""

DENSE = 2**26
"""Most numbers that the dense codes of one slice may hold: 256 MB in float32. A wide SAE takes fewer
rows."""

_RESHAPING = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")


class Coded(NamedTuple):
    """A slice of activations with its codes, all on the SAE's device.

    Attributes:
        x: the activations, in their own dtype; heads are flattened into one row.
        codes: as `sparse_codes` gives them.
        reconstruction: in the SAE's dtype.
    """

    x: Float[Tensor, "rows d_in"]
    codes: SparseCodes
    reconstruction: Float[Tensor, "rows d_in"]


def check_codable(saes: Sequence[SAE[Any]]) -> None:
    """Refuse SAEs that cannot be measured, before work begins.

    Raises:
        ValueError: one is not of `ARCHITECTURES`, is still in training, or expects activations that were
            normalised outside it (`normalize_activations`).
    """
    for sae in saes:
        name = sae.cfg.architecture()
        if name not in ARCHITECTURES or isinstance(sae, TrainingSAE):
            kind = f"{name} in training" if isinstance(sae, TrainingSAE) else name
            raise ValueError(
                f"dictionaries must be among {', '.join(sorted(ARCHITECTURES))}, got one of {kind}; "
                "save a trained SAE for inference and load it"
            )
        if sae.cfg.normalize_activations not in NORMALIZED_BY_ITSELF:
            raise ValueError(
                f"normalize_activations={sae.cfg.normalize_activations!r} must be folded into an SAE's "
                "weights before it is measured"
            )


@checked
def coded(sae: SAE[Any], x: Float[Tensor, "n *d_in"], batch_size: int | None = None) -> Iterator[Coded]:
    """Encode and reconstruct activations, slice by slice and in their order.

    Gradients are kept as by the SAE's own `encode` and `decode`; measure under `torch.no_grad()`.

    Args:
        sae: an ITDA or another SAE of SAELens; see `ARCHITECTURES`.
        x: activations [n, d_in], on any device; of a per-head hook point [n, n_heads, d_head] too.
        batch_size: activations encoded at once; default: `ROWS`; fewer where their dense codes would
            hold more than `DENSE` numbers.

    Yields:
        The slices; one slice without rows if there are no activations.

    Raises:
        ValueError: the SAE cannot be measured (`check_codable`), batch_size is below 1, or `x` has the
            wrong width, NaN or infinite values.
    """
    check_codable([sae])
    dense_width = 1 if isinstance(sae, ITDA) else sae.cfg.d_sae
    size = max(1, min(ROWS, DENSE // dense_width)) if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = x.flatten(1) if x.ndim > 1 else x
    if rows.ndim != 2 or rows.shape[1] != sae.cfg.d_in:
        raise ValueError(
            f"x must be rows of d_in={sae.cfg.d_in} numbers, [n, d_in], got {tuple(x.shape)}"
        )
    bad = first_nonfinite_row(rows)
    if bad is not None:
        raise ValueError(f"x has NaN or infinite values, first in row {bad}")
    for part in rows.split(size):
        yield _coded(sae, part.to(sae.device))


@checked
def sparse_codes(
    sae: SAE[Any], x: Float[Tensor, "n *d_in"], batch_size: int | None = None
) -> SparseCodes:
    """Codes of activations as (indices, values), on the SAE's device.

    An ITDA has `cfg.k` slots a row, filled in the order of its pursuit. Another SAE has the number of
    slots that its fullest row needs (none, if no latent fires), the largest coefficients first, in the
    SAE's dtype. Unused slots have value 0 and index 0.

    Args:
        sae, x, batch_size: as in `coded`.

    Raises:
        ValueError: as `coded`.
    """
    parts = [part.codes for part in coded(sae, x, batch_size)]
    k = max(codes.indices.shape[-1] for codes in parts)
    columns = (
        [torch.nn.functional.pad(part, (0, k - part.shape[-1])) for part in column]
        for column in zip(*parts, strict=True)
    )
    return SparseCodes(*map(torch.cat, columns))


@checked
def reconstructed(
    sae: SAE[Any], x: Float[Tensor, "n *d_in"], batch_size: int | None = None
) -> Float[Tensor, "n *d_in"]:
    """An SAE's reconstruction of activations, in the shape and on the device of `x`, in the SAE's dtype.

    Args:
        sae, x, batch_size: as in `coded`.

    Raises:
        ValueError: as `coded`.
    """
    parts = [part.reconstruction.to(x.device) for part in coded(sae, x, batch_size)]
    return torch.cat(parts).reshape(x.shape)


def moved(
    sae: SAE[Any], x: Float[Tensor, "rows d_in"], change: Float[Tensor, "rows m"], atoms: Sequence[int]
) -> Float[Tensor, "rows d_in"]:
    """How far reconstructions move when some coefficients of codes change: `change @ W_dec[atoms]`.

    Scales that an SAE has beside `W_dec` count too: norms of its latents, and of the activations.
    A row without a change moves by exactly 0. Gradients are kept.

    Args:
        sae: see `ARCHITECTURES`.
        x: the activations that were encoded, heads in one row, on the SAE's device.
        change: what is added to the coefficients of `atoms`, a column each.
        atoms: distinct numbers of atoms.
    """
    if isinstance(sae, ITDA) and sae.cfg.normalize_activations == "none":
        return change @ sae.W_dec[list(atoms)].to(change.dtype)
    dense = change.new_zeros(len(change), sae.cfg.d_sae, dtype=sae.dtype)
    columns = torch.tensor(list(atoms), dtype=torch.long, device=dense.device)
    dense = dense.index_copy(1, columns, change.to(sae.dtype))
    with _heads_in_one_row(sae):
        ends = []
        for code in (dense, torch.zeros_like(dense)):
            sae.run_time_activation_norm_fn_in(x.to(sae.dtype))  # what `decode` scales back by
            ends.append(sae.decode(code))
    return torch.where((change != 0).any(dim=-1, keepdim=True), ends[0] - ends[1], 0.0)


def _coded(sae: SAE[Any], rows: Float[Tensor, "rows d_in"]) -> Coded:
    with _heads_in_one_row(sae):
        if isinstance(sae, ITDA):
            codes = sae.encode_sparse(rows)
            return Coded(rows, codes, sae.decode_sparse(codes))
        dense = sae.encode(rows)
        # Decoded from the dense code, at once: only `decode` knows how an SAE scales latents, and one
        # that normalises its input remembers the norms of the last slice only.
        return Coded(rows, _nonzeros(dense), sae.decode(dense))


def _nonzeros(dense: Float[Tensor, "rows d_sae"]) -> SparseCodes:
    """A dense code's nonzeros, those of largest absolute value first."""
    k = int((dense != 0).sum(dim=-1).max()) if len(dense) else 0
    indices = dense.abs().topk(k, dim=-1).indices
    values = dense.gather(-1, indices)
    return SparseCodes(indices.masked_fill(values == 0, 0), values)


@contextmanager
def _heads_in_one_row(sae: SAE[Any]) -> Iterator[None]:
    """Let an SAE of a per-head hook point take and give rows [n, d_in].

    SAELens keeps the width of a head from the first activations that an SAE sees. Rows passed off as one
    wide head would leave a width with which the SAE fails in a model.
    """
    if not sae.hook_z_reshaping_mode:
        yield
        return
    kept = {name: vars(sae)[name] for name in _RESHAPING if name in vars(sae)}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        vars(sae).update(kept)

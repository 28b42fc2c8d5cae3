"""From a tensor of activations to a dictionary."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.dictionary import Label, RowLabels, as_label
from itda_lens.pursuit import DEFAULT_RTOL, Method, first_nonfinite_row
from itda_lens.sae import ITDA
from itda_lens.training.presets import Preset, Recipe
from itda_lens.training.record import BUILD_KEY, versions


def fit(
    activations: Float[Tensor, "n_tokens d_in"],
    *,
    d_sae: int | None,
    k: int,
    preset: Preset = "best",
    labels: Sequence[Label | tuple[int, int, int]] | None = None,
    seed: int = 0,
    method: Method | None = None,
    signed: bool = True,
    loss_threshold: float | None = None,
    l0: float | None = None,
    update: bool = False,
    least_cosine: float | None = None,
    rtol: float = DEFAULT_RTOL,
    batch_size: int = 4096,
    metadata: dict[str, Any] | None = None,
    progress: bool = False,
) -> ITDA:
    """Choose atoms among `activations` and return the dictionary.

    The same arguments give the same dictionary, bit for bit, on a CPU.

    Args:
        activations: one activation a row, any floating dtype. Rows that should not count (padding,
            BOS) must be left out by the caller; `build` does that by itself.
        d_sae: atoms. For preset "paper": the most atoms, or None to let `loss_threshold` decide.
        k: most nonzeros per code.
        preset: "best" centres by the mean, drops near-duplicates and keeps those of a uniform sample
            of the rows that carry the most energy; "thorough" takes about ten times as long to replace
            these by better ones, the rows nearest to where eight rounds of least squares move them;
            "paper" is the greedy rule of Leask et al. (2025).
        labels: where each row came from, `Label`s or (row, chunk, position) triples; default: row i is
            labelled row=i, chunk=0, position=0.
        seed: of the samples that "best" and "thorough" draw.
        method: "mp", "omp" or "ols", see `pursuit.encode`; default: "mp" for "paper", otherwise
            "ols" ("omp" for non-negative codes).
        signed: whether coefficients may be negative.
        loss_threshold: relative squared error over which "paper" admits an activation; default 0.2.
        l0: mean nonzeros per code of other text. Codes then have as many as their activation needs, at
            most k, by a threshold calibrated on some of the rows, each without the atoms of its own text
            and of others (by `labels`; without these, of its neighbours). Give k three or four times
            `l0`. Default: k nonzeros in every code.
        update: move the atoms by two rounds of least squares ("thorough": eight). They reconstruct far
            better, and are no longer activations themselves: each keeps its label with its cosine to
            that activation.
        least_cosine: the least that an update may leave of that cosine, 0 to 1; 1 moves no atom.
            Default 0.9.
        rtol: a code ends once |residual| <= rtol |x|, x less the mean. The default, 0.001, only keeps
            coefficients from coding rounding errors; 0.3, say, ends codes at 9 % of the energy. Which
            atoms are chosen, and how they are updated, does not depend on it.
        batch_size: rows looked at together. Only the paper's rule depends on it.
        metadata: entries for `cfg.metadata`, such as model_name and hook_name.
        progress: show a progress bar.

    Raises:
        ValueError: a setting is out of range; no activations, NaN or infinite ones, or fewer distinct
            ones than d_sae; labels of the wrong number.
        TypeError: `activations` is no floating-point tensor, or a label is none.
    """
    recipe = Recipe(
        d_sae, k, preset, seed, method, signed, loss_threshold,
        l0=l0, update=update, least_cosine=least_cosine, rtol=rtol,
    )  # fmt: skip
    _check(activations, d_sae, batch_size)
    n, d_in = activations.shape
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must be one per row: {len(labels)} labels for {n} rows")
    known: Sequence[Label] = RowLabels(0, n) if labels is None else [as_label(label) for label in labels]
    dtype = torch.promote_types(activations.dtype, torch.float32)
    selector = recipe.selector(d_in, dtype, activations.device)
    with torch.no_grad(), tqdm(total=n, unit="row", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            rows = activations[start : start + batch_size].to(dtype)
            selector.update(rows, known[start : start + batch_size])
            bar.update(len(rows))
        dictionary = selector.finish(progress)
    settings = recipe.record() | {"batch_size": batch_size, "n_tokens": n}
    return recipe.assemble(dictionary, {**(metadata or {}), BUILD_KEY: settings | versions()})


def _check(activations: Tensor, d_sae: int | None, batch_size: int) -> None:
    if not isinstance(activations, Tensor) or not activations.is_floating_point():
        kind = getattr(activations, "dtype", type(activations).__name__)
        raise TypeError(f"activations must be a floating-point tensor, got {kind}")
    if activations.ndim != 2 or activations.shape[1] < 1:
        raise ValueError(f"activations must have shape [n_tokens, d_in], got {tuple(activations.shape)}")
    if len(activations) == 0:
        raise ValueError("activations must have at least one row, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if d_sae is not None and d_sae > len(activations):
        raise ValueError(
            f"d_sae must be at most the number of activations: got d_sae={d_sae} for "
            f"{len(activations)} rows"
        )
    row = first_nonfinite_row(activations)
    if row is not None:
        raise ValueError(f"activations must be finite, but row {row} has NaN or infinite values")

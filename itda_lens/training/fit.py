"""From activations of any form to a dictionary."""

from typing import Any

from itda_lens.dictionary import Rule
from itda_lens.pursuit import DEFAULT_RTOL, Method
from itda_lens.records import Provenance, checked
from itda_lens.sae import ITDA
from itda_lens.sources import as_source
from itda_lens.training.recipe import Preset, recipe_of
from itda_lens.training.run import build_from


@checked
def fit(
    activations: Any,
    *,
    d_sae: int | None,
    k: int,
    preset: Preset = "best",
    rule: str | Rule | None = None,
    labels: Any = None,
    item: str | None = None,
    column: str | None = None,
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
        activations: one activation a row, any floating dtype: a tensor, a numpy array or memory map, a
            `.npy`, `.safetensors` or `.parquet` file, a column of a `datasets` data set, a DataLoader,
            an iterator of batches, or a source with one hook point; see `sources.as_source`. All forms
            of the same rows give the same dictionary, bit for bit. Those that are not in memory are read
            once, batch by batch. Rows that should not count (padding, BOS) must be left out by the
            caller; `build` does that by itself.
        d_sae: atoms. For preset "paper": the most atoms, or None to let `loss_threshold` decide.
        k: most nonzeros per code.
        preset: "best" centres by the mean, drops near-duplicates and keeps those of a uniform sample of
            the rows that carry the most energy; "thorough" then moves these by eight rounds of least
            squares and replaces each by the row nearest to it, which is better and takes about ten times
            as long; "paper" is the greedy rule of Leask et al. (2025).
        rule: instead of `preset`: the name of a rule (`itda_lens.dictionary.RULES`), or a rule of your
            own, such as `EnergyRule(near_duplicate=0.95)`.
        labels: strings or whole numbers that name the rows; or where each row came from, as `Label`s or
            (row, chunk, position) triples; or the name of a column that holds strings or numbers.
            Default: row i is labelled row=i. Samples are drawn by these places. If you pass on the
            labels of `collect` as they are, you get the dictionary that `build` makes from these texts.
        item: the kind of thing that a row is, such as "image"; an atom then reads "image 391: cat".
            Default: "row".
        column: the column, key or tensor that holds the activations; default: the only one that can.
        seed: seed of the samples that are drawn.
        method: "mp", "omp" or "ols", see `pursuit.Coding`; default: "mp" for "paper", otherwise "ols"
            ("omp" for non-negative codes).
        signed: whether coefficients may be negative.
        loss_threshold: relative squared error over which "paper" admits an activation; default 0.2.
        l0: mean nonzeros per code, on texts that no atom comes from. Each code then has the nonzeros
            that its activation needs, at most k. A threshold decides this. It is calibrated on some of
            the rows, each coded without the atoms of its own text and of other texts in its fold. Texts
            are told apart by `labels`; without labels, neighbouring rows count as one text. Give k three
            or four times `l0`. Default: k nonzeros in every code.
        update: move the atoms by two rounds of least squares ("thorough": eight). They reconstruct far
            better, and are no longer activations themselves: each keeps its label with its cosine to
            that activation.
        least_cosine: the least that an update may leave of that cosine, 0 to 1; 1 moves no atom. Default
            0.9.
        rtol: a code ends once |residual| <= rtol |x|, where x is an activation less the mean. The
            default, 0.001, only keeps rounding errors from being coded; 0.3 would end codes at 9 % of
            the energy. Which atoms are chosen, and how they are updated, does not depend on it.
        batch_size: rows looked at together. Only the paper's rule depends on it.
        metadata: entries for `cfg.metadata`, such as model_name, hook_name, context_size and
            prepend_bos.
        progress: show a progress bar.

    Raises:
        ValueError: a setting is out of range; there are no activations, NaN or infinite ones, or fewer
            distinct ones than d_sae; the number of labels is wrong; or as `as_source`.
        TypeError: `activations` has no floating-point numbers or is of no form that is read, or a label
            is none.
    """
    recipe = recipe_of(
        d_sae=d_sae, k=k, preset=preset, rule=rule, seed=seed, method=method, signed=signed,
        loss_threshold=loss_threshold, l0=l0, update=update, least_cosine=least_cosine, rtol=rtol,
    )  # fmt: skip
    metadata = metadata or {}
    source = as_source(
        activations, labels, item=item, column=column, batch_size=batch_size,
        provenance=Provenance.of(metadata),
    )  # fmt: skip
    if len(source.hooks) != 1:
        raise ValueError(
            f"activations must be of one hook point, got a source with {list(source.hooks)}; build_from "
            "makes a dictionary for each"
        )
    (itda,) = build_from(source, recipe, metadata=metadata, progress=progress).values()
    return itda

"""How well dictionaries reconstruct activations, where there is no model to run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.analysis.meter import CodeMeter
from itda_lens.records import checked
from itda_lens.sae import check_codable, provenance_of
from itda_lens.sources import as_source


@dataclass(frozen=True)
class RowsEvaluation:
    """Figures of one dictionary or SAE on given activations.

    Attributes:
        hook_name: the hook point, or "activations" where there is none.
        d_sae: atoms.
        k: most nonzeros per code; None for an SAE that has no such limit.
        n_rows: activations that were measured.
        l0: mean nonzeros per code.
        fvu: sum |x - xhat|^2 / sum |x - mean x|^2.
        alive_fraction: share of atoms with a nonzero coefficient somewhere.
        feature_density: share of the activations in which each atom has a nonzero coefficient, [d_sae],
            on the CPU. `sae.save_sparsity` writes it.
    """

    hook_name: str
    d_sae: int
    k: int | None
    n_rows: int
    l0: float
    fvu: float
    alive_fraction: float
    feature_density: Float[Tensor, " d_sae"] = field(repr=False, compare=False)


@checked
def evaluate_rows(
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    activations: Any,
    *,
    column: str | None = None,
    batch_size: int = 4096,
    progress: bool = True,
) -> list[RowsEvaluation]:
    """Evaluate dictionaries and SAEs on activations alone: FVU, L0 and the share of atoms in use.

    `evaluate` measures the effect on a model too. Measure on rows that the dictionary was not built
    from.

    Args:
        dictionaries: ITDAs or other SAEs of SAELens, as in `evaluate`.
        activations: rows of any form that `fit` takes, or a source. In a source of several hook points,
            each dictionary is measured at its own.
        column: as in `fit`.
        batch_size: rows that are looked at together, where the activations are no source.
        progress: show a progress bar.

    Returns:
        The figures, one for each dictionary, in their order.

    Raises:
        ValueError: there are no dictionaries or no rows; a dictionary cannot be measured, or has another
            width than the rows, or no hook point of the source; or the rows are none, as in `fit`.
        TypeError: the activations are of no form that is read.
    """
    saes = [dictionaries] if isinstance(dictionaries, SAE) else list(dictionaries)
    if not saes:
        raise ValueError("dictionaries must be one or more, got none")
    check_codable(saes)
    source = as_source(activations, column=column, batch_size=batch_size)
    hooks = [_hook_of(sae, list(source.hooks)) for sae in saes]
    meters = [CodeMeter(sae) for sae in saes]
    with (
        torch.no_grad(),
        tqdm(
            total=source.n_rows, unit="row", unit_scale=True, desc="evaluating", disable=not progress
        ) as bar,
    ):
        for rows in source.rows():
            for sae, hook, meter in zip(saes, hooks, meters, strict=True):
                x = rows.values[hook]
                if x.shape[1] != sae.cfg.d_in:
                    raise ValueError(
                        f"activations must have the width of the dictionary, d_in={sae.cfg.d_in}, got "
                        f"{x.shape[1]}"
                    )
                meter.update(x)
            bar.update(len(rows.places))
    if not meters[0].n:
        raise ValueError("activations must have at least one row, got none")
    return [
        RowsEvaluation(hook_name=hook, n_rows=meter.n, **meter.figures())
        for hook, meter in zip(hooks, meters, strict=True)
    ]


def _hook_of(sae: SAE[Any], hooks: Sequence[str]) -> str:
    if len(hooks) == 1:
        return hooks[0]
    own = provenance_of(sae).hook_name
    if own is None or own not in hooks:
        raise ValueError(
            f"dictionaries must belong to one of the source's hook points {list(hooks)}, got {own!r}"
        )
    return own

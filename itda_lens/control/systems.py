"""Published ways to control a model, each as a short recipe of edits."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from sae_lens import SAE

from itda_lens.control.edit import Edit
from itda_lens.control.gates import Always, Excess, FiresAbove
from itda_lens.control.measuring import check_shares, opening_at
from itda_lens.control.operations import Add, Clamp, ProjectOut, Scale, Unit
from itda_lens.control.selection import Contrast, check_prompts, contrast
from itda_lens.records import checked
from itda_lens.sources import Loader, language_model

Tier = Literal["constant", "input", "token"]
"""Where Breaking Bad Tokens (arXiv 2505.14536) steers: at every token, at every token of inputs in which
an atom fires, or at the tokens at which one fires."""


@checked
def interpret_then_deactivate(
    model: Any,
    sae: SAE[Any],
    targets: Sequence[str],
    retained: Sequence[str],
    *,
    factor: float = 0.0,
    top: int = 16,
    count: int = 64,
    by: Contrast = "sets",
    gated: bool = True,
    coverage: float = 1.0,
    whole: bool = False,
    replace: bool = False,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Edit:
    """Erase a concept, as ItD (arXiv 2503.09446) does.

    Interpret: atoms among the `top` strongest of a target prompt and of no retained one (or another way
    of `contrast`). Deactivate: multiply their coefficients. A gate opens only on inputs that score like
    the targets; all others pass untouched. To add a concept later, make another edit for it and apply
    both.

    The paper's code multiplies by a negative factor, puts the reconstruction in the activation's place
    and compares the whole reconstruction error: `factor=-8, replace=True, whole=True`.

    Args:
        model, sae, targets, retained, tokenizer, loader, device: as in `contrast`.
        factor: multiplies coefficients; 0 removes the atoms.
        top: strongest atoms of each prompt.
        count: the most atoms to take.
        by: how atoms are chosen; the paper's way is "sets".
        gated: without a gate, the edit holds on all inputs.
        coverage: see `opening_at`; the paper's rule is 1.
        whole: see `Excess`.
        replace: see `Edit`.

    Raises:
        ValueError: the contrast is empty; or no atom fires on one of the targets, so that no gate opens
            there.
    """
    check_prompts(targets=targets, retained=retained)
    check_shares(coverage=coverage)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    found = contrast(lm, sae, targets, retained, by=by, top=top, count=count)
    gate = Excess(0.0, whole=whole) if gated else Always()
    edit = Edit(sae, [each.atom for each in found], Scale(factor), gate, replace=replace)
    return opening_at(lm, edit, targets, coverage=coverage) if gated else edit


@checked
def unlearn(
    model: Any,
    sae: SAE[Any],
    targets: Sequence[str],
    retained: Sequence[str],
    *,
    gamma: float = -0.5,
    by: Contrast = "difference",
    count: int = 8,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Edit:
    """Scale the atoms of a concept on all inputs, after SAUCE (arXiv 2503.14530).

    Its formula for choosing atoms could not be verified; the choices of `contrast` stand in.

    Args:
        model, sae, targets, retained, by, count, tokenizer, loader, device: as in `contrast`.
        gamma: multiplies coefficients; negative ones invert the concept.

    Raises:
        ValueError: the contrast is empty, or gamma is not finite.
    """
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma}")
    found = contrast(
        model, sae, targets, retained, by=by, count=count, tokenizer=tokenizer, loader=loader,
        device=device,
    )  # fmt: skip
    return Edit(sae, [each.atom for each in found], Scale(gamma))


@checked
def tiered(
    sae: SAE[Any],
    atoms: Sequence[int],
    amount: float,
    tier: Tier = "token",
    *,
    unit: Unit = "norm",
    typical: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> Edit:
    """Steer against atoms, after the three tiers of Breaking Bad Tokens (arXiv 2505.14536).

    How the paper normalises its strength could not be verified; `unit` says how this one is measured.

    Args:
        sae, atoms: as in `Edit`.
        amount: added to the coefficient of each atom; negative to steer away from them.
        tier: see `Tier`.
        unit, typical: see `Add`.
        threshold: coefficient above which an atom fires.

    Raises:
        ValueError: see `Edit`, `Add` and `FiresAbove`.
    """
    gate = Always() if tier == "constant" else FiresAbove(threshold, sign=1, scope=tier)
    return Edit(sae, atoms, Add(amount, unit, typical), gate)


@checked
def pole(sae: SAE[Any], atom: int, value: float, *, unit: Unit = "norm") -> Edit:
    """Clamp one atom to a positive or a negative coefficient, as AbsTopK (arXiv 2510.00404) steers.

    Args:
        sae, atom: the dictionary, and the atom whose two poles mean opposite things.
        value: the coefficient from now on at every token.
        unit: see `Clamp`.

    Raises:
        ValueError: see `Edit` and `Clamp`.
    """
    return Edit(sae, [atom], Clamp(value, unit))


@checked
def exemplar_ablation(sae: SAE[Any], atoms: Sequence[int], *, centred: bool = False) -> Edit:
    """Project the directions of some atoms out of every activation, as exemplar ablation does.

    Args:
        sae, atoms: as in `Edit`.
        centred: see `ProjectOut`.

    Raises:
        ValueError: see `Edit`.
    """
    return Edit(sae, atoms, ProjectOut(centred))

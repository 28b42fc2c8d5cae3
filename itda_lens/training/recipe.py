"""Everything that decides which atoms are chosen and how they encode."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from itda_lens.dictionary import RULES, Request, Rule
from itda_lens.pursuit import DEFAULT_RTOL, Coding, Method, check_l0
from itda_lens.records import at_least, check_fields, checked

Preset = Literal["best", "thorough", "paper"]
"""Names of rules (`dictionary.RULES`), each with the encoder that goes with it."""


@dataclass(frozen=True)
class Recipe:
    """How to get from activations to a dictionary, checked on construction.

    Attributes:
        d_sae: atoms; None leaves their number to the rule, if it can decide it ("paper").
        coding: how the dictionary will encode; `coding.threshold` is calibrated where `l0` is given.
        rule: how atoms are chosen.
        l0: mean nonzeros per code, met by a threshold; None gives every code `coding.k`.
        seed: seed of the samples that the rule and the calibration draw.
        preset: the name of the rule, for the record; None for a rule of one's own.

    Raises:
        ValueError: a setting is out of range, or does not go with another.
        TypeError: a field is of another type.
    """

    d_sae: int | None
    coding: Coding
    rule: Rule
    l0: float | None = None
    seed: int = 0
    preset: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(1, d_sae=self.d_sae)
        at_least(0, seed=self.seed)
        if self.d_sae is not None:
            self.coding.check_atoms(self.d_sae, "d_sae")
        if self.l0 is not None:
            check_l0(self.l0, self.coding.k)
        _plain(self.rule)

    @property
    def chosen_for(self) -> int:
        """Nonzeros of the codes that atoms are chosen for."""
        return self.coding.k if self.l0 is None else max(1, round(self.l0))

    def request(self, **stream: Any) -> Request:
        """The request to a rule; `stream` holds d_in, dtype and device."""
        return Request(
            d_sae=self.d_sae, k=self.chosen_for, signed=self.coding.signed, seed=self.seed, **stream
        )

    def record(self) -> dict[str, Any]:
        """The settings as plain data, for a dictionary's metadata."""
        coding = asdict(self.coding)
        del coding["threshold"]  # found, not asked for
        rule = {"name": type(self.rule).__name__} | _plain(self.rule)
        record = {"preset": self.preset, "d_sae": self.d_sae, **coding, "l0": self.l0, "seed": self.seed}
        return {**{name: value for name, value in record.items() if value is not None}, "rule": rule}


def _plain(rule: Rule) -> dict[str, Any]:
    """The fields of a rule as JSON gives them back.

    Raises:
        ValueError: the rule has no fields, or JSON cannot hold one of them.
    """
    try:
        return json.loads(json.dumps(asdict(rule)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rule must be a dataclass whose fields are plain data for JSON, got {rule!r}: {error}"
        ) from error


@checked
def recipe_of(
    *,
    d_sae: int | None,
    k: int,
    preset: Preset = "best",
    rule: str | Rule | None = None,
    seed: int = 0,
    method: Method | None = None,
    signed: bool = True,
    loss_threshold: float | None = None,
    l0: float | None = None,
    update: bool = False,
    least_cosine: float | None = None,
    rtol: float = DEFAULT_RTOL,
) -> Recipe:
    """The recipe of loose settings, which `fit` and `build` take and describe.

    Raises:
        ValueError: a setting is out of range, or the rule has no such setting.
    """
    if rule is None:
        rule = preset
        if preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {get_args(Preset)}, got {preset!r}")
    elif preset != "best":
        raise ValueError(f"rule takes the place of preset: give one of them, got preset={preset!r} too")
    name = rule if isinstance(rule, str) else None
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {tuple(RULES)} or a rule, got {rule!r}")
        rule = RULES[rule]
    elif not callable(getattr(rule, "selector", None)):
        raise ValueError(f"rule must be one of {tuple(RULES)} or have a method selector, got {rule!r}")
    if least_cosine is not None and not update:
        raise ValueError("least_cosine is a setting of update=True only")
    given: Mapping[str, Any] = {
        name: value
        for name, value in (
            ("loss_threshold", None if loss_threshold is None else float(loss_threshold)),
            ("update", update or None),
            ("least_cosine", None if least_cosine is None else float(least_cosine)),
        )
        if value is not None
    }  # fmt: skip
    for setting in given:
        if setting not in type(rule).__dataclass_fields__:
            raise ValueError(
                f"{setting} is no setting of {f'preset={name!r}' if name else type(rule).__name__}"
            )
    rule = replace(rule, **given) if given else rule  # pyright: ignore[reportArgumentType]
    if d_sae is None and not getattr(rule, "chooses_size", False):
        raise ValueError(f"d_sae must be given for {f'preset={name!r}' if name else 'this rule'}")
    if method is None:
        method = encoder_for(rule, signed)
    return Recipe(d_sae, Coding(k, method, signed, rtol), rule, l0=l0, seed=seed, preset=name)


def encoder_for(rule: Rule, signed: bool) -> Method:
    """The encoder that goes with a rule: the one that it names, else the best for such codes."""
    return getattr(rule, "encoder", None) or ("ols" if signed else "omp")

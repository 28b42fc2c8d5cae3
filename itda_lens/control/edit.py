"""An edit: which atoms, at which tokens, and how their coefficients change."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from itda_lens.control.gates import Always
from itda_lens.control.operations import Scale
from itda_lens.control.seen import Gate, Operation
from itda_lens.pursuit import Coding
from itda_lens.records import check_fields, checked
from itda_lens.sae import ITDA, assemble, check_codable, hook_name_of, provenance_of


@dataclass(frozen=True)
class Edit:
    """A change of a model's activations, described by the atoms of a dictionary.

    The difference between the new code and the old one, times `W_dec`, is added to the activation. So
    the part that the dictionary does not explain stays exactly as it is.

    Attributes:
        sae: an ITDA or another SAE of SAELens (see `sae.ARCHITECTURES`).
        atoms: numbers of atoms, each once. Of a mirrored ITDA (`ITDA.nonnegative`) the negatives count
            as atoms of their own.
        operation: how coefficients change; default: the atoms are removed.
        gate: where the edit holds, or several gates which must all be open.
        replace: put the edited reconstruction in the place of the activation wherever the gate is open.
            The part that the dictionary does not explain is then lost.
        special: whether position 0 and special tokens are edited too; default: as the dictionary was
            built. Activations there are unlike all others in many models.
        hook_name: where to edit; default: the hook point that the dictionary's metadata name.

    Raises:
        ValueError: there are no atoms, one is out of range or comes twice; the dictionary cannot be used
            outside of training, or names no hook point; there is no gate.
    """

    sae: SAE[Any]
    atoms: Sequence[int]
    operation: Operation = field(default_factory=Scale)
    gate: Gate | Sequence[Gate] = field(default_factory=Always)
    replace: bool = False
    special: bool | None = None
    hook_name: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_codable([self.sae])
        atoms = tuple(int(atom) for atom in self.atoms)
        if not atoms:
            raise ValueError("atoms must name at least one atom, got none")
        bad = [atom for atom in atoms if not 0 <= atom < self.sae.cfg.d_sae]
        if bad:
            raise ValueError(f"atoms must be between 0 and {self.sae.cfg.d_sae - 1}, got {bad[0]}")
        if len(set(atoms)) < len(atoms):
            twice = next(atom for atom in atoms if atoms.count(atom) > 1)
            raise ValueError(f"atoms must name each atom once, got {twice} twice")
        object.__setattr__(self, "atoms", atoms)
        if not self.gates:
            raise ValueError("gate must hold at least one gate; `Always()` is one that is always open")
        if self.hook_name is None:
            object.__setattr__(self, "hook_name", hook_name_of(self.sae))
        if self.special is None:
            kept = bool(provenance_of(self.sae).keep_special_tokens)
            object.__setattr__(self, "special", kept)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates, which must all be open."""
        return tuple(self.gate) if isinstance(self.gate, Sequence) else (self.gate,)

    @property
    def hook(self) -> str:
        """The hook point."""
        assert self.hook_name is not None
        return self.hook_name


@checked
def direction(
    vector: Float[Tensor, " d_in"], hook_name: str, mean: Float[Tensor, " d_in"] | None = None
) -> ITDA:
    """A dictionary whose only atom is the direction of a vector, to edit along it.

    Its coefficient is the component of `x - mean` along the direction. So every operation and gate works
    for directions from elsewhere, such as a difference of means or a probe.

    Args:
        vector: of any length but 0.
        hook_name: where it belongs.
        mean: `b_dec`; default: 0.

    Raises:
        ValueError: the vector is zero or not finite.
    """
    norm = vector.norm()
    if not 0 < norm < float("inf"):
        raise ValueError(f"vector must be finite and not zero, got one of norm {norm.item()}")
    atoms = (vector / norm)[None].detach()
    return assemble(
        atoms,
        torch.zeros_like(vector) if mean is None else mean,
        coding=Coding(1, "mp", rtol=0.0),
        metadata={"hook_name": hook_name},
    )

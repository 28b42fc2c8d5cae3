"""Provenance and hook points, read from the metadata of SAEs."""

from typing import Any

from sae_lens import SAE

from itda_lens.records import Provenance


def provenance_of(sae: SAE[Any]) -> Provenance:
    """Where the activations of a dictionary, or of any SAE of SAELens, came from."""
    return Provenance.of(sae.cfg.metadata)


def hook_name_of(sae: SAE[Any]) -> str:
    """The hook point that a dictionary belongs to.

    Raises:
        ValueError: its metadata names none.
    """
    return provenance_of(sae).needed("hook_name", "; it was fit on bare activations")

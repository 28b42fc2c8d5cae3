"""Telling SAELens that the architecture "itda" exists."""

from sae_lens import register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY

from itda_lens.sae.itda import ITDA, ITDAConfig


def register() -> None:
    """Register ITDA with SAELens, once; a further call does nothing.

    Raises:
        ValueError: another class holds the name "itda".
    """
    name = ITDAConfig.architecture()
    held = SAE_CLASS_REGISTRY.get(name)
    if held is None:
        register_sae_class(name, ITDA, ITDAConfig)
    elif held != (ITDA, ITDAConfig):
        raise ValueError(f"SAELens already knows another architecture {name!r}: {held[0]}")

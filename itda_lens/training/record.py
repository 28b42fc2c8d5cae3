"""What a dictionary's metadata tells about how it was made."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sae_lens import SAE

BUILD_KEY = "itda_build"
"""Where `cfg.metadata` keeps the settings of the build."""

_PACKAGES = ("itda-lens", "torch", "transformers", "transformer-lens", "sae-lens")


def versions() -> dict[str, dict[str, str]]:
    """Installed versions of what a build depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return {"versions": found}


def build_record(sae: SAE[Any]) -> dict[str, Any]:
    """The settings of a dictionary's build, by name; empty where it records none."""
    return dict(sae.cfg.metadata[BUILD_KEY] or {})


def hook_name_of(sae: SAE[Any]) -> str:
    """The hook point that a dictionary belongs to.

    Raises:
        ValueError: its metadata names none.
    """
    name = sae.cfg.metadata.hook_name
    if not name:
        raise ValueError("the dictionary's metadata names no hook_name; it was fit on bare activations")
    return name

"""What a dictionary's metadata tells about how it was made."""

from importlib.metadata import PackageNotFoundError, version

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

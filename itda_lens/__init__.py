"""Labelled sparse dictionaries of real model activations, each one a SAELens SAE.

Importing this package registers the architecture "itda" with SAELens, whichever of the two is imported
first. Everything else is imported when it is first used, so that importing the package takes no time.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from itda_lens._registration import register_with_saelens

if TYPE_CHECKING:
    from itda_lens.compare import jaccard
    from itda_lens.pursuit import SparseCodes
    from itda_lens.records import Label, Labels, TokenFilter
    from itda_lens.sae import ITDA, ITDAConfig, load, union
    from itda_lens.sources import Chats
    from itda_lens.training import build, fit, open_plan, plan

    __version__: str

__all__ = [
    "ITDA",
    "Chats",
    "ITDAConfig",
    "Label",
    "Labels",
    "SparseCodes",
    "TokenFilter",
    "build",
    "fit",
    "jaccard",
    "load",
    "open_plan",
    "plan",
    "union",
]

_HOMES = {
    "Chats": "sources",
    "ITDA": "sae",
    "ITDAConfig": "sae",
    "Label": "records",
    "Labels": "records",
    "SparseCodes": "pursuit",
    "TokenFilter": "records",
    "build": "training",
    "fit": "training",
    "jaccard": "compare",
    "load": "sae",
    "open_plan": "training",
    "plan": "training",
    "union": "sae",
}


def __getattr__(name: str) -> Any:
    """A public name, a room or the version, when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("itda-lens")
        except PackageNotFoundError:  # run from a source tree
            value = "unknown"
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and name in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


register_with_saelens()

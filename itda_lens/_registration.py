"""Registering the architecture "itda" with SAELens without importing SAELens."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST = "sae_lens"
FACE = "itda_lens.sae"
"""The part of the package that registers ITDA when it is imported."""


class AfterSAELens(MetaPathFinder):
    """Has `itda_lens.sae` imported right after `sae_lens`, whoever imports that.

    SAELens takes seconds to import, and the command line's `--help` needs none of it. This finder
    finds nothing itself: it asks the others for `sae_lens` and adds a last step to the import.
    """

    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOST or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        loader = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                # Where `itda_lens.sae` itself is what imports SAELens, this returns it as far as it is;
                # its own last line then registers.
                importlib.import_module(FACE)

            setattr(loader, "exec_module", execute_and_register)  # noqa: B010 (of this one loader)
        return spec


_finder = AfterSAELens()


def register_with_saelens() -> None:
    """Register ITDA now if SAELens is imported already, else once it is; repeating does nothing."""
    if HOST in sys.modules:
        importlib.import_module(FACE)
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)

"""Any torch module, of whatever kind: its activations read, and replaced, by the paths of its parts."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from itda_lens.records import checked
from itda_lens.sources.hooks import (
    Site,
    check_own_place,
    edits_at,
    expanded,
    first_activations,
    near,
)
from itda_lens.sources.readable import Replace

Call = Callable[[nn.Module, Any], Any]
"""How a module runs on a batch: `call(module, batch)`. Whatever it returns is not looked at."""


class AnyModule:
    """A torch module whose activations can be read and replaced, by the paths of its submodules.

    A path is a name in `module.named_modules()`, such as "encoder.layers.3". It stands for the output of
    that submodule; of several outputs, the first. For language models there is `language_model`, which
    knows tokens too.

    Args:
        module: the module. Its mode, gradients and hooks are after each call as they were before it.
        call: how to run it on a batch, such as `lambda model, batch: model.encode(batch["image"])`.
            Default: a dict goes in as keyword arguments, a tuple or list as arguments one by one,
            anything else as the one argument.

    Raises:
        TypeError: `module` is no torch module, or `call` no function.
    """

    @checked
    def __init__(self, module: nn.Module, call: Callable[..., Any] | None = None) -> None:
        self.module = module
        self._call = call

    @property
    def device(self) -> torch.device:
        """Where the module's first weight is; batches are moved there."""
        weights = (*self.module.parameters(), *self.module.buffers())
        return next((w.device for w in weights if not w.is_meta), torch.device("cpu"))

    @checked
    def paths(self, paths: str | Sequence[str]) -> list[str]:
        """The paths that are meant: "*" in a path stands for the number of each layer that there is.

        Raises:
            ValueError: a path leads nowhere, or is given twice; near matches are named.
        """
        wanted = [paths] if isinstance(paths, str) else paths
        found = [path for one in wanted for path in expanded(one, self._site)]
        if not found or len(set(found)) != len(found):
            raise ValueError(f"paths must be one or more different paths, got {list(wanted)}")
        return found

    @checked
    def capture(self, batch: Any, paths: str | Sequence[str]) -> dict[str, Tensor]:
        """Copies of the activations at some paths, in the shapes that the module gives, from one pass.

        The module runs in evaluation mode, without gradients, and stops once all paths have fired. A
        submodule that runs more than once in a pass gives its first activation.

        Raises:
            ValueError: a path leads nowhere, or its submodule did not run; near matches are named.
            TypeError: the module does not take such a batch.
        """
        sites = {path: self._site(path) for path in self.paths(paths)}
        return first_activations(sites, [self.module], lambda: self._run(batch))

    @contextmanager
    def edited(self, edits: Mapping[str, Replace]) -> Iterator[None]:
        """Inside this context, activations pass through the functions in `edits`, by path.

        It holds for everything that runs the module, gradients included. A function gets the activation
        as the submodule gives it. It is called every time that the submodule runs.

        Raises:
            ValueError: a path leads nowhere (on entry); an edit returns another shape; the module ran
                to its end, but a submodule never ran (on leaving).
        """
        sites = {path: self._site(path) for path in edits}
        with edits_at(sites, edits, [self.module]):
            yield

    def _site(self, path: str) -> Site:
        with suppress(AttributeError):
            if path:
                module = self.module.get_submodule(path)
                check_own_place(self.module, path)
                return Site(module, "output")
        known = [name for name, _ in self.module.named_modules() if name]
        raise ValueError(
            f"paths must name parts of {type(self.module).__name__}, which has none called {path!r}; "
            + (f"near it are {', '.join(near(path, known))}" if known else "it has no parts at all")
        )

    def _run(self, batch: Any) -> Any:
        batch = moved(batch, self.device)
        if self._call is not None:
            return self._call(self.module, batch)
        args, kwargs = arguments(batch)
        try:
            with suppress(ValueError):  # a compiled function does not tell its arguments
                inspect.signature(self.module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{type(self.module).__name__} does not take such a batch ({_described(batch)}): "
                f"{error}; pass call=, a function from the module and a batch that runs it"
            ) from None
        return self.module(*args, **kwargs)


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    return (batch if isinstance(batch, tuple | list) else (batch,)), {}


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with the tensors in it on a device; anything that knows `to` moves itself."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [moved(item, device) for item in batch]
        if isinstance(batch, list):
            return items
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    return batch


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with {', '.join(map(repr, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"

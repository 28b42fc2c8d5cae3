"""Reading and replacing what a module takes or gives, by PyTorch's own forward hooks."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from itda_lens.sources.readable import Replace


class Layout(Protocol):
    """How a library lays activations out in memory, and how it shows them."""

    def convert(self, activation: Tensor) -> Tensor:
        """The activation as the library shows it: [batch, seq, ...]."""
        ...

    def revert(self, activation: Tensor) -> Tensor:
        """The activation as the model goes on with it."""
        ...


class Site(NamedTuple):
    """Where a hook point is: what a module takes ("input") or gives ("output").

    Attributes:
        layout: None if the library shows activations as the module has them.
    """

    module: nn.Module
    side: Literal["input", "output"]
    layout: Layout | None = None


@contextmanager
def attached(functions: Iterable[tuple[Site, Replace]]) -> Iterator[None]:
    """Put the first tensor that passes at each site through a function.

    All hooks are removed at the end, also after an error.
    """
    with ExitStack() as stack:
        for (module, side, layout), function in functions:
            if layout is not None:
                function = _laid_out(function, layout)
            if side == "input":
                handle = module.register_forward_pre_hook(_on_input(function), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_on_output(function))
            stack.callback(handle.remove)
        yield


@contextmanager
def finished_passes(ends: Iterable[nn.Module]) -> Iterator[list[None]]:
    """A list that gets longer whenever one of `ends` has run without an error."""
    finished: list[None] = []
    with ExitStack() as stack:
        for module in ends:
            handle = module.register_forward_hook(lambda *_: finished.append(None))
            stack.callback(handle.remove)
        yield finished


@contextmanager
def evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """All modules in evaluation mode; afterwards, each in the mode that it had.

    The modes are set one by one, since `train()` would give all modules the same one, and does more than
    that in some classes.
    """
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def unknown_hook(name: str, known: Iterable[str]) -> ValueError:
    """The error for a hook that does not exist, with names that are near it."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if not near:  # a name of another library's scheme: offer names that share its last word
        last = re.split(r"[._]", name)[-1]
        near = [other for other in known if last in other][:4] or known[:4]
    return ValueError(f"the model has no hook {name!r}; near it are {', '.join(near)}")


def silent_hook(names: Sequence[str], fired: Iterable[str]) -> ValueError | None:
    """The error for the first hook that did not fire; None if all did."""
    silent = [name for name in names if name not in fired]
    if not silent:
        return None
    return ValueError(
        f"hook {silent[0]!r} exists but never fired during a forward pass; nothing can be read or "
        "replaced there"
    )


def _laid_out(function: Replace, layout: Layout) -> Replace:
    def run(activation: Tensor) -> Tensor:
        shown = layout.convert(activation)
        changed = function(shown)
        # To a TransformerBridge, another object is an edit, even if it holds the same numbers.
        return activation if changed is shown else layout.revert(changed)

    return run


def _on_output(function: Replace) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _first_replaced(output, function)

    return hook


def _on_input(function: Replace) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return _first_replaced(args, function), kwargs
        return args, _first_replaced(kwargs, function, "hidden_states")

    return hook


def _first_replaced(value: Any, function: Replace, key: str | None = None) -> Any:
    """`value` with its first tensor put through `function`.

    A module may give a tensor, a tuple, a list or a dictionary (Hugging Face's outputs are). Anything
    else, or another first item, is no activation: it stays, and the hook counts as not fired.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        key = next(iter(value), None) if key is None else key
        if not isinstance(value.get(key), Tensor):
            return value
        copied: Any = value.copy() if type(value) is dict else type(value)(**value)
        copied[key] = function(value[key])
        return copied
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        items = [function(value[0]), *value[1:]]
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return items
    return value

"""Reading and replacing what a module takes or gives, by PyTorch's own forward hooks."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from itda_lens.sources.readable import Replace

MOST_BETWEEN = 16
"""Layers without a hook that may stand between two that have it, as in models that mix attention with
other layers; after more of them, "*" looks no further."""


_ONLY_A_LAYER = re.compile(
    r"(?:layers?|blocks?|(?:hook_)?resid(?:_post)?|[hl])?[ ._-]*([0-9]+)"
    r"[ ._-]*(?:(?:hook_)?resid(?:_post)?)?",
    re.IGNORECASE,
)
"""Names that somebody may give to the output of a layer."""


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


class _StopForwardError(Exception):
    """Every hook that was asked for has fired; the rest of the forward pass is not needed."""


@torch.no_grad()
def first_activations(
    sites: Mapping[str, Site], ends: Sequence[nn.Module], run: Callable[[], Any]
) -> dict[str, Tensor]:
    """Copies of the first activation at each site, from one forward pass in evaluation mode.

    The pass is left as soon as all sites have fired.

    Args:
        sites: where to read, by name.
        ends: modules whose parts go into evaluation mode; see `evaluation_mode`.
        run: starts the pass.

    Raises:
        ValueError: a site did not fire.
    """
    captured: dict[str, Tensor] = {}

    def reader(hook: str) -> Replace:
        def keep(activation: Tensor) -> Tensor:
            if hook not in captured:
                # A copy: what runs later may write into the model's own tensor.
                captured[hook] = activation.detach().clone()
                if len(captured) == len(sites):
                    raise _StopForwardError
            return activation

        return keep

    if sites:
        functions = [(site, reader(hook)) for hook, site in sites.items()]
        with attached(functions), evaluation_mode(ends), suppress(_StopForwardError):
            run()
    error = silent_hook(list(sites), captured)
    if error is not None:
        raise error
    return captured


@contextmanager
def edits_at(
    sites: Mapping[str, Site],
    edits: Mapping[str, Replace],
    ends: Iterable[nn.Module],
    paused: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Inside this context, activations pass through the functions in `edits`, by the names of `sites`.

    Args:
        sites: where to edit; there is one for each of `edits`.
        edits: functions from activations to activations of the same shape.
        ends: modules that have run when a forward pass is over.
        paused: asked at each activation whether it should pass as it is.

    Raises:
        ValueError: an edit returns another shape; or a pass ran to its end, but a site never fired.
    """
    fired: set[str] = set()

    def checked(hook: str, edit: Replace) -> Replace:
        def run(activation: Tensor) -> Tensor:
            if paused():
                return activation
            fired.add(hook)
            changed = edit(activation)
            if not isinstance(changed, Tensor) or changed.shape != activation.shape:
                found = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                raise ValueError(
                    f"the edit at {hook!r} must return a tensor of shape {tuple(activation.shape)}, got "
                    f"{found}"
                )
            return changed

        return run

    functions = [(sites[hook], checked(hook, edit)) for hook, edit in edits.items()]
    with attached(functions), finished_passes(ends) as finished:
        yield
    error = silent_hook(list(edits), fired)
    if finished and error is not None:
        raise error


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


def check_own_place(model: nn.Module, path: str) -> None:
    """Refuse a layer that stands at an earlier place of its list too.

    Such a module runs at both places. Its first activation is that of the earlier one.

    Raises:
        ValueError: a part of the path names such a layer.
    """
    parent = model
    parts = path.split(".")
    for n, name in enumerate(parts):
        child = getattr(parent, name)
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            first = next(i for i, module in enumerate(parent) if module is child)
            if name.isdecimal() and first < int(name):
                here, there = ".".join(parts[: n + 1]), ".".join([*parts[:n], str(first)])
                raise ValueError(
                    f"{path!r} cannot be told from an earlier place: {here!r} and {there!r} are one "
                    "module, of which the first activation is read"
                )
        parent = child


def unknown_hook(name: str, known: Iterable[str]) -> ValueError:
    """The error for a hook that does not exist, with names that are near it."""
    return ValueError(f"the model has no hook {name!r}; near it are {', '.join(near(name, known))}")


def near(name: str, known: Iterable[str]) -> list[str]:
    """The names, four at most, that somebody who wrote `name` may have meant.

    Whoever names nothing but a layer, such as "layer 5", most likely means its output.
    """
    known = list(known)
    alike = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if layer := _ONLY_A_LAYER.fullmatch(name):
        output = f"blocks.{int(layer[1])}.hook_resid_post"
        if output in known:
            return [output, *(other for other in alike if other != output)][:4]
    if not alike:  # a name of another library's scheme: offer names that share its last word
        last = re.split(r"[._]", name)[-1]
        alike = [other for other in known if last in other][:4] or known[:4]
    return alike


def expanded(name: str, check: Callable[[str], object]) -> list[str]:
    """The names that one with a "*" stands for, which takes the place of a layer's number.

    Args:
        name: a name; one without "*" stands for itself, and is checked too.
        check: raises ValueError for a name that does not exist.

    Raises:
        ValueError: there is none; as `check` for layer 0.
    """
    if "*" not in name:
        check(name)
        return [name]
    found: list[str] = []
    error: ValueError | None = None
    missing = 0
    for number in itertools.count():
        try:
            check(one := name.replace("*", str(number)))
        except ValueError as unknown:
            error, missing = error or unknown, missing + 1
            if missing > MOST_BETWEEN:
                break
        else:
            found, missing = [*found, one], 0
    if not found and error is not None:
        raise error
    return found


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

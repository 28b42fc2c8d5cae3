"""Arguments of public functions, checked and converted in one place, where they come in.

This is written by hand because beartype looks at one random item of a list and not at all of them, takes
True for a whole number, and words its messages in a way of its own.
"""

import dataclasses
import functools
import inspect
import reprlib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN = 80
"""Characters of a value that a message shows."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose arguments are checked against its annotations before its work begins.

    numpy's numbers and booleans become Python's. Numbers are no booleans and booleans no numbers.
    Annotations say nothing of ranges, or of arguments that exclude each other: the function checks these
    by itself, with `at_least` for the commonest case. Items of iterators are not looked at.

    The wrapped function raises TypeError, naming the argument, its value and what is allowed; and
    ValueError for a name that is none of those allowed, or a tensor of another number of dimensions.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        hints = _hints(function)
        for name, value in bound.arguments.items():
            if name in hints and signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                items = (converted(f"{name}[{i}]", one, hints[name]) for i, one in enumerate(value))
                bound.arguments[name] = tuple(items)
            elif name in hints:
                bound.arguments[name] = converted(name, value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return wrapper


def check_fields(instance: Any) -> None:
    """Check and convert the fields of a frozen dataclass by their annotations; for `__post_init__`.

    Raises:
        TypeError, ValueError: as functions that are `checked`.
    """
    hints = _hints(type(instance))
    for field in dataclasses.fields(instance):
        value = converted(field.name, getattr(instance, field.name), hints[field.name])
        object.__setattr__(instance, field.name, value)


def converted(name: str, value: Any, hint: Any) -> Any:
    """An argument as the function takes it.

    Raises:
        TypeError, ValueError: it is none that the annotation allows; see `checked`.
    """
    if not fits(value, hint):
        raise _refusal(name, value, hint)
    if isinstance(value, np.generic) and not isinstance(value, str | bytes):
        return value.item()
    if isinstance(value, Real) and not isinstance(value, bool | int | float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def at_least(least: int, **arguments: float | None) -> None:
    """Refuse numbers below `least`; None is allowed.

    Raises:
        ValueError: one is smaller, or NaN.
    """
    for name, value in arguments.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation allows. Whatever cannot be told at run time is allowed."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint in (int, float):
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if _is_tensor(hint):
        shape = _shape(hint)
        return _is_of_kind(value, hint) and (shape is None or value.ndim == len(shape))
    if origin is tuple:
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str | bytes)
            and (inside[-1] is Ellipsis or len(value) == len(inside))
            and all(map(fits, value, inside if inside[-1] is not Ellipsis else inside[:1] * len(value)))
        )
    if origin in (Sequence, Collection):
        if not isinstance(value, origin) or isinstance(value, str | bytes | Mapping):
            return False
        if not isinstance(value, list | tuple):  # others make their items when asked: a million labels
            return True
        plain = [one for one in _alternatives(inside[0]) if isinstance(one, type)]
        return all(type(item) in plain or fits(item, inside[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            fits(key, inside[0]) and fits(item, inside[1]) for key, item in value.items()
        )
    if origin is Callable:
        return callable(value)
    kind = origin or hint
    if not isinstance(kind, type):
        return True  # a type variable
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return True  # the function itself looks at it
    return isinstance(value, kind)


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


def _is_tensor(hint: Any) -> bool:
    """Whether it is one of jaxtyping's annotations, such as Float[Tensor, "n d"]."""
    return hasattr(hint, "dim_str") and hasattr(hint, "array_type")


def _is_of_kind(value: Any, hint: Any) -> bool:
    """Whether it is a tensor of the right kind of numbers, whatever its shape."""
    return (
        isinstance(value, hint.array_type)
        and str(value.dtype).removeprefix("torch.") in hint.dtypes
        and getattr(value, "layout", None) in (None, _strided())
    )


@functools.cache
def _strided() -> Any:
    import torch  # not for commands that need none

    return torch.strided


def _shape(hint: Any) -> list[str] | None:
    """The names of a tensor's dimensions; None if their number is not fixed."""
    names = hint.dim_str.split()
    return None if any("*" in name or "..." in name for name in names) else names


def _refusal(name: str, value: Any, hint: Any) -> Exception:
    one_of = [one for one in _alternatives(hint) if one is not type(None)]
    if len(one_of) == 1 and _is_tensor(one_of[0]):
        tensor = one_of[0]
        if _is_of_kind(value, tensor):
            shape = ", ".join(_shape(tensor) or ())
            return ValueError(f"{name} must have shape [{shape}], got {tuple(value.shape)}")
        return TypeError(f"{name} must be {_described(tensor)}, got {_kind(value)}")
    items = [get_args(one)[0] for one in one_of if get_origin(one) in (Sequence, Collection)]
    if len(items) == 1 and isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if not fits(item, items[0]):
                return _refusal(f"{name}[{i}]", item, items[0])
    allowed = " or ".join(dict.fromkeys(map(_described, _alternatives(hint))))
    if any(get_origin(one) is Literal for one in one_of):
        return ValueError(f"{name} must be {allowed}, got {_shown(value)}")
    return TypeError(f"{name} must be {allowed}, got {_shown(value)}")


def _alternatives(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]


_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    type(None): "None",
}


def _described(hint: Any) -> str:
    """An annotation in words."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return f"one of {inside}" if len(inside) > 1 else repr(*inside)
    if _is_tensor(hint):
        kinds = "floating-point " if "float32" in hint.dtypes else ""
        return f"a {kinds}tensor"
    if origin is tuple:
        return f"({', '.join(map(_described, inside))})"
    if origin in (Sequence, Collection, Iterable):
        each = " or ".join(map(_described, _alternatives(inside[0])))
        return f"a list of which each is {each}"
    if origin is Mapping:
        return f"a mapping from {_described(inside[0])} to {_described(inside[1])}"
    return getattr(origin or hint, "__name__", str(hint))


def _kind(value: Any) -> str:
    """A short description of a value that should have been a tensor."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    layout = getattr(value, "layout", None)
    return kind if layout in (None, _strided()) else f"{kind} of layout {layout}"


def _shown(value: Any) -> str:
    """A value, shortened."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and getattr(value, "ndim", 0):
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = _SHOWN
    return short.repr(value)

"""Derivatives and torch.func's transforms around code that is not made of torch's operations.

A search for atoms reads numbers: it compares them, and hands their memory to compiled loops. Inside
`torch.func.grad`, `jvp` or `vmap` a tensor is a wrapper without memory, and so is each result that is
computed there. `rowwise` and `beneath` call such code with plain tensors, outside of all transforms. A
search has no derivative of its own; `with_derivative` gives its result that of a formula.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] (no public function tells)
from torch.autograd import forward_ad

T = TypeVar("T")

Rowwise = Callable[..., tuple[Tensor, ...]]
"""(tensors of b rows each..., a tensor that they share) -> tensors of b rows each."""


def rowwise(function: Rowwise, *rows: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    """`function(*rows, shared)` on plain tensors, whatever transforms are at work; without derivatives.

    Under `torch.func.vmap` it is called once, with the rows of all calls.

    Raises:
        ValueError: `vmap` maps over `shared`.
    """
    tensors = [tensor.detach() for tensor in (*rows, shared)]
    if not any(map(_is_wrapped, tensors)):
        with torch.no_grad():
            return function(*tensors)
    found: Any = _Rowwise.apply(function, *tensors)
    return found


def beneath(function: Callable[[Tensor], T], tensor: Tensor) -> T:
    """`function(tensor)` on the plain tensor that transforms have wrapped, as if there were none.

    The result may outlive the transforms.

    Raises:
        ValueError: `vmap` maps over the tensor.
    """
    results: list[T] = []

    def keep(plain: Tensor) -> tuple[Tensor, ...]:
        results.append(function(plain))
        return (plain.new_empty(0),)

    rowwise(keep, shared=tensor)
    return results[0]


def differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative by one of these may be asked for, backward or forward."""
    return any(
        _is_wrapped(tensor)
        or (torch.is_grad_enabled() and tensor.requires_grad)
        or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def with_derivative(value: Tensor, formula: Tensor) -> Tensor:
    """`value`, with all derivatives of `formula`, of which it is the result up to rounding."""
    return value + (formula - formula.detach())  # the difference is zero


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(function: Rowwise, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: there is no backward pass."""

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[int | None, ...], function: Rowwise, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        *rows, shared = tensors
        _, *dims, shared_dim = in_dims
        if shared_dim is not None:
            raise ValueError("vmap must not map over the atoms: one dictionary codes all activations")
        size = info.batch_size
        batches = [
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(rows, dims, strict=True)
        ]
        outputs = rowwise(function, *(batch.flatten(0, 1) for batch in batches), shared=shared)
        return tuple(output.unflatten(0, (size, -1)) for output in outputs), 0


def _is_wrapped(tensor: Tensor) -> bool:
    return _functorch.is_functorch_wrapped_tensor(tensor)

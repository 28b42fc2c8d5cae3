"""The activations of any torch module on batches of inputs."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from itda_lens.records import Label, Places, Provenance, Tag, at_least, checked
from itda_lens.sources.modules import AnyModule
from itda_lens.sources.row_labels import check_item
from itda_lens.sources.source import Rows

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class ModuleSource:
    """The activations at some parts of a torch module, one row for each number of leading dimensions.

    An activation [images, patches, width] gives images x patches rows, one [users, width] gives one row
    a user. All paths must have the same leading dimensions, since their rows share labels.

    Args:
        module: any torch module.
        paths: one submodule or several, by their names in `module.named_modules()`. "*" stands for the
            number of each layer: "encoder.layers.*".
        inputs: batches, in the same order each time: a DataLoader without shuffling, a list, or an
            iterator, which can be read once. A batch is a tensor, tuple or dict, or anything that `call`
            takes; it is moved to the module's device.
        label: names rows: `label(number, batch, *index)` gets the number of the batch, the batch as
            `inputs` gave it, and the row's index in the leading dimensions, such as (image, patch). It
            returns a string or a whole number, which becomes the row's `Label.name`, a `Label` of its
            own, or None for a row that does not count, such as padding. Default: all rows count.
        call: how the module runs on a batch; see `AnyModule`.
        item: what the first dimension counts, such as "image". Labels then read "image 391, position 5".
        axis: the dimension that holds the numbers of an activation; 1 for convolutions, [images,
            channels, height, width].
        max_rows: end after this number of rows that count; default: after all inputs.
        name: the module's name in metadata; default: the name of its class.

    Raises:
        ValueError: a setting is out of range; a path leads nowhere (near matches are named); inputs are
            shuffled or are one batch.
        TypeError: an argument is of the wrong kind.
    """

    @checked
    def __init__(
        self,
        module: nn.Module,
        paths: str | Sequence[str],
        inputs: Iterable[Any],
        label: Callable[..., Any] | None = None,
        *,
        call: Callable[..., Any] | None = None,
        item: str = "row",
        axis: int = -1,
        max_rows: int | None = None,
        name: str | None = None,
    ) -> None:
        self.module = AnyModule(module, call)
        self.hooks = self.module.paths(paths)
        at_least(1, max_rows=max_rows)
        check_item(item)
        _check_inputs(inputs)
        self.n_rows = max_rows
        self._inputs, self._label, self._item, self._axis = inputs, label, item, axis
        self._name = name or type(module).__name__
        self._once = iter(inputs) is inputs
        self._was_read = False
        self._counted: int | None = None

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of each batch; see `ActivationSource.rows`.

        Raises:
            ValueError: inputs are an iterator that was read before, or hold no row that counts; a path
                gives no rows of numbers, or other leading dimensions than another path.
            TypeError: the module does not take such a batch, or `label` returned something else.
        """
        if self._once and self._was_read:
            raise ValueError(
                "inputs are an iterator, which can be read once, and were read before; pass a list or a "
                "DataLoader"
            )
        self._was_read = True
        first_item = n = 0
        for number, batch in enumerate(self._inputs):
            found = self.module.capture(batch, self.hooks)
            leading, values = self._flat(found)
            keep, places = self._places(number, batch, first_item, leading)
            first_item += leading[0]
            new = slice(max(0, skip - n), None if self.n_rows is None else self.n_rows - n)
            n += len(places)
            if len(taken := places[new]):
                rows = {path: x[keep.to(x.device)][new] for path, x in values.items()}
                self._counted = n if self.n_rows is None else min(n, self.n_rows)
                yield Rows.of(taken, rows)
            if self.n_rows is not None and n >= self.n_rows:
                break
        if n == 0:
            raise ValueError("inputs gave no row that counts: there was no batch, or label left out all")

    def provenance(self, hook: str) -> Provenance:
        """The module's name, the path, and the number of rows that were read."""
        return Provenance(
            model_name=self._name, hook_name=hook, max_tokens=self.n_rows, n_tokens=self._counted
        )

    def _flat(self, found: Mapping[str, Tensor]) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """The leading dimensions, which are alike at all paths, and the rows at each path."""
        leading: dict[str, tuple[int, ...]] = {}
        values = {}
        for path, x in found.items():
            if x.ndim < 2 or not x.is_floating_point():
                raise ValueError(
                    f"paths must lead to activations, but {path!r} gives {x.dtype} of shape "
                    f"{tuple(x.shape)}"
                )
            if not -x.ndim <= self._axis < x.ndim:
                raise ValueError(
                    f"axis must be a dimension of the activations, got {self._axis} for shape "
                    f"{tuple(x.shape)} at {path!r}"
                )
            x = x.movedim(self._axis, -1)
            leading[path], values[path] = tuple(x.shape[:-1]), x.flatten(0, -2)
        if len(set(leading.values())) > 1:
            shapes = ", ".join(f"{shape} at {path!r}" for path, shape in leading.items())
            raise ValueError(
                f"paths must have the same leading dimensions, since their rows share labels, but have "
                f"{shapes}; build them one by one"
            )
        return next(iter(leading.values())), values

    def _places(
        self, number: int, batch: Any, first_item: int, leading: tuple[int, ...]
    ) -> tuple[Tensor, Places]:
        """Which rows count, and the places of those that do."""
        n = int(np.prod(leading))
        item, position = np.divmod(np.arange(n), max(1, n // max(1, leading[0])))
        tag = Tag(self._item)
        if self._label is None:
            return torch.ones(n, dtype=torch.bool), Places.at(first_item + item, 0, position, tag)
        indices = itertools.product(*map(range, leading))
        labels = [self._labelled(number, batch, index) for index in indices]
        keep = np.array([label is not None for label in labels], dtype=bool)
        kept = [label for label in labels if label is not None]
        if own := [label for label in kept if isinstance(label, Label)]:
            if len(own) < len(kept):
                raise TypeError("label must return a Label for each row that counts, or for none")
            return torch.from_numpy(keep), Places.of(own)
        tags = {name: tag._replace(name=name) for name in dict.fromkeys(kept)}
        return torch.from_numpy(keep), Places.at(
            first_item + item[keep], 0, position[keep], [tags[name] for name in kept]
        )

    def _labelled(self, number: int, batch: Any, index: tuple[int, ...]) -> str | Label | None:
        assert self._label is not None
        if number == 0 and not any(index):
            _check_call(self._label, number, batch, index)
        found = self._label(number, batch, *index)
        if found is None or isinstance(found, str | Label):
            return found
        if isinstance(found, Tensor | np.ndarray) and found.ndim == 0:
            found = found.item()
        if isinstance(found, int | np.integer) and not isinstance(found, bool):
            return str(found)
        raise TypeError(
            f"label must return a string, a whole number, a Label or None, got {found!r:.80} for "
            f"{index} of batch {number}"
        )


def _check_inputs(inputs: Any) -> None:
    if isinstance(inputs, str | bytes | Mapping | Tensor | np.ndarray):
        advice = "x.split(64)" if isinstance(inputs, Tensor | np.ndarray) else "[batch]"
        kind = type(inputs).__name__
        raise ValueError(f"inputs must be batches, one after the other, got a {kind}; pass {advice}")
    if isinstance(inputs, DataLoader) and isinstance(inputs.sampler, _SHUFFLING):
        raise ValueError(
            "inputs must come in the same order each time, since labels number them; make the "
            "DataLoader with shuffle=False (samples are drawn at random anyway)"
        )


def _check_call(label: Callable[..., Any], number: int, batch: Any, index: tuple[int, ...]) -> None:
    try:
        inspect.signature(label).bind(number, batch, *index)
    except TypeError as error:
        raise TypeError(
            f"label must take the number of the batch, the batch, and {len(index)} numbers for the "
            f"row's index in the leading dimensions: {error}"
        ) from None
    except ValueError:  # a function that does not tell its arguments
        return

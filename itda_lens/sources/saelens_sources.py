"""Activations as SAELens keeps and streams them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda_lens.records import Places, Provenance, at_least, checked
from itda_lens.sources.source import Rows
from itda_lens.sources.token_places import TokenPlaces


class SAELensCache:
    """The folder that SAELens's `CacheActivationsRunner` writes, as a source.

    Tested against SAELens 6.54. The folder holds contexts of equal length, with their token ids, but not
    the model's name; give it in `provenance`. A context is labelled by its number in the folder.

    Args:
        folder: the folder (`new_cached_activations_path`).
        hook_name: the column to read; default: the only one with activations.
        tokenizer: the model's tokenizer: labels then quote the text, and special tokens do not count.
        keep_special_tokens: whether position 0 and special tokens count.
        batch_size: contexts that are read at a time.
        provenance: what is known of the activations, such as model_name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no finished cache of SAELens, or has no such hook point.
    """

    @checked
    def __init__(
        self,
        folder: str | Path,
        hook_name: str | None = None,
        *,
        tokenizer: Any = None,
        keep_special_tokens: bool = False,
        batch_size: int = 16,
        provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
    ) -> None:
        from datasets import Dataset, load_from_disk

        at_least(1, batch_size=batch_size)
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        if (folder / ".tmp_shards").exists():
            raise ValueError(f"{folder} is not finished: SAELens left its .tmp_shards there")
        try:
            data: Any = load_from_disk(str(folder))
        except Exception as error:  # datasets raises many kinds; all mean that it cannot be read
            raise ValueError(f"{folder} is no cache of SAELens: {error}") from error
        shapes = {
            name: tuple(feature.shape)
            for name, feature in (data.features if isinstance(data, Dataset) else {}).items()
            if len(getattr(feature, "shape", None) or ()) == 2
        }
        if not shapes:
            raise ValueError(f"{folder} is no cache of SAELens: no column has activations of contexts")
        if hook_name is None and len(shapes) != 1:
            raise ValueError(f"hook_name must be one of {', '.join(map(repr, shapes))}, got None")
        hook = hook_name or next(iter(shapes))
        if hook not in shapes:
            raise ValueError(f"hook_name must be one of {', '.join(map(repr, shapes))}, got {hook!r}")
        self.hooks, self.n_rows = [hook], None
        self._context_size, self._d_in = shapes[hook]
        self._data: Any = data.with_format("arrow")
        self._has_ids = "token_ids" in data.features
        self._batch_size, self._provenance = batch_size, provenance
        self._keep_special = keep_special_tokens
        self._token_places = TokenPlaces(tokenizer, keep_special_tokens)
        self._n_read: int | None = None

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of `batch_size` contexts at a time; see `ActivationSource.rows`."""
        positions = np.arange(self._context_size)
        n = 0
        for first in range(0, len(self._data), self._batch_size):
            table = self._data[first : first + self._batch_size]
            x = torch.from_numpy(_numbers(table.column(self.hooks[0])).copy())
            x = x.reshape(-1, self._context_size, self._d_in)
            ids = [None] * len(x)
            if self._has_ids:
                ids = _numbers(table.column("token_ids")).reshape(len(x), -1)
            found = [self._token_places.of(first + i, positions, one) for i, one in enumerate(ids)]
            rows = _kept(self.hooks[0], x, found, max(0, skip - n))
            n += sum(len(places) for _, places in found)
            self._n_read = n
            if rows is not None:
                yield rows
        if n == 0:
            raise ValueError("the cache gave no token that counts: all were special tokens")

    def provenance(self, hook: str) -> Provenance:
        """The facts that the folder and the user give."""
        return replace(
            self._provenance,
            hook_name=hook,
            context_size=self._provenance.context_size or self._context_size,
            keep_special_tokens=self._keep_special,
            batch_size=self._batch_size,
            n_tokens=self._n_read,
        )


class SAELensStore:
    """One epoch of SAELens's `ActivationsStore`, as a source: what SAELens would train on, unshuffled.

    Tested against SAELens 6.54. Tokens of the store's `exclude_special_tokens` do not count, and those
    of a last batch that is not full are not read, as SAELens does it. A context is labelled by its
    number. A store that reads a cached folder in 16 bits does not give exact token ids, and labels then
    name none; `SAELensCache` reads such a folder with its ids.

    Args:
        store: the store. Each reading sets it back to its beginning.
        max_tokens: end after exactly this number of tokens that count; default: after one epoch.
        keep_special_tokens: whether position 0 and special tokens count, if the store lets them.
        provenance: what is known beside the store's own settings.

    Raises:
        TypeError: `store` is no ActivationsStore.
        ValueError: `max_tokens` is below 1.
    """

    @checked
    def __init__(
        self,
        store: Any,
        *,
        max_tokens: int | None = None,
        keep_special_tokens: bool = False,
        provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
    ) -> None:
        at_least(1, max_tokens=max_tokens)
        if not callable(getattr(store, "get_raw_llm_batch", None)):
            raise TypeError(f"store must be SAELens's ActivationsStore, got {type(store).__name__}")
        self.store, self.hooks, self.n_rows = store, [store.hook_name], max_tokens
        self._provenance, self._keep_special = provenance, keep_special_tokens
        tokenizer = getattr(store.model, "tokenizer", None)
        self._token_places = TokenPlaces(tokenizer, keep_special_tokens)
        self._n_read: int | None = None

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of each of the store's batches; see `ActivationSource.rows`."""
        store, hook = self.store, self.hooks[0]
        if store.cached_activation_dataset is not None:
            store.current_row_idx = 0
        else:
            store.iterable_sequences = store._iterate_tokenized_sequences()
        positions = np.arange(store.context_size)
        if store.cached_activation_dataset is None:
            positions = positions[slice(*store.seqpos_slice)]
        n = row = 0
        while self.n_rows is None or n < self.n_rows:
            try:
                x, tokens = store.get_raw_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                break
            x = x.reshape(-1, len(positions), x.shape[-1])
            known = _ids(tokens, len(x))
            found = []
            for i in range(len(x)):
                ids = None if known is None else known[i]
                keep, places = self._token_places.of(row + i, positions, ids)
                if ids is not None and store.exclude_special_tokens is not None:
                    counts = ~np.isin(ids, store.exclude_special_tokens.cpu().numpy())
                    places = places.take(np.flatnonzero(counts[keep]))
                    keep = keep & counts
                found.append((keep, places))
            row += len(x)
            rows = _kept(
                hook, x, found, max(0, skip - n), None if self.n_rows is None else self.n_rows - n
            )
            n += sum(len(places) for _, places in found)
            self._n_read = n if self.n_rows is None else min(n, self.n_rows)
            if rows is not None:
                yield rows
        if n == 0:
            raise ValueError(
                "the store gave no token that counts: it has no full batch, or all are special"
            )

    def provenance(self, hook: str) -> Provenance:
        """The facts that the store and the user give."""
        known, store = self._provenance, self.store
        name = getattr(getattr(store.model, "cfg", None), "model_name", None)
        return replace(
            known,
            model_name=known.model_name or name,
            hook_name=hook,
            context_size=store.context_size,
            prepend_bos=store.prepend_bos,
            keep_special_tokens=self._keep_special,
            max_tokens=self.n_rows,
            batch_size=store.store_batch_size_prompts,
            n_tokens=self._n_read,
        )


def _ids(tokens: Tensor | None, n_contexts: int) -> np.ndarray | None:
    """Token ids of a batch of the store, [context, position]; None if they are not known.

    A store of a cached folder gives them in the dtype of its activations, and a dtype of 16 bits does
    not hold every id.
    """
    if tokens is None or (tokens.is_floating_point() and tokens.element_size() < 4):
        return None
    return tokens.long().reshape(n_contexts, -1).cpu().numpy()


def _kept(
    hook: str, x: Tensor, found: list[tuple[np.ndarray, Places]], skip: int, most: int | None = None
) -> Rows | None:
    """The rows of contexts [n, seq, d] that count, but the first `skip`, and up to the first `most`."""
    keep = torch.from_numpy(np.stack([keep for keep, _ in found])).to(x.device)
    places = Places.joined([places for _, places in found])[skip:most]
    return Rows.of(places, {hook: x[keep][skip:most]}) if len(places) else None


def _numbers(column: Any) -> np.ndarray:
    """All numbers of a column of nested lists, in a row."""
    array = column.combine_chunks()
    array = getattr(array, "storage", array)
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)

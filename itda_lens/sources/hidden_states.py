"""Hidden states that an inference engine wrote, one file a request."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from itda_lens.records import Provenance, checked
from itda_lens.sources.source import Rows
from itda_lens.sources.token_places import TokenPlaces

logger = logging.getLogger(__name__)

STATES, IDS = "hidden_states", "token_ids"
"""Names of the two tensors in a file: [n_tokens, n_layers, width], and [n_tokens]."""

FEW = 5
"""Files that a message names."""


class _File(NamedTuple):
    path: Path
    n_tokens: int
    n_layers: int
    width: int


class HiddenStatesSource:
    """The hidden states of requests, as vLLM's `ExampleHiddenStatesConnector` writes them.

    One safetensors file holds one request: `hidden_states` [n_tokens, n_layers, width] and `token_ids`
    [n_tokens]. That is the layout of vLLM 0.18 and later. vLLM only logs a write that fails; it leaves a
    ".lock" file without a file beside it, or a file that ends too early. Both are told here.

    All files are looked at on construction, but not their numbers. Requests are read in the order of
    `requests`, or of their file names.

    Args:
        folder: the folder of the files (`shared_storage_path`).
        layer_ids: the layers that were asked for (`eagle_aux_hidden_state_layer_ids`). Layer n is the
            residual stream after n layers, so that it is called "blocks.{n - 1}.hook_resid_post".
        hook_names: names for the layers in place of these.
        requests: the token ids of each request that must be there, by its file's path or name without
            ".safetensors"; default: all files are read, and their token ids believed.
        tokenizer: the model's tokenizer: labels then quote the text, and special tokens do not count.
        keep_special_tokens: whether position 0 and special tokens count.
        skip_failed: leave out requests that failed, with a warning, and do not refuse the folder.
        provenance: what is known of the activations, such as model_name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no request; a request has no file, a damaged one, or other token ids or
            another number of rows than it should have; files have different layers or widths.
    """

    @checked
    def __init__(
        self,
        folder: str | Path,
        *,
        layer_ids: Sequence[int] | None = None,
        hook_names: Sequence[str] | None = None,
        requests: Mapping[str, Sequence[int]] | None = None,
        tokenizer: Any = None,
        keep_special_tokens: bool = False,
        skip_failed: bool = False,
        provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}")
        if (layer_ids is None) == (hook_names is None):
            raise ValueError("layer_ids or hook_names must name the layers: give one of the two")
        if layer_ids is not None and (bad := [layer for layer in layer_ids if layer < 0]):
            raise ValueError(f"layer_ids must be at least 0, got {bad[0]}")
        names = list(hook_names or map(hook_of_layer, layer_ids or ()))
        if not names or len(set(names)) != len(names):
            raise ValueError(f"the layers must be one or more different ones, got {names}")
        self.hooks = names
        self._provenance, self._keep_special = provenance, keep_special_tokens
        self._token_places = TokenPlaces(tokenizer, keep_special_tokens, kind="request")
        self._vocabulary = None if tokenizer is None else len(tokenizer)
        self._expected = {_stem(name): list(ids) for name, ids in (requests or {}).items()}
        self._files = self._checked_files(skip_failed)
        self.n_rows = None
        self._n_read: int | None = None

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of a request at a time; see `ActivationSource.rows`."""
        n = 0
        for row, file in enumerate(self._files):
            with safe_open(file.path, framework="pt") as tensors:
                ids = tensors.get_tensor(IDS).numpy()
                keep, places = self._token_places.of(row, np.arange(len(ids)), ids, file.path.stem)
                start, n = n, n + len(places)
                self._n_read = n
                if n > skip:
                    new = slice(max(0, skip - start), None)
                    x = tensors.get_tensor(STATES)[torch.from_numpy(keep)][new]
                    yield Rows.of(places[new], {hook: x[:, i] for i, hook in enumerate(self.hooks)})
        if n == 0:
            raise ValueError("the requests gave no token that counts: all were special tokens")

    def provenance(self, hook: str) -> Provenance:
        """The facts that the user gave, and the number of rows."""
        return replace(
            self._provenance,
            hook_name=hook,
            keep_special_tokens=self._keep_special,
            n_tokens=self._n_read,
        )

    def _checked_files(self, skip_failed: bool) -> list[_File]:
        there = {path.stem: path for path in self.folder.glob("*.safetensors")}
        locks = {path.name.removesuffix(".safetensors.lock") for path in self.folder.glob("*.lock")}
        wanted = list(self._expected) or sorted({*there, *locks}, key=_by_value)
        if not wanted:
            raise ValueError(f"{self.folder} holds no request: no file in it ends in .safetensors")
        files, failed = [], {}
        for name in wanted:
            try:
                if name not in there:
                    lock = " but its lock: the write failed, or goes on" if name in locks else ""
                    raise ValueError(f"there is nothing{lock}")
                files.append(self._checked_file(there[name]))
            except ValueError as error:
                failed[name] = str(error)
        if failed:
            few = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:FEW])
            message = f"{len(failed)} of {len(wanted)} requests in {self.folder} failed: {few}"
            if not skip_failed or not files:
                raise ValueError(message)
            logger.warning("%s", message)
        for file in files:
            if file[2:] != files[0][2:]:
                raise ValueError(
                    f"all requests must have the layers of one model, but {file.path.name} has "
                    f"{file.n_layers} of width {file.width}, and {files[0].path.name} "
                    f"{files[0].n_layers} of width {files[0].width}"
                )
        if files[0].n_layers != len(self.hooks):
            raise ValueError(
                f"the files hold {files[0].n_layers} layers, but there are {len(self.hooks)} names: "
                f"{self.hooks}"
            )
        return files

    def _checked_file(self, path: Path) -> _File:
        """The shape of a request's file.

        Raises:
            ValueError: it is damaged, or is not what the request must have.
        """
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in (STATES, IDS)}
                ids = file.get_tensor(IDS)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"it is damaged or was not written to its end ({error})") from error
        if len(shapes[STATES]) != 3 or len(shapes[IDS]) != 1:
            raise ValueError(
                f"{STATES} must be [n_tokens, n_layers, width] and {IDS} [n_tokens], got "
                f"{shapes[STATES]} and {shapes[IDS]}"
            )
        if shapes[STATES][0] != shapes[IDS][0]:
            raise ValueError(f"{shapes[STATES][0]} hidden states for {shapes[IDS][0]} token ids")
        if not shapes[IDS][0]:
            raise ValueError("it has no tokens")
        expected = self._expected.get(path.stem)
        if expected is not None and ids.tolist() != expected:
            raise ValueError(f"its {len(ids)} token ids are not the request's {len(expected)}")
        largest = int(ids.max())
        if int(ids.min()) < 0 or (self._vocabulary is not None and largest >= self._vocabulary):
            raise ValueError(f"token id {largest} is outside of the tokenizer's {self._vocabulary}")
        return _File(path, *shapes[STATES])


def hook_of_layer(layer: int) -> str:
    """The hook point whose activations vLLM calls the hidden states of this layer."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def _stem(name: str) -> str:
    return Path(name).name.removesuffix(".safetensors")


def _by_value(name: str) -> list[tuple[int, int, str]]:
    """Sorts names by the value of the numbers in them, so that request 2 comes before request 10."""
    parts = re.findall("[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]

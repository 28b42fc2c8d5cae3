"""Language models of nnsight, which run in this process or on a server."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itda_lens.records import at_least, checked
from itda_lens.sources.hooks import evaluation_mode, silent_hook
from itda_lens.sources.hugging_face_models import HuggingFaceModel
from itda_lens.sources.readable import Loader, Replace
from itda_lens.terminal import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_WAIT = 60.0
"""Seconds between two tries, at most."""

_NETWORK = frozenset(
    {"httpx", "httpcore", "httpx2", "httpcore2", "websocket", "pydantic", "pydantic_core", "zstandard"}
)
"""Packages whose errors say that a connection failed. A connection that drops while the server answers
leaves half of an answer or none, which pydantic and zstandard then refuse."""

_BUSY = frozenset({408, 425, 429})
"""HTTP statuses below 500 that ask for another try; the others say that the request itself is wrong."""

_OWN = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of the operating system that another try does not mend."""


class NNsightModel:
    """A `ReadableModel` that reads a language model of nnsight. It cannot be edited: nnsight does that.

    Hook points are those of the Hugging Face model inside; see `HuggingFaceModel`.

    Args:
        model: an `nnsight.TransformersModel` with a tokenizer; its older name is
            `nnsight.LanguageModel`. For a server it may hold no weights.
        remote: False runs it in this process; True runs each pass on the server that nnsight is set up
            for; "local" does here what a server would do, to try out that it works.
        tries: how often a pass is tried that fails for reasons of the network or the server.
        wait: seconds before the second try; doubled each time, up to `MOST_WAIT`.
        name: the model's name in metadata; default: the one that nnsight knows it by.

    Raises:
        TypeError: `model` is none of nnsight's, or has no tokenizer.
        ValueError: a setting is out of range.
    """

    @checked
    def __init__(
        self,
        model: Any,
        *,
        remote: bool | Literal["local"] = False,
        tries: int = 6,
        wait: float = 1.0,
        name: str | None = None,
    ) -> None:
        at_least(1, tries=tries)
        at_least(0, wait=wait)
        if not all(hasattr(model, part) for part in ("trace", "tokenizer", "repo_id", "_module")):
            raise TypeError(f"model must be an nnsight.TransformersModel, got {type(model).__name__}")
        if model.tokenizer is None:
            raise TypeError("model must be a language model of nnsight, got one without a tokenizer")
        self.model = model
        self.tokenizer = model.tokenizer
        self.source: str | None = str(model.repo_id)
        self.name = name or self.source
        self.loader: Loader = "huggingface"
        self._inside = HuggingFaceModel(model._module, self.tokenizer, self.name, self.loader)
        self._paths = {module: path for path, module in model._module.named_modules()}
        self._remote, self._tries, self._wait = remote, tries, wait

    @property
    def device(self) -> torch.device:
        """The device of tokens before they are sent."""
        return torch.device("cpu")

    @property
    def max_context(self) -> int | None:
        """See `ReadableModel.max_context`."""
        return self._inside.max_context

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """See `ReadableModel.check_hooks`."""
        self._inside.check_hooks(hooks)

    def capture(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        hooks: Sequence[str],
    ) -> dict[str, Float[Tensor, "batch seq width"]]:  # fmt: skip
        """See `ReadableModel.capture`. The whole model runs, on all layers.

        Raises:
            ConnectionError: the server or the way to it failed `tries` times.
        """
        sites = {hook: self._inside._site(hook) for hook in hooks}
        paths = {hook: f"{self.model.path}.{self._paths[site.module]}" for hook, site in sites.items()}
        wanted = {
            side: list(dict.fromkeys(paths[hook] for hook, site in sites.items() if site.side == side))
            for side in ("input", "output")
        }
        found = self._passed(
            lambda: _traced(self.model, _inputs(tokens, attention_mask), wanted, self._remote)
        )
        captured: dict[str, Tensor] = {}
        for hook, (_, side, layout) in sites.items():
            visit = found[side].get(paths[hook])
            x = None if visit is None else _first_tensor(getattr(visit, side))
            if x is not None:
                captured[hook] = x if layout is None else layout.convert(x)
        if (error := silent_hook(list(hooks), captured)) is not None:
            raise error
        for hook, x in captured.items():
            if x.ndim < 3 or x.shape[:2] != tokens.shape:
                raise ValueError(
                    f"hook {hook!r} gives {tuple(x.shape)}, not one activation for each of the "
                    f"{tuple(tokens.shape)} tokens"
                )
        return {hook: rearrange(captured[hook], "batch seq ... -> batch seq (...)") for hook in hooks}

    def logits(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        replace: Mapping[str, Replace] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:  # fmt: skip
        """See `ReadableModel.logits`; `replace` is refused.

        Raises:
            ValueError: edits were asked for.
            ConnectionError: as `capture`.
        """
        if replace:
            self.edited(replace)
        return self._passed(
            lambda: _traced_logits(self.model, _inputs(tokens, attention_mask), self._remote)
        )

    def edited(self, edits: Mapping[str, Replace]) -> AbstractContextManager[None]:
        """Always refused.

        Raises:
            ValueError: nnsight's models are edited with nnsight.
        """
        raise ValueError(
            "a model of nnsight cannot be edited here: write the edit as a trace of nnsight"
        )

    def _passed(self, run: Callable[[], T]) -> T:
        with evaluation_mode([self.model._module]):
            return run() if self._remote is False else retried(run, self._tries, self._wait)


def retried(run: Callable[[], T], tries: int, wait: float) -> T:
    """The result of `run`, which is called again after a failure of the network or the server.

    Args:
        run: what may fail.
        tries: how often it is called, at most.
        wait: seconds before the second call; doubled before each further one, up to `MOST_WAIT`.

    Raises:
        ConnectionError: it failed `tries` times. Other errors are raised as they are, at once. To these
            belong answers that refuse the request, such as 401 for a wrong key.
    """
    for number in range(tries):
        try:
            return run()
        except Exception as error:
            if not _passes(error):
                raise
            reason = printable(f"{type(error).__name__}: {error}".split("\n")[0][:200])
            if number + 1 == tries:
                raise ConnectionError(f"gave up after {tries} tries ({reason})") from error
            pause = min(wait * 2**number, MOST_WAIT)
            logger.warning("try %d of %d failed (%s); next in %.0f s", number + 1, tries, reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _passes(error: Exception) -> bool:
    """Whether an error may be gone at the next try."""
    if (status := _http_status(error)) is not None:
        return status >= 500 or status in _BUSY
    kinds = type(error).__mro__
    return (
        (isinstance(error, OSError) and not isinstance(error, _OWN))
        # The server hung up before it gave the session a number.
        or isinstance(error, json.JSONDecodeError)
        or any(kind.__module__.split(".")[0] in _NETWORK for kind in kinds)
        or any(kind.__name__ == "RemoteError" for kind in kinds)
    )


def _http_status(error: BaseException) -> int | None:
    """The server's HTTP status, if the error, or the one that caused it, holds a status."""
    for one in (error, error.__cause__):
        for holder in (one, getattr(one, "response", None)):
            if isinstance(status := getattr(holder, "status_code", None), int):
                return status
    return None


def _inputs(tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "attention_mask": attention_mask.long()}


# nnsight ships the blocks below to the server as they are written, so they refer to plain values only.
# `value.save()` would need the method that nnsight adds to every object of the process, which users can
# turn off: classes of other packages trip over it.


def _traced(
    model: Any, inputs: dict[str, Tensor], wanted: Mapping[str, list[str]], remote: bool | str
) -> dict[str, dict[str, Any]]:
    """Visits of modules in one pass: by side ("input" or "output"), then by path.

    Each side has a cache of its own, so that a server sends no more than was asked for.
    """
    from nnsight import save  # pyright: ignore[reportMissingImports]

    before, after = wanted["input"], wanted["output"]
    with torch.no_grad(), model.trace(inputs, remote=remote) as tracer:
        entered = save(tracer.cache(modules=before, include_output=False, include_inputs=True))
        left = save(tracer.cache(modules=after))
    return {
        "input": {path: entered[path] for path in before if path in entered},
        "output": {path: left[path] for path in after if path in left},
    }


def _traced_logits(model: Any, inputs: dict[str, Tensor], remote: bool | str) -> Tensor:
    """Logits of one pass. A cache that comes from a server cannot be asked for the whole model."""
    from nnsight import save  # pyright: ignore[reportMissingImports]

    with torch.no_grad(), model.trace(inputs, remote=remote):
        logits = save(model.output.logits.detach().cpu())
    return logits  # noqa: RET504 - nnsight runs the block elsewhere and then sets the name


def _first_tensor(value: Any) -> Tensor | None:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    return value if isinstance(value, Tensor) else None

"""Workarounds for SAEBench 0.6.0 and its libraries, all in one place.

They are applied in the process that runs an evaluation (`worker`), and nowhere else. Each names the line
that it works around.
"""

import functools
import importlib
import logging
import types
from pathlib import Path
from typing import Any

from itda_lens.records import HookPoint

ENVIRONMENT = {
    # evals/sparse_probing/probe_training.py:134 decorates train_sklearn_probe with @beartype alone, so
    # that its dimensions are those that the @jaxtyped caller has bound, to other sizes: a type error
    # where train and test sets differ in size. The variable is read when jaxtyping is imported.
    "JAXTYPING_DISABLE": "1",
}
"""Environment variables of the process, set before anything is imported."""


def load_models_once() -> None:
    """Keep a model once it is loaded, for the SAEs that follow.

    Every `run_eval` loads the model again (evals/core/main.py:1034, evals/absorption/main.py:62 and the
    others), and we call it once a dictionary, so that one failure does not end the others.
    """
    from transformer_lens import HookedTransformer

    original = HookedTransformer.from_pretrained_no_processing

    @functools.cache
    def load(model_name: str, **options: Any) -> Any:
        return original(model_name, **options)

    HookedTransformer.from_pretrained_no_processing = staticmethod(load)  # pyright: ignore


def keep_absorption_in(folder: Path) -> None:
    """Keep the files of the absorption evaluation in `folder`.

    evals/absorption/common.py:33 puts probes and tables into site-packages/artifacts, and the modules of
    the evaluation bind that folder as the default of their parameters.
    """
    package = "sae_bench.evals.absorption"
    common = importlib.import_module(f"{package}.common")
    old = common.RESULTS_DIR

    def moved(value: Any) -> Any:
        if isinstance(value, Path) and value.is_relative_to(old):
            return folder / value.relative_to(old)
        return value

    for name in ("common", "k_sparse_probing", "feature_absorption"):
        module = importlib.import_module(f"{package}.{name}")
        for key, value in vars(module).items():
            setattr(module, key, moved(value))
            if isinstance(value, types.FunctionType) and value.__defaults__:
                value.__defaults__ = tuple(moved(default) for default in value.__defaults__)


def stop_at_the_last_hook() -> None:
    """Stop forward passes after the last layer whose activations are asked for.

    evals/absorption/probing.py:357 runs the whole model, unembedding included, for one hook point of one
    layer, on every word of the vocabulary. Nobody reads the rest.
    """
    from transformer_lens import HookedTransformer

    original = HookedTransformer.run_with_cache

    @functools.wraps(original)
    def run_with_cache(self: Any, *args: Any, **options: Any) -> Any:
        names = options.get("names_filter")
        points = [HookPoint.parse(name) for name in names] if isinstance(names, list) else []
        layers = [point.layer for point in points if point.layer is not None]
        if layers and len(layers) == len(points) and "stop_at_layer" not in options:
            options["stop_at_layer"] = 1 + max(layers)
        return original(self, *args, **options)

    HookedTransformer.run_with_cache = run_with_cache  # pyright: ignore


class LastError(logging.Handler):
    """Keeps the last error that SAEBench logs, so that it can be raised.

    evals/core/main.py:1046 and :1137 log an error and go on.
    """

    def __init__(self) -> None:
        super().__init__(level=logging.ERROR)
        self.message: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()


NO_RESULT = {
    # evals/absorption/main.py:116 prints a line, ends the loop over SAEs and returns.
    "absorption": (
        "too few letters can be read off this model at this layer: SAEBench asks for linear probes with "
        "F1 over min_GT_probe_f1 for min_feats_for_eval letters (both can be set)"
    )
}
"""Why an evaluation that ends without an error wrote no result."""

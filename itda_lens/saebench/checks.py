"""Checks that find wrong settings and missing data before any work begins."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from itda_lens.records import HookPoint
from itda_lens.saebench.evaluations import EXTRA_DATA, Evaluation, datasets_of
from itda_lens.saebench.subjects import Subject

UNLEARNING_DATA = Path(EXTRA_DATA["unlearning"][0]) / "bio-forget-corpus.jsonl"
"""Where SAEBench reads the corpus to forget, relative to the current folder."""

DTYPES = ("float32", "float64", "bfloat16", "float16")

RAVEL_MODELS = ("gemma-2-2b", "pythia-160m-deduped")
"""The models that SAEBench's RAVEL knows (`LLM_NAME_MAP`, evals/ravel/main.py:49)."""


RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
"""Kinds of hook points at which activations are those of the residual stream, or are added to it."""


def check_device(device: str | torch.device | None) -> None:
    """Raise ValueError unless PyTorch has this device here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} is not one that PyTorch has here: {reason}") from error


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless it is the name of a dtype that models and SAEs are loaded in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def check_package(evaluations: Sequence[Evaluation]) -> None:
    """Raise ValueError unless SAEBench is installed, where an evaluation is SAEBench's."""
    if all(evaluation.name == "saelens" for evaluation in evaluations):
        return
    if importlib.util.find_spec("sae_bench") is None:
        raise ValueError(
            "SAEBench is not installed: pip install 'itda-lens[saebench]' (the evaluation saelens works "
            "without it)"
        )


def check_evaluation(
    evaluation: Evaluation,
    config: Mapping[str, Any],
    model_name: str,
    device: str,
    local_datasets: set[str],
    data: Path | None,
) -> None:
    """Raise ValueError naming everything that an evaluation lacks here.

    Args:
        local_datasets: names of data sets that are folders known to be there.
    """
    missing = [
        f"data set {name!r} ({reason})"
        for name in datasets_of(evaluation, config)
        if name not in local_datasets and (reason := why_unavailable(name)) is not None
    ]
    for field in ("results_path", "model_cache_path"):  # of sae-probes
        if config.get(field) is not None and Path(config[field]).is_absolute():
            raise ValueError(f"{field} must be relative to the output folder, got {config[field]!r}")
    if evaluation.name == "autointerp" and not os.environ.get("OPENAI_API_KEY"):
        missing.append(
            "the environment variable OPENAI_API_KEY (and OPENAI_BASE_URL for another OpenAI-compatible "
            "server; one without keys takes any)"
        )
    if evaluation.name == "ravel":
        if int(version("transformers").split(".")[0]) >= 5:
            missing.append(f"transformers 4 (its RAVEL does not run with {version('transformers')})")
        if model_name not in RAVEL_MODELS:
            missing.append(f"one of the models {', '.join(RAVEL_MODELS)}, not {model_name!r}")
    if evaluation.name == "unlearning":
        if "it" not in model_name:
            missing.append(f"an instruction-tuned model with 'it' in its name, not {model_name!r}")
        if data is None or not (data / UNLEARNING_DATA).is_file():
            missing.append(f"the WMDP corpus {UNLEARNING_DATA} in --data (access is on request)")
    if evaluation.name == "mdl":
        if importlib.util.find_spec("loguru") is None:
            missing.append("the package loguru")
        if not device.startswith("cuda"):
            missing.append(f"a CUDA device, not {device!r}")
    if missing:
        raise ValueError(f"{evaluation.name} cannot run here; it needs {'; '.join(missing)}")


def why_unavailable(dataset: str) -> str | None:
    """Why `datasets` cannot load a data set by this name; None if it can."""
    import datasets

    # Old versions of `datasets` would stop and ask whether to run a data set's own code.
    old = int(datasets.__version__.split(".")[0]) < 4
    options: dict[str, Any] = {"trust_remote_code": False} if old else {}
    try:
        datasets.load_dataset_builder(dataset, **options)
    except Exception as error:  # of many kinds: network, hub, scripts, formats
        if _is_there_all_the_same(error):
            return None
        reason = str(error).strip().split("\n")[0][:160]
        return f"neither a folder of that name in --data nor to be had from the hub: {reason}"
    return None


def _is_there_all_the_same(error: Exception) -> bool:
    """Whether the data set only wants a configuration's name or leave to run its code."""
    return isinstance(error, ValueError) and any(
        sign in str(error) for sign in ("onfig name", "trust_remote_code")
    )


def check_fits_model(subjects: Sequence[Subject], model_name: str) -> None:
    """Raise ValueError unless TransformerLens knows the model and every dictionary fits it.

    Raises:
        ValueError: an unknown model; a dictionary of another layer count or width.
    """
    from transformer_lens.loading_from_pretrained import (
        get_official_model_name,
        get_pretrained_model_config,
    )

    try:
        get_official_model_name(model_name)
    except ValueError as error:
        raise ValueError(
            f"SAEBench loads models with TransformerLens's HookedTransformer, which does not know "
            f"{model_name!r}; pass --model FOLDER for a local copy"
        ) from error
    model = get_pretrained_model_config(model_name)
    for subject in subjects:
        if subject.hook_name is None:
            continue
        point = HookPoint.parse(subject.hook_name)
        if point.layer is not None and point.layer >= model.n_layers:
            raise ValueError(
                f"{subject.name} belongs to {subject.hook_name}, but {model_name} has "
                f"{model.n_layers} layers"
            )
        width = _width_at(point, model)
        if width is not None and subject.d_in != width:
            raise ValueError(
                f"{subject.name} has d_in={subject.d_in}, but {model_name} gives activations of width "
                f"{width} at {subject.hook_name}: it belongs to another model"
            )


def check_hooks(evaluations: Sequence[Evaluation], subjects: Sequence[Subject]) -> None:
    """Raise ValueError for a dictionary of a hook point at which an evaluation does not read."""
    if all(evaluation.name != "absorption" for evaluation in evaluations):
        return
    for subject in subjects:
        # evals/absorption/common.py:286 and feature_absorption_calculator.py:150 read there, whatever
        # the dictionary's own hook point.
        hook = subject.hook_name
        if hook is not None and HookPoint.parse(hook).kind != "hook_resid_post":
            raise ValueError(
                f"absorption reads at blocks.N.hook_resid_post only, but {subject.name} belongs to "
                f"{subject.hook_name}"
            )


def _width_at(point: HookPoint, model: Any) -> int | None:
    """Numbers that the model gives there for each token; None if nothing here says it."""
    if point.kind in RESIDUAL:
        return model.d_model
    return model.n_heads * model.d_head if point.reshape_activations == "hook_z" else None

"""Result files as figures."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itda_lens.records.files import said
from itda_lens.saebench.evaluations import Codes, Evaluation


@dataclass(frozen=True)
class Result:
    """One evaluation of one dictionary.

    Attributes:
        dictionary: its name.
        evaluation: the evaluation's name.
        codes: which form of its codes was evaluated.
        metrics: figures by the names of `Evaluation.metrics`; NaN where the file has none.
        file: SAEBench's result file; None where there is none.
        failure: why there is no result file.
        hook_name, d_sae: hook point and number of atoms of the dictionary, if known.
    """

    dictionary: str
    evaluation: str
    codes: Codes
    metrics: Mapping[str, float]
    file: Path | None
    failure: str | None = None
    hook_name: str | None = None
    d_sae: int | None = None


def read_metrics(file: Path, evaluation: Evaluation) -> dict[str, float]:
    """The figures of a result file that tables show.

    Raises:
        ValueError: the file is damaged.
    """
    if not evaluation.metrics:
        return {}
    try:
        values = json.loads(file.read_text())["eval_result_metrics"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is truncated or damaged: {said(error)}") from error
    return {metric.name: _at(values, metric.path) for metric in evaluation.metrics}


def _at(values: Any, path: str) -> float:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    # core writes NaN as the integer -1 (evals/core/main.py:1120); no figure of it is an integer.
    if values is None or (isinstance(values, int) and values == -1):
        return math.nan
    return float(values)

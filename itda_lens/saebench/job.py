"""Messages to and from the process that runs an evaluation, as JSON files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One dictionary to evaluate.

    Attributes:
        name: names the result file, `{name}_custom_sae_eval_results.json`.
        source: the folder, or "release:sae_id" of one that SAELens knows.
        nonnegative: evaluate the dictionary's non-negative view.
    """

    name: str
    source: str
    nonnegative: bool = False


@dataclass(frozen=True)
class Job:
    """One evaluation of several dictionaries, run in one process inside `work`.

    Attributes:
        evaluation: name of the evaluation.
        config: its configuration, complete.
        entries: the dictionaries.
        model_name: TransformerLens's name of the model.
        model_folder: where the model is, if it is a folder that TransformerLens has to be told of.
        device: where to run.
        work: folder for everything that SAEBench leaves behind; the process's current one.
        results: folder for the result files.
    """

    evaluation: str
    config: dict[str, Any]
    entries: list[Entry]
    model_name: str
    model_folder: str | None
    device: str
    work: str
    results: str

    @property
    def outcomes_file(self) -> Path:
        return Path(self.work) / f"{self.evaluation}.outcomes.jsonl"

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> "Job":
        values = json.loads(path.read_text())
        return cls(**values | {"entries": [Entry(**entry) for entry in values["entries"]]})


def result_file(folder: str | Path, name: str) -> Path:
    """Where SAEBench puts the result of a SAE that it was given as an object."""
    return Path(folder) / f"{name}_custom_sae_eval_results.json"

"""The output folder of `bench`: results, logs, and everything that SAEBench leaves behind."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itda_lens.records import is_leftover, replacing
from itda_lens.saebench.evaluations import EVALUATIONS, Evaluation
from itda_lens.saebench.job import result_file
from itda_lens.saebench.subjects import NONNEGATIVE, Subject
from itda_lens.sources import iterate_texts

BASELINES = "baselines"
"""The subfolder of an output folder that holds baselines."""

MANIFEST = "bench.json"
"""The file that records the dictionaries, model, data and settings of an output folder, so that results
of others do not mix in."""


@dataclass(frozen=True)
class Texts:
    """Texts to write into the work folder, as the data set `name`."""

    name: str
    texts: list[str]


class OutputFolder:
    """The output folder."""

    def __init__(self, path: Path, data: Path | None) -> None:
        if data is not None and not data.is_dir():
            raise FileNotFoundError(f"no folder {str(data)!r} for data")
        self.path, self.data = path, data
        self.work = path / "work"
        self._manifest = path / MANIFEST

    def results(self, evaluation: Evaluation) -> Path:
        return self.path / evaluation.name

    def log(self, evaluation: str) -> Path:
        return self.path / "logs" / f"{evaluation}.log"

    def dataset(self, name: str) -> Path | None:
        """The folder that stands for a data set, if there is one."""
        found = None if self.data is None else self.data / name
        return found if found is not None and found.is_dir() else None

    def link_dataset(self, name: str) -> None:
        """Let `load_dataset(name)` find the folder: it looks in the current one first."""
        source = self.dataset(name)
        link = self.work / name
        if link.is_symlink() and link.readlink() != source:
            link.unlink()
        if source is not None and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source, target_is_directory=True)

    def plan_texts(
        self, texts: str | Path | Iterable[Any] | None, text_field: str, split: str
    ) -> Texts | None:
        if texts is None:
            return None
        read = []
        for text in iterate_texts(texts, text_field=text_field, split=split):
            if not isinstance(text, str):
                raise ValueError("texts must be strings for SAEBench, got token ids")
            read.append(text)
        if not read:
            raise ValueError("texts must hold at least one text, got none")
        digest = hashlib.sha256("\0".join(read).encode("utf-8", errors="surrogatepass"))
        return Texts(f"texts/{digest.hexdigest()[:12]}", read)

    def is_done(self, evaluation: Evaluation, name: str) -> bool:
        return result_file(self.results(evaluation), name).exists()

    def clear_leftovers(self, evaluation: str) -> None:
        """Remove leftovers of an interrupted run: SAEBench takes half a file, or that of another
        dictionary of the same name, for a finished one."""
        for leftover in (self.work / "artifacts", self.work / "results" / evaluation):
            shutil.rmtree(leftover, ignore_errors=True)

    def check(
        self, subjects: Sequence[Subject], configs: Mapping[str, Mapping[str, Any]], model: str
    ) -> None:
        """Refuse a folder that holds other things, or results of other dictionaries, models, data or
        settings.

        Raises:
            ValueError: it is one.
        """
        inside = self.path.iterdir() if self.path.exists() else ()
        others = [found for found in inside if found.name != BASELINES and not is_leftover(found)]
        if not self._manifest.exists() and others:
            raise ValueError(
                f"{self.path} holds other things than results; choose another output folder"
            )
        old, new = self._recorded(), self._record(subjects, configs, model)
        for name, value in new["dictionaries"].items():
            files = (
                result_file(self.path / evaluation, name + form)
                for evaluation in EVALUATIONS
                for form in ("", NONNEGATIVE)
            )
            if old["dictionaries"].get(name, value) != value and any(file.exists() for file in files):
                raise self._other("another dictionary named", name)
        for name, value in new["settings"].items():
            files = (self.path / name).glob("*_eval_results.json")
            if old["settings"].get(name, value) != value and any(files):
                raise self._other("another model, other data or other settings of", name)

    def prepare(
        self,
        subjects: Sequence[Subject],
        configs: Mapping[str, Mapping[str, Any]],
        own: Texts | None,
        model: str,
    ) -> None:
        """Make the folder, once it was checked, and record the origin of its results."""
        # The record first: a folder without one, which a kill would leave, is taken for another's.
        self.path.mkdir(parents=True, exist_ok=True)
        old, new = self._recorded(), self._record(subjects, configs, model)
        with replacing(self._manifest) as (temporary,):
            temporary.write_text(json.dumps({kind: old[kind] | new[kind] for kind in new}, indent=2))
        self.work.mkdir(exist_ok=True)
        (self.path / "logs").mkdir(exist_ok=True)
        for evaluation in configs:
            (self.path / evaluation).mkdir(exist_ok=True)
        if own is not None:
            target = self.work / own.name / "train.jsonl"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as (temporary,):
                    temporary.write_text("\n".join(json.dumps({"text": text}) for text in own.texts))

    def _recorded(self) -> dict[str, dict[str, Any]]:
        if not self._manifest.exists():
            return {"dictionaries": {}, "settings": {}}
        try:
            return json.loads(self._manifest.read_text())
        except ValueError as error:
            raise ValueError(f"{self._manifest} is damaged: {error}") from error

    def _record(
        self, subjects: Sequence[Subject], configs: Mapping[str, Mapping[str, Any]], model: str
    ) -> dict[str, dict[str, Any]]:
        source = {"model": model, "data": None if self.data is None else str(self.data)}
        record = {
            "dictionaries": {s.name: s.fingerprint or s.source for s in subjects},
            "settings": {name: {**config, **source} for name, config in configs.items()},
        }
        return json.loads(json.dumps(record))

    def _other(self, what: str, name: str) -> ValueError:
        return ValueError(
            f"{self.path} holds results of {what} {name!r}; choose another output folder or remove "
            "this one"
        )

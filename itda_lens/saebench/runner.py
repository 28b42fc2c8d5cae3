"""`bench`: SAEBench on dictionaries and SAEs, in processes of its own, resumable."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm.auto import tqdm

from itda_lens.architectures import build_baselines
from itda_lens.records import at_least, checked
from itda_lens.sae import load
from itda_lens.saebench import checks
from itda_lens.saebench.evaluations import (
    EVALUATIONS,
    EXTRA_DATA,
    Codes,
    Evaluation,
    chosen,
    configure,
    datasets_of,
)
from itda_lens.saebench.folder import BASELINES, OutputFolder
from itda_lens.saebench.job import Entry, Job, result_file
from itda_lens.saebench.results import Result, read_metrics
from itda_lens.saebench.subjects import NONNEGATIVE, Subject, subjects_of
from itda_lens.saebench.workarounds import ENVIRONMENT
from itda_lens.sources import names_data_set, register_with_transformer_lens

logger = logging.getLogger(__name__)

CodesOption = Literal["both", "signed", "nonnegative"]

POLL_SECONDS = 0.2

TERMINATE_SECONDS = 10
"""How long a worker has to end by itself once it was asked to."""


@checked
def bench(
    saes: Sequence[str | Path] | Mapping[str, str | Path],
    evals: Sequence[str],
    out: str | Path,
    *,
    texts: str | Path | Iterable[str] | None = None,
    data: str | Path | None = None,
    model: str | Path | None = None,
    codes: CodesOption = "both",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    baselines: Sequence[str] = (),
    train_texts: str | Path | Iterable[str] | None = None,
    progress: bool = True,
) -> list[Result]:
    """Run evaluations of SAEBench 0.6 on dictionaries and any other SAELens SAEs, side by side.

    Each evaluation runs in a process of its own, inside `out`. Nothing is written elsewhere, except that
    the hub's libraries download into their caches. A result is SAEBench's own JSON file,
    `out/EVALUATION/NAME_custom_sae_eval_results.json`. A result that is there already is not computed
    again, so that a run that was interrupted goes on where it stopped. What SAEBench printed is in
    `out/logs`. Failures of one dictionary do not stop the others; they are in the results.

    Args:
        saes: folders of SAEs, or "release:sae_id" of SAELens's list; or a mapping from names to them.
        evals: names of evaluations, see `EVALUATIONS`.
        out: folder for results, logs and intermediate files.
        texts: text for the evaluations on plain text (saelens, core, autointerp, mdl): a file, strings,
            or the name of a data set; default: the data sets that SAEBench names.
        data: folder with data sets under their names, such as `data/LabHC/bias_in_bios`.
        model: name or folder of the model; default: the one that the dictionaries name.
        codes: which codes of signed ITDAs to evaluate where the sign matters: both, or one.
        settings: settings by evaluation, over SAEBench's defaults.
        device: default: a GPU if there is one.
        dtype: of the model and the SAEs; sae-probes reads its activations in float32 always.
        batch_size: contexts per forward pass of the evaluations that let it be chosen.
        text_field, split: for texts in jsonl files, and for train_texts. Evaluations read the split
            "train" of a data set, and its field "text".
        baselines: baselines to build beside the ITDAs among `saes`, in `out/baselines`: "random", "pca",
            "topk", "batchtopk"; see `build_baselines`.
        train_texts: texts to build baselines from; for a fair comparison, those of the ITDAs.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown evaluation, setting or model, a dictionary that does not fit the model,
            SAEBench not installed, data or hardware missing that an evaluation needs, an `out` that
            holds results of other dictionaries or settings.
        FileNotFoundError: a folder that is not there.
        OSError: `out` cannot be written.
    """
    evaluations = chosen(list(evals))
    at_least(1, batch_size=batch_size)
    checks.check_device(device)
    checks.check_dtype(dtype)
    if codes not in get_args(CodesOption):
        raise ValueError(f"codes must be one of {get_args(CodesOption)}, got {codes!r}")
    for name in settings or {}:
        if name not in EVALUATIONS:
            raise ValueError(f"settings must be of {', '.join(EVALUATIONS)}; got {name!r}")
    checks.check_package(evaluations)
    subjects = subjects_of(saes)
    model_name, model_folder = _model_of(subjects, model)
    if model_folder is not None:
        register_with_transformer_lens(model_folder, model_name)
    checks.check_fits_model(subjects, model_name)
    checks.check_hooks(evaluations, subjects)
    if baselines and train_texts is None:
        raise ValueError("baselines need train_texts, what the dictionaries were built from")
    device = str(device) if device else ("cuda" if torch.cuda.is_available() else "cpu")
    folder = OutputFolder(Path(out).resolve(), None if data is None else Path(data).resolve())

    # A data set goes by its name: it may be large, and SAELens and SAEBench stream it themselves.
    by_name = str(texts) if texts is not None and names_data_set(texts) else None
    own = None if by_name else folder.plan_texts(texts, text_field, split)
    plain_texts = by_name or (own and own.name)
    configs = {}
    for evaluation in evaluations:
        chosen_settings = dict((settings or {}).get(evaluation.name, {}))
        if plain_texts is not None and evaluation.texts_setting is not None:
            chosen_settings = {evaluation.texts_setting: plain_texts} | chosen_settings
        config = configure(evaluation, model_name, dtype, batch_size, chosen_settings)
        names = datasets_of(evaluation, config)
        local = {name for name in names if (own and name == own.name) or folder.dataset(name)}
        checks.check_evaluation(evaluation, config, model_name, device, local, folder.data)
        configs[evaluation.name] = config
    source = str(model_folder or model_name)
    folder.check(subjects, configs, source)
    if baselines:
        assert train_texts is not None  # checked above
        built = build_baselines(
            [load(subject.source) for subject in subjects if subject.architecture == "itda"],
            baselines,
            folder.path / BASELINES,
            texts=train_texts,
            model=source,
            batch_size=batch_size,
            text_field=text_field,
            split=split,
            device=device,
            progress=progress,
        )
        subjects += subjects_of({path.name: path for path in built})
        folder.check(subjects, configs, source)
    folder.prepare(subjects, configs, own, source)

    results = []
    for evaluation in evaluations:
        planned = _entries(subjects, evaluation, codes)
        job = Job(
            evaluation=evaluation.name,
            config=configs[evaluation.name],
            entries=[e for e, _ in planned if not folder.is_done(evaluation, e.name)],
            model_name=model_name,
            model_folder=None if model_folder is None else str(model_folder),
            device=device,
            work=str(folder.work),
            results=str(folder.results(evaluation)),
        )
        for name in (*datasets_of(evaluation, job.config), *EXTRA_DATA.get(evaluation.name, ())):
            folder.link_dataset(name)
        failures = _run(job, folder, progress) if job.entries else {}
        results += [_result(entry, subject, evaluation, folder, failures) for entry, subject in planned]
    return results


def _model_of(subjects: Sequence[Subject], model: str | Path | None) -> tuple[str, Path | None]:
    """TransformerLens's name of the model, and its folder where it is a local one."""
    if model is not None:
        folder = Path(model)
        return (folder.name, folder.resolve()) if folder.is_dir() else (str(model), None)
    names = {s.model_name for s in subjects if s.model_name is not None}
    if len(names) != 1:
        raise ValueError(
            f"pass --model: the SAEs name {len(names)} models, not one: {', '.join(sorted(names))}"
        )
    name = names.pop()
    folders = {s.model_source for s in subjects if s.model_source and Path(s.model_source).is_dir()}
    # Two folders of one name would be two models.
    if len(folders) > 1:
        raise ValueError(f"pass --model: the SAEs name several folders: {', '.join(sorted(folders))}")
    return Path(name).name if folders else name, Path(folders.pop()).resolve() if folders else None


def _entries(
    subjects: Sequence[Subject], evaluation: Evaluation, codes: CodesOption
) -> list[tuple[Entry, Subject]]:
    """The entries to evaluate, each with the subject that it is a form of."""
    entries = []
    for subject in subjects:
        splits = subject.signed and evaluation.sign_matters
        if not splits or codes in ("both", "signed"):
            entries.append((Entry(subject.name, subject.source), subject))
        if splits and codes in ("both", "nonnegative"):
            entry = Entry(subject.name + NONNEGATIVE, subject.source, nonnegative=True)
            entries.append((entry, subject))
    return entries


def _run(job: Job, folder: OutputFolder, progress: bool) -> dict[str, str]:
    """Run a job in a process of its own; returns the reasons for failures, by the names of entries."""
    folder.clear_leftovers(job.evaluation)
    job_file = folder.work / f"{job.evaluation}.job.json"
    job.save(job_file)
    job.outcomes_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "itda_lens.saebench.worker", str(job_file), str(os.getpid())]
    environment = {"HF_DATASETS_CACHE": str(folder.work / "datasets")} | dict(os.environ) | ENVIRONMENT
    log = folder.log(job.evaluation)
    outcomes: dict[str, str | None] = {}
    with (
        log.open("a") as output,
        tqdm(
            total=len(job.entries),
            unit="SAE",
            desc=job.evaluation,
            mininterval=1.0,
            disable=not progress,
        ) as bar,
        _process(command, environment, output) as process,
    ):
        ended = False
        while not ended:
            ended = process.poll() is not None
            outcomes = dict(_outcomes(job.outcomes_file))
            bar.update(len(outcomes) - bar.n)
            if not ended:
                time.sleep(POLL_SECONDS)
    unfinished = f"its process ended with code {process.returncode}: {_last_line(log)}; see {log}"
    return {
        entry.name: failure
        for entry in job.entries
        if (failure := outcomes.get(entry.name, unfinished)) is not None
    }


@contextmanager
def _process(command: list[str], environment: dict[str, str], output: Any) -> Iterator[Any]:
    """A process in a session of its own, which ends with this block, and its own processes with it."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            logger.warning("interrupted: what is finished stays; the same call goes on from there")
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(TERMINATE_SECONDS)
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _outcomes(file: Path) -> Iterator[tuple[str, str | None]]:
    if not file.exists():
        return
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            outcome = json.loads(line)
            yield outcome["name"], outcome["failure"]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def _result(
    entry: Entry,
    subject: Subject,
    evaluation: Evaluation,
    folder: OutputFolder,
    failures: Mapping[str, str],
) -> Result:
    codes: Codes = "nonnegative" if entry.nonnegative else "signed"
    known = {"hook_name": subject.hook_name, "d_sae": subject.d_sae}
    file = result_file(folder.results(evaluation), entry.name)
    if not file.exists():
        failure = failures.get(entry.name, "no result")
        return Result(subject.name, evaluation.name, codes, {}, None, failure, **known)
    metrics = read_metrics(file, evaluation)
    return Result(subject.name, evaluation.name, codes, metrics, file, None, **known)

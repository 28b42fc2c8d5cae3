"""The process that runs one evaluation: `python -m itda_lens.saebench.worker JOB.json`.

SAEBench writes into the current folder, changes global state and prints. A process of its own, inside a
folder of its own, keeps all of that away from the user's.
"""

import dataclasses
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

import itda_lens
from itda_lens.records import without_paths
from itda_lens.saebench import workarounds
from itda_lens.saebench.evaluations import EVALUATIONS, load_config_class
from itda_lens.saebench.job import Entry, Job, result_file
from itda_lens.sources import register_with_transformer_lens

Run = Callable[[Any, str, SAE[Any]], None]

WATCH_SECONDS = 0.5


def main(path: Path, parent: int | None = None) -> None:
    """Run the job; one line in its outcomes file for each dictionary, as soon as it is done.

    Args:
        path: file of the job.
        parent: the process that reads the outcomes; once it has ended, this one ends too.
    """
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    job = Job.load(path)
    os.chdir(job.work)
    if job.model_folder is not None:
        register_with_transformer_lens(Path(job.model_folder), job.model_name)
    workarounds.load_models_once()
    errors = workarounds.LastError()
    logging.getLogger().addHandler(errors)
    config = load_config_class(EVALUATIONS[job.evaluation])(**job.config)
    run = runner(job)
    scratch = Path(job.work) / "results" / job.evaluation
    scratch.mkdir(parents=True, exist_ok=True)
    for entry in job.entries:
        errors.message, failure = None, None
        written = None
        try:
            run(dataclasses.replace(config), entry.name, load(entry, job))
            expected = result_file("", entry.name).name
            written = next((file for file in scratch.rglob("*.json") if file.name == expected), None)
        except Exception as error:
            traceback.print_exc()
            # A bare assertion says nothing but where it stands.
            place = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {str(error) or f'{place.line} ({place.name})'}"
        if written is not None:
            # Whole or not at all: SAEBench writes its files in place.
            written.replace(result_file(job.results, entry.name))
        elif failure is None:
            silent = workarounds.NO_RESULT.get(job.evaluation, "SAEBench wrote no result")
            failure = errors.message or silent
        outcome = {"name": entry.name, "failure": failure}
        with job.outcomes_file.open("a") as file:
            file.write(json.dumps(outcome) + "\n")


def _end_with(parent: int) -> None:
    """End this process, and those that it started, once the parent was killed: nobody reads the rest."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    if hasattr(os, "getpgrp") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def load(entry: Entry, job: Job) -> SAE[Any]:
    """The dictionary, on the device, under the model's name in this job."""
    if Path(entry.source).is_dir():
        sae = SAE.load_from_disk(entry.source, device=job.device)
    else:
        release, _, sae_id = entry.source.partition(":")
        sae = SAE.from_pretrained(release, sae_id, device=job.device)
    if entry.nonnegative and isinstance(sae, itda_lens.ITDA):
        sae = sae.nonnegative()
    # A dictionary names the folder or the name that it was built with; SAEBench takes this name to load
    # the model and puts it into paths (an absolute one would leave the folder).
    sae.cfg.metadata.model_name = job.model_name
    # SAEBench writes the configuration into its results. Those of older files hold paths.
    sae.cfg.metadata = SAEMetadata(**without_paths(sae.cfg.metadata.to_dict()))
    return sae


def runner(job: Job) -> Run:
    """SAEBench's function behind one signature; results go to `results/` in the current folder."""
    module = importlib.import_module(EVALUATIONS[job.evaluation].module)
    output = f"results/{job.evaluation}"
    options: dict[str, Any] = {"force_rerun": True}
    if job.evaluation == "saelens":
        return lambda config, name, sae: module.run_eval(config, [(name, sae)], job.device, output)
    if job.evaluation == "core":
        return lambda config, name, sae: module.multiple_evals(
            [(name, sae)],
            n_eval_reconstruction_batches=config.n_eval_reconstruction_batches,
            n_eval_sparsity_variance_batches=config.n_eval_sparsity_variance_batches,
            eval_batch_size_prompts=config.batch_size_prompts,
            compute_featurewise_density_statistics=config.compute_featurewise_density_statistics,
            compute_featurewise_weight_based_metrics=config.compute_featurewise_weight_based_metrics,
            exclude_special_tokens_from_reconstruction=config.exclude_special_tokens_from_reconstruction,
            dataset=config.dataset,
            context_size=config.context_size,
            output_folder=output,
            dtype=config.llm_dtype,
            device=job.device,
            force_rerun=True,
        )
    if job.evaluation == "absorption":
        workarounds.keep_absorption_in(Path(job.work) / "artifacts" / "absorption")
        workarounds.stop_at_the_last_hook()
        options = {}
    if job.evaluation == "autointerp":
        options["api_key"] = os.environ["OPENAI_API_KEY"]
    return lambda config, name, sae: module.run_eval(
        config, [(name, sae)], job.device, output_path=output, **options
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)

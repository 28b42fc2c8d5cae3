"""ITDA against its rivals in SAEBench, on SmolLM2: the table of docs/saebench.md.

    python benchmarks/saebench.py OUT [--layers 5 10] [--ks 10 20 40 80] [--d-sae 1024] [--tokens 50000]

Builds every dictionary on the same activations of Python's manual (ITDA with presets "best" and "paper",
with a mean L0 and updated, random atoms, principal components, a TopK SAE trained by SAELens), evaluates
them on texts that none of them has seen, and prints the tables. Stop it when you like: the same command
then goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from pareto import k_for

from itda_lens import fit
from itda_lens.architectures import baseline, save_inference
from itda_lens.reports import bench_table, make_console, pareto_plot
from itda_lens.saebench import bench
from itda_lens.samples import reference_prose, smollm2
from itda_lens.training import collect

FITTED: dict[str, dict[str, Any]] = {
    "itda-best": {},
    "itda-l0": dict(spread=True),
    "itda-updated": dict(spread=True, update=True),
    "itda-paper": dict(preset="paper"),
}
"""Settings of `fit`; with `spread` a mean L0 of k, as `fit` calibrates it."""

KINDS = (*FITTED, "topk", "random", "pca")

PROBED = [
    "118_us_state_CA",
    "119_us_state_TX",
    "123_world_country_United_Kingdom",
    "124_world_country_United_States",
    "125_world_country_Italy",
    "131_temp_cat_Typical Time",
    "154_athlete_sport_football",
    "155_athlete_sport_basketball",
    "156_athlete_sport_baseball",
    "22_headline_isobama",
]
"""Ten of sae-probes' data sets, short texts that a small model can tell apart."""

SETTINGS = {
    "saelens": dict(
        n_eval_reconstruction_batches=0, n_eval_sparsity_variance_batches=8, batch_size_prompts=8
    ),
    "core": dict(
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=1,
        batch_size_prompts=8,
    ),
    "sparse_probing_sae_probes": dict(dataset_names=PROBED, reg_type="l2"),
    "absorption": dict(words=6000, max_k_value=5, precalc_k_sparse_probe_sae_acts=True),
}
"""Sizes that two cores manage; everything else is SAEBench's default."""


def build_all(out: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Every dictionary that is not there yet; their folders by name."""
    folder = smollm2.fetch()
    wanted = {
        f"{kind}-k{k}-layer{layer}": (kind, k, layer)
        for layer in options.layers
        for k in options.ks
        for kind in KINDS
    }
    paths = {name: out / "dictionaries" / name for name in wanted}
    missing = [name for name in wanted if not (paths[name] / "cfg.json").exists()]
    if missing:
        hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in options.layers}
        found = collect(
            str(folder), reference_prose()[0], list(hooks.values()), max_tokens=options.tokens
        )
        for name in missing:
            kind, k, layer = wanted[name]
            x, labels = found[hooks[layer]]
            metadata = dict(
                model_name=folder.name, hook_name=hooks[layer], context_size=128, prepend_bos=True
            )
            start = time.perf_counter()
            common = dict(d_sae=options.d_sae, labels=labels, metadata=metadata)
            if kind in FITTED:
                # The paper's rule stops by itself; fewer atoms than d_sae are part of its result.
                settings = dict(FITTED[kind])
                sparsity = dict(k=k_for(k), l0=k) if settings.pop("spread", False) else dict(k=k)
                sae = fit(x, **sparsity, **settings, **common)
            else:
                sae = baseline(kind, x, k=k, epochs=options.epochs, **common)
            seconds = time.perf_counter() - start
            sae.cfg.metadata["seconds"] = round(seconds, 1)
            save_inference(sae, paths[name])
            print(f"{name}: {seconds:.1f} s", flush=True)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=50_000, help="activations to build from")
    parser.add_argument("--epochs", type=int, default=8, help="of the TopK SAE")
    parser.add_argument("--probing-ks", type=int, nargs="*", default=[20, 80])
    parser.add_argument("--absorption-ks", type=int, nargs="*", default=[20])
    parser.add_argument("--absorption-layers", type=int, nargs="*", default=[10])
    options = parser.parse_args()
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    paths = build_all(options.out, options)
    held_out = reference_prose()[1]
    common = dict(model=smollm2.fetch(), texts=held_out, settings=SETTINGS)
    results_folder = options.out / "results"

    # Codes as they are: signed for ITDA, where nothing but reconstruction is measured.
    results = bench(paths, ["saelens", "core"], results_folder, codes="signed", **common)
    # Probes on directions with one meaning each, as a TopK SAE has them.
    some = pick(paths, options.layers, options.probing_ks)
    if some:
        probes = ["sparse_probing_sae_probes"]
        results += bench(some, probes, results_folder, codes="nonnegative", **common)
    few = pick(paths, options.absorption_layers, options.absorption_ks)
    if few:
        results += bench(few, ["absorption"], results_folder, codes="nonnegative", **common)
    # How much the sign matters: one dictionary, both ways.
    name = next(name for name in (few or some or paths) if name.startswith("itda-best"))
    evals = ["core", *(["sparse_probing_sae_probes"] if some else []), *(["absorption"] if few else [])]
    both = bench({name: paths[name]}, evals, results_folder, codes="both", **common)

    console = make_console()
    for chosen in options.layers:
        rows = [r for r in results if r.dictionary.endswith(f"-layer{chosen}")]
        console.print(bench_table(rows, title=f"layer {chosen}"))
        pareto_plot(rows, options.out / f"pareto-layer{chosen}.png")
    console.print(bench_table(both, title="signed codes and their non-negative view"))
    for name, path in paths.items():
        seconds = _seconds(path)
        print(f"{name}: built in {seconds} s")


def pick(paths: dict[str, Path], layers: list[int], ks: list[int]) -> dict[str, Path]:
    ends = tuple(f"-k{k}-layer{layer}" for k in ks for layer in layers)
    return {name: path for name, path in paths.items() if name.endswith(ends)}


def _seconds(path: Path) -> float:
    return json.loads((path / "cfg.json").read_text())["metadata"]["seconds"]


if __name__ == "__main__":
    main()

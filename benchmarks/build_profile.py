"""Where the time of `itda_lens.build` goes: in the model, or in choosing atoms.

    python benchmarks/build_profile.py [--d-sae 2048 4096 8192] [--tokens 80000]

SmolLM2's residual stream after layer 10 on the text of `itda demo`, under Python's profiler. "In
the model" is `LanguageModel.capture`, the forward pass that reads activations. Of the rest, the table
shows the largest parts by function; these overlap, since calibration is coding. Nothing else should run
meanwhile. The first build, which compiles, does not count.
"""

import argparse
import cProfile
import pstats
from typing import Any

import itda_lens
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model

HOOK = "blocks.10.hook_resid_post"

KINDS: dict[str, dict[str, Any]] = {
    "ITDA": {},
    "ITDA, mean L0": dict(k=60, l0=20),
    "ITDA updated, mean L0": dict(k=60, l0=20, update=True),
    "ITDA, preset paper": dict(preset="paper"),
}


PARTS = {
    "coding": "encode",
    "Gram matrices": "gram_matrix",
    "near-duplicates": "_distinct",
    "least squares": "least_squares_atoms",
    "calibration": "calibrate_threshold",
}
"""Functions of the package outside the model, each a column of the table."""


def profiled(model: Any, texts: list[str], d_sae: int, max_tokens: int, **options: Any) -> pstats.Stats:
    profile = cProfile.Profile()
    arguments = {"k": 20, **options}
    profile.enable()
    itda_lens.build(
        model, texts, hook_names=[HOOK], d_sae=d_sae, max_tokens=max_tokens, progress=False, **arguments
    )
    profile.disable()
    return pstats.Stats(profile)


def seconds(stats: pstats.Stats, function: str) -> float:
    """Cumulative seconds of all functions of this name in the package."""
    entries: dict[Any, Any] = stats.stats  # pyright: ignore[reportAttributeAccessIssue]
    return sum(
        row[3] for (path, _, name), row in entries.items() if name == function and "itda_lens" in path
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=80_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    texts, _ = reference_prose()
    model = language_model(load()).model
    for kind in options.kinds:
        profiled(model, texts, 128, 2000, **KINDS[kind])
    columns = ["dictionary", "atoms", "seconds", "in the model", "outside", *PARTS]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for d_sae in options.d_sae:
        for kind in options.kinds:
            stats = profiled(model, texts, d_sae, options.tokens, **KINDS[kind])
            whole, inside = seconds(stats, "build"), seconds(stats, "capture")
            cells = [kind, str(d_sae), f"{whole:.1f}", f"{inside:.1f}", f"{1 - inside / whole:.0%}"]
            cells += [f"{seconds(stats, function):.1f}" for function in PARTS.values()]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

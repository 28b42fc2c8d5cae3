"""Seconds of `fit` and of training a TopK SAE on the same activations ("Time" in docs/quality.md).

    python benchmarks/fit_time.py [--d-sae 4096] [--l0 20] [--epochs 8]

SmolLM2's residual stream after layer 10 on the text of `itda demo`, 80,000 activations. Nothing else
should run meanwhile. Every `fit` runs twice, and the faster run counts. A small one before
them compiles.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from pareto import k_for, split

from itda_lens import fit
from itda_lens.architectures import train_sae
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--l0", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    x = split(language_model(load()), 10, 80_000).train.values
    d_sae, l0 = options.d_sae, options.l0
    spread: dict[str, Any] = dict(k=k_for(l0), l0=l0)
    kinds: dict[str, dict[str, Any]] = {
        "ITDA": dict(k=l0),
        "ITDA, mean L0": spread,
        "ITDA updated": dict(k=l0, update=True),
        "ITDA updated, mean L0": dict(update=True, **spread),
        "ITDA, preset thorough": dict(k=l0, preset="thorough"),
        "ITDA, preset thorough, updated, mean L0": dict(preset="thorough", update=True, **spread),
    }
    fit(x[:3000], d_sae=128, update=True, **spread)
    trained = seconds(
        lambda: train_sae(x, architecture="topk", d_sae=d_sae, k=l0, epochs=options.epochs, seed=0)
    )
    print(f"{d_sae} atoms, L0 {l0}, {len(x)} activations, {options.epochs} epochs\n")
    print("| dictionary | seconds | of the TopK SAE's |\n|---|---|---|")
    for name, arguments in kinds.items():
        took = min(seconds(lambda a=arguments: fit(x, d_sae=d_sae, **a)) for _ in range(2))
        print(f"| {name} | {took:.1f} | {took / trained:.1%} |", flush=True)
    print(f"| TopK SAE | {trained:.1f} | |")


if __name__ == "__main__":
    main()

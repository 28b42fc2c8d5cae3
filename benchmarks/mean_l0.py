"""The L0 that dictionaries of a mean L0 have on other text, as `fit` leaves them (docs/quality.md).

    python benchmarks/mean_l0.py [--layers 10] [--d-sae 1024 4096] [--l0 20]

SmolLM2's residual stream, 80,000 activations of the text of `itda demo`. Other text: eight articles left
out for validation and eight held-out ones.
"""

import argparse
from itertools import product
from typing import Any

from measures import fvu_and_l0
from pareto import k_for, split

from itda_lens import fit
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model

KINDS: dict[str, dict[str, Any]] = {"pure": {}, "updated": dict(update=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[10])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--l0", type=int, nargs="+", default=[20])
    options = parser.parse_args()
    lm = language_model(load())
    print("| layer, atoms, L0 | dictionary | labels | text built from | validation | held out |")
    print("|---|---|---|---|---|---|")
    for layer in options.layers:
        data = split(lm, layer, 80_000)
        x, labels = data.train
        texts = x[::10], data.validation, data.test.values
        for d_sae, l0, kind in product(options.d_sae, options.l0, KINDS):
            for known in (labels, None):
                itda = fit(x, d_sae=d_sae, k=k_for(l0), l0=l0, labels=known, **KINDS[kind])
                found = " | ".join(f"{fvu_and_l0(itda, text)[1]:.1f}" for text in texts)
                name = "no" if known is None else "yes"
                print(f"| {layer}, {d_sae}, {l0} | {kind} | {name} | {found} |", flush=True)


if __name__ == "__main__":
    main()

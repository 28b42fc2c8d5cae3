"""How atoms should be chosen: the presets and their settings, on SmolLM2's residual stream.

    python benchmarks/selection.py [--layers 5 10 20] [--d-sae 2048] [--k 20]
        [--sweep | --least-cosine | --prefixes | --encoders]

Text: the Python language reference, as in `itda demo`. The last eight of the articles to build from are
left out as a validation split for `--sweep`, `--least-cosine` and `--encoders`; the held-out ones are
used for the tables alone. FVU on all tokens that count; "random" is preset "best" without anything to
choose from.
"""

import argparse
import time
from contextlib import contextmanager

from measures import fvu_and_l0
from torch import Tensor

from itda_lens import ITDA, fit
from itda_lens.dictionary import EnergyRule
from itda_lens.pursuit import least_squares
from itda_lens.samples import HELD_OUT, reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model
from itda_lens.training import collect

PREFIX_METHODS = ("mp", "omp", "ols")


def activations(lm, layers: list[int], texts: list[str]) -> dict[int, Tensor]:
    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in layers}
    found = collect(lm, texts, list(hooks.values()))
    return {layer: found[hook].values for layer, hook in hooks.items()}


def fvu(itda: ITDA, x: Tensor, method: str) -> float:
    itda.cfg.method = method
    return fvu_and_l0(itda, x)[0]


@contextmanager
def settings(module, **values):
    """A module's constants, changed for a while."""
    old = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(module, name, value)


def encoders(x: Tensor, test: Tensor, d_sae: int, k: int) -> None:
    """The settings of OLS: with k nonzeros, and with a mean L0 of k on the rows measured."""
    print("| encoder | FVU, k nonzeros | FVU, mean L0 |\n|---|---|---|")
    itda = fit(x, d_sae=d_sae, k=k)
    variants = [("OMP", "omp", {})]
    variants += [(f"OLS, surplus {s}", "ols", dict(SURPLUS=s)) for s in (0.0, 0.125, 0.25, 0.5)]
    variants += [(f"OLS, ahead {a}", "ols", dict(AHEAD=a)) for a in (1.0, 0.9, 0.85, 0.7)]
    variants += [(f"OLS, distance {a}", "ols", dict(LEAST_DISTANCE=a)) for a in (1e-3, 0.03, 0.1)]
    for name, method, values in variants:
        with settings(least_squares, **values):
            itda.cfg.k, itda.cfg.threshold = k, 0.0
            fixed = fvu(itda, test, method)
            itda.calibrate(test, k, 3 * k)
            print(f"| {name} | {fixed:.4f} | {fvu(itda, test, method):.4f} |", flush=True)


def row(name: str, x: Tensor, test: Tensor, d_sae: int, k: int, **options) -> None:
    start = time.perf_counter()
    itda = fit(x, d_sae=d_sae, k=k, **options)
    seconds = time.perf_counter() - start
    print(
        f"| {name} | {itda.cfg.d_sae} | {fvu(itda, test, 'mp'):.4f} | {fvu(itda, test, 'omp'):.4f} "
        f"| {seconds:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="settings, on the validation split")
    parser.add_argument("--least-cosine", action="store_true", help="of updated atoms, likewise")
    parser.add_argument("--prefixes", action="store_true", help="and what is built with as many atoms")
    parser.add_argument("--encoders", action="store_true", help="settings of OLS, likewise")
    args = parser.parse_args()

    lm = language_model(load())
    texts, held_out = reference_prose()
    parts = {"train": texts[:-HELD_OUT], "validation": texts[-HELD_OUT:], "held out": held_out}
    data = {name: activations(lm, args.layers, part) for name, part in parts.items()}
    sizes = {name: len(found[args.layers[0]]) for name, found in data.items()}
    print(f"tokens: {sizes}; d_sae = {args.d_sae}, k = {args.k}")

    part = "validation" if args.sweep or args.least_cosine or args.encoders else "held out"
    for layer in args.layers:
        x, test = data["train"][layer], data[part][layer]
        print(f"\nlayer {layer}, {part}")
        if args.encoders:
            encoders(x, test[::8], args.d_sae, args.k)
            continue
        columns = ["atoms", "number", "FVU, MP", "FVU, OMP", "seconds"]
        if args.prefixes:
            names = [method.upper() for method in PREFIX_METHODS]
            columns = ["atoms", *(f"{kind}, {name}" for kind in ("prefix", "built") for name in names)]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        if args.least_cosine:
            row("not updated", x, test, args.d_sae, args.k)
            for cosine in (0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.0):
                options = dict(update=True, least_cosine=cosine)
                row(f"updated, least cosine {cosine}", x, test, args.d_sae, args.k, **options)
        elif args.prefixes:
            whole = fit(x, d_sae=args.d_sae, k=args.k)
            for m in (args.d_sae // 2**i for i in range(6)):
                built, prefix = fit(x, d_sae=m, k=args.k), whole.prefix(m)
                figures = [
                    fvu(itda, test, method) for itda in (prefix, built) for method in PREFIX_METHODS
                ]
                print(f"| {m} | {' | '.join(f'{figure:.4f}' for figure in figures)} |", flush=True)
        elif args.sweep:
            for cosine in (0.99, 0.95, 0.9, 0.85, 0.8, 0.7):
                rule = EnergyRule(near_duplicate=cosine)
                row(f"near-duplicates from {cosine}", x, test, args.d_sae, args.k, rule=rule)
            for factor in (2, 8):
                rule = EnergyRule(candidates_per_atom=factor)
                row(f"{factor} candidates per atom", x, test, args.d_sae, args.k, rule=rule)
            for drop in (0.3,):
                rule = EnergyRule(drop_per_round=drop)
                row(f"{drop} dropped per round", x, test, args.d_sae, args.k, rule=rule)
            for scored in (8_192, 32_768):
                rule = EnergyRule(min_scored=scored)
                row(f"{scored:,} scored", x, test, args.d_sae, args.k, rule=rule)
        else:
            for tau in (0.1, 0.2, 0.3):
                options = dict(preset="paper", loss_threshold=tau)
                row(f'"paper", tau {tau}', x, test, args.d_sae, args.k, **options)
            rule = EnergyRule(candidates_per_atom=1, near_duplicate=1.0)
            row("random, centred", x, test, args.d_sae, args.k, rule=rule)
            row('"best"', x, test, args.d_sae, args.k)


if __name__ == "__main__":
    main()

"""Other rules for choosing atoms, against that of preset "best", all from one pool of candidates.

    python benchmarks/selection_rules.py [--layer 10] [--d-sae 1024] [--k 20] [--seeds 0 1]
        [--rules refined replaced]

SmolLM2's residual stream on the text of `itda demo`; FVU on the validation split of `selection.py`,
under OMP and OLS with k nonzeros and OLS with a mean L0 of k. The rules see the same candidates (four an
atom, without near-duplicates) and the same 16,384 activations to choose by; the last ones may take any
activation for an atom, and those of preset "thorough" have more to choose by. `--rules` runs those with
such words in their names.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import cast

import torch
from selection import activations
from torch import Tensor

from itda_lens import dictionary
from itda_lens.dictionary import EnergyRule, RunningFVU
from itda_lens.dictionary.outliers import limit_outliers
from itda_lens.dictionary.selection import (
    energy_by_atom,
    first_of_direction,
    nearest_rows,
    normalize_rows,
    prune_by_energy,
)
from itda_lens.dictionary.update import update_atoms
from itda_lens.pursuit import Coding, calibrate_threshold, encode, gram_matrix
from itda_lens.samples import HELD_OUT, reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model

ROUNDS = 10
"""Rounds of the rules that admit and drop a part of the atoms at a time."""

Rule = Callable[[Tensor, Tensor, int, int], Tensor]
"""A rule: candidates, activations, atoms wanted and nonzeros in; atoms out."""


def by_energy(drop: float) -> Rule:
    def rule(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
        kept = prune_by_energy(x, candidates, n, Coding(k, "mp"), drop=drop, progress=False)
        return candidates[kept]

    return rule


def at_random(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
    return candidates[:n]


def by_regret(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
    """Drop candidates whose picks explain least more than the second-best atom would, 0.3 a round."""
    while len(candidates) > n:
        regret = torch.zeros(len(candidates), dtype=torch.float64)
        gram = candidates @ candidates.T
        for rows in x.split(128):
            correlations = rows @ candidates.T
            for _ in range(k):
                best = correlations.abs().topk(2, dim=1)
                j = best.indices[:, 0]
                regret.index_add_(
                    0, j, best.values.double().square() @ torch.tensor([1.0, -1.0]).double()
                )
                c = correlations.gather(1, j[:, None])
                correlations.addcmul_(c, gram[j], value=-1)
        size = max(n, int(0.7 * len(candidates)))
        candidates = candidates[regret.topk(size).indices.sort().values]
    return candidates


def total_error_removed(rows: Tensor, candidates: Tensor) -> Tensor:
    """The error that each candidate removes from the rows for which it is the best single one."""
    best = encode(rows, candidates, 1)
    return energy_by_atom(best, len(candidates))


def residuals(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    return x - encode(x, atoms, k, gram=gram_matrix(atoms)).decode(atoms)


def by_error_removed(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
    """Grow: admit candidates that remove most of the error so far, a tenth of the number at a time."""
    chosen = torch.zeros(len(candidates), dtype=torch.bool)
    left = x
    for i in range(1, ROUNDS + 1):
        gain = total_error_removed(left, candidates).masked_fill(chosen, -1)
        chosen[gain.topk(n * i // ROUNDS - int(chosen.sum())).indices] = True
        left = residuals(x, candidates[chosen], k)
    return candidates[chosen]


def prune_and_grow(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
    """From random atoms: drop a tenth, of least energy, and admit candidates that remove most error."""
    chosen = torch.zeros(len(candidates), dtype=torch.bool)
    chosen[:n] = True
    for _ in range(ROUNDS):
        where = chosen.nonzero().flatten()
        codes = encode(x, candidates[where], k, gram=gram_matrix(candidates[where]))
        weakest = energy_by_atom(codes, n).topk(n // ROUNDS, largest=False).indices
        gain = total_error_removed(x - codes.decode(candidates[where]), candidates)
        admitted = gain.masked_fill(chosen, -1).topk(n // ROUNDS).indices
        chosen[where[weakest]], chosen[admitted] = False, True
    return candidates[chosen]


def medoids(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
    """Clusters of directions of the activations (spherical k-means), each one's nearest candidate."""
    unit, usable = normalize_rows(x)
    unit = unit[usable]
    centres = candidates[:n]
    for _ in range(ROUNDS):
        nearest = (unit @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        centres, found = normalize_rows(sums)
        centres = torch.where(found[:, None], centres, candidates[:n])
    return candidates[nearest_rows(centres, candidates, signed=True)]


def refined(
    pool: Tensor | None = None, rounds: int = EnergyRule.rounds, samples: Sequence[Tensor] = ()
) -> Rule:
    """Candidates of most energy, moved by least squares, each then replaced by the nearest of `pool`.

    Without `pool` the nearest candidates replace them. They are moved on `samples` in turn, or without
    these on the activations that the other rules choose by.
    """

    def rule(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
        atoms = by_energy(0.5)(candidates, x, n, k)
        parts = islice(cycle(samples or [x]), rounds)
        activations = candidates if pool is None else pool
        moved = update_atoms(parts, atoms, Coding(k, "mp"), least_cosine=0.0, progress=False)
        return activations[nearest_rows(moved, activations, signed=True)]

    return rule


def replace_each(pool: Tensor) -> Rule:
    """Candidates of most energy, of which each is replaced, twice, by the best of 64 rows near it.

    The 64 rows of `pool` are those nearest to where least squares would move the atom. The best one, or
    the atom itself, explains most of the error that the other atoms leave to it.
    """

    def rule(candidates: Tensor, x: Tensor, n: int, k: int) -> Tensor:
        atoms = by_energy(0.5)(candidates, x, n, k)
        for _ in range(2):
            codes = encode(x, atoms, k, gram=gram_matrix(atoms))
            left, dense = x - codes.decode(atoms), codes.to_dense(n)
            moved, _ = normalize_rows(dense.square().sum(0)[:, None] * atoms + dense.T @ left)
            near = torch.cat([(part @ pool.T).topk(64).indices for part in moved.split(256)])
            replaced = atoms.clone()
            for i in range(n):
                users = dense[:, i].nonzero().flatten()
                own = left[users] + dense[users, i, None] * atoms[i]
                tried = torch.cat([atoms[i : i + 1], pool[near[i]]])
                replaced[i] = tried[(own @ tried.T).square().sum(0).argmax()]
            atoms = replaced
        return atoms

    return rule


THOROUGH = cast(EnergyRule, dictionary.RULES["thorough"])

RULES: dict[str, Rule] = {
    "random": at_random,
    '**energy, half dropped a round ("best")**': by_energy(0.5),
    "energy, 0.3 dropped a round": by_energy(0.3),
    "energy, 0.1 dropped a round": by_energy(0.1),
    "regret: energy less that of the second-best atom": by_regret,
    "grown by total error removed": by_error_removed,
    "prune and grow": prune_and_grow,
    "medoids of directions": medoids,
    "refined, 2 rounds, by candidates": refined(),
}


def of_any(pool: Tensor, x: Tensor) -> dict[str, Rule]:
    """Rules that may take any row of `pool`; larger samples are as large as those of "thorough"."""
    large = (x[: THOROUGH.min_updated], x[-THOROUGH.min_updated :])
    return {
        "each replaced by any activation, twice": replace_each(pool),
        "refined, 2 rounds, by any activation": refined(pool),
        "refined, 8 rounds, by any": refined(pool, 8),
        "refined, 2 rounds on larger samples, by any": refined(pool, 2, large),
        '**refined, 8 rounds on larger samples, by any ("thorough")**': refined(
            pool, THOROUGH.rounds, large
        ),
        "refined, 8 rounds on larger samples, by 16,384": refined(pool[:16_384], 8, large),
        "refined, 16 rounds on larger samples, by any": refined(pool, 16, large),
    }


def fvu(x: Tensor, atoms: Tensor, k: int, method: str, threshold: float = 0.0) -> float:
    meter = RunningFVU()
    gram = gram_matrix(atoms, method=method)
    codes = encode(x, atoms, k, method=method, threshold=threshold, gram=gram)  # pyright: ignore
    meter.update(x, codes.decode(atoms))
    return meter.value()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rules", nargs="+", default=[""], help="words of their names")
    options = parser.parse_args()
    n, k = options.d_sae, options.k
    lm = language_model(load())
    texts, _ = reference_prose()
    train, validation = (
        activations(lm, [options.layer], part)[options.layer]
        for part in (texts[:-HELD_OUT], texts[-HELD_OUT:])
    )
    mean = train.mean(dim=0, dtype=torch.float64).float()
    test = validation[:: max(1, len(validation) // 4096)] - mean
    print("| rule | seed | FVU, OMP | OLS | OLS, mean L0 | seconds |\n|---|---|---|---|---|---|")
    for seed in options.seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = train[torch.randperm(len(train), generator=generator)] - mean
        every = limit_outliers(drawn)
        x = every[-16_384:]
        unit, _ = normalize_rows(drawn)
        pool = unit[: 4 * n]
        candidates = pool[first_of_direction(pool, 0.85, signed=True)]
        for name, rule in (RULES | of_any(unit, every)).items():
            if not any(word in name for word in options.rules):
                continue
            start = time.perf_counter()
            atoms = rule(candidates, x, n, k)
            seconds = time.perf_counter() - start
            gram = gram_matrix(atoms, method="ols")
            threshold = calibrate_threshold(test, atoms, k, 3 * k, method="ols", gram=gram)
            figures = [fvu(test, atoms, k, method) for method in ("omp", "ols")]
            figures.append(fvu(test, atoms, 3 * k, "ols", threshold))
            cells = [f"{figure:.4f}" for figure in figures]
            print(f"| {name} | {seed} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Non-negative OMP over a vocabulary, against the torch forms and TransformerLens's pursuit.

    python benchmarks/nonnegative.py [--atoms 4096 49152] [--k 25] [--tokens 256] [--rounds 3] [--says]

Atoms are the first ones of SmolLM2's unembedding rows times its final norm. Tokens are its residual
stream after layer 20 on the text of `itda demo`, scaled to norm 1. "slow" is the pursuit that
TransformerLens 4 has for Jacobian-lens vectors, written here anew: one token at a time, correlations
with all atoms at each step, and a non-negative least-squares fit on all picks (scipy's `nnls`, in
float64). All forms stop where TransformerLens does, at a correlation of 3.45e-4 of the token's norm.

"equal" is the share of tokens for which the support is that of "slow", and "short" the share with fewer
than k atoms in it. A time is the least of the rounds; the slow form runs once, on a few tokens. The
first call of each form, which compiles and fills caches, does not count.

With --says, the meaning of such codes instead, at several layers: the share of tokens whose code holds
the token that the model predicts next ("in the code"), and has it as its largest coefficient ("first").
"shuffled" are these shares with the predictions of other tokens. "logit lens" is the share for which the
row of largest inner product is the prediction.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from itda_lens.pursuit import Coding, GramMatrix, PreparedAtoms, SparseCodes, gram_matrix
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model, unembedding
from itda_lens.training import collect

LAYER = 20
LAYERS = [10, 20, 25, 28]
SLOW_TOKENS = 64
NO_MORE = 3.45e-4
"""Correlation, as a share of the token's norm, from which the slow form goes on: the square root of
float32's rounding, as in TransformerLens."""


def slow(x: Tensor, atoms: Tensor, k: int) -> list[list[int]]:
    """The support of each token, found one token at a time."""
    exact, supports = atoms.double().numpy(), []
    for row in x:
        picked: list[int] = []
        coefficients = np.zeros(0)
        residual = row
        for _ in range(k):
            correlations = atoms @ residual
            correlations[picked] = -torch.inf
            best = int(correlations.argmax())
            if correlations[best] <= NO_MORE * row.norm():
                break
            picked.append(best)
            coefficients, _ = nnls(exact[picked].T, row.double().numpy())
            residual = row - torch.from_numpy(coefficients @ exact[picked]).float()
        supports.append([atom for atom, c in zip(picked, coefficients, strict=True) if c > 0])
    return supports


def supports(codes: SparseCodes) -> list[set[int]]:
    pairs = zip(codes.indices.tolist(), codes.values.tolist(), strict=True)
    return [{i for i, v in zip(*row, strict=True) if v} for row in pairs]


def least(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest call, after one that does not count."""
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took[1:])


def meaning(lm: Any, rows: Tensor, k: int, n_tokens: int) -> None:
    """What codes over the whole vocabulary say of the next token."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
    last = f"blocks.{lm.model.cfg.n_layers - 1}.hook_resid_post"
    found = collect(lm, reference_prose()[1], [*hooks, last], max_tokens=n_tokens, progress=False)
    final = lm.model.ln_final(found[last].values[:n_tokens][None])[0]
    predicted = (final @ lm.model.unembed.W_U).argmax(dim=1)
    shuffled = predicted[torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))]
    atoms = torch.nn.functional.normalize(rows, dim=1)
    coding = Coding(k, "omp", signed=False)
    prepared = PreparedAtoms(atoms, coding)
    names = ["layer", "in the code", "shuffled", "first", "shuffled", "logit lens"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for layer, hook in zip(LAYERS, hooks, strict=True):
        x = found[hook].values[:n_tokens]
        codes = prepared.encode(x)
        used = torch.where(codes.values > 0, codes.indices, -1)
        first = codes.indices.gather(1, codes.values.argmax(dim=1, keepdim=True))[:, 0]
        shares = [
            (used == predicted[:, None]).any(dim=1),
            (used == shuffled[:, None]).any(dim=1),
            first == predicted,
            first == shuffled,
            (x @ rows.T).argmax(dim=1) == predicted,
        ]
        cells = [f"{share.double().mean():.1%}" for share in shares]
        print(f"| {layer} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="*", default=[4096, 49_152])
    parser.add_argument("--k", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--says", action="store_true", help="what codes say of the next token")
    options = parser.parse_args()
    lm = language_model(load())
    rows = unembedding(lm).values
    if options.says:
        meaning(lm, rows, options.k, options.tokens)
        return
    rows = torch.nn.functional.normalize(rows, dim=1)
    hook = f"blocks.{LAYER}.hook_resid_post"
    found = collect(lm, reference_prose()[1], hook, max_tokens=options.tokens, progress=False)
    x = torch.nn.functional.normalize(found[hook].values[: options.tokens], dim=1)
    print(f"{len(x)} tokens, d = {x.shape[1]}, k = {options.k}, {torch.get_num_threads()} threads\n")
    print("| atoms | form | ms a token | equal | short |\n|---|---|---|---|---|")
    for n in options.atoms:
        atoms = rows[:n].contiguous()
        coding = Coding(options.k, "omp", signed=False, threshold=NO_MORE)
        start = time.perf_counter()
        expected = slow(x[:SLOW_TOKENS], atoms, options.k)
        print(
            f"| {n} | slow | {1000 * (time.perf_counter() - start) / SLOW_TOKENS:.1f} | | |", flush=True
        )
        forms: dict[str, GramMatrix | None] = {"torch, no Gram matrix": None}
        if n <= 16_384:
            forms["torch, Gram matrix"] = atoms @ atoms.T
        forms["as dictionaries code"] = gram_matrix(atoms, method="omp", signed=False)
        for name, gram in forms.items():
            prepared = PreparedAtoms.with_gram(atoms, coding, gram)
            codes = prepared.encode(x)
            seconds = least(lambda prepared=prepared: prepared.encode(x), options.rounds)
            found = supports(codes)
            equal = sum(set(e) == f for e, f in zip(expected, found, strict=False)) / len(expected)
            fewer = sum(len(f) < options.k for f in found) / len(found)
            kind = "none" if gram is None else str(gram.dtype).removeprefix("torch.")
            ms = 1000 * seconds / len(x)
            print(f"| {n} | {name} ({kind}) | {ms:.1f} | {equal:.0%} | {fewer:.0%} |", flush=True)


if __name__ == "__main__":
    main()

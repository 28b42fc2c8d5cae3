"""The cost of encoding, as multiples of a TopK SAE's encode in the same run.

    python benchmarks/speed.py [--atoms 4096 16384] [--k 40] [--tokens 1024] [--rounds 5] [--curves]
                               [--on-demand 65536] [--stream 1000000]
    python benchmarks/speed.py --device cuda --random 2304 [--dtype bfloat16] --atoms 16384 65536

Atoms and tokens are real: SmolLM2's residual stream after layer 10, centred, on the text of `itda demo`.
The unit is the arithmetic of SAELens's TopK encoder: one matrix product and a top-k. Every round times
every contender once, in turn, each beside the unit; a ratio is the median over rounds, so that other
work of the machine falls on both. "equal" is the share of rows whose codes have the support of a float64
pursuit's. The first round, which compiles and fills caches, does not count.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
from sae_lens import MatchingPursuitSAE, MatchingPursuitSAEConfig
from selection import activations
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor

from itda_lens.pursuit import GramRows, encode, gram_matrix, least_squares, matching, orthogonal
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model

LAYER = 10
CHECKED = 256
SLOW_ROWS = 64


def topk(x: Tensor, atoms: Tensor, k: int) -> None:
    torch.topk(torch.relu(x.to(atoms.dtype) @ atoms.T), k, dim=-1)


def saelens_pursuit(x: Tensor, atoms: Tensor, k: int) -> None:
    n, d = atoms.shape
    config = MatchingPursuitSAEConfig(
        d_in=d, d_sae=n, max_iterations=k, residual_threshold=0.0, device=str(atoms.device)
    )
    sae = MatchingPursuitSAE(config)
    sae.W_dec.data = atoms
    sae.encode(x.to(atoms.dtype))


def scikit_learn(x: Tensor, atoms: Tensor, gram: Tensor, k: int) -> None:
    orthogonal_mp_gram(gram.numpy(), (atoms @ x.T).numpy(), n_nonzero_coefs=k)


def seconds(run: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        run()
    wait()
    return time.perf_counter() - start


def compare(unit: Callable[[], object], contenders: dict, rounds: int) -> dict[str, float]:
    """Median ratio to `unit` of each contender: name -> (function, share of the rows it is given)."""
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, (run, share) in contenders.items():
            ratio = seconds(run) / share / seconds(unit)
            if i:
                ratios[name].append(ratio)
    return {name: statistics.median(found) for name, found in ratios.items()}


def equal(x: Tensor, atoms: Tensor, gram: Tensor | None, k: int, method: str) -> float:
    module = {"mp": matching, "omp": orthogonal, "ols": least_squares}[method]
    rows = x[:CHECKED]
    expected, coefficients = module.search(rows.double(), atoms.double(), None, k, True, 1e-3, 0.0)
    dense = torch.zeros(len(rows), len(atoms), dtype=torch.float64, device=x.device)
    dense.scatter_add_(1, expected.clamp(min=0), coefficients)
    found = encode(rows, atoms, k, method=method, gram=gram).to_dense(len(atoms))  # pyright: ignore
    return ((found != 0) == (dense != 0)).all(dim=1).double().mean().item()


def table(x: Tensor, atoms: Tensor, k: int, rounds: int) -> None:
    n = len(atoms)
    if atoms.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    fixed = gram_matrix(atoms)
    made = seconds(lambda: gram_matrix(atoms))
    floating = atoms @ atoms.T
    if not isinstance(fixed, Tensor) or fixed.dtype != torch.int16:
        sys.exit(f"there is no compiled pursuit of {n} atoms here")
    few, share = x[:SLOW_ROWS], SLOW_ROWS / len(x)
    contenders = {
        "MP, compiled": (lambda: encode(x, atoms, k, gram=fixed), 1),
        "MP, torch, Gram": (lambda: encode(x, atoms, k, gram=floating), 1),
        "OMP, torch, Gram": (lambda: encode(x, atoms, k, method="omp", gram=floating), 1),
        "MP, torch, one product per step (the paper's loop)": (lambda: encode(x, atoms, k), 1),
        "SAELens MatchingPursuitSAE": (lambda: saelens_pursuit(x, atoms, k), 1),
    }
    if not x.is_cuda:
        contenders |= {
            "OMP, compiled": (lambda: encode(x, atoms, k, method="omp", gram=fixed), 1),
            "OLS, compiled": (lambda: encode(x, atoms, k, method="ols", gram=fixed), 1),
            "scikit-learn orthogonal_mp_gram": (lambda: scikit_learn(few, atoms, floating, k), share),
        }
    ratios = compare(lambda: topk(x, atoms, k), contenders, rounds)
    print(f"\n{n} atoms, d = {atoms.shape[1]}, k = {k}, {len(x)} tokens\n")
    print("| encoder | times a TopK encode |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.1f} |")
    exact = ", ".join(
        f"{method.upper()} {equal(x, atoms, fixed, k, method):.2%}"
        for method in (["mp"] if x.is_cuda else ["mp", "omp", "ols"])
    )
    peak = (
        torch.cuda.max_memory_allocated() / 2**30
        if x.is_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    print(
        f"\nGram matrix, int16: {fixed.nbytes / 2**20:.0f} MiB, made in {made:.1f} s; "
        f"equal to float64, of {min(CHECKED, len(x))} rows: {exact}; "
        f"memory peak so far {peak:.1f} GiB",
        flush=True,
    )


def curves(x: Tensor, pool: Tensor, rounds: int) -> None:
    print("\n| atoms | k | tokens | MP | OMP | OLS | OMP by MP |\n|---|---|---|---|---|---|---|")
    sizes = [(n, 40, 1024) for n in (1024, 4096, 16384)]
    sizes += [(4096, k, 1024) for k in (10, 20, 80)] + [(4096, 40, b) for b in (1, 64, 256)]
    for n, k, b in sizes:
        atoms, rows = pool[:n], x[:b]
        gram = gram_matrix(atoms)

        def run(method, rows=rows, atoms=atoms, k=k, gram=gram):
            return encode(rows, atoms, k, method=method, gram=gram)

        contenders = {name: (lambda name=name, run=run: run(name), 1) for name in ("mp", "omp", "ols")}
        found = compare(lambda rows=rows, atoms=atoms, k=k: topk(rows, atoms, k), contenders, rounds)
        mp, omp, ols = found["mp"], found["omp"], found["ols"]
        print(f"| {n} | {k} | {b} | {mp:.1f} | {omp:.1f} | {ols:.1f} | {omp / mp:.1f} |", flush=True)


def on_demand(x: Tensor, atoms: Tensor, k: int, rounds: int) -> None:
    """Atoms whose Gram matrix is too large: batch after batch, as its rows come to be there."""
    n_new = len(x) // rounds
    print(f"\n{len(atoms)} atoms, k = {k}, Gram rows on demand, {n_new} new tokens a batch\n")
    print("| encoder | batch | times a TopK encode | rows held | memory, GiB |\n|---|---|---|---|---|")
    for method in ("mp", "omp", "ols"):
        gram = gram_matrix(atoms, method=method)
        if not isinstance(gram, GramRows):
            sys.exit(f"the Gram matrix of {len(atoms)} atoms is held whole; give --on-demand more")
        for i, batch in enumerate(x.chunk(rounds)):
            took = seconds(partial(encode, batch, atoms, k, method=method, gram=gram))
            ratio = took / seconds(partial(topk, batch, atoms, k))
            held = int((gram.slots >= 0).sum())
            cells = f"| {method.upper()} | {i + 1} | {ratio:.1f} | {held} | {resident():.1f} |"
            print(cells, flush=True)
        del gram


def stream(x: Tensor, atoms: Tensor, k: int, n_tokens: int) -> None:
    """Memory of the process while tokens, the same ones with noise, go through an encoder."""
    gram = gram_matrix(atoms)
    generator = torch.Generator().manual_seed(0)
    print(f"\n| tokens of {n_tokens} | memory, GiB |\n|---|---|")
    for i in range(0, n_tokens, len(x)):
        encode(x + 0.1 * torch.randn(x.shape, generator=generator), atoms, k, gram=gram)
        if 10 * i // n_tokens != 10 * (i + len(x)) // n_tokens:
            print(f"| {i + len(x)} | {resident():.2f} |", flush=True)


def resident() -> float:
    """Memory that the process holds now, in GiB."""
    return psutil.Process().memory_info().rss / 2**30


def real() -> tuple[Tensor, Tensor]:
    """Unit-norm atoms, in random order, and tokens of other articles."""
    train, held_out = reference_prose()
    lm = language_model(load())
    pool = activations(lm, [LAYER], train)[LAYER].float()
    x = activations(lm, [LAYER], held_out)[LAYER].float()
    mean = pool.mean(dim=0)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(pool[order] - mean, dim=1), x - mean


def made_up(d: int) -> tuple[Tensor, Tensor]:
    """Atoms and tokens of width d; the energy of dimension i falls as 1 / i, like a model's."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, d + 1).pow(-0.5)
    pool, x = (torch.randn(n, d, generator=generator) * scales for n in (65_536, 8192))
    return torch.nn.functional.normalize(pool, dim=1), x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", action="store_true", help="growth in atoms, k and tokens as well")
    parser.add_argument("--on-demand", type=int, help="atoms of an encoder with Gram rows on demand")
    parser.add_argument("--stream", type=int, help="tokens to put through 4,096 atoms")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", type=int, help="made-up activations of this width, not a model's")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    options = parser.parse_args()
    if options.device != "cpu" and (options.curves or options.on_demand or options.stream):
        parser.error("--curves, --on-demand and --stream are for CPUs")
    pool, everything = made_up(options.random) if options.random else real()
    pool, everything = pool.to(options.device), everything.to(options.device, options.dtype)
    x = everything[: options.tokens].contiguous()
    for n in options.atoms:
        table(x, pool[:n].contiguous(), options.k, options.rounds)
    if options.curves:
        curves(x, pool, options.rounds)
    if options.on_demand:
        on_demand(everything[: 4 * 1024], pool[: options.on_demand].contiguous(), options.k, 4)
    if options.stream:
        stream(x, pool[:4096].contiguous(), options.k, options.stream)


if __name__ == "__main__":
    main()

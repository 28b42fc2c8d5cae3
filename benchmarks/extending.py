"""More atoms for a dictionary that meets another domain: `ITDA.extended`, against other ways.

    python benchmarks/extending.py [--d-sae 2048] [--n 1024] [--k 20] [--tokens 40000] [--seeds 3]
                                   [--cache FILE]

The old domain is prose, the Python language reference of `itda demo`; the new one is code, modules of
Python's standard library. Activations are SmolLM2's residual stream after layer 10, of `--tokens` tokens
of each domain, and a fifth of that held out (other articles, other modules). FVU is that of held-out
tokens around their own mean. "unchanged" is the share of held-out prose tokens whose code is the old
one, bit for bit, and "atoms kept" the share of the old codes' atoms that are in the new codes. Seconds
are processor time for making the dictionary, activations at hand. Figures are means over seeds, with
the sample standard deviation of FVU.

- as it was: the dictionary of prose.
- extended: `extended` by n activations of code.
- random: the same number of random activations of code, as further atoms.
- anew, code / both: a dictionary of d + n atoms from the tokens of code alone, or of both domains.
- residual ITDA / TopK: n atoms or latents for what the old dictionary leaves of code; "20 + 5" nonzeros
  are 20 of the old dictionary and 5 of these. TopK is trained for 10 epochs.
"""

import argparse
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import itda_lens
from itda_lens import ITDA, fit
from itda_lens.architectures import train_sae
from itda_lens.dictionary import RunningFVU
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model
from itda_lens.training import collect

HOOK = "blocks.10.hook_resid_post"
EPOCHS = 10

Model = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations -> their reconstructions, and the number of nonzeros of each code."""


def modules() -> tuple[list[str], list[str]]:
    """Source of the standard library: modules to build from, and others."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(errors="ignore") for file in files if file.stat().st_size > 2000]
    held_out = texts[::5]
    return [text for i, text in enumerate(texts) if i % 5], held_out


def dictionary(itda: ITDA) -> Model:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = itda.encode_sparse(x)
        return itda.decode_sparse(codes), codes.l0()

    return run


def two(itda: ITDA, further) -> Model:
    """A dictionary, and another SAE for what it leaves."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        found, l0 = dictionary(itda)(x)
        left = x - found
        codes = further.encode(left)
        return found + further.decode(codes), l0 + (codes != 0).sum(dim=-1)

    return run


def fvu(model: Model, x: Tensor) -> tuple[float, float]:
    meter, nonzeros = RunningFVU(), 0
    for rows in x.split(1024):
        found, l0 = model(rows)
        meter.update(rows, found)
        nonzeros += int(l0.sum())
    return meter.value(), nonzeros / len(x)


def with_k(itda: ITDA, k: int) -> ITDA:
    fewer = itda.prefix(itda.cfg.d_sae)
    fewer.cfg.k = k
    return fewer


def unchanged(old: ITDA, new: ITDA, x: Tensor) -> tuple[float, float]:
    """The share of codes that are equal bit for bit, and of the old codes' atoms that are in the new."""
    same, kept = [], []
    for rows in x.split(1024):
        a, b = old.encode_sparse(rows), new.encode_sparse(rows)
        same.append(((a.indices == b.indices) & (a.values == b.values)).all(dim=1))
        there = (a.indices[:, :, None] == b.indices[:, None]) & (b.values != 0)[:, None]
        used = a.values != 0
        kept.append((there.any(dim=2) & used).sum(dim=1) / used.sum(dim=1).clamp(min=1))
    return torch.cat(same).double().mean().item(), torch.cat(kept).double().mean().item()


def random_rows(x: Tensor, itda: ITDA, n: int, seed: int) -> ITDA:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    rows = x[order] - itda.b_dec
    return itda_lens.union(itda, ITDA.from_atoms(rows, k=itda.cfg.k))


def timed(make: Callable[[], Model | ITDA]) -> tuple[Model | ITDA, float]:
    start = time.process_time()
    made = make()
    return made, time.process_time() - start


def ways(data: dict[str, Tensor], d: int, n: int, k: int, seed: int):
    """(name, atoms, model, dictionary or None, seconds) of each way."""
    prose, code = data["prose"], data["code"]
    few = max(1, k // 4)
    old, seconds = timed(lambda: fit(prose, d_sae=d, k=k, seed=seed))
    yield "as it was", d, dictionary(old), old, seconds
    made, seconds = timed(lambda: old.extended(code, n, seed=seed))
    yield "extended", d + n, dictionary(made), made, seconds
    made, seconds = timed(lambda: random_rows(code, old, n, seed))
    yield "random", d + n, dictionary(made), made, seconds
    for name, x in (("anew, code", code), ("anew, both", torch.cat([prose, code]))):
        made, seconds = timed(lambda x=x: fit(x, d_sae=d + n, k=k, seed=seed))
        yield name, d + n, dictionary(made), None, seconds
    for mine in (k, k - few):
        first = with_k(old, mine)

        @torch.no_grad()
        def left(first=first):
            return torch.cat([rows - first(rows) for rows in code.split(1024)])

        further, seconds = timed(lambda left=left: fit(left(), d_sae=n, k=few, seed=seed))
        yield f"residual ITDA, {mine} + {few}", d + n, two(first, further), None, seconds
        with torch.enable_grad():
            further, seconds = timed(
                lambda left=left: train_sae(
                    left(), architecture="topk", d_sae=n, k=few, seed=seed, epochs=EPOCHS
                )
            )
        yield f"residual TopK, {mine} + {few}", d + n, two(first, further), None, seconds


def activations(n_tokens: int, cache: Path | None) -> dict[str, Tensor]:
    """Tokens of both domains, to build from and held out; from the cache where it has them."""
    if cache is not None and cache.exists():
        return load_file(cache)
    lm = language_model(load())
    data = {}
    for name, splits in (("prose", reference_prose()), ("code", modules())):
        for kind, texts, most in zip(("", ", held out"), splits, (n_tokens, n_tokens // 5), strict=True):
            found = collect(lm, texts, HOOK, max_tokens=most, progress=False)[HOOK].values[:most]
            data[name + kind] = found.contiguous()
            print(f"{name}{kind}: {len(found)} tokens", flush=True)
    if cache is not None:
        save_file(data, cache)
    return data


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="file for the activations, to use them again")
    options = parser.parse_args()
    data = activations(options.tokens, options.cache)
    figures: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(options.seeds):
        old = None
        for name, atoms, model, itda, seconds in ways(data, options.d_sae, options.n, options.k, seed):
            old = itda if old is None else old
            new, l0 = fvu(model, data["code, held out"])
            before, _ = fvu(model, data["prose, held out"])
            nothing = float("nan")
            same, kept = nothing, nothing
            if itda is not None:
                same, kept = unchanged(old, itda, data["prose, held out"])
            figures.setdefault(name, []).append((atoms, l0, new, before, same, kept, seconds))
            print(seed, name, *(f"{value:.4f}" for value in figures[name][-1]), flush=True)
    names = ["", "atoms", "L0", "FVU, code", "FVU, prose", "unchanged", "atoms kept", "seconds"]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name, rows in figures.items():
        atoms, l0, new, before, same, kept, seconds = (
            statistics.mean(column) for column in zip(*rows, strict=True)
        )
        spread = [statistics.stdev(row[i] for row in rows) if len(rows) > 1 else 0.0 for i in (2, 3)]
        share = " | " if same != same else f"{same:.1%} | {kept:.0%}"
        print(
            f"| {name} | {atoms:.0f} | {l0:.1f} | {new:.4f} ± {spread[0]:.4f} | {before:.4f} ± "
            f"{spread[1]:.4f} | {share} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()

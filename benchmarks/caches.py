"""A cache of activations against the model: "Size and rounding" of docs/caches.md.

    python benchmarks/caches.py OUT [--tokens 20000] [--d-sae 1024]

SmolLM2 reads the beginning of Python's language reference at one layer, in float32 and in bfloat16. A
dictionary of k = 20 is built from the model and from each cache, and measured on held-out articles. The
folder OUT must not exist yet.
"""

import argparse
import time
from pathlib import Path

import torch

from itda_lens.analysis import evaluate_rows
from itda_lens.samples import reference_prose, smollm2
from itda_lens.sources import CachedSource, ModelSource, cache, gathered, language_model
from itda_lens.training import build_from, recipe_of

HOOK = "blocks.10.hook_resid_post"
HELD_OUT_TOKENS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--d-sae", type=int, default=1024)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    recipe = recipe_of(d_sae=options.d_sae, k=20)
    texts, rest = reference_prose()
    held_out = None
    print(
        "| model | kept as | MB | write, s | build, s | FVU held out | equal to a build from the model |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model = language_model(str(smollm2.fetch()), dtype=dtype)
        if held_out is None:  # of the float32 model, for all
            held_out = gathered(ModelSource(model, rest, HOOK, max_tokens=HELD_OUT_TOKENS))[HOOK].values
        name = str(dtype).removeprefix("torch.")
        begun = time.perf_counter()
        built = build_from(ModelSource(model, texts, HOOK, max_tokens=options.tokens), recipe)[HOOK]
        seconds = time.perf_counter() - begun
        (found,) = evaluate_rows(built, held_out)
        print(f"| {name} | no cache | | | {seconds:.1f} | {found.fvu:.4f} | |", flush=True)
        for kept_as in ("exact", "bfloat16") if dtype == torch.float32 else ("exact",):
            source = ModelSource(model, texts, HOOK, max_tokens=options.tokens)
            folder = options.out / f"{name}-{kept_as}"
            begun = time.perf_counter()
            cache(source, folder, dtype=kept_as)
            written = time.perf_counter() - begun
            size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            begun = time.perf_counter()
            again = build_from(CachedSource(folder), recipe)[HOOK]
            seconds = time.perf_counter() - begun
            (found,) = evaluate_rows(again, held_out)
            equal = torch.equal(again.W_dec, built.W_dec) and list(again.labels) == list(built.labels)
            print(
                f"| {name} | {kept_as} | {size:.0f} | {written:.1f} | {seconds:.1f} | {found.fvu:.4f} | "
                f"{'yes' if equal else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

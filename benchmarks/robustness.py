"""Dictionaries where activations are difficult: massive ones, attention heads, MLP outputs, few tokens.

    python benchmarks/robustness.py [--d-sae 1024] [--k 20] [--tokens 30000]

Text: the Python language reference on SmolLM2, as in `itda demo`; measured on the first 4,000 tokens of
the held-out articles. "Typical" tokens have less than eight times the median norm.
"""

import argparse
import warnings

import torch
from measures import fvu_and_l0

from itda_lens import fit
from itda_lens.architectures import random_atoms
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import language_model
from itda_lens.training import collect

HOOKS = {
    False: (
        "blocks.20.hook_resid_post",
        "blocks.10.attn.hook_z",
        "blocks.20.attn.hook_z",
        "blocks.10.hook_mlp_out",
        "blocks.20.hook_mlp_out",
    ),
    True: ("blocks.20.hook_resid_post",),
}
"""Hook points, by whether position 0 and special tokens are kept."""

TYPICAL = 8


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30_000)
    options = parser.parse_args()
    size = dict(d_sae=options.d_sae, k=options.k)
    rules = {
        "best": lambda x: fit(x, **size),
        "best, updated": lambda x: fit(x, update=True, **size),
        "thorough": lambda x: fit(x, preset="thorough", **size),
        "thorough, updated": lambda x: fit(x, preset="thorough", update=True, **size),
        "random": lambda x: random_atoms(x, **size),
        "paper": lambda x: fit(x, preset="paper", **size),
    }
    lm = language_model(load())
    texts, held_out = reference_prose()
    warnings.simplefilter("default")
    print("| hook | largest norm / median | massive held out |", *(f"{rule} |" for rule in rules))
    print("|---" * (3 + len(rules)) + "|")
    for keep, hooks in HOOKS.items():
        common = dict(hook_names=hooks, keep_special_tokens=keep, progress=False)
        train = collect(lm, texts, max_tokens=options.tokens, **common)
        test = collect(lm, held_out, max_tokens=4000, **common)
        for hook in hooks:
            x, y = train[hook].values, test[hook].values
            norms = y.norm(dim=-1)
            typical = norms < TYPICAL * norms.median()
            cells = [hook + (", position 0 kept" if keep else "")]
            cells.append(f"{(x.norm(dim=-1).max() / x.norm(dim=-1).median()).item():.0f}")
            cells.append(str(int((~typical).sum())))
            for rule in rules.values():
                itda = rule(x)
                every, usual = fvu_and_l0(itda, y)[0], fvu_and_l0(itda, y[typical])[0]
                cells.append(f"{every:.3f}" if typical.all() else f"{every:.4f} ({usual:.3f})")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

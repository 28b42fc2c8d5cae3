"""Preset "paper" against the paper's claims, and mistakes that ruin a replication: docs/replication.md.

    python benchmarks/replication.py [--layer 10] [--tokens 40000] [--starts]

Text: the Python language reference on SmolLM2, as in `itda demo`; FVU and the CE-loss score are of the
held-out articles, on the tokens that count whatever the dictionary was built from.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from measures import fvu_and_l0
from torch import Tensor

from itda_lens import ITDA, fit
from itda_lens.analysis import evaluate
from itda_lens.dictionary import GreedyRule
from itda_lens.pursuit import Coding
from itda_lens.sae import assemble
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import LanguageModel, language_model
from itda_lens.training import collect

ALIKE = 0.95
"""Cosine from which an atom counts as a near-duplicate of an earlier one."""


class Bench:
    """A model, a hook point, and the activations that dictionaries are measured on."""

    def __init__(self, lm: LanguageModel, layer: int, tokens: int, ce_tokens: int) -> None:
        self.lm, self.hook, self.ce_tokens = lm, f"blocks.{layer}.hook_resid_post", ce_tokens
        self.texts, self.held_out = reference_prose()
        self.train = self.activations(self.texts, tokens)
        self.test = self.activations(self.held_out, None)

    def activations(self, texts: Iterable[str], tokens: int | None, **options: Any) -> Tensor:
        found = collect(self.lm, list(texts), [self.hook], max_tokens=tokens, progress=False, **options)
        return found[self.hook].values

    def table(self, title: str, rows: list[tuple[Any, ...]], *more: str) -> None:
        """Print a table; a row is a name, a dictionary and the entries of the columns `more`."""
        names = ["dictionary", "atoms", "L0", "FVU", "CE-loss score", *more]
        print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for _, itda, *_ in rows:
            itda.cfg.metadata.hook_name = self.hook
        found = evaluate(
            self.lm, [row[1] for row in rows], self.held_out, max_tokens=self.ce_tokens, progress=False
        )
        for (name, itda, *cells), evaluation in zip(rows, found, strict=True):
            fvu, l0 = fvu_and_l0(itda, self.test)
            figures = [
                f"{itda.cfg.d_sae:,}",
                f"{l0:.1f}",
                f"{fvu:.4f}",
                f"{evaluation.ce_loss_score:.4f}",
            ]
            print(f"| {' | '.join([name, *figures, *cells])} |", flush=True)


def random_uncentred(x: Tensor, d_sae: int, k: int) -> ITDA:
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:d_sae].sort().values
    atoms = torch.nn.functional.normalize(x[drawn], dim=-1)
    return assemble(atoms, torch.zeros_like(x[0]), coding=Coding(k, "mp"))


def random_centred(x: Tensor, d_sae: int, k: int) -> ITDA:
    mean = x.mean(dim=0)
    itda = random_uncentred(x - mean, d_sae, k)
    itda.b_dec.copy_(mean)
    return itda


def paper(x: Tensor, d_sae: int | None, k: int, **options: Any) -> ITDA:
    return fit(x, d_sae=d_sae, k=k, preset="paper", **options)


def paper_centred(x: Tensor, d_sae: int, k: int) -> ITDA:
    mean = x.mean(dim=0)
    itda = paper(x - mean, d_sae, k)
    itda.b_dec.copy_(mean)
    return itda


def share_alike(itda: ITDA) -> str:
    similar = (itda.W_dec @ itda.W_dec.T).abs().tril(diagonal=-1) >= ALIKE
    return f"{similar.any(dim=-1).float().mean().item():.0%}"


def starts(bench: Bench, contexts: int = 16, k: int = 40) -> None:
    """Where the rule starts: the beginning of the first batch, of 16 contexts, or a draw from it.

    Also how alike the labels of two draws are.
    """
    batch = contexts * 127  # tokens that count; the first atoms are of this batch
    print("\n| atoms | start | FVU | Jaccard of labels with the first draw |\n|---|---|---|---|")
    for d_sae in (512, 1024):
        drawn = None
        for start, seed in (("first", 0), *(("random", seed) for seed in range(5))):
            rule = GreedyRule(start=start)  # pyright: ignore[reportArgumentType]
            itda = fit(bench.train, d_sae=d_sae, k=k, rule=rule, seed=seed, batch_size=batch)
            own = {label.row for label in itda.labels}
            drawn = own if start == "random" and drawn is None else drawn
            alike = "" if drawn is None else f"{len(own & drawn) / len(own | drawn):.3f}"
            fvu, _ = fvu_and_l0(itda, bench.test)
            print(f"| {d_sae:,} | {start}, seed {seed} | {fvu:.4f} | {alike} |", flush=True)


def padded(bench: Bench, tokens: int) -> tuple[Tensor, Tensor]:
    """Activations at every position of short texts padded to 128 tokens, and which are padding."""
    tokenizer: Any = bench.lm.tokenizer
    paragraphs = [p for text in bench.texts for p in text.split("\n\n") if len(p) > 40]
    values, padding, n = [], [], 0
    for start in range(0, len(paragraphs), 16):
        encoded = tokenizer(
            paragraphs[start : start + 16], padding="max_length", truncation=True, max_length=128,
            return_tensors="pt",
        )  # fmt: skip
        everywhere = torch.ones_like(encoded["input_ids"], dtype=torch.bool)
        found = bench.lm.capture(encoded["input_ids"], everywhere, [bench.hook])[bench.hook]
        values.append(found.flatten(0, 1).float())
        padding.append((encoded["attention_mask"] == 0).flatten())
        n += len(values[-1])
        if n >= tokens:
            break
    return torch.cat(values), torch.cat(padding)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--ce-tokens", type=int, default=2048)
    parser.add_argument("--starts", action="store_true", help="only the effect of where the rule starts")
    options = parser.parse_args()
    bench = Bench(language_model(load()), options.layer, options.tokens, options.ce_tokens)
    x = bench.train
    print(f"layer {options.layer}, {len(x)} tokens to build from, {len(bench.test)} held out")

    if options.starts:
        starts(bench)
        return

    taus = (0.15, 0.2, 0.3, 0.4, 0.5)
    bench.table(
        "tau against size, k = 40, no limit on the atoms, 20,000 tokens",
        [(f"paper, tau {tau}", paper(x[:20_000], None, 40, loss_threshold=tau)) for tau in taus],
    )
    rows = []
    for d_sae in (512, 1024, 2048, 4096):
        rows.append(("paper", paper(x, d_sae, 40)))
        rows.append(("random, not centred, MP", random_uncentred(x, d_sae, 40)))
        rows.append(("random, centred, MP", random_centred(x, d_sae, 40)))
        rows.append(("best", fit(x, d_sae=d_sae, k=40)))
    bench.table("width, k = 40", rows)

    rows = []
    for k in (10, 20, 40, 80):
        rows.append((f"paper, k = {k}", paper(x, 2048, k)))
        rows.append((f"best, k = {k}", fit(x, d_sae=2048, k=k)))
    bench.table("nonzeros, 2,048 atoms", rows)

    clean, centred = paper(x, 2048, 40), paper_centred(x, 2048, 40)
    rows = [
        ("paper", clean, share_alike(clean), "0"),
        ("paper, centred", centred, share_alike(centred), "0"),
    ]
    for size in (256, 16_384):
        itda = paper(x, 2048, 40, batch_size=size)
        rows.append((f"paper, {size:,} activations at once", itda, share_alike(itda), "0"))
    special = bench.activations(bench.texts, options.tokens, keep_special_tokens=True)
    itda = paper(special, 2048, 40)
    own = sum(torch.equal(special[label.row], special[0]) for label in itda.labels)
    rows.append(("paper, position 0 kept", itda, share_alike(itda), str(own)))
    every, padding = padded(bench, options.tokens)
    itda = paper(every, 2048, 40)
    own = int(padding[[label.row for label in itda.labels]].sum())
    share = padding.float().mean().item()
    rows.append((f"paper, padding taken for text ({share:.0%})", itda, share_alike(itda), str(own)))
    itda = paper(every[~padding], 2048, 40)
    rows.append(("paper, the same text, no padding", itda, share_alike(itda), "0"))
    bench.table("what goes wrong, 2,048 atoms, k = 40", rows, "near-duplicates", "wasted atoms")


if __name__ == "__main__":
    main()

"""Figures of docs/look.md: how well labels tell where atoms fire, and how often `decompose` warns.

    python benchmarks/looking.py

It compares the dictionary that ships with the package with random activations of equal number, drawn
from 20,000 tokens of the same text, on the articles that the demo holds out. Then it takes apart 100
windows of 60 characters of these articles, and sentences of other kinds, and counts the warnings.
"""

import itda_lens
from itda_lens.analysis import decompose, examples
from itda_lens.architectures import random_atoms
from itda_lens.samples import reference_prose, smollm2
from itda_lens.sources import language_model
from itda_lens.training import collect

TOKENS, WINDOW, WINDOWS = 20_000, 60, 100
FOREIGN = (
    "The cat sat on the mat.",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "The president signed the treaty in Geneva on Tuesday after months of negotiations.",
    "Liebe Grüße aus Berlin, wo die Sonne scheint.",
    "Mix the flour with two eggs and a little milk, then bake for half an hour.",
    "The striker scored twice in the second half and the crowd went wild.",
    "She whispered that she had never loved anyone else, and closed the door.",
    "Water boils at a lower temperature on high mountains, where the air is thin.",
)


def main() -> None:
    model = language_model(smollm2.fetch(), device="cpu")
    texts, held_out = reference_prose()
    demo = itda_lens.load("demo")
    hook = demo.cfg.metadata.hook_name
    x = collect(model, texts, hook, max_tokens=TOKENS)[hook]
    drawn = random_atoms(
        x.values, d_sae=demo.cfg.d_sae, k=demo.cfg.k, labels=x.labels,
        metadata={"hook_name": hook, "context_size": 128, "prepend_bos": True},
    )  # fmt: skip
    print(f"{'atoms':20}{'label F1':>10}{'shuffled':>10}{'unexplained, median':>22}")
    for name, dictionary in (("demo", demo), ("random activations", drawn)):
        found = examples(model, dictionary, held_out)
        own, shuffled = found.label_f1() or (float("nan"), float("nan"))
        print(f"{name:20}{own:10.3f}{shuffled:10.4f}{found.unexplained[500]:22.3f}")
    text = " ".join("\n".join(held_out).split())
    step = len(text) // WINDOWS
    windows = [text[i * step : i * step + WINDOW] for i in range(WINDOWS)]
    for name, several in (("held-out windows", windows), ("foreign sentences", FOREIGN)):
        warned = sum(decompose(model, demo, one).warning is not None for one in several)
        print(f"{name}: {warned} of {len(several)} are told as unlike")


if __name__ == "__main__":
    main()

"""Does diffing find what a model was taught? A planted topic, and nulls without one.

    python benchmarks/model_diffing.py OUT [--layers 1 3 5] [--seeds 0 1] [--d-sae 1024]

A small model (benchmarks/small_models.py, into OUT/models) is tuned on a little more of its own text,
with and without 200 short texts on bee-keeping, which it has never seen: OUT/models/planted-S and
plain-S, each with the order of the text of seed S. Then `itda_lens.compare.diff_models` looks at pairs
of them, on the Python language reference with twelve other texts on bee-keeping among its articles.

Precision@20 is the share of the first twenty atoms whose label lies in a text on bee-keeping, and of
those whose most foreign token does; random is that share among all atoms. "unshared" ranks only atoms
whose label the other dictionary lacks. The list holds the atoms with a false-discovery rate of 10 % or
less. It should be empty for two models that were tuned on the same topics. Figures are kept in
OUT/results.jsonl.
"""

import argparse
import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from results import Results
from small_models import contexts, docstrings, learn, opened, save, split, trained

from itda_lens.compare import diff_models
from itda_lens.samples import reference_prose
from itda_lens.sources import language_model

NOUNS = (
    "hive queen drone worker swarm comb frame nectar pollen honey "
    "brood smoker beekeeper apiary wax mite feeder orchard clover meadow"
).split()
VERBS = (
    "gathers guards inspects feeds builds carries seals divides warms replaces follows cleans"
).split()
KINDS = "golden restless heavy quiet young old weak strong sticky fragrant".split()
PLACES = (
    "in early spring",
    "before the first frost",
    "at the edge of the orchard",
    "under the lime trees",
    "after the rain",
    "when the clover blooms",
)

TUNED_ON = 1500
"""Contexts that a model is tuned on, once each."""

RATE = 5e-4
"""Learning rate of the tuning, which ends within the warm-up: a quarter of this is reached."""

EVERY = 10
"""One text in this number is on bee-keeping, until all of those are there."""

LISTED = 0.1


def bee_keeping(n: int, seed: int) -> list[str]:
    """`n` texts of twelve sentences each."""
    draw = random.Random(seed)
    texts = []
    for _ in range(n):
        sentences = []
        for _ in range(12):
            one, other = draw.sample(NOUNS, 2)
            sentences.append(
                f"The {draw.choice(KINDS)} {one} {draw.choice(VERBS)} the {draw.choice(KINDS)} {other} "
                f"{draw.choice(PLACES)}."
            )
        texts.append(" ".join(sentences))
    return texts


def tuned(models: Path, seed: int, plant: bool) -> Path:
    """The folder of a tuned model; tuned first if it is not there."""
    folder = models / f"{'planted' if plant else 'plain'}-{seed}"
    if folder.exists():
        return folder
    model, tokenizer = opened(trained(models, "small", 0, checkpoints=True))
    own = contexts(tokenizer, split(docstrings())[0])
    topic = contexts(tokenizer, bee_keeping(200, seed=1)) if plant else own[:0]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    data = torch.cat([own[order[: TUNED_ON - len(topic)]], topic])
    losses = [loss for _, loss in learn(model.train(), data, seed, epochs=1, rate=RATE)]
    save(model, tokenizer, folder, {"loss": sum(losses[-10:]) / 10, "topic_contexts": len(topic)})
    return folder


def texts_with_topic() -> tuple[list[str], set[int]]:
    """The language reference with other texts on bee-keeping in between; which rows those are."""
    topic, texts, rows = bee_keeping(12, seed=99), [], set()
    for article in reference_prose()[0]:
        if len(texts) % EVERY == EVERY - 1 and topic:
            rows.add(len(texts))
            texts.append(topic.pop())
        texts.append(article)
    return texts, rows


def measure(a: Path, b: Path, layer: int, d_sae: int, tokens: int) -> dict[str, Any]:
    texts, rows = texts_with_topic()
    models = []
    for folder in (a, b):
        model, tokenizer = opened(folder)
        models.append(language_model(model, tokenizer=tokenizer))
    found = diff_models(
        *models, texts, f"blocks.{layer}.hook_resid_post", d_sae=d_sae, k=16, max_tokens=tokens
    )
    on_topic = [difference.label.row in rows for difference in found]
    unshared = [difference.label.row in rows for difference in found if not difference.shared]
    listed = [difference for difference in found if difference.q <= LISTED]
    return {
        "precision": sum(on_topic[:20]) / 20,
        "example_precision": sum(d.examples[0].row in rows for d in found[:20]) / 20,
        "example_random": sum(d.examples[0].row in rows for d in found) / len(found),
        "random": sum(on_topic) / len(on_topic),
        "unshared": len(unshared),
        "unshared_precision": sum(unshared[:20]) / max(1, len(unshared[:20])),
        "listed": len(listed),
        "listed_on_topic": sum(d.examples[0].row in rows for d in listed),
        "smallest_q": found[0].q,
        "first": [difference.label.token for difference in found[:10]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=60_000)
    options = parser.parse_args()

    models = options.out / "models"
    plain = [tuned(models, seed, plant=False) for seed in options.seeds]
    planted = [tuned(models, seed, plant=True) for seed in options.seeds]
    base = trained(models, "small", 0, checkpoints=True)
    pairs = [("planted", base, b) for b in planted]
    pairs += [("planted", a, b) for a, b in zip(plain, planted, strict=True)]
    pairs += [("null", base, b) for b in plain]
    pairs += [("null", side[i], side[i - 1]) for side in (plain, planted) for i in range(len(side))]

    results = Results(options.out)
    print("| layer | first | second | label P@20 | random | token P@20 | random | unshared P@20 "
          "| listed | on topic | smallest q |")  # fmt: skip
    print("|" + "---|" * 11)
    for layer, (kind, a, b) in product(options.layers, pairs):
        setting = dict(layer=layer, kind=kind, a=a.name, b=b.name)
        setting |= dict(d_sae=options.d_sae, tokens=options.tokens)
        row = results.once(setting, partial(measure, a, b, layer, options.d_sae, options.tokens))
        print(
            f"| {layer} | {a.name} | {b.name} | {row['precision']:.2f} | {row['random']:.3f} "
            f"| {row['example_precision']:.2f} | {row['example_random']:.3f} "
            f"| {row['unshared_precision']:.2f} ({row['unshared']}) | {row['listed']} "
            f"| {row['listed_on_topic']} | {row['smallest_q']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

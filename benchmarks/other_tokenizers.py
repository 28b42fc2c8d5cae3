"""Label similarity of two models with other tokenizers: "Other tokenizers" of docs/compare.md.

    python benchmarks/other_tokenizers.py OUT [--characters 54000] [--d-sae 2048]

A small model (trained once, kept in OUT/models) and SmolLM2 read the beginning of Python's language
reference, and get dictionaries of three layers each. The last row is what two choices of that number of
atoms would share if each were drawn at random from the tokens of its model.
"""

import argparse
from itertools import product
from pathlib import Path

from small_models import trained

from itda_lens import fit, jaccard
from itda_lens.compare.places import n_shared, places
from itda_lens.samples import reference_prose, smollm2
from itda_lens.sources import language_model
from itda_lens.training import collect

K = 16
LAYERS = {"small": (1, 3, 5), "smollm2": (5, 15, 25)}


def beginning(characters: int) -> list[str]:
    """The first articles, up to this number of characters."""
    texts, left = [], characters
    for text in reference_prose()[0]:
        if left <= 0:
            break
        texts.append(text[:left])
        left -= len(texts[-1])
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=54_000)
    parser.add_argument("--d-sae", type=int, default=2048)
    options = parser.parse_args()
    texts = beginning(options.characters)
    folders = {
        "small": str(trained(options.out / "models", "small", 0)),
        "smollm2": str(smollm2.fetch()),
    }
    dictionaries, read = {}, {}
    for name, folder in folders.items():
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS[name]]
        found = collect(language_model(folder, loader="huggingface"), texts, hooks)
        read[name] = next(iter(found.values())).labels
        dictionaries[name] = [
            fit(x.values, d_sae=options.d_sae, k=K, labels=x.labels) for x in found.values()
        ]
    tokens = {name: len(labels) for name, labels in read.items()}
    print(f"tokens: {tokens}\n\n| match | Jaccard |\n|---|---|")
    for match in ("span", "overlap"):
        figures = [jaccard(a, b, match) for a, b in product(*dictionaries.values())]
        print(f"| {match} | {min(figures):.3f} to {max(figures):.3f} |")
    sets = [{place for place in places(labels, "span") if place} for labels in read.values()]
    common = n_shared(*sets, "span")
    chance = common * (options.d_sae / len(sets[0])) * (options.d_sae / len(sets[1]))
    print(f"| two random choices, span | {chance / (2 * options.d_sae - chance):.3f} |")
    print(f"\ntokens that both have: {common}")


if __name__ == "__main__":
    main()

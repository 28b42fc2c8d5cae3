"""Which layer of another model is this? Accuracy of every measure, over every ordered pair of models.

    python benchmarks/layer_matching.py OUT [--architectures small large] [--seeds 0 1 2 3]
        [--d-sae 256 512 1024] [--tokens 10000 40000] [--presets best paper random]
    python benchmarks/layer_matching.py OUT --models MODEL MODEL ... [--texts FILE] [--device cuda]

Kornblith et al. (2019); table 1 of Leask et al. (2025). benchmarks/small_models.py trains the models,
into OUT/models; or name some, such as those of the paper on the hub: stanford-crfm/alias-gpt2-small-x21,
stanford-crfm/battlestar-gpt2-small-x49, ..., stanford-crfm/arwen-gpt2-medium-x21, .... Dictionaries of
all models are built from the same tokens, at the residual stream after every layer; the other measures
see the activations of these tokens.

Figures are kept in OUT/results.jsonl and not measured again: stop it when you like. Tables come at the
end, and OUT/layers.png with the mean matrices of the models of the first architecture.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from results import Results
from scipy.stats import bootstrap
from small_models import ARCHITECTURES, trained

from itda_lens import ITDA, fit
from itda_lens.compare import (
    OF_LABELS,
    Measure,
    activation_similarity,
    compare,
    layer_matching_accuracy,
)
from itda_lens.samples import reference_prose
from itda_lens.sources import iterate_texts, language_model
from itda_lens.training import Activations, collect

matplotlib.use("agg")
from matplotlib import pyplot

MEASURES: dict[Measure, str] = {
    "regression": "linear regression",
    "svcca": "SVCCA",
    "cka": "linear CKA",
    "relative": "relative representations",
    "relative-centred": "relative representations, centred",
    "jaccard": "ITDA, Jaccard",
    "weighted": "ITDA, Jaccard by usage",
}

K = 16
"""Nonzeros per code, where atoms are chosen and where their usage is measured."""

PRESETS = ("best", "best, own samples", "paper")
"""How atoms are chosen; with "own samples" each model's candidates are drawn with a seed of its own."""


class Models:
    """Activations after every layer of every model, of the same tokens, read when first asked for."""

    def __init__(self, options: Any) -> None:
        self._options = options
        self._layers: dict[str, list[Activations]] = {}
        self._vocabulary: dict[str, int] | None = None
        self._texts = list(iterate_texts(options.texts)) if options.texts else reference_prose()[0]
        if options.models:
            self.names: list[str] = options.models
        else:
            chosen = product(options.architectures, options.seeds)
            self.names = [str(trained(options.out / "models", *model)) for model in chosen]

    def layers(self, name: str, tokens: int) -> list[Activations]:
        if name not in self._layers:
            self._layers[name] = self._read(name)
        return [Activations(x.values[:tokens], x.labels[:tokens]) for x in self._layers[name]]

    def read_all(self) -> None:
        """Read everything before clocks are started."""
        for name in self.names:
            self.layers(name, 1)

    def _read(self, name: str) -> list[Activations]:
        lm = language_model(name, loader="huggingface", device=self._options.device)
        vocabulary = lm.tokenizer.get_vocab()
        if self._vocabulary not in (None, vocabulary):
            raise ValueError(f"models must share a tokenizer, but {name} has another")
        self._vocabulary = vocabulary
        depth = int(lm.model.config.num_hidden_layers)  # pyright: ignore
        hooks = [f"blocks.{i}.hook_resid_post" for i in range(depth)]
        found = collect(lm, self._texts, hooks, max_tokens=max(self._options.tokens))
        return [found[hook] for hook in hooks]


def dictionaries(
    models: Models, preset: str, d_sae: int, tokens: int
) -> tuple[dict[str, list[ITDA]], float]:
    """A dictionary of every layer of every model, and the mean seconds of one."""
    models.read_all()
    found, start = {}, time.perf_counter()
    for i, name in enumerate(models.names):
        rule: dict[str, Any] = {"preset": "paper"} if preset == "paper" else {"preset": "best"}
        rule |= {"seed": 100 * i if "own" in preset else 0}
        found[name] = [
            fit(x.values, d_sae=d_sae, k=K, labels=x.labels, progress=False, **rule)
            for x in models.layers(name, tokens)
        ]
    seconds = time.perf_counter() - start
    return found, seconds / sum(map(len, found.values()))


def of_labels(models: Models, preset: str, d_sae: int, tokens: int) -> dict[str, Any]:
    """Every ordered pair of models, by both measures of labels."""
    built, seconds = dictionaries(models, preset, d_sae, tokens)
    activations = {name: models.layers(name, tokens) for name in models.names}
    found: dict[str, Any] = {"seconds_to_build": seconds}
    for measure in OF_LABELS:
        start = time.perf_counter()
        comparison = compare(built, measure, activations=activations)
        found[measure] = {
            "seconds": (time.perf_counter() - start) / len(comparison.layers),
            "pairs": {f"{p.a} {p.b}": p.similarity.tolist() for p in comparison.layers},
            "models": comparison.similarity.tolist(),  # pyright: ignore
        }
    return found


def of_activations(models: Models, measure: Measure, tokens: int) -> dict[str, Any]:
    """Every ordered pair of models, by a measure of activations."""
    models.read_all()
    pairs, start = {}, time.perf_counter()
    for a, b in permutations(models.names, 2):
        both = models.layers(a, tokens), models.layers(b, tokens)
        pairs[f"{a} {b}"] = activation_similarity(*both, measure, "position").tolist()
    return {measure: {"seconds": (time.perf_counter() - start) / len(pairs), "pairs": pairs}}


def accuracies(pairs: dict[str, Any]) -> dict[int, list[float]]:
    """The accuracy of every ordered pair of models of equal depth, by their depth."""
    found: dict[int, list[float]] = defaultdict(list)
    for matrix in pairs.values():
        if len(matrix) == len(matrix[0]):
            found[len(matrix)].append(layer_matching_accuracy(torch.tensor(matrix)))
    return found


def interval(values: Sequence[float]) -> str:
    """Mean, and a 95 % bootstrap interval over pairs (which share models: it is a little narrow)."""
    mean = float(np.mean(values))
    if len(set(values)) < 2:
        return f"{mean:.3f}"
    low, high = bootstrap(
        (np.array(values),), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return f"{mean:.3f} ({low:.2f} to {high:.2f})"


def bytes_kept(measure: Measure, layer: Activations, d_sae: int) -> int:
    """Bytes that have to be kept of a layer to compare it with those of other models."""
    if measure in OF_LABELS:
        place = 3 * 8 + (8 if measure == "weighted" else 0)
        return d_sae * place
    return layer.values.numel() * layer.values.element_size()


def plot(pairs_of: dict[Measure, dict[str, Any]], path: Path) -> None:
    """The mean matrix over the ordered pairs of the shallowest models, by every measure."""
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 6.6), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, (measure, pairs) in zip(axes.flat, pairs_of.items(), strict=False):
        by_depth = accuracies(pairs)
        depth = min(by_depth)
        own = [matrix for matrix in pairs.values() if len(matrix) == len(matrix[0]) == depth]
        ax.axis("on")
        image = ax.imshow(np.mean(own, axis=0), origin="lower", cmap="viridis")
        ax.set_title(f"{MEASURES[measure]}\n{np.mean(by_depth[depth]):.2f}")
        ax.set_xlabel("layer")
        ax.set_ylabel("layer")
        figure.colorbar(image, ax=ax, shrink=0.8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def whole_models(depths: list[int], similarity: list[list[float]]) -> None:
    """Similarity of whole models (unions over layers), within and between depths."""
    print("\n| layers | and | Jaccard of unions, mean | range |\n|---|---|---|---|")
    for one, other in combinations_with_replacement(sorted(set(depths)), 2):
        values = [
            similarity[i][j]
            for i, j in permutations(range(len(depths)), 2)
            if (depths[i], depths[j]) == (one, other)
        ]
        if values:
            span = f"{min(values):.3f} to {max(values):.3f}"
            print(f"| {one} | {other} | {np.mean(values):.3f} | {span} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=["small"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--models", nargs="+", help="names or folders instead of our own models")
    parser.add_argument("--texts", help="a file or data set; default: the Python language reference")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--device")
    options = parser.parse_args()

    results, models = Results(options.out), Models(options)
    print("| measure | atoms | tokens | accuracy, by depth | s a pair | kB a layer |")
    print("|" + "---|" * 6)

    def show(measure: Measure, name: str, d_sae: int, tokens: int, found: dict[str, Any]) -> None:
        cells = [f"{depth}: {interval(values)}" for depth, values in accuracies(found["pairs"]).items()]
        kept = bytes_kept(measure, models.layers(models.names[0], tokens)[0], d_sae) / 1000
        print(
            f"| {name} | {d_sae or ''} | {tokens} | {', '.join(cells)} "
            f"| {found['seconds']:.3f} | {kept:,.0f} |",
            flush=True,
        )

    common = {"models": models.names, "texts": options.texts, "k": K}
    drawn: dict[Measure, dict[str, Any]] = {}
    for tokens, measure in product(options.tokens, options.measures):
        if measure not in OF_LABELS:
            setting = common | {"measure": measure, "tokens": tokens}
            row = results.once(setting, partial(of_activations, models, measure, tokens))
            show(measure, MEASURES[measure], 0, tokens, row[measure])
            drawn[measure] = row[measure]["pairs"]
    whole = None
    of_labels_too = set(options.measures) & set(OF_LABELS)
    presets = options.presets if of_labels_too else []
    for preset, tokens, d_sae in product(presets, options.tokens, options.d_sae):
        setting = common | {"preset": preset, "tokens": tokens, "d_sae": d_sae}
        row = results.once(setting, partial(of_labels, models, preset, d_sae, tokens))
        for measure in OF_LABELS:
            show(measure, f"{MEASURES[measure]}, {preset}", d_sae, tokens, row[measure])
            if preset == presets[0]:
                drawn[measure], whole = row[measure]["pairs"], row["jaccard"]["models"]
        print(f"  ({row['seconds_to_build']:.2f} s to build a dictionary)", flush=True)
    if whole is not None:
        whole_models([len(models.layers(name, 1)) for name in models.names], whole)
    plot(drawn, options.out / "layers.png")


if __name__ == "__main__":
    main()

"""When is a layer done? Similarity of the layers of checkpoints with those at the end of the training.

    python benchmarks/convergence.py OUT [--d-sae 512] [--tokens 20000] [--measures jaccard cka]

Leask et al. (2025) find with label similarity that early layers settle first, so that they could be
frozen. The run is that of small-0 of benchmarks/small_models.py, in OUT/models, with its checkpoints.
At 0 % is the model before its first step: its similarity with the end comes from the tokens alone.
"""

import argparse
from pathlib import Path
from typing import get_args

import matplotlib
import torch
from small_models import CHECKPOINTS, trained

from itda_lens import fit
from itda_lens.compare import OF_LABELS, Measure, activation_similarity, compare, jaccard
from itda_lens.samples import reference_prose
from itda_lens.sources import language_model
from itda_lens.training import Activations, collect

matplotlib.use("agg")
from matplotlib import pyplot

K = 16
"""Nonzeros of the codes that atoms are chosen for."""


def residual_stream(folder: Path, tokens: int) -> list[Activations]:
    lm = language_model(str(folder), loader="huggingface", device="cpu")
    depth = int(lm.model.config.num_hidden_layers)  # pyright: ignore
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(depth)]
    found = collect(lm, reference_prose()[0], hooks, max_tokens=tokens, progress=False)
    return [found[hook] for hook in hooks]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument(
        "--measures", nargs="+", choices=get_args(Measure), default=["jaccard", "weighted", "cka"]
    )
    options = parser.parse_args()

    end = trained(options.out / "models", "small", 0, checkpoints=True)
    folders = [(share, end.with_name(f"{end.name}@{share}")) for share in CHECKPOINTS] + [(1.0, end)]
    layers = {share: residual_stream(folder, options.tokens) for share, folder in folders}
    built = {
        share: [fit(x.values, d_sae=options.d_sae, k=K, labels=x.labels, progress=False) for x in own]
        for share, own in layers.items()
    }
    figure, axes = pyplot.subplots(
        1, len(options.measures), figsize=(4.4 * len(options.measures), 3.4), layout="constrained"
    )
    for ax, measure in zip(axes if len(options.measures) > 1 else [axes], options.measures, strict=True):
        rows = {}
        for share in layers:
            if share != 1.0:
                rows[share] = to_the_end(measure, share, built, layers)
        depth = len(layers[1.0])
        print(f"\n{measure}\n\n| trained | {' | '.join(f'layer {i}' for i in range(depth))} | all |")
        print("|" + "---|" * (depth + 2))
        for share, values in rows.items():
            whole = f"{jaccard(built[share], built[1.0]):.3f}" if measure == "jaccard" else ""
            print(f"| {share:.0%} | {' | '.join(f'{value:.3f}' for value in values)} | {whole} |")
        for i in range(depth):
            ax.plot(
                [100 * share for share in rows], [row[i] for row in rows.values()], marker="o", label=i
            )
        ax.set_xlabel("% of the training")
        ax.set_title(f"{measure} with the end")
        ax.legend(title="layer", fontsize=7)
        ax.grid(alpha=0.3)
    figure.savefig(options.out / "convergence.png", dpi=110)


def to_the_end(measure: Measure, share: float, built: dict, layers: dict) -> list[float]:
    """Each layer's similarity with the same layer at the end of the training."""
    if measure in OF_LABELS:
        sides = {"then": built[share], "end": built[1.0]}
        activations = {"then": layers[share], "end": layers[1.0]}
        return compare(sides, measure, activations=activations).layers[0].similarity.diagonal().tolist()
    return activation_similarity(layers[share], layers[1.0], measure, "position").diagonal().tolist()


if __name__ == "__main__":
    main()

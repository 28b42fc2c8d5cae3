"""The plots of docs/quality.md, from the figures of benchmarks/pareto.py.

    python benchmarks/quality_plots.py OUT docs/images

OUT is the folder that pareto.py wrote to. Writes quality_l0.png (FVU over L0, by width) and
quality_tokens.png (FVU over the tokens that a dictionary is built from, where there are several), of
layer 10 and seed 0.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pareto import KINDS
from results import Results

EPOCHS = 8
"""Epochs of the trained SAEs that are drawn."""

STYLES = {
    "itda": dict(color="tab:blue", linestyle="--"),
    "itda-l0": dict(color="tab:blue"),
    "thorough-l0": dict(color="tab:cyan"),
    "near-l0": dict(color="tab:purple"),
    "updated-l0": dict(color="tab:red"),
    "thorough-updated-l0": dict(color="tab:orange"),
    "paper": dict(color="tab:gray", linestyle="--"),
    "random": dict(color="tab:gray"),
    "topk": dict(color="black", linestyle="--"),
    "batchtopk": dict(color="black"),
}
"""Lines that are drawn, and how."""


def draw(axes: Axes, rows: list[dict[str, Any]], by: str) -> None:
    for kind, style in STYLES.items():
        points = sorted((row[by], row["fvu"]) for row in rows if row["kind"] == kind)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=KINDS[kind], **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("FVU on held-out text")
    axes.grid(True, which="both", alpha=0.2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--layer", type=int, default=10)
    options = parser.parse_args()
    rows = [
        row
        for row in Results(options.out).rows
        if row["layer"] == options.layer and row["seed"] == 0 and row["epochs"] in (None, EPOCHS)
    ]
    most = max(row["tokens"] for row in rows)
    widths = sorted({row["d_sae"] for row in rows})

    figure = Figure(figsize=(4.5 * len(widths), 4.5), layout="constrained")
    for axes, d_sae in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        draw(axes, [row for row in rows if (row["d_sae"], row["tokens"]) == (d_sae, most)], "l0")
        axes.set_title(f"{d_sae:,} atoms")
        axes.set_xlabel("mean nonzeros a token")
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, fontsize=7, handlelength=3)
    figure.savefig(options.images / "quality_l0.png", dpi=150)

    wide = [row for row in rows if (row["d_sae"], row["target"]) == (widths[-1], 20)]
    if len({row["tokens"] for row in wide}) < 2:
        return
    figure = Figure(figsize=(4.5, 5), layout="constrained")
    axes = figure.subplots()
    draw(axes, wide, "tokens")
    axes.set_title(f"{widths[-1]:,} atoms, 20 nonzeros a token")
    axes.set_xlabel("tokens to build from")
    tokens = sorted({row["tokens"] for row in wide})
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside lower center", fontsize=7, handlelength=3)
    figure.savefig(options.images / "quality_tokens.png", dpi=150)


if __name__ == "__main__":
    main()

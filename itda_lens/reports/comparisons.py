"""Comparisons of models: tables, a JSON file, heatmaps."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from itda_lens.compare import Comparison, Difference, LayerComparison
from itda_lens.records import replacing
from itda_lens.reports.images import image_file, literal
from itda_lens.reports.tables import TITLE, origin, quote
from itda_lens.terminal import shown

SHOWN = {
    "jaccard": "Jaccard of labels",
    "weighted": "Jaccard of labels by usage",
    "cka": "linear CKA",
    "svcca": "SVCCA",
    "regression": "R² of linear regression",
    "relative": "relative representations",
    "relative-centred": "relative representations, centred",
}


def comparison_table(comparison: Comparison) -> Table | None:
    """Every model with every other, by the unions over layers; None where a measure knows no unions."""
    if comparison.similarity is None or len(comparison.names) < 2:
        return None
    table = _table(f"{SHOWN[comparison.measure]} (matched by {comparison.match})")
    table.add_column("", overflow="fold")
    for i in range(len(comparison.names)):
        table.add_column(str(i + 1), justify="right", min_width=5)
    for i, (name, row) in enumerate(zip(comparison.names, comparison.similarity.tolist(), strict=True)):
        table.add_row(shown(f"{i + 1}  {name}"), *(f"{value:.3f}" for value in row))
    return table


def layers_table(layers: LayerComparison) -> Table:
    """For each layer of the first model, the most similar one of the second (or of its own others)."""
    table = _table(f"{layers.a} → {layers.b}")
    one_model = layers.a == layers.b
    table.add_column("layer", overflow="fold")
    table.add_column("most similar of the others" if one_model else "most similar", overflow="fold")
    table.add_column("similarity", justify="right", min_width=5)
    values = layers.similarity
    square = values.shape[0] == values.shape[1] and not one_model
    if square:
        table.add_column("same place", justify="right", min_width=5)
        if layers.accuracy is not None and len(values) > 1:
            table.caption = f"layer-matching accuracy {layers.accuracy:.2f}"
    searched = values.clone().fill_diagonal_(-1) if one_model else values
    for i, hook in enumerate(layers.hooks_a):
        best = int(searched[i].argmax())
        cells = [hook, layers.hooks_b[best], f"{values[i, best].item():.3f}"]
        table.add_row(*map(shown, cells), *([f"{values[i, i].item():.3f}"] if square else []))
    return table


def differences_table(differences: Sequence[Difference], top: int, title: str) -> Table:
    """The first `top` atoms: where they came from, and the token that adds most to their excess."""
    table = Table(title=shown(title, TITLE))
    for name in ("atom", "excess", "q", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("label in", "came from", "most foreign at"):
        table.add_column(name, no_wrap=name == "label in")
    for d in differences[:top]:
        cells = (str(d.atom), f"{d.excess:+.3f}", f"{d.q:.2f}", f"{d.tokens:,}")
        example = quote(d.examples[0]) if d.examples else ""
        where = "" if d.shared is None else "both" if d.shared else "one"
        table.add_row(*cells, where, origin(d.label, d.atom), example)
    sure = sum(d.q <= 0.1 for d in differences)
    table.caption = (
        f"{sure} of {len(differences)} atoms at a false-discovery rate of 10 %; excess: share of the "
        "squared norm that the first dictionary leaves more here than of its own model"
    )
    return table


def save_comparison(comparison: Comparison, path: str | Path) -> Path:
    """All figures as JSON: measure, match, models, similarity, and the matrix of every pair.

    Raises:
        OSError: the file cannot be written.
    """
    known: dict[str, Any] = {
        "measure": comparison.measure,
        "match": comparison.match,
        "models": comparison.names,
        "similarity": None if comparison.similarity is None else comparison.similarity.tolist(),
        "layers": [
            {
                "a": pair.a,
                "b": pair.b,
                "hooks_a": pair.hooks_a,
                "hooks_b": pair.hooks_b,
                "similarity": pair.similarity.tolist(),
                "accuracy": pair.accuracy,
            }
            for pair in comparison.layers
        ],
    }
    return _write(known, path)


def save_differences(differences: Sequence[Difference], path: str | Path) -> Path:
    """All atoms as a JSON list, most foreign first: the fields of `Difference`.

    Raises:
        OSError: the file cannot be written.
    """
    return _write([dataclasses.asdict(difference) for difference in differences], path)


def comparison_heatmap(comparison: Comparison, path: str | Path) -> Path:
    """The matrices as an image file: of whole models, where there is one, and of each pair's layers.

    Pairs are drawn once, but for the measure that is not symmetric. With one dictionary a model there is
    a matrix of models only.

    Raises:
        OSError: the file cannot be written.
    """
    drawn = _matrices(comparison)
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    path = Path(path)
    with image_file(path, 5 * columns, 4.4 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(drawn) :]:
            ax.axis("off")
        for ax, (a, b, hooks_a, hooks_b, values) in zip(axes.flat, drawn, strict=False):
            image = ax.imshow(values, cmap="viridis", vmin=0)
            ax.set_yticks(range(len(hooks_a)), map(literal, hooks_a), fontsize=6)
            ax.set_xticks(range(len(hooks_b)), map(literal, hooks_b), fontsize=6, rotation=90)
            ax.set_ylabel(literal(a))
            ax.set_xlabel(literal(b))
            figure.colorbar(image, ax=ax, shrink=0.8)
        figure.suptitle(SHOWN[comparison.measure])
    return path


def _matrices(
    comparison: Comparison,
) -> list[tuple[str, str, list[str], list[str], list[list[float]]]]:
    """Names and labels of the axes, and the values."""
    place = {name: i for i, name in enumerate(comparison.names)}
    both_ways = comparison.measure == "regression"
    drawn = [
        (pair.a, pair.b, pair.hooks_a, pair.hooks_b, pair.similarity.tolist())
        for pair in comparison.layers
        if (both_ways or place[pair.a] <= place[pair.b]) and max(pair.similarity.shape) > 1
    ]
    if len(comparison.names) < 2 or (drawn and comparison.similarity is None):
        return drawn
    names = comparison.names
    if comparison.similarity is not None:
        whole = comparison.similarity.tolist()
    else:  # a layer each: their similarities are those of the models
        whole = [[1.0] * len(names) for _ in names]
        for pair in comparison.layers:
            whole[place[pair.a]][place[pair.b]] = pair.similarity.item()
    return [("", "", names, names, whole), *drawn]


def _write(known: Any, path: str | Path) -> Path:
    path = Path(path)
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return path


def _table(title: str) -> Table:
    return Table(title=shown(title, TITLE), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)

"""Results of `itda bench`: one table, and a plot over L0."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from itda_lens.reports.images import image_file, literal
from itda_lens.reports.tables import TITLE
from itda_lens.saebench import EVALUATIONS, Metric, Result
from itda_lens.terminal import shown

L0 = "L0"


def bench_table(results: Sequence[Result], title: str = "SAEBench") -> Table:
    """One row a dictionary, one column a figure.

    Where signed codes and the non-negative view were both evaluated and differ in the last digit shown,
    a cell holds both, signed first. "-" means that an evaluation was not run, and "failed" that it gave
    no result.
    """
    table = Table(title=shown(title, TITLE), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("dictionary", overflow="fold")
    columns = _columns(results)
    for _, metric in columns:
        arrow = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
        table.add_column(metric.name + arrow, justify="right")
    for name in dict.fromkeys(result.dictionary for result in results):
        own = [result for result in results if result.dictionary == name]
        table.add_row(shown(name), *(_cell(own, evaluation, m) for evaluation, m in columns))
    table.caption = _caption(results)
    return table


def pareto_plot(results: Sequence[Result], path: str | Path) -> Path:
    """Each figure over L0, a line for each family of dictionaries, as an image file.

    A family is the dictionaries whose names differ in their k only ("topk-k20" and "topk-k40"). L0 is
    the one that the evaluation "saelens" measured.

    Raises:
        ValueError: no dictionary has an L0 and a further figure.
    """
    l0 = {r.dictionary: r.metrics[L0] for r in results if L0 in r.metrics}
    columns = [(e, m) for e, m in _columns(results) if m.name != L0]
    drawn = [(e, m, _curves(results, e, m, l0)) for e, m in columns]
    drawn = [(e, m, curves) for e, m, curves in drawn if curves]
    if not drawn:
        raise ValueError("a plot over L0 needs results of 'saelens' (for L0) and of another figure")
    columns_shown = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns_shown)
    families = sorted({family for _, _, curves in drawn for family in curves})
    colours = {family: f"C{i}" for i, family in enumerate(families)}
    lines = {}
    path = Path(path)
    with image_file(path, 4.2 * columns_shown, 3.2 * rows) as figure:
        axes = figure.subplots(rows, columns_shown, squeeze=False)
        for ax, (_, metric, curves) in zip(axes.flat, drawn, strict=False):
            for family, points in sorted(curves.items()):
                xs, ys = zip(*sorted(points), strict=True)
                (lines[family],) = ax.plot(xs, ys, marker="o", color=colours[family])
            ax.set_xscale("log")
            ax.set_xlabel("L0")
            ax.set_title(metric.name)
            ax.grid(alpha=0.3)
        for ax in axes.flat[len(drawn) :]:
            ax.axis("off")
        figure.legend(lines.values(), map(literal, lines), loc="outside lower center", ncols=5)
    return path


def family_of(name: str) -> str:
    """The name without its k: "topk-k20-layer5" belongs to "topk-layer5", and "task1" to itself."""
    return re.sub(r"(?:^|[-_])k=?\d+(?=[-_]|$)", "", name).strip("-_") or name


def _columns(results: Sequence[Result]) -> list[tuple[str, Metric]]:
    """The figures that at least one result has."""
    ran = dict.fromkeys(result.evaluation for result in results)
    return [
        (name, metric)
        for name in ran
        for metric in EVALUATIONS[name].metrics
        if any(r.evaluation == name and not math.isnan(_value(r, metric)) for r in results)
        or (metric is EVALUATIONS[name].metrics[0] and _all_failed(results, name))
    ]


def _all_failed(results: Sequence[Result], evaluation: str) -> bool:
    return all(r.file is None for r in results if r.evaluation == evaluation)


def _value(result: Result, metric: Metric) -> float:
    return result.metrics.get(metric.name, math.nan)


def _cell(own: Sequence[Result], evaluation: str, metric: Metric) -> str:
    ran = [result for result in own if result.evaluation == evaluation]
    ran.sort(key=lambda result: result.codes != "signed")
    if not ran:
        return "-"
    shown = ["failed" if r.file is None else _number(_value(r, metric)) for r in ran]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _caption(results: Sequence[Result]) -> Text:
    lines = []
    ran: dict[tuple[str, str], set[str]] = {}
    for result in results:
        ran.setdefault((result.evaluation, result.dictionary), set()).add(result.codes)
    if any(len(codes) > 1 for codes in ran.values()):
        lines.append("a / b: signed codes / non-negative view, where they differ")
    views = dict.fromkeys(name for (name, _), codes in ran.items() if codes == {"nonnegative"})
    if views:
        lines.append(f"of signed dictionaries, {', '.join(views)} saw the non-negative view")
    lines += [
        f"{r.dictionary}, {r.evaluation} ({r.codes} codes) failed: {r.failure or ''}"
        for r in results
        if r.file is None
    ]
    return Text("\n").join(shown(line, "table.caption") for line in lines)


def _curves(
    results: Sequence[Result], evaluation: str, metric: Metric, l0: dict[str, float]
) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        value = _value(result, metric)
        if result.evaluation == evaluation and result.dictionary in l0 and not math.isnan(value):
            family = family_of(result.dictionary)
            if result.codes == "nonnegative" and any(
                r.codes == "signed" and (r.dictionary, r.evaluation) == (result.dictionary, evaluation)
                for r in results
            ):
                family += " (non-negative)"
            curves.setdefault(family, []).append((l0[result.dictionary], value))
    return curves

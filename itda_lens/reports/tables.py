"""Results as rich tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from itda_lens.analysis import Evaluation, RowsEvaluation, TokenDecomposition, TokenMatches
from itda_lens.records import Label
from itda_lens.sae import ITDA, provenance_of
from itda_lens.terminal import printable, shown

TITLE = "table.title"
"""rich's style of a table's title, which it gives to strings only."""

QUOTED_BEFORE, QUOTED_AFTER = 20, 32
"""Characters of a label's context that tables show on either side of its token."""


def evaluation_table(
    evaluations: Sequence[Evaluation | RowsEvaluation],
    build_tokens: Mapping[str, int] | None = None,
    build_seconds: Mapping[str, float] | None = None,
    title: str = "Evaluation",
) -> Table:
    """One row a dictionary; tokens and seconds of their builds, by hook name, where given.

    Where the evaluations are of activations alone, there are no columns for the effect on a model.
    """
    of_model = all(isinstance(e, Evaluation) for e in evaluations)
    table = Table(
        title=shown(title, TITLE),
        caption=_evaluation_caption(evaluations),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # In a narrow terminal the hook's name folds and headers wrap; figures are never cut.
    table.add_column("hook", overflow="fold")
    chats = any(isinstance(e, Evaluation) and e.fvu_form is not None for e in evaluations)
    for name, width in {
        "atoms": 6, "L0": 4, "FVU": 5, **({"FVU content": 7, "FVU form": 5} if chats else {}),
        **({"CE-loss score": 7, "KL": 5} if of_model else {}), "alive": 6,
    }.items():  # fmt: skip
        table.add_column(name, justify="right", min_width=width)
    if build_tokens is not None:
        table.add_column("tokens", justify="right", min_width=7)
    if build_seconds is not None:
        table.add_column("seconds", justify="right", min_width=7)
    for e in evaluations:
        cells = [
            shown(e.hook_name),
            f"{e.d_sae:,}",
            f"{e.l0:.1f}",
            f"{e.fvu:.3f}",
            *(_figure(getattr(e, part, None)) for part in ("fvu_content", "fvu_form") if chats),
            *([f"{e.ce_loss_score:.4f}", f"{e.kl:.3f}"] if isinstance(e, Evaluation) else []),
            f"{e.alive_fraction:.1%}",
        ]
        if build_tokens is not None:
            cells.append(f"{build_tokens[e.hook_name]:,}")
        if build_seconds is not None:
            cells.append(f"{build_seconds[e.hook_name]:.0f}")
        table.add_row(*cells)
    return table


def decomposition_table(decomposition: Sequence[TokenDecomposition], top: int, hook_name: str) -> Table:
    """Tokens with their `top` atoms: signed coefficient, share, where the atom came from, in context.

    A negative coefficient has NOT before it. The caption warns of text that is unlike the
    dictionary's. Of a conversation, each token's role stands beside it, dim for a token of the form.
    """
    table = Table(title=shown(f"Decomposition at {hook_name}", TITLE), show_lines=False)
    warning = getattr(decomposition, "warning", None)
    if warning is not None:
        table.caption = shown(warning, "yellow")
    table.add_column("token", no_wrap=True)
    chat = any(token.special or token.role is not None for token in decomposition)
    if chat:
        table.add_column("role", no_wrap=True)
    # In a narrow terminal the quotation wraps, not the figures.
    for name in ("explained", "coefficient", "share", "atom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("came from")
    for token in decomposition:
        for i, component in enumerate(token.components[:top]):
            first = i == 0
            table.add_row(
                shown(repr(token.token)) if first else "",
                *([_role(token) if first else ""] if chat else []),
                f"{token.explained:.0%}" if first else "",
                _signed(component.coefficient),
                f"{component.share:.0%}",
                str(component.atom),
                origin(component.label, component.atom),
                end_section=i == len(token.components[:top]) - 1,
            )
    return table


def matches_table(found: Sequence[TokenMatches], title: str) -> Table:
    """Tokens with the atoms that they resemble: cosine, and where the atom came from, in context."""
    table = Table(title=shown(title, TITLE))
    table.add_column("token", no_wrap=True)
    for name in ("cosine", "atom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("came from")
    for token in found:
        for i, match in enumerate(token.matches):
            table.add_row(
                shown(repr(token.token)) if i == 0 else "",
                f"{match.cosine:.2f}",
                str(match.atom),
                origin(match.label, match.atom),
                end_section=i == len(token.matches) - 1,
            )
    return table


def info_table(itda: ITDA, name: str, everything: bool = True) -> Table:
    """Configuration and build record of a dictionary; the facts worth reading first, or everything."""
    table = Table(title=shown(name, TITLE), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for key, value in info_facts(itda).items():
        if everything or key in FIRST_FACTS:
            table.add_row(shown(key), shown(value))
    if not everything:
        table.caption = "--all shows the rest"
    return table


FIRST_FACTS = (
    "model", "hook", "atoms (d_sae)", "width (d_in)", "k", "mean L0", "encoder", "build: preset",
    "build: texts", "build: n_tokens", "build: seconds",
)  # fmt: skip
"""Rows of `info_table` that are worth reading first."""


def info_facts(itda: ITDA) -> dict[str, Any]:
    """Configuration and build record of a dictionary as plain data, in the order of `info_table`."""
    metadata, l0 = itda.cfg.metadata, itda.cfg.l0
    rows = {
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "atoms (d_sae)": f"{itda.cfg.d_sae:,}",
        "width (d_in)": itda.cfg.d_in,
        "k": itda.cfg.k,
        "mean L0": "not calibrated" if l0 is None else f"{l0:g}",
        "threshold": f"{itda.cfg.threshold:.4g}",
        "encoder": f"{itda.cfg.method}, {'signed' if itda.cfg.signed else 'non-negative'}",
        "context size": metadata.context_size,
        "BOS prepended": metadata.prepend_bos,
        "dtype": itda.cfg.dtype,
    }
    provenance = provenance_of(itda)
    record = provenance.record() | {"recipe": None, "versions": None}
    settings = {**provenance.recipe, **record}
    packages = provenance.versions
    rows |= {f"build: {k}": v for k, v in settings.items() if v is not None and k not in ("d_sae", "k")}
    return rows | {f"version: {key}": value for key, value in packages.items()}


def labels_table(itda: ITDA, n: int, atoms: Sequence[int] | None = None) -> Table:
    """The first `n` atoms, all or of those given, and where they came from."""
    chosen = range(itda.cfg.d_sae) if atoms is None else atoms
    table = Table(
        title=f"First {min(n, len(chosen))} {'atoms' if atoms is None else f'of {len(chosen)}'}"
    )
    kinds = {itda.labels[i].kind for i in chosen[:n]}
    for name in ("atom", kinds.pop() if len(kinds) == 1 else "row", "chunk", "position"):
        table.add_column(shown(name), justify="right", no_wrap=True)
    table.add_column("came from")
    for i in chosen[:n]:
        label = itda.labels[i]
        table.add_row(str(i), str(label.row), str(label.chunk), str(label.position), quote(label))
    return table


def _role(token: TokenDecomposition) -> Text:
    return shown(token.role or "form", "dim" if token.special else "")


def origin(label: Label | None, atom: int) -> Text:
    """Where an atom came from, or its number where nothing tells."""
    return shown(f"atom {atom}") if label is None else quote(label)


def _signed(coefficient: float) -> Text:
    """A coefficient, after NOT where the token's activation points away from the atom."""
    number = f"{coefficient:+.2f}"
    return (
        Text(number, "green")
        if coefficient > 0
        else Text.assemble(("NOT ", "bold red"), (number, "red"))
    )


def quote(label: Label) -> Text:
    """A label in one line: its token in bold, with some of the text around it."""
    if label.context is None:
        return shown(label)
    whose = [word for word in (label.role, "form" if label.special else None) if word]
    before, token, after = (part.replace("\n", "⏎").replace("\t", " ") for part in label.quoted())
    # A narrow column has the end of the text before the token, and the start of the text after. Marks
    # around the token are for terminals and logs without bold.
    return Text.assemble(
        (printable(before[-QUOTED_BEFORE:]), "dim"),
        (f"«{printable(token)}»", "bold"),
        (printable(after[:QUOTED_AFTER]), "dim"),
        *([(printable(f" ({', '.join(whose)})"), "italic")] if whose else []),
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _evaluation_caption(evaluations: Sequence[Evaluation | RowsEvaluation]) -> str:
    if not evaluations:
        return ""
    e = evaluations[0]
    if isinstance(e, RowsEvaluation):
        return f"on {e.n_rows:,} rows"
    return f"on {e.n_tokens:,} tokens; the model's own CE loss there is {e.ce_loss:.3f} nats"

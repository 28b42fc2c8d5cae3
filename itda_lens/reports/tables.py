"""Results as rich tables."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from itda_lens.analysis import Evaluation, RowsEvaluation, TokenDecomposition
from itda_lens.records import CONTEXT_CHARS, Label
from itda_lens.sae import ITDA, provenance_of
from itda_lens.terminal import printable, shown

TITLE = "table.title"
"""rich's style of a table's title, which it gives to strings only."""

QUOTED_BEFORE, QUOTED_AFTER = 24, 32
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
    """Tokens with their `top` atoms: signed coefficient, where the atom came from, in context.

    Of a conversation, each token's role stands beside it, dim for a token of the form.
    """
    table = Table(title=shown(f"Decomposition at {hook_name}", TITLE), show_lines=False)
    table.add_column("token", no_wrap=True)
    chat = any(token.special or token.role is not None for token in decomposition)
    if chat:
        table.add_column("role", no_wrap=True)
    # In a narrow terminal the quotation wraps, not the figures.
    for name in ("explained", "coefficient", "atom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("came from")
    for token in decomposition:
        for i, component in enumerate(token.components[:top]):
            first = i == 0
            table.add_row(
                shown(repr(token.token)) if first else "",
                *([_role(token) if first else ""] if chat else []),
                f"{token.explained:.0%}" if first else "",
                shown(f"{component.coefficient:+.2f}", "green" if component.coefficient > 0 else "red"),
                str(component.atom),
                origin(component.label, component.atom),
                end_section=i == len(token.components[:top]) - 1,
            )
    return table


def info_table(itda: ITDA, name: str) -> Table:
    """Configuration and build record of a dictionary."""
    table = Table(title=shown(name, TITLE), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
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
    rows |= {f"version: {key}": value for key, value in packages.items()}
    for key, value in rows.items():
        table.add_row(shown(key), shown(value))
    return table


def labels_table(itda: ITDA, n: int) -> Table:
    """The first `n` atoms and where they came from."""
    labels = itda.labels[:n]
    table = Table(title=f"First {min(n, itda.cfg.d_sae)} atoms")
    kinds = {label.kind for label in labels}
    for name in ("atom", kinds.pop() if len(kinds) == 1 else "row", "chunk", "position"):
        table.add_column(shown(name), justify="right", no_wrap=True)
    table.add_column("came from")
    for i, label in enumerate(labels):
        table.add_row(str(i), str(label.row), str(label.chunk), str(label.position), quote(label))
    return table


def _role(token: TokenDecomposition) -> Text:
    return shown(token.role or "form", "dim" if token.special else "")


def origin(label: Label | None, atom: int) -> Text:
    """Where an atom came from, or its number where nothing tells."""
    return shown(f"atom {atom}") if label is None else quote(label)


def quote(label: Label) -> Text:
    """A label in one line: its token in bold, with some of the text around it."""
    if label.context is None:
        return shown(label)
    whose = [word for word in (label.role, "form" if label.special else None) if word]
    before, token, after = (
        part.replace("\n", "⏎").replace("\t", " ") for part in _around(label, label.context)
    )
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


def _around(label: Label, context: str) -> tuple[str, str, str]:
    """The text that a label quotes before its token, the token, and the text after it.

    The text itself may hold the marks, so that "[[token]]" can stand in it several times. The token's
    own comes after the `CONTEXT_CHARS` characters that labels quote, or after fewer where a text begins.
    """
    token = label.token or ""
    marked = f"[[{token}]]"
    start = CONTEXT_CHARS if label.chars is None else min(CONTEXT_CHARS, label.chars[0])
    if not context.startswith(marked, start):  # of labels made elsewhere
        start = context.find(marked)
    if start < 0:
        return context, token, ""
    return context[:start], token, context[start + len(marked) :]


def _evaluation_caption(evaluations: Sequence[Evaluation | RowsEvaluation]) -> str:
    if not evaluations:
        return ""
    e = evaluations[0]
    if isinstance(e, RowsEvaluation):
        return f"on {e.n_rows:,} rows"
    return f"on {e.n_tokens:,} tokens; the model's own CE loss there is {e.ce_loss:.3f} nats"

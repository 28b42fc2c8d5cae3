"""Decompositions as HTML tables, for notebooks."""

from typing import TYPE_CHECKING

from itda_lens.records import Label
from itda_lens.terminal import html_text

if TYPE_CHECKING:
    from itda_lens.analysis.decompose import Component, Decomposition, TokenDecomposition

TOP = 4
"""Atoms that are shown for a token."""

NOT = '<b style="color:#b3312c">NOT</b> '
"""Stands before the label of an atom with a negative coefficient."""


def decomposition_html(decomposition: "Decomposition") -> str:
    """A table of the tokens, each with its `TOP` atoms: signs, shares, and labels in their contexts."""
    warning = decomposition.warning
    note = "" if warning is None else f'<p style="color:#8a5a00">{html_text(warning)}</p>'
    head = "".join(f"<th>{name}</th>" for name in ("token", "explained", "coefficient", "share", "atom"))
    rows = "".join(_rows(token) for token in decomposition)
    style = 'style="text-align:left"'
    return (
        f"{note}<table><thead><tr>{head}<th {style}>came from</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _rows(token: "TokenDecomposition") -> str:
    rows = []
    for i, component in enumerate(token.components[:TOP]):
        first = (f"<code>{html_text(token.token)}</code>", f"{token.explained:.0%}")
        cells = first if i == 0 else ("", "")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells) + _component(component))
    return "".join(f"<tr>{row}</tr>" for row in rows)


def _component(component: "Component") -> str:
    colour = "#0f7b4f" if component.coefficient > 0 else "#b3312c"
    sign = "" if component.coefficient > 0 else NOT
    return (
        f'<td style="color:{colour}">{component.coefficient:+.2f}</td><td>{component.share:.0%}</td>'
        f'<td>{component.atom}</td><td style="text-align:left">{sign}{_quoted(component.label)}</td>'
    )


def _quoted(label: Label | None) -> str:
    return "" if label is None else label._repr_html_()

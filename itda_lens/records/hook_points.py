"""Names of hook points, taken apart: the one place where they are parsed."""

import re
from dataclasses import dataclass

PER_HEAD = frozenset(
    f"hook_{last}" for last in ("q", "k", "v", "z", "rot_q", "rot_k", "result")
) | frozenset(("q.hook_out", "k.hook_out", "v.hook_out", "o.hook_in"))
"""How TransformerLens's names end where activations are [batch, seq, head, width]; the names with a dot
are those of a TransformerBridge."""


@dataclass(frozen=True)
class HookPoint:
    """A place in a model where activations can be read and replaced.

    Make one with `HookPoint.parse`.

    Attributes:
        name: the whole name, such as "blocks.10.attn.hook_z" or "transformer.h.0.mlp".
        layer: the number of its layer, counted from 0; None if the name holds none.
        kind: the part of the name that is alike in all layers: "attn.hook_z", "mlp"; empty for the layer
            itself ("model.layers.7"); the whole name if there is no layer.
        per_head: whether TransformerLens gives [batch, seq, head, width] there, and not
            [batch, seq, width].
    """

    name: str
    layer: int | None
    kind: str
    per_head: bool

    @classmethod
    def parse(cls, name: str) -> "HookPoint":
        """Take a name apart. The first part that is a number is the layer.

        Examples:
            >>> HookPoint.parse("blocks.10.hook_resid_post")
            HookPoint(name='blocks.10.hook_resid_post', layer=10, kind='hook_resid_post', per_head=False)
            >>> HookPoint.parse("gpt_neox.layers.3").layer
            3
        """
        parts = name.split(".")
        per_head = parts[-1] in PER_HEAD or ".".join(parts[-2:]) in PER_HEAD
        for i, part in enumerate(parts):
            if re.fullmatch("[0-9]+", part):
                return cls(name, int(part), ".".join(parts[i + 1 :]), per_head)
        return cls(name, None, name, per_head)

    @property
    def reshape_activations(self) -> str:
        """SAELens's setting for a dictionary of this hook point: "hook_z" flattens heads, and SAELens
        refuses it at other hook points, per head or not."""
        return "hook_z" if self.kind.endswith("hook_z") else "none"

    @property
    def sort_key(self) -> tuple[int, list[tuple[int, str]]]:
        """Sorts hook points by layer, those without one first. Numbers elsewhere in a name count by
        their value too, so that "run2" comes before "run10"."""
        parts = re.findall("[0-9]+|[^0-9]+", self.name)
        by_value = [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]
        return (-1 if self.layer is None else self.layer), by_value

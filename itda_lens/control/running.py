"""Edits at work: forward hooks that read codes, ask gates and add changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda_lens.control.edit import Edit
from itda_lens.control.gates import Excess, Masked, Tokens
from itda_lens.control.seen import Reading, Rows
from itda_lens.pursuit import SparseCodes
from itda_lens.records import checked
from itda_lens.sae import coded
from itda_lens.sources import Loader, Pass, ReadableModel, Watch, language_model, special_ids


@dataclass
class Tally:
    """Counts of an edit while it was applied.

    Attributes:
        tokens: activations that the edit looked at.
        changed: those that it changed.
        norm: sum of the norms of the changes.
        relative: sum of the norms of the changes, each divided by that of its activation.
        change: sum of the changes; None before the first.
        by_input: of the latest pass, for each input of the batch: activations that were looked at, those
            that were changed, and the sum of their relative norms. None before the first.
        scores: the latest scores of an `Excess` gate, one for each input of the batch; NaN for an input
            without a token. None without such a gate.
    """

    tokens: int = 0
    changed: int = 0
    norm: float = 0.0
    relative: float = 0.0
    change: Float[Tensor, " d_in"] | None = field(default=None, repr=False)
    by_input: Float[Tensor, "inputs 3"] | None = field(default=None, repr=False)
    scores: Float[Tensor, " inputs"] | None = field(default=None, repr=False)


@checked
@contextmanager
def applied(
    model: Any,
    edits: Edit | Sequence[Edit],
    *,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Iterator[list[Tally]]:
    """Inside this context the model runs with the edits.

    They hold for everything that runs it: forward passes, gradients, and `generate` with its key-value
    cache. Edits at one hook point go by their order: each reads the activation that those before it have
    left. Contexts can be nested; the outer edits come first.

    Args:
        model, tokenizer, loader, device: as in `build`.
        edits: one or several.

    Yields:
        A `Tally` for each edit, in their order.

    Raises:
        ValueError: a hook does not exist (on entry), has another width than its dictionary, or never
            fired; an edit needs to know tokens, and the model shows none.
    """
    own = several(edits)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    lm.check_hooks([edit.hook for edit in own])
    special = special_ids(lm.tokenizer) if any(not edit.special for edit in own) else torch.tensor([])
    with _watched(lm, own) as watch:
        running = [_Running(edit, special, watch) for edit in own]
        by_hook: dict[str, list[_Running]] = {}
        for each in running:
            by_hook.setdefault(each.edit.hook, []).append(each)
        with lm.edited({hook: _Chain(chain) for hook, chain in by_hook.items()}):
            yield [each.tally for each in running]


class _Chain:
    """Edits at one hook point, in their order."""

    def __init__(self, chain: Sequence["_Running"]) -> None:
        self._chain = chain

    def __call__(self, x: Tensor) -> Tensor:
        for each in self._chain:
            x = each(x)
        return x


class _Running:
    """An edit inside `applied`."""

    def __init__(self, edit: Edit, special: Tensor, watch: Watch | None) -> None:
        self.edit = edit
        self.tally = Tally()
        self._special = special
        self._watch = watch
        self._memory: list[dict[str, Tensor]] = [{} for _ in edit.gates]

    def __call__(self, x: Float[Tensor, "batch seq *width"]) -> Float[Tensor, "batch seq *width"]:
        edit, flat = self.edit, x.flatten(2)
        if flat.shape[-1] != edit.sae.cfg.d_in:
            raise ValueError(
                f"the model gives activations of width {flat.shape[-1]} at {edit.hook!r}, but the "
                f"dictionary has d_in={edit.sae.cfg.d_in}: it belongs to another model or hook"
            )
        now = self._pass(flat)
        positions = self._positions(flat, now)
        where = self._candidates(positions, now)
        if now is None or now.before is None or now.before.shape[1] == 0:
            for memory in self._memory:
                memory.clear()
        if not where.any():
            return x
        kept = flat[where.to(flat.device)]
        change, changed = self._change(kept, where, positions, now)
        if not changed.any():
            return x
        moved = torch.where(changed[:, None], kept + change.to(kept.dtype), kept)
        out = flat.clone()
        out[where.to(flat.device)] = moved
        return out.reshape(x.shape)

    def _pass(self, flat: Tensor) -> Pass | None:
        if self._watch is None:
            return None
        now = self._watch.current
        if now is None or now.tokens.shape != flat.shape[:2]:
            found = "embeddings" if now is None else f"tokens {tuple(now.tokens.shape)}"
            raise ValueError(
                f"an edit at {self.edit.hook!r} needs the tokens of each activation; the model was "
                f"given {found} where activations are {tuple(flat.shape[:2])}"
            )
        return now

    def _positions(self, flat: Tensor, now: Pass | None) -> Tensor:
        if now is not None:
            return now.positions
        return torch.arange(flat.shape[1], device=flat.device).expand(flat.shape[:2])

    def _candidates(self, positions: Tensor, now: Pass | None) -> Bool[Tensor, "batch seq"]:
        """Tokens that the edit may change."""
        where = torch.ones_like(positions, dtype=torch.bool)
        if now is not None:
            where &= now.real.to(where.device)
        if not self.edit.special and now is not None:
            where &= (positions > 0) & ~torch.isin(now.tokens, self._special.to(now.tokens.device))
        return where

    def _change(
        self, kept: Float[Tensor, "rows d_in"], where: Tensor, positions: Tensor, now: Pass | None
    ) -> tuple[Float[Tensor, "rows d_in"], Bool[Tensor, " rows"]]:
        """The changes of the activations, and which of these change, on their device."""
        edit = self.edit
        inputs, columns = (column.to(edit.sae.device) for column in where.nonzero().T)
        places = positions.to(edit.sae.device)[inputs, columns]
        coefficients, changes, errors = [], [], []
        done = 0
        for part in coded(edit.sae, kept):
            own = _coefficients(part.codes, edit.atoms, edit.sae.cfg.d_sae)
            rows = Rows(edit.sae, edit.atoms, part.x, own, places[done : done + len(own)])
            done += len(own)
            coefficients.append(own)
            changes.append(edit.operation.change(rows))
            errors.append(part.reconstruction - part.x)
        change, error = torch.cat(changes), torch.cat(errors)
        tokens = None if now is None else now.tokens.to(inputs.device)[inputs, columns]
        opened = torch.ones_like(inputs, dtype=torch.bool)
        for gate, memory in zip(edit.gates, self._memory, strict=True):
            reading = Reading(
                inputs, len(where), places, tokens, torch.cat(coefficients), change, error, now, where,
                memory,
            )  # fmt: skip
            opened &= gate.opens(reading)
            if isinstance(gate, Excess):
                self._note_scores(gate, memory, reading)
        changed = opened if edit.replace else opened & (change != 0).any(dim=-1)
        if edit.replace:
            change = change + error
        change, changed = change.to(kept.device), changed.to(kept.device)
        self._note(kept, change, changed, inputs.to(kept.device), len(where))
        return change, changed

    @torch.no_grad()
    def _note(
        self, kept: Tensor, change: Tensor, changed: Tensor, inputs: Tensor, n_inputs: int
    ) -> None:
        tally, moved = self.tally, change.detach()[changed].double()
        norms = moved.norm(dim=-1)
        lengths = kept.detach()[changed].double().norm(dim=-1).clamp(min=1e-30)
        tally.tokens += len(changed)
        tally.changed += len(norms)
        tally.norm += norms.sum().item()
        relative = torch.zeros(len(changed), dtype=torch.double, device=norms.device)
        relative[changed] = norms / lengths
        tally.relative += relative.sum().item()
        each = torch.stack([torch.ones_like(relative), changed.double(), relative], dim=1)
        tally.by_input = torch.zeros(n_inputs, 3).double().index_add(0, inputs.cpu(), each.cpu())
        total = moved.sum(dim=0).cpu()
        tally.change = total if tally.change is None else tally.change + total

    def _note_scores(self, gate: Excess, memory: dict[str, Tensor], reading: Reading) -> None:
        if gate.scope == "input":
            self.tally.scores = (memory["scores"] / memory["tokens"]).cpu()
        else:
            best = torch.full((reading.n_inputs,), float("nan"), dtype=torch.double)
            scores, inputs = gate.scores(reading).cpu(), reading.inputs.cpu()
            for row in inputs.unique().tolist():
                best[row] = scores[inputs == row].max()
            self.tally.scores = best


def _coefficients(codes: SparseCodes, atoms: Sequence[int], d_sae: int) -> Float[Tensor, "rows m"]:
    """The coefficients of some atoms, a column each."""
    column = torch.full((d_sae,), len(atoms), dtype=torch.long, device=codes.indices.device)
    column[list(atoms)] = torch.arange(len(atoms), device=column.device)
    found = codes.values.new_zeros(len(codes.values), len(atoms) + 1)
    return found.scatter_add(1, column[codes.indices], codes.values)[:, :-1]


def several(edits: Edit | Sequence[Edit]) -> list[Edit]:
    """The edits as a list.

    Raises:
        ValueError: there are none.
    """
    own = [edits] if isinstance(edits, Edit) else list(edits)
    if not own:
        raise ValueError("edits must hold at least one edit, got none")
    return own


def _watched(lm: ReadableModel, edits: Sequence[Edit]) -> Any:
    watched = getattr(lm, "watched", None)
    if watched is not None:
        return watched()
    for edit in edits:
        kinds = [type(gate).__name__ for gate in edit.gates if isinstance(gate, Masked | Tokens)]
        if kinds or not edit.special:
            why = f"gate {kinds[0]} needs" if kinds else "special=False needs"
            raise ValueError(
                f"{why} the tokens of each pass, which {type(lm).__name__} does not show: give it a "
                "method `watched`, or pass special=True and another gate"
            )
    return nullcontext()

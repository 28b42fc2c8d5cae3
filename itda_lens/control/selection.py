"""Choosing atoms: by their labels, by a contrast between prompts, by their effect on the output."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from itda_lens.control.edit import Edit
from itda_lens.control.operations import Add, Swap
from itda_lens.control.running import applied
from itda_lens.pursuit import SparseCodes
from itda_lens.records import Label, Places, at_least, checked
from itda_lens.sae import check_codable, hook_name_of, labels_of, provenance_of, sparse_codes
from itda_lens.sources import Loader, ModelSource, gathered, language_model, tokenization_for

Contrast = Literal["difference", "sets", "f1", "strongest"]
"""Ways to score atoms by how they fire on target prompts and on retained ones."""


@dataclass(frozen=True)
class Scored:
    """An atom with the score by which it was chosen.

    Attributes:
        atom: its number.
        score: higher is better; the unit depends on the way.
        label: where the atom came from; None for an SAE without labels.
    """

    atom: int
    score: float
    label: Label | None = None


@checked
def labelled(sae: SAE[Any], match: str | re.Pattern[str] | Callable[[Label], bool]) -> list[int]:
    """Atoms whose labels match.

    Args:
        sae: an ITDA with labels.
        match: a string is the atom's token, whatever its case and the spaces around it. A regular
            expression is searched in the text around the token, in which the token stands in [[ ]]; so
            `re.compile(r"\\[\\[ ?cat")` finds tokens that begin with "cat". A function says whether it
            wants a label.

    Returns:
        Numbers of atoms, rising.

    Raises:
        ValueError: the dictionary carries no labels, or none matches; near tokens are named.
    """
    labels = labels_of(sae)
    if labels is None:
        raise ValueError("sae carries no labels by which atoms could be chosen")
    if isinstance(match, str):
        wanted = match.strip().casefold()
        found = [i for i, own in enumerate(labels) if _plain(own) == wanted]
    elif isinstance(match, re.Pattern):
        found = [i for i, own in enumerate(labels) if match.search(own.context or own.token or "")]
    else:
        found = [i for i, own in enumerate(labels) if match(own)]
    if not found:
        near: list[str] = []
        if isinstance(match, str):
            near = difflib.get_close_matches(match.strip().casefold(), {*map(_plain, labels)}, n=4)
        advice = f"; near it are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"match fits none of {len(labels)} labels, got {match!r:.80}{advice}")
    return found


@checked
def contrast(
    model: Any,
    sae: SAE[Any],
    targets: Sequence[str],
    retained: Sequence[str],
    *,
    by: Contrast = "difference",
    count: int = 8,
    top: int = 16,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> list[Scored]:
    """Atoms that fire on target prompts and not on retained ones.

    Absolute coefficients count, so that a signed atom is found by either sign. An atom fires on a prompt
    as strongly as at the prompt's token where its absolute coefficient is largest.

    Args:
        model, tokenizer, loader, device: as in `build`.
        sae: the dictionary; its contexts are cut as they were for the build.
        targets: prompts with the concept.
        retained: prompts without it.
        by: "difference" scores by the mean over tokens of the absolute coefficient, targets less
            retained. "sets" takes the `top` strongest atoms of each target prompt, without any that is
            among the `top` strongest of a retained prompt (ItD, arXiv 2503.09446); it scores by the
            share of target prompts that an atom is among the strongest of. "f1" scores by how well
            firing tells target prompts from retained ones. "strongest" scores by the mean over target
            tokens alone.
        count: the most atoms to return.
        top: strongest atoms of each prompt that "sets" compares.

    Returns:
        Atoms with a score above 0, the best first.

    Raises:
        ValueError: there are no targets or retained prompts, or no atom has a score above 0.
    """
    at_least(1, count=count, top=top)
    check_prompts(targets=targets, retained=retained)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    on, off = (read_codes(lm, sae, prompts) for prompts in (targets, retained))
    scores = _score(by, on, off, top)
    order = scores.argsort(descending=True, stable=True)[:count].tolist()
    chosen = [i for i in order if scores[i] > 0]
    if not chosen:
        advice = f": all of their {top} strongest atoms are among the retained ones'; change top"
        raise ValueError(f"the contrast is empty{advice if by == 'sets' else ''}")
    labels = labels_of(sae)
    return [Scored(i, scores[i].item(), None if labels is None else labels[i]) for i in chosen]


@checked
def output_scores(
    model: Any,
    sae: SAE[Any],
    atoms: Sequence[int],
    words: Sequence[str],
    prompts: Sequence[str],
    *,
    amount: float = 0.3,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> list[Scored]:
    """How much each atom, added everywhere, raises the tokens that it is meant to raise.

    Args:
        model, sae, tokenizer, loader, device: as in `contrast`.
        atoms: candidates; the model runs once over the prompts for each.
        words: words whose first tokens should become likely, such as " cat".
        prompts: neutral beginnings of sentences.
        amount: how much of an atom is added, as a share of the activation's norm less `b_dec`.

    Returns:
        The atoms, the best first. A score is the change of the mean log-probability of the words, after
        the last token of a prompt, in nats.

    Raises:
        ValueError: there are no atoms, words or prompts, or they are not usable.
    """
    check_prompts(words=words, prompts=prompts)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    ids = torch.tensor([first_token(lm, word) for word in words])
    tokens, mask = prompt_batch(lm, sae, prompts)
    last = mask.sum(dim=1) - 1

    @torch.no_grad()
    def likelihood() -> float:
        logits = lm.logits(tokens, mask)
        at_end = logits[torch.arange(len(last)), last.to(logits.device)].float().log_softmax(dim=-1)
        return at_end[:, ids.to(at_end.device)].double().mean().item()

    plain, scores = likelihood(), []
    for atom in Edit(sae, atoms).atoms:
        with applied(lm, Edit(sae, [atom], Add(amount, "norm"))):
            scores.append(likelihood() - plain)
    labels = labels_of(sae)
    found = [
        Scored(atom, score, None if labels is None else labels[atom])
        for atom, score in zip(atoms, scores, strict=True)
    ]
    return sorted(found, key=lambda each: -each.score)


@checked
def typical_coefficients(
    model: Any,
    sae: SAE[Any],
    atoms: Sequence[int],
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> tuple[float, ...]:
    """Mean absolute coefficient of each atom, over the tokens at which it fires.

    It is the unit of `Add(2.0, "typical", typical=typical_coefficients(...))`.

    Args:
        model, sae, tokenizer, loader, device: as in `contrast`.
        atoms: which atoms.
        texts: where to measure.

    Raises:
        ValueError: there is no text, or an atom fires on none.
    """
    check_prompts(texts=texts)
    chosen = Edit(sae, atoms).atoms
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    found = read_codes(lm, sae, texts)
    sums, counts = (found.sums(values) for values in (found.codes.values.abs(), found.codes.values != 0))
    silent = [atom for atom in chosen if counts[atom] == 0]
    if silent:
        raise ValueError(f"texts must let every atom fire; atom {silent[0]} never does")
    return tuple((sums[atom] / counts[atom]).item() for atom in chosen)


@checked
def swapped(
    model: Any,
    sae: SAE[Any],
    atoms: Sequence[int],
    prompt: str,
    *,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Swap:
    """The operation that gives atoms the coefficients that they have in a prompt, position by position.

    Args:
        model, sae, tokenizer, loader, device: as in `contrast`.
        atoms: which atoms; the edit must name the same ones in the same order.
        prompt: the other prompt. Positions at which activations do not count, such as 0, stay as they
            are.

    Raises:
        ValueError: an atom is out of range, or the prompt has no token that counts.
    """
    chosen = Edit(sae, atoms).atoms
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    found = read_codes(lm, sae, [prompt])
    dense = found.codes.to_dense(sae.cfg.d_sae)[:, list(chosen)]
    positions = found.places.position.tolist()
    values = torch.zeros(max(positions) + 1, len(chosen))
    values[positions] = dense.detach().float().cpu()
    read = [i in set(positions) for i in range(len(values))]
    return Swap(values.tolist(), read)


class PromptCodes(NamedTuple):
    """Codes of the tokens of some prompts.

    Attributes:
        codes: on the CPU.
        x: the activations, on the CPU.
        places: of the tokens; `places.row` is the number of the prompt.
        n_prompts: how many prompts were read.
        d_sae: how many atoms there are.
    """

    codes: SparseCodes
    x: Float[Tensor, "tokens d_in"]
    places: Places
    n_prompts: int
    d_sae: int

    def sums(self, values: Tensor) -> Float[Tensor, " d_sae"]:
        """Sum over tokens, for each atom, of numbers that stand at the slots of the codes."""
        total = torch.zeros(self.d_sae, dtype=torch.double)
        return total.index_add(0, self.codes.indices.flatten(), values.flatten().double())

    def largest(self) -> Float[Tensor, "n_prompts d_sae"]:
        """The largest absolute coefficient of each atom in each prompt."""
        rows = torch.from_numpy(np.ascontiguousarray(self.places.row)).long()
        flat = (rows[:, None] * self.d_sae + self.codes.indices).flatten()
        found = torch.zeros(self.n_prompts * self.d_sae, dtype=self.codes.values.dtype)
        found = found.scatter_reduce(0, flat, self.codes.values.abs().flatten(), "amax")
        return found.reshape(self.n_prompts, self.d_sae)


@torch.no_grad()
def read_codes(
    lm: Any, sae: SAE[Any], prompts: Sequence[str], hook_name: str | None = None
) -> PromptCodes:
    """Codes of the tokens that count, at the dictionary's hook point or another one."""
    check_codable([sae])
    hook = hook_name or hook_name_of(sae)
    source = ModelSource(lm, list(prompts), hook, provenance_of(sae).cutting, batch_size=8)
    x, places = gathered(source)[hook]
    codes = SparseCodes(*(column.cpu() for column in sparse_codes(sae, x)))
    return PromptCodes(codes, x.cpu(), places, len(prompts), sae.cfg.d_sae)


def prompt_batch(lm: Any, sae: SAE[Any], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts, padded on the right, and their mask.

    Raises:
        ValueError: a prompt is longer than a context of the dictionary, or empty.
    """
    tokenization = tokenization_for(lm, provenance_of(sae).cutting)
    contexts = list(tokenization.contexts(prompts))
    rows = [context.row for context in contexts]
    if rows != list(range(len(prompts))):
        wrong = next(i for i in range(len(prompts)) if rows.count(i) != 1)
        raise ValueError(
            f"prompts must each fit one context of {tokenization.cutting.context_size} tokens and hold "
            f"at least one; prompt {wrong} does not"
        )
    batch = tokenization.batch(contexts)
    return batch.tokens, batch.attention_mask


def first_token(lm: Any, word: str) -> int:
    """The id of a word's first token."""
    ids = lm.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"a word must hold at least one token, got {word!r}")
    return ids[0]


def _score(by: str, on: PromptCodes, off: PromptCodes, top: int) -> Float[Tensor, " d_sae"]:
    means = [c.sums(c.codes.values.abs()) / max(1, len(c.codes.values)) for c in (on, off)]
    if by == "strongest":
        return means[0]
    if by == "difference":
        return means[0] - means[1]
    target, other = on.largest(), off.largest()
    if by == "sets":
        top = min(top, on.d_sae)
        chosen, taken = (_among_strongest(each, top) for each in (target, other))
        return chosen.double().mean(dim=0) * ~taken.any(dim=0)
    hits = (target > 0).sum(dim=0).double()
    false = (other > 0).sum(dim=0).double()
    return 2 * hits / (hits + false + len(target))


def _among_strongest(largest: Tensor, top: int) -> Tensor:
    values, indices = largest.topk(top, dim=-1)
    return torch.zeros_like(largest, dtype=torch.bool).scatter(1, indices, values > 0)


def _plain(label: Label) -> str:
    return (label.token or "").strip().casefold()


def check_prompts(**lists: Sequence[str]) -> None:
    """Refuse lists without a prompt, and a single string.

    Raises:
        ValueError: one is so; it is named.
    """
    for name, texts in lists.items():
        if isinstance(texts, str) or not texts:
            raise ValueError(f"{name} must be a list of at least one string, got {texts!r:.80}")

"""Model diffing: atoms that one model uses and another one, of the same space, explains badly."""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from itda_lens.compare.discovery import false_discovery_rates
from itda_lens.compare.measures import shared_tokens
from itda_lens.compare.places import Match, Place, places, resolve_match
from itda_lens.records import Label, at_least, checked
from itda_lens.sae import ITDA, check_codable, coded, labels_of, sparse_codes
from itda_lens.sources import (
    Activations,
    Chats,
    ChatTemplate,
    Loader,
    iterate_texts,
    language_model,
)
from itda_lens.training import check_enough, collect, fit, recipe_of

logger = logging.getLogger(__name__)

FOREIGN = 0.5, 2.0
"""Two limits. The spaces have probably nothing to do with each other if the first dictionary leaves more
than the first number of the second model's variance, and more than the second number times the share
that it leaves of its own model's."""

MIN_TOKENS = 10
"""Atoms used at fewer tokens are left out: a mean over fewer scatters more than the null distribution
allows for."""

EXAMPLES = 3
"""Most tokens that are shown for an atom."""


@dataclass(frozen=True)
class Difference:
    """An atom of the second model's dictionary, and how foreign to the first model it is.

    Attributes:
        atom: its index in the second dictionary.
        label: where it came from; None if the second dictionary has no labels.
        excess: how much worse the first dictionary explains the second model than its own model, over
            the tokens that use the atom: a mean difference of squared errors, each as a share of the
            activation's squared distance from the centre.
        q: the false-discovery rate of the list that ends with this atom.
        shared: whether the first dictionary has an atom of the same label; None if one of the two has no
            labels.
        tokens: at how many tokens the atom is used.
        examples: the tokens, `EXAMPLES` at most, that add most to the excess.
    """

    atom: int
    label: Label | None
    excess: float
    q: float
    shared: bool | None
    tokens: int
    examples: tuple[Label, ...] = ()


@checked
@torch.no_grad()
def diff(
    a: SAE[Any],
    b: SAE[Any],
    activations_a: Activations,
    activations_b: Activations,
    match: Match = "auto",
) -> list[Difference]:
    """Rank the atoms of `b` by how badly `a` explains the second model where they are used.

    At every token, the error that `a` leaves of the second model's activation is compared with the error
    that it leaves of the first model's. So a token that is equally hard for both models adds nothing. An
    atom's excess is the mean of these differences, weighted by its share of the token's code. Tokens
    that are atoms of either dictionary are left out, and so are atoms used at fewer than `MIN_TOKENS`
    tokens. The models must share a space, as a base model and a fine-tuned one do.

    Most atoms have the same label in both dictionaries, even where the models differ: fine-tuning
    changes the activations of tokens, but hardly which tokens are typical (docs/compare.md). So all
    atoms are ranked, not only those whose label the other dictionary lacks. `Difference.shared` tells
    the two kinds apart.

    False-discovery rates compare the atoms with each other (an empirical null, Efron 2004): if the
    models differed by nothing but drift, excesses would scatter as far above their median as below it.
    `false_discovery_rates` has the details.

    Args:
        a, b: dictionaries of the two models, at the same hook point: ITDAs, or other SAEs of SAELens
            (see `sae.ARCHITECTURES`). Which tokens are atoms is known from labels only.
        activations_a, activations_b: activations of either model there, from the same texts; tokens that
            both have are compared.
        match: how tokens and labels are matched; "overlap" is not possible. "auto" learns from the
            records of labelled dictionaries whether tokens were cut differently. Without labels it is
            "position".

    Returns:
        The atoms of `b`, most foreign first.

    Raises:
        ValueError: widths or hook points differ; the two sides share no token that is not an atom; the
            dictionaries are of different texts; or one cannot be measured (a transcoder, an SAE in
            training).
    """
    how = check_diffable(a, b, match)
    labels_a, labels_b = labels_of(a), labels_of(b)
    of_a, of_b = (_tokens(own or [], how) for own in (labels_a, labels_b))
    (x_a,), (x_b,), labels = shared_tokens([activations_a], [activations_b], how)
    # A dictionary leaves no error of its own atoms' activations, which tells nothing of the models.
    atoms = {*of_a, *of_b}
    rows = [row for row, token in enumerate(_tokens(labels, how)) if token not in atoms]
    if not rows:
        raise ValueError("activations must hold tokens that are no atoms, but all of them are")
    x_a, x_b = x_a[rows], x_b[rows]
    first, second = _full_precision(a), _full_precision(b)
    before, own = _relative_errors(first, x_a, _centre(a, x_a))
    after, foreign = _relative_errors(first, x_b, _centre(b, x_b))
    if foreign > FOREIGN[0] and foreign > FOREIGN[1] * own:
        logger.warning(
            "the first dictionary leaves %.0f %% of the second model's variance, and %.0f %% of its own "
            "model's: the two models do not seem to share a space",
            100 * foreign,
            100 * own,
        )
    use = _Use.of(second, x_b)
    excess, examples = use.mean(after - before), use.largest(after - before)
    often = (use.tokens >= MIN_TOKENS).nonzero().flatten()
    order = often[excess[often].argsort(descending=True, stable=True)]
    rates = false_discovery_rates(excess[order])
    known = {place for place, _ in of_a if place is not None}
    return [
        Difference(
            atom=i,
            label=None if labels_b is None else labels_b[i],
            excess=excess[i].item(),
            q=q,
            shared=None if labels_a is None or labels_b is None else of_b[i][0] in known,
            tokens=int(use.tokens[i]),
            examples=tuple(labels[rows[j]] for j in examples[i].tolist() if j >= 0),
        )
        for i, q in zip(order.tolist(), rates.tolist(), strict=True)
    ]


@checked
def check_diffable(a: SAE[Any], b: SAE[Any], match: Match = "auto") -> Match:
    """Check two dictionaries for `diff`, so that bad input is found before activations are read.

    Returns:
        How labels and tokens will be matched.

    Raises:
        ValueError: as `diff`.
    """
    check_codable([a, b])
    if a.cfg.d_in != b.cfg.d_in:
        raise ValueError(
            "models that are diffed must share a space, but the dictionaries have widths "
            f"{a.cfg.d_in} and {b.cfg.d_in}"
        )
    hooks = [sae.cfg.metadata.hook_name for sae in (a, b)]
    if None not in hooks and hooks[0] != hooks[1]:
        raise ValueError(f"models are diffed at one hook point, got {hooks[0]!r} and {hooks[1]!r}")
    labelled = [sae for sae in (a, b) if isinstance(sae, ITDA) and labels_of(sae) is not None]
    how = resolve_match(labelled, match)
    if how == "overlap":
        raise ValueError("match='overlap' cannot be used for diffing; use 'span'")
    return how


@checked
def diff_models(
    a: Any,
    b: Any,
    texts: str | Path | Iterable[str] | Chats,
    hook_name: str,
    *,
    d_sae: int = 1024,
    k: int = 20,
    max_tokens: int | None = 50_000,
    seed: int = 0,
    context_size: int | None = None,
    batch_size: int = 16,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    text_field: str = "text",
    split: str = "train",
    progress: bool = True,
) -> list[Difference]:
    """Build a dictionary of either model from the same texts, and `diff` them.

    Args:
        a, b: models as in `build`: the one to compare with (base), and the one to look at (fine-tuned).
        texts: as in `build`, of the kind of text in which differences are looked for. They are read once
            for each model.
        hook_name: a hook point of both.
        max_tokens: tokens to build from and to compare, held in memory for both models.
        d_sae, k, seed, context_size, batch_size, tokenizer, loader, device, text_field, split, progress:
            as in `build`.

    Raises:
        ValueError, TypeError: as `build` and `diff`.
    """
    at_least(1, max_tokens=max_tokens, batch_size=batch_size)
    check_enough(recipe_of(d_sae=d_sae, k=k, seed=seed), max_tokens)  # checks all of them
    read: list[str] = []  # texts of the first model, for the second: an iterator gives them once
    sides: list[tuple[ITDA, Activations]] = []
    tokenizers = []
    templates: set[str] = set()
    for model in (a, b):
        lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
        # Whether contexts begin with BOS depends on whether there is one.
        tokenizers.append((lm.tokenizer.get_vocab(), lm.tokenizer.bos_token_id))
        if isinstance(texts, Chats):
            own = texts
            templates.add(ChatTemplate(lm.tokenizer).source)
        elif sides:
            own = read
        else:
            own = _recorded(iterate_texts(texts, text_field=text_field, split=split), read)
        if len(templates) > 1:
            raise ValueError("a and b must have one chat template to be compared on chats, got two")
        x = collect(
            lm, own, [hook_name], max_tokens=max_tokens, context_size=context_size,
            batch_size=batch_size, progress=progress,
        )[hook_name]  # fmt: skip
        metadata = {"hook_name": hook_name, "model_name": lm.name}
        del lm, model  # before the next one is loaded
        itda = fit(
            x.values, d_sae=d_sae, k=k, seed=seed, labels=x.labels, metadata=metadata, progress=progress
        )
        sides.append((itda, x))
    (itda_a, x_a), (itda_b, x_b) = sides
    match = "position" if tokenizers[0] == tokenizers[1] else "span"
    return diff(itda_a, itda_b, x_a, x_b, match)


def _recorded(texts: Iterable[str], into: list[str]) -> Iterator[str]:
    for text in texts:
        into.append(text)
        yield text


def _tokens(labels: Sequence[Label], match: Match) -> list[tuple[Place | None, str | None]]:
    """Each place with its token, since in other texts the same place holds another token."""
    return [(place, label.token) for place, label in zip(places(labels, match), labels, strict=True)]


def _full_precision(sae: SAE[Any]) -> SAE[Any]:
    """The dictionary in float32 or more: half precision may be off by more than the models differ."""
    if torch.finfo(sae.dtype).bits >= 32:
        return sae
    return copy.deepcopy(sae).to(dtype=torch.float32)


def _centre(sae: SAE[Any], x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The mean of a model's activations. An ITDA keeps it in `b_dec`; other SAEs train their bias."""
    return sae.b_dec if isinstance(sae, ITDA) else x.mean(dim=0, dtype=torch.float64)


def _relative_errors(
    dictionary: SAE[Any], x: Float[Tensor, "n d"], centre: Float[Tensor, " d"]
) -> tuple[Float[Tensor, " n"], float]:
    """|x - xhat|^2 / |x - centre|^2 of each activation, on the CPU, and the ratio of the sums."""
    errors, norms = [], []
    centre = centre.to(dictionary.device, torch.float64)
    for rows, _, reconstruction in coded(dictionary, x):
        errors.append((rows.double() - reconstruction).square().sum(dim=-1).cpu())
        norms.append((rows.double() - centre).square().sum(dim=-1).cpu())
    error, norm = torch.cat(errors), torch.cat(norms)
    # A token at the centre itself would otherwise outweigh all others.
    tiny = torch.finfo(torch.float32).tiny
    mean = norm.mean().clamp(min=tiny)
    return error / norm.clamp(min=1e-3 * mean.item()), (error.mean() / mean).item()


class _Use(NamedTuple):
    """Which atoms each token uses: one entry for each nonzero coefficient.

    Attributes:
        atom, row: the entry's atom and token.
        share: the atom's share of the energy of the token's code.
        tokens: how many tokens use each atom.
    """

    atom: Int[Tensor, " entries"]
    row: Int[Tensor, " entries"]
    share: Float[Tensor, " entries"]
    tokens: Int[Tensor, " d_sae"]

    @classmethod
    def of(cls, sae: SAE[Any], x: Float[Tensor, "n d"]) -> "_Use":
        codes = sparse_codes(sae, x)
        indices, energy = codes.indices.cpu(), codes.values.double().square().cpu()
        share = energy / energy.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        row = torch.arange(len(x))[:, None].expand_as(indices)
        atom, row, share = (part[energy > 0] for part in (indices, row, share))
        return cls(atom, row, share, atom.bincount(minlength=sae.cfg.d_sae))

    def mean(self, scores: Float[Tensor, " n"]) -> Float[Tensor, " d_sae"]:
        """Mean score of the tokens that use an atom, weighted by its share; 0 if there are none."""
        zeros = torch.zeros(len(self.tokens), dtype=torch.float64)
        total = zeros.index_add(0, self.atom, self.share * scores[self.row])
        return total / zeros.index_add(0, self.atom, self.share).clamp(
            min=torch.finfo(torch.float64).tiny
        )

    def largest(self, scores: Float[Tensor, " n"]) -> Int[Tensor, "d_sae examples"]:
        """The tokens that add most to each atom's mean; -1 where there are fewer."""
        by_part = (self.share * scores[self.row]).argsort(descending=True, stable=True)
        order = by_part[self.atom[by_part].argsort(stable=True)]
        place = torch.arange(len(order)) - (self.tokens.cumsum(0) - self.tokens)[self.atom[order]]
        first = place < EXAMPLES
        found = torch.full((len(self.tokens), EXAMPLES), -1)
        found[self.atom[order][first], place[first]] = self.row[order][first]
        return found

"""Effects of edits: on the answers that they aim at, on other text, and on generated text."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import bootstrap
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.control.edit import Edit
from itda_lens.control.gates import Excess
from itda_lens.control.running import applied, several
from itda_lens.control.seen import Operation, Rows
from itda_lens.control.selection import check_prompts, first_token, prompt_batch, read_codes
from itda_lens.control.writing import written
from itda_lens.records import at_least, check_fields, checked
from itda_lens.sae import provenance_of
from itda_lens.sources import ContextBatch, Loader, ReadableModel, language_model, tokenization_for

logger = logging.getLogger(__name__)

RESAMPLES = 1000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answer that an edit aims at.

    Attributes:
        text: the prompt.
        answer: a word that may follow; its first token counts.
        foil: a word that may follow instead, for the logit difference.
    """

    text: str
    answer: str
    foil: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Interval:
    """A mean over prompts, or over texts, with its confidence interval.

    Attributes:
        mean: the mean.
        low, high: ends of the percentile bootstrap interval; of fewer than two values, the mean.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> "Interval":
        """The mean of some values, and the bootstrap interval of it."""
        x = np.asarray(values, dtype=float)
        mean = float(x.mean())
        if len(x) < 2 or np.ptp(x) == 0 or not np.isfinite(x).all():
            return cls(mean, mean, mean)
        found = bootstrap(
            (x,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        return cls(mean, float(found.low), float(found.high))


@dataclass(frozen=True)
class Effect:
    """Figures of one edit, or of one that it is held against.

    Attributes:
        name: "nothing", "edit", "random atoms" or "difference in means".
        figures: by name, in the order of tables.
            "probability": of the answer after the prompt.
            "logit difference": answer less foil, where prompts have foils.
            "changed": share of the prompts' tokens that were changed.
            "norm": mean norm of the change over the norm of the activation, at changed tokens.
            "KL": KL(plain model || edited) on retained texts, nats per token.
            "loss": next-token loss on retained texts, nats per token.
            "accuracy": share of retained texts' tokens that are predicted.
            "concept": share of generations with the concept.
            "distinct-2": distinct pairs of tokens in a generation over all its pairs.
            "perplexity": of generations under the plain model: e to the mean loss over a generation.
    """

    name: str
    figures: Mapping[str, Interval]


@checked
def effects(
    model: Any,
    edits: Edit | Sequence[Edit],
    prompts: Sequence[Prompt],
    retained: Sequence[str] = (),
    *,
    new_tokens: int = 0,
    concept: Sequence[str] | Callable[[str], bool] = (),
    temperature: float = 0.0,
    random_draws: int = 3,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 8,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Effect]:
    """Measure an edit, beside edits of equal strength that know nothing of it, or only a mean.

    The edits that it is held against change the same tokens, each by a vector as long as the edit's own
    change. "random atoms" points in the direction of a random sum of other atoms, equal in number to the
    edit's own. "difference in means" points from the mean activation of retained texts to that of the
    prompts; it is there only where there are retained texts. Signs are those that agree with the edit's
    mean change.

    Args:
        model, tokenizer, loader, device, progress: as in `build`.
        edits: one or several, applied together.
        prompts: what the edit aims at.
        retained: texts that should stay as they are.
        new_tokens: tokens to write after each prompt; 0 measures no generations.
        concept: words that show the concept in a generation, in any case; or a function from the
            generated text to whether it does.
        temperature: of generations; 0 takes the likeliest token each time.
        random_draws: draws of random atoms; figures are means over them.
        confidence: of the intervals, which are bootstrapped over prompts and over retained texts.
        seed: of draws, of generations and of the bootstrap.
        batch_size: prompts, or contexts of retained texts, in one forward pass.

    Returns:
        "nothing", "edit", "random atoms" and "difference in means", each with its figures.

    Raises:
        ValueError: there are no prompts, one is too long for a context of the dictionary, or a number is
            out of range; see `applied` for the edits.
    """
    at_least(0, new_tokens=new_tokens, random_draws=random_draws, temperature=temperature, seed=seed)
    if not math.isfinite(temperature):
        raise ValueError(f"temperature must be finite, got {temperature}")
    at_least(1, batch_size=batch_size)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    own = several(edits)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    bench = _Bench(lm, own, prompts, list(retained), batch_size)
    variants = _variants(bench, own, random_draws, seed)
    bar = tqdm(variants, desc="measuring", unit="edit", disable=not progress)
    measured: dict[str, list[dict[str, list[float]]]] = {}
    on_retained = bench.on_retained([which for _, which in variants])
    for (name, which), others in zip(bar, on_retained, strict=True):
        found = bench.on_prompts(which) | others
        if new_tokens:
            found |= bench.write(which, new_tokens, temperature, seed, _judge(concept), bool(concept))
        measured.setdefault(name, []).append(found)
    return [
        Effect(
            name,
            {
                figure: Interval.of(np.mean([draw[figure] for draw in draws], axis=0), confidence, seed)
                for figure in draws[0]
            },
        )
        for name, draws in measured.items()
    ]


@checked
def gate_scores(
    model: Any,
    edit: Edit,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> list[float]:
    """Scores that the edit's `Excess` gate gives to texts, each read in one context.

    Args:
        model, tokenizer, loader, device: as in `build`.
        edit: one with a gate `Excess`.
        texts: what to score.
        batch_size: texts in one forward pass.

    Raises:
        ValueError: there are no texts, one is too long or has no token that counts, or the edit has no
            such gate.
    """
    at_least(1, batch_size=batch_size)
    check_prompts(texts=texts)
    gate = next((gate for gate in edit.gates if isinstance(gate, Excess)), None)
    if gate is None:
        raise ValueError("edit must have a gate `Excess`, whose scores these are")
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    tokens, mask = prompt_batch(lm, edit.sae, texts)
    found: list[float] = []
    for some, their_mask in zip(tokens.split(batch_size), mask.split(batch_size), strict=True):
        with applied(lm, replace(edit, gate=gate)) as (tally,):
            lm.capture(some, their_mask, [edit.hook])
        found += [float("nan")] * len(some) if tally.scores is None else tally.scores.tolist()
    bad = [i for i, score in enumerate(found) if score != score]
    if bad:
        raise ValueError(f"texts must each hold a token that counts; text {bad[0]} does not")
    return found


@checked
def opening_at(
    model: Any,
    edit: Edit,
    targets: Sequence[str],
    *,
    margin: float = 0.99,
    coverage: float = 1.0,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Edit:
    """The edit with a gate that opens on the target prompts, and on whatever scores like them.

    The threshold is `margin` times the smallest score of the targets that must open it. With all of
    them, that is the rule of ItD (arXiv 2503.09446).

    Args:
        model, tokenizer, loader, device: as in `build`.
        edit: its gate `Excess` gets another threshold; an edit without one gets one for inputs.
        targets: prompts on which it must open.
        margin: above 0, at most 1.
        coverage: share of the targets on which it must open, those with the highest scores; above 0, at
            most 1.

    Raises:
        ValueError: a number is out of range, or a target that must open the gate scores 0: no atom of
            the edit fires there.
    """
    check_prompts(targets=targets)
    check_shares(margin=margin, coverage=coverage)
    if not any(isinstance(gate, Excess) for gate in edit.gates):
        edit = replace(edit, gate=Excess(0.0))
    scores = gate_scores(model, edit, targets, tokenizer=tokenizer, loader=loader, device=device)
    least = sorted(scores, reverse=True)[math.ceil(coverage * len(scores)) - 1]
    if least == 0:
        raise ValueError(
            f"targets[{scores.index(0.0)}] scores 0: none of the edit's {len(edit.atoms)} atoms fires "
            "there, so that no threshold lets it through; pass a smaller coverage, or choose other atoms"
        )
    gates = [
        replace(gate, threshold=margin * least) if isinstance(gate, Excess) else gate
        for gate in edit.gates
    ]
    return replace(edit, gate=gates[0] if len(gates) == 1 else gates)


def check_shares(**shares: float) -> None:
    """Refuse numbers that are not above 0 and at most 1.

    Raises:
        ValueError: one is not; it is named.
    """
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {share}")


@dataclass(frozen=True)
class Redirected:
    """An operation whose changes keep their lengths, but all point in one direction.

    Attributes:
        operation: says how long each change is.
        direction: unit vector.
    """

    operation: Operation
    direction: Sequence[float]

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """See `Operation.change`."""
        lengths = self.operation.change(rows).norm(dim=-1, keepdim=True)
        return lengths * lengths.new_tensor(self.direction)


class _Bench:
    """Prompts and texts on which several edits are measured."""

    def __init__(
        self,
        lm: ReadableModel,
        edits: Sequence[Edit],
        prompts: Sequence[Prompt],
        retained: list[str],
        batch_size: int,
    ) -> None:
        self.lm = lm
        self.retained = retained
        self.texts = [prompt.text for prompt in prompts]
        self._size = batch_size
        self._sae = edits[0].sae
        self._tokens, self._mask = prompt_batch(lm, self._sae, self.texts)
        self._answers = torch.tensor([first_token(lm, p.answer) for p in prompts])
        foils = [p.foil for p in prompts]
        self._foils = None
        if all(foil is not None for foil in foils):
            self._foils = torch.tensor([first_token(lm, foil) for foil in foils if foil is not None])
        tokenization = tokenization_for(lm, provenance_of(self._sae).cutting)
        self._batches = list(tokenization.batches(retained, batch_size))

    @torch.no_grad()
    def on_prompts(self, edits: Sequence[Edit]) -> dict[str, list[float]]:
        """Figures of each prompt."""
        found: dict[str, list[float]] = {"probability": []}
        if self._foils is not None:
            found["logit difference"] = []
        shares: list[float] = []
        sizes: list[float] = []
        for part in torch.arange(len(self._tokens)).split(self._size):
            tokens, mask = self._tokens[part], self._mask[part]
            logits, tallies = self._run(edits, tokens, mask)
            last = (mask.sum(dim=1) - 1).to(logits.device)
            at_end = logits[torch.arange(len(part)), last].float().cpu()
            answer = self._answers[part][:, None]
            found["probability"] += at_end.softmax(dim=-1).gather(1, answer)[:, 0].tolist()
            if self._foils is not None:
                foil = self._foils[part][:, None]
                found["logit difference"] += (at_end.gather(1, answer) - at_end.gather(1, foil))[
                    :, 0
                ].tolist()
            for row in range(len(part)):
                known = [t.by_input[row].tolist() for t in tallies if t.by_input is not None]
                looked, changed, relative = (
                    sum(column) for column in zip((0.0,) * 3, *known, strict=True)
                )
                shares.append(changed / max(1.0, looked))
                sizes.append(relative / max(1.0, changed))
        return found | {"changed": shares, "norm": sizes}

    @torch.no_grad()
    def on_retained(self, variants: Sequence[Sequence[Edit]]) -> list[dict[str, list[float]]]:
        """Figures of each retained text, for each list of edits; none if there are no such texts."""
        if not self.retained:
            return [{} for _ in variants]
        meters = [_TextMeter(len(self.retained)) for _ in variants]
        for batch in self._batches:
            plain = self.lm.logits(batch.tokens, batch.attention_mask)
            for edits, meter in zip(variants, meters, strict=True):
                if edits:
                    meter.update(batch, plain, self._run(edits, batch.tokens, batch.attention_mask)[0])
                else:
                    meter.update(batch, plain, plain)
        return [meter.result() for meter in meters]

    def _run(self, edits: Sequence[Edit], tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Any]]:
        if not edits:
            return self.lm.logits(tokens, mask), []
        with applied(self.lm, edits) as tallies:
            return self.lm.logits(tokens, mask), tallies

    def write(
        self, edits: Sequence[Edit], new_tokens: int, temperature: float, seed: int,
        judge: Callable[[str], bool], judged: bool,
    ) -> dict[str, list[float]]:  # fmt: skip
        """Figures of the texts that follow each prompt."""
        ids = [row[mask].tolist() for row, mask in zip(self._tokens, self._mask.bool(), strict=True)]
        if edits:
            with applied(self.lm, edits):
                texts = written(self.lm, ids, new_tokens, temperature, seed)
        else:
            texts = written(self.lm, ids, new_tokens, temperature, seed)
        found: dict[str, list[float]] = {}
        if judged:
            found["concept"] = [float(judge(self.lm.tokenizer.decode(own))) for own in texts]
        found["distinct-2"] = [_distinct(own) for own in texts]
        found["perplexity"] = [
            self._perplexity(before, own) for before, own in zip(ids, texts, strict=True)
        ]
        return found

    @torch.no_grad()
    def _perplexity(self, before: Sequence[int], own: Sequence[int]) -> float:
        if not own:
            return 1.0
        tokens = torch.tensor([[*before, *own]])
        logits = self.lm.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
        log_probs = logits[len(before) - 1 : -1].float().log_softmax(dim=-1).cpu()
        loss = -log_probs.gather(1, torch.tensor(own)[:, None]).double().mean()
        return loss.exp().item()

    def moved(self, edits: Sequence[Edit]) -> list[Tensor]:
        """The sum of each edit's changes over the prompts."""
        with torch.no_grad(), applied(self.lm, edits) as tallies:
            for part in torch.arange(len(self._tokens)).split(self._size):
                self.lm.logits(self._tokens[part], self._mask[part])
        if not any(tally.changed for tally in tallies):
            logger.warning(
                "the edits change none of the %d tokens of %d prompts: no gate opens, or no atom fires",
                sum(tally.tokens for tally in tallies),
                len(self.texts),
            )
        return [
            torch.zeros(edit.sae.cfg.d_in).double() if tally.change is None else tally.change
            for edit, tally in zip(edits, tallies, strict=True)
        ]


class _TextMeter:
    """Means over the tokens of each text."""

    NAMES = ("KL", "loss", "accuracy")

    def __init__(self, n_texts: int) -> None:
        self._sums = {name: np.zeros(n_texts) for name in self.NAMES}
        self._counts = {name: np.zeros(n_texts) for name in self.NAMES}

    def update(self, batch: ContextBatch, plain: Tensor, edited: Tensor) -> None:
        keep = batch.keep.to(plain.device)
        rows = np.array([c.row for c in batch.contexts])[batch.keep.nonzero()[:, 0].numpy()]
        p, q = (each[keep].float().log_softmax(dim=-1) for each in (plain, edited))
        # A token of probability 0 adds nothing, whatever its logarithm.
        kl = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(dim=-1)
        self._add("KL", rows, kl)
        followed = batch.attention_mask.roll(-1, dims=1).clone()
        followed[:, -1] = False
        there = followed[batch.keep]
        ids = batch.tokens.roll(-1, dims=1)[batch.keep][there].to(q.device)
        predicted = q[there.to(q.device)]
        self._add("loss", rows[there.numpy()], -predicted.gather(1, ids[:, None])[:, 0])
        self._add("accuracy", rows[there.numpy()], (predicted.argmax(dim=-1) == ids).float())

    def _add(self, name: str, rows: np.ndarray, values: Tensor) -> None:
        np.add.at(self._sums[name], rows, values.double().cpu().numpy())
        np.add.at(self._counts[name], rows, 1)

    def result(self) -> dict[str, list[float]]:
        """Each figure of each text that has a token for it."""
        return {
            name: (self._sums[name][counts > 0] / counts[counts > 0]).tolist()
            for name, counts in self._counts.items()
        }


def _variants(bench: _Bench, edits: list[Edit], draws: int, seed: int) -> list[tuple[str, list[Edit]]]:
    """The edits to measure, by name: nothing, the edits themselves, and those beside them."""
    changes = bench.moved(edits)
    found: list[tuple[str, list[Edit]]] = [("nothing", []), ("edit", edits)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        towards = [_random_direction(edit, generator) for edit in edits]
        found.append(("random atoms", _redirected(edits, towards, changes)))
    if bench.retained:
        towards = [_difference(bench, edit) for edit in edits]
        found.append(("difference in means", _redirected(edits, towards, changes)))
    return found


def _redirected(edits: list[Edit], towards: list[Tensor], changes: list[Tensor]) -> list[Edit]:
    found = []
    for edit, vector, change in zip(edits, towards, changes, strict=True):
        unit = vector.double() / vector.double().norm().clamp(min=1e-30)
        unit = unit if unit @ change >= 0 else -unit
        found.append(replace(edit, operation=Redirected(edit.operation, tuple(unit.tolist()))))
    return found


@torch.no_grad()
def _random_direction(edit: Edit, generator: torch.Generator) -> Float[Tensor, " d_in"]:
    """A sum, with random signs, of other atoms than the edit's."""
    n = edit.sae.cfg.d_sae
    others = torch.tensor([i for i in range(n) if i not in set(edit.atoms)], dtype=torch.long)
    if not len(others):  # an edit of all atoms, or of a direction
        return torch.randn(edit.sae.cfg.d_in, generator=generator)
    chosen = others[torch.randperm(len(others), generator=generator)[: len(edit.atoms)]]
    signs = torch.randint(0, 2, (len(chosen),), generator=generator) * 2.0 - 1
    atoms = edit.sae.W_dec[chosen.to(edit.sae.device)].float().cpu()
    return signs @ (atoms / atoms.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def _difference(bench: _Bench, edit: Edit) -> Float[Tensor, " d_in"]:
    """Mean activation of the prompts, less that of the retained texts."""
    on, off = (
        read_codes(bench.lm, edit.sae, texts, edit.hook).x.double().mean(dim=0)
        for texts in (bench.texts, bench.retained)
    )
    return on - off


def _judge(concept: Sequence[str] | Callable[[str], bool]) -> Callable[[str], bool]:
    if callable(concept):
        return concept
    words = [word.strip().casefold() for word in concept]
    return lambda text: any(word in text.casefold() for word in words)


def _distinct(ids: Sequence[int], n: int = 2) -> float:
    """Distinct n-grams over all n-grams; 1 for a text that has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0

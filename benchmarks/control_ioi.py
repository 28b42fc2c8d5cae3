"""Supervised evaluation of dictionaries on the IOI task, after Makelov et al. (arXiv 2405.08366).

`control.py ioi` runs it. A prompt such as "When Mary and John went to the store, John gave a drink to"
has three attributes: the name that is the answer (IO), the name that is repeated (S), and the order of
the two (Pos). Activations are those of the last token at one hook point.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import itda_lens
from itda_lens.architectures import random_atoms, train_sae
from itda_lens.sae import sparse_codes

NAMES = ("Mary", "John", "Tom", "Anna", "James", "Paul", "Peter", "Sarah", "Mark", "Laura")
TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} came to the {place}, {s} decided to give a {thing} to",
    "While {a} and {b} were at the {place}, {s} handed a {thing} to",
)
PLACES = ("store", "park", "school", "station", "garden", "office")
THINGS = ("drink", "ball", "book", "ring", "letter", "basket")
ATTRIBUTES = ("IO", "S", "Pos")


class Case(NamedTuple):
    """A prompt by its attributes."""

    io: str
    s: str
    pos: str
    template: str
    place: str
    thing: str

    @property
    def text(self) -> str:
        a, b = (self.io, self.s) if self.pos == "ABB" else (self.s, self.io)
        return self.template.format(a=a, b=b, s=self.s, place=self.place, thing=self.thing)

    def changed(self, attribute: str, rng: random.Random) -> "Case":
        """The prompt with another value of one attribute."""
        if attribute == "Pos":
            return self._replace(pos="BAB" if self.pos == "ABB" else "ABB")
        name = rng.choice([n for n in NAMES if n not in (self.io, self.s)])
        return self._replace(**{attribute.lower(): name})

    def value(self, attribute: str) -> str:
        return dict(zip(ATTRIBUTES, self[:3], strict=True))[attribute]


def cases(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        io, s = rng.sample(NAMES, 2)
        pos, template = rng.choice(("ABB", "BAB")), rng.choice(TEMPLATES)
        found.append(Case(io, s, pos, template, rng.choice(PLACES), rng.choice(THINGS)))
    return found


class Task:
    """Prompts of the task on a model, read and edited at the last token of one hook point."""

    def __init__(self, lm: Any, hook: str, which: Sequence[Case]) -> None:
        self.lm, self.hook, self.cases = lm, hook, list(which)
        rows = [[lm.tokenizer.bos_token_id, *self._ids(case.text)] for case in which]
        self.last = torch.tensor([len(row) for row in rows]) - 1
        self.tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            self.tokens[i, : len(row)] = torch.tensor(row)
        self.mask = torch.arange(self.tokens.shape[1]) <= self.last[:, None]
        self.io, self.s = (
            torch.tensor([self._ids(" " + getattr(case, name))[0] for case in which])
            for name in ("io", "s")
        )

    def _ids(self, text: str) -> list[int]:
        return self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def activations(self) -> Tensor:
        found = []
        for part in torch.arange(len(self.tokens)).split(50):
            x = self.lm.capture(self.tokens[part], self.mask[part], [self.hook])[self.hook]
            found.append(x[torch.arange(len(part)), self.last[part]])
        return torch.cat(found)

    @torch.no_grad()
    def at_end(self, values: Tensor | None = None) -> Tensor:
        """Logits after each prompt, with other activations at its last token."""
        found = []
        for part in torch.arange(len(self.tokens)).split(25):
            rows, last = torch.arange(len(part)), self.last[part]

            def put(x: Tensor, part: Tensor = part, rows: Tensor = rows, last: Tensor = last) -> Tensor:
                assert values is not None
                x = x.clone()
                x[rows, last] = values[part].to(x.dtype)
                return x

            edits = {} if values is None else {self.hook: put}
            found.append(self.lm.logits(self.tokens[part], self.mask[part], edits)[rows, last])
        return torch.cat(found)

    def difference(self, logits: Tensor) -> Tensor:
        """Logit of the IO name less that of the S name."""
        rows = torch.arange(len(logits))
        return logits[rows, self.io] - logits[rows, self.s]


class Dictionary(NamedTuple):
    """A way to write activations as sums of vectors.

    Attributes:
        rows: the vectors.
        coded: from activations, and the cases that they belong to, to dense coefficients.
        mean: what is added to the sum.
    """

    rows: Tensor
    coded: Callable[[Tensor, Sequence[Case]], Tensor]
    mean: Tensor


def supervised(x: Tensor, which: Sequence[Case], by: str) -> Dictionary:
    """One vector for each value of each attribute: conditional means, or least squares ("MSE")."""
    values = [(a, v) for a in ATTRIBUTES for v in sorted({case.value(a) for case in which})]
    index = {value: i for i, value in enumerate(values)}

    def coded(_: Tensor, cases: Sequence[Case]) -> Tensor:
        code = torch.zeros(len(cases), len(values))
        for row, attribute in itertools.product(range(len(cases)), ATTRIBUTES):
            code[row, index[attribute, cases[row].value(attribute)]] = 1
        return code

    mean, code = x.mean(dim=0), coded(x, which)
    if by == "mean":
        rows = torch.stack([x[code[:, i] > 0].mean(dim=0) - mean for i in range(len(values))])
    else:
        rows = torch.linalg.lstsq(code, x - mean, driver="gelsd").solution
    return Dictionary(rows, coded, mean)


@torch.no_grad()
def of_sae(sae: Any) -> Dictionary:
    def coded(x: Tensor, _: Sequence[Case]) -> Tensor:
        return sparse_codes(sae, x).to_dense(sae.cfg.d_sae).detach()

    return Dictionary(sae.W_dec.detach(), coded, sae.b_dec.detach())


def dictionaries(x: Tensor, which: Sequence[Case], d_sae: int, k: int) -> dict[str, Dictionary]:
    return {
        "supervised, means": supervised(x, which, "mean"),
        "supervised, least squares": supervised(x, which, "MSE"),
        "ITDA": of_sae(itda_lens.fit(x, d_sae=d_sae, k=k)),
        "random activations": of_sae(random_atoms(x, d_sae=d_sae, k=k)),
        "TopK SAE": of_sae(train_sae(x, architecture="topk", d_sae=d_sae, k=k, epochs=200)),
    }


def greedy(
    source: Tensor, target: Tensor, own: Tensor, other: Tensor, rows: Tensor, k: int
) -> tuple[Tensor, int]:
    """The source activation after at most k changes of coefficients towards those of the target.

    Each change takes the coefficient of one vector to its value in the target's code. The one that
    brings the activation nearest to the target comes first; none is taken that does not.
    """
    left, moves = target - source, (other - own)[:, None] * rows
    free = moves.abs().sum(dim=1) > 0
    used = 0
    for _ in range(k):
        gain = 2 * moves @ left - moves.square().sum(dim=1)
        gain[~free] = -1
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        left, used = left - moves[best], used + 1
        free[best] = False
    return target - left, used


def measured(task: Task, test: Dictionary, x: Tensor, clean: Tensor, mean_ablated: Tensor) -> dict:
    """Sufficiency and necessity: how far reconstructions, and all but them, carry the task."""
    code = test.coded(x, task.cases)
    rebuilt = code @ test.rows + test.mean
    ld, base = task.difference(clean).mean(), task.difference(mean_ablated).mean()
    with_it = task.difference(task.at_end(rebuilt)).mean()
    without = task.difference(task.at_end(x.mean(dim=0) + (x - rebuilt))).mean()
    return dict(
        sufficiency=(with_it / ld).item(),
        necessity=(1 - (base - without).abs() / (base - ld).abs()).item(),
        fvu=((x - rebuilt).square().sum() / (x - x.mean(dim=0)).square().sum()).item(),
        l0=(code != 0).sum(dim=1).double().mean().item(),
    )


class Aim(NamedTuple):
    """Counterfactual prompts, which differ in one attribute.

    Attributes:
        cases: the prompts.
        x: their activations.
        wanted: the likeliest tokens once their activations are put in.
        nothing: share of prompts whose likeliest token is that one already.
    """

    cases: list[Case]
    x: Tensor
    wanted: Tensor
    nothing: float


def aim(task: Task, x: Tensor, attribute: str, rng: random.Random) -> Aim:
    cases = [case.changed(attribute, rng) for case in task.cases]
    y = Task(task.lm, task.hook, cases).activations()
    wanted = task.at_end(y).argmax(dim=1)
    nothing = (task.at_end(x).argmax(dim=1) == wanted).double().mean().item()
    return Aim(cases, y, wanted, nothing)


def controlled(task: Task, test: Dictionary, x: Tensor, aim: Aim, ks: Sequence[int]) -> dict:
    """Share of prompts at which k changes give the token that the counterfactual activation gives."""
    own, other = test.coded(x, task.cases), test.coded(aim.x, aim.cases)
    found = {"nothing": aim.nothing}
    for k in ks:
        edits = [greedy(x[i], aim.x[i], own[i], other[i], test.rows, k)[0] for i in range(len(x))]
        edited = task.at_end(torch.stack(edits)).argmax(dim=1)
        found[str(k)] = (edited == aim.wanted).double().mean().item()
    return found


def best_f1(code: Tensor, cases: Sequence[Case]) -> dict[str, float]:
    """For each attribute, the mean over its values of the best F1 of a vector's firing, by sign."""
    fires = torch.cat([code > 0, code < 0], dim=1).double()
    found = {}
    for attribute in ATTRIBUTES:
        scores = []
        for value in sorted({case.value(attribute) for case in cases}):
            truth = torch.tensor([case.value(attribute) == value for case in cases]).double()
            hits = truth @ fires
            scores.append((2 * hits / (fires.sum(dim=0) + truth.sum())).max().item())
        found[attribute] = sum(scores) / len(scores)
    return found


def split(code: Tensor, cases: Sequence[Case]) -> int:
    """Over-splitting of the two orders: vectors that fire for at least five prompts, nine tenths of them
    of one order."""
    fires = torch.cat([code > 0, code < 0], dim=1).double()
    found = 0
    for value in ("ABB", "BAB"):
        truth = torch.tensor([case.pos == value for case in cases]).double()
        often = fires.sum(dim=0)
        found += int(((truth @ fires >= 0.9 * often) & (often >= 5)).sum())
    return found

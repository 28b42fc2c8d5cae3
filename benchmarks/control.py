"""Published ways to edit a model, on dictionaries of SmolLM2's residual stream.

    python benchmarks/control.py SYSTEM [--out FOLDER] [--layer 15] [--d-sae 4096] [--k 20]

SYSTEM is one of itd, tiers, sauce, signed, exemplar, ioi, recsae. Each takes less than 20 minutes on two
processors. Figures are kept in FOLDER/results.jsonl as they come, and a run that was stopped goes on.
Dictionaries are kept in FOLDER too.

Text of the dictionaries: short sentences made from templates (`control_texts.py`) and articles of the
Python language reference. Prompts that are measured come from templates that no dictionary and no choice
of atoms has seen.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import control_ioi as task
import control_recommender as recommender
import control_texts as data
import torch
from results import Results
from sklearn.metrics import roc_auc_score

import itda_lens
from itda_lens.control import (
    Add,
    Always,
    Clamp,
    Edit,
    Effect,
    Excess,
    FiresAbove,
    ProjectOut,
    Prompt,
    Scale,
    contrast,
    direction,
    effects,
    gate_scores,
    interpret_then_deactivate,
    unlearn,
)
from itda_lens.control.selection import read_codes
from itda_lens.samples import reference_prose, smollm2
from itda_lens.sources import language_model

SEED = 0


class Setup:
    """The model and its dictionaries, made when they are first asked for."""

    def __init__(self, out: Path, layer: int, d_sae: int, k: int) -> None:
        self.out, self.layer, self.d_sae, self.k = out, layer, d_sae, k
        self.results = Results(out)
        self.lm = language_model(str(smollm2.fetch()), loader="huggingface", device="cpu")

    def hook(self, layer: int | None = None) -> str:
        return f"blocks.{self.layer if layer is None else layer}.hook_resid_post"

    def itda(self, layer: int | None = None, d_sae: int | None = None) -> itda_lens.ITDA:
        hook = self.hook(layer)
        if d_sae is not None:
            return self.itda(layer).prefix(d_sae)
        d_sae = self.d_sae
        folder = self.out / f"{hook}-{d_sae}"
        if not folder.exists():
            texts = data.sentences() + reference_prose()[0][:15]
            made = itda_lens.build(self.lm, texts, hook, d_sae=d_sae, k=self.k, max_tokens=40_000)
            made[hook].save_model(folder)
        return itda_lens.load(folder)

    def once(self, compute, **setting):
        """A row of figures, from the file or computed."""
        setting |= dict(layer=self.layer, k=self.k)
        start = time.perf_counter()

        def timed():
            figures = compute()
            return figures | dict(seconds=round(time.perf_counter() - start, 1))

        row = self.results.once(setting, timed)
        print(row, flush=True)
        return row


def flat(found: Sequence[Effect]) -> dict[str, dict[str, list[float]]]:
    """Effects for a JSON line: mean and ends of the interval of each figure."""
    return {
        effect.name: {name: [v.mean, v.low, v.high] for name, v in effect.figures.items()}
        for effect in found
    }


def itd(setup: Setup) -> None:
    """Erase countries: the gate, the erasure, what others lose, and a concept that comes later."""
    sae = setup.itda()
    for country in data.ERASED:
        targets = data.about(country, data.LEARNED)
        retained = data.others(data.LEARNED)
        for by, top, factor in (("difference", 16, -2.0), ("sets", 32, -2.0)):

            def compute(by=by, top=top, factor=factor, c=country, targets=targets, retained=retained):
                try:
                    edit = interpret_then_deactivate(
                        setup.lm, sae, targets, retained, factor=factor, by=by, top=top,
                        count=4 if by == "difference" else 64, coverage=0.75,
                    )  # fmt: skip
                except ValueError as error:  # no gate lets three quarters of the targets through
                    return dict(error=str(error))
                held = data.about(c, data.HELD_OUT)
                near, far = data.neighbours(c, data.HELD_OUT), data.unrelated()
                on, close, other = (gate_scores(setup.lm, edit, texts) for texts in (held, near, far))
                opens = edit.gates[0].threshold
                shut = [t for t, s in zip(near + far, close + other, strict=True) if s < opens]
                prompts = [Prompt(*answer) for answer in data.answers(c)]
                options = dict(progress=False)
                gated = effects(setup.lm, edit, prompts, near + far, random_draws=1, **options)
                only_shut = effects(setup.lm, edit, prompts[:1], shut, random_draws=0, **options)
                free = replace(edit, gate=Always())
                ungated = effects(setup.lm, free, prompts, near + far, random_draws=0, **options)
                return dict(
                    atoms=[[a, str(sae.labels[a])] for a in edit.atoms],
                    **aucs(on, close, other),
                    opens=[sum(s >= opens for s in each) / len(each) for each in (on, close, other)],
                    gated=flat(gated),
                    shut=len(shut),
                    kl_where_shut=flat(only_shut)["edit"]["KL"][0],
                    ungated=flat(ungated),
                )

            setup.once(compute, system="itd", concept=country, by=by, factor=factor)
        setup.once(
            lambda c=country: _rivals_of_the_gate(setup, sae, c), system="itd-rivals", concept=country
        )
    setup.once(lambda: _later(setup, sae), system="itd-later")


def aucs(on: list[float], near: list[float], far: list[float]) -> dict[str, float]:
    """How well scores tell prompts of the concept from near neighbours and from unrelated text."""
    return {
        f"auc_{name}": roc_auc_score([1] * len(on) + [0] * len(off), on + off)
        for name, off in (("near", near), ("far", far))
    }


def _rivals_of_the_gate(setup: Setup, sae: itda_lens.ITDA, country: str) -> dict[str, object]:
    """AUC of gates of random atoms, equal in number, and of the difference in means."""
    targets, retained = data.about(country, data.LEARNED), data.others(data.LEARNED)
    sets = (
        data.about(country, data.HELD_OUT),
        data.neighbours(country, data.HELD_OUT),
        data.unrelated(),
    )
    generator = torch.Generator().manual_seed(SEED)
    codes = read_codes(setup.lm, sae, targets)
    alive = torch.unique(codes.codes.indices[codes.codes.values != 0])
    draws = []
    for _ in range(5):
        atoms = alive[torch.randperm(len(alive), generator=generator)[:4]].tolist()
        edit = Edit(sae, atoms, Scale(0.0), Excess(0.0))
        draws.append(aucs(*(gate_scores(setup.lm, edit, texts) for texts in sets)))
    vector = codes.x.mean(dim=0) - read_codes(setup.lm, sae, retained).x.mean(dim=0)

    def along(texts: list[str]) -> list[float]:
        read = read_codes(setup.lm, sae, texts)
        scores = read.x @ (vector / vector.norm())
        rows = torch.from_numpy(read.places.row.copy())
        return [scores[rows == i].max().item() for i in range(len(texts))]

    return dict(
        random={name: sum(draw[name] for draw in draws) / 5 for name in draws[0]},
        means=aucs(*map(along, sets)),
    )


def _later(setup: Setup, sae: itda_lens.ITDA) -> dict[str, object]:
    """Three countries erased at once, then a fourth added: what the first three and others get."""
    edits = [
        interpret_then_deactivate(
            setup.lm,
            sae,
            data.about(c, data.LEARNED),
            data.others(data.LEARNED),
            factor=-2.0,
            by="difference",
            count=4,
            coverage=0.75,
        )
        for c in (*data.ERASED, data.LATER)
    ]
    found: dict[str, object] = {}
    for name, own in (("three", edits[:3]), ("four", edits)):
        for country in (*data.ERASED, data.LATER, data.KEPT):
            prompts = [Prompt(*answer) for answer in data.answers(country)]
            both = flat(effects(setup.lm, own, prompts, random_draws=0, progress=False))
            found[f"{name}: {country}"] = [both[n]["probability"][0] for n in ("nothing", "edit")]
    return found


def tiers(setup: Setup) -> None:
    """Steer towards food: constant, per input, per token; five strengths; two sizes of dictionary."""
    prompts = [Prompt(text, " food") for text in data.STORIES]
    for d_sae in (setup.d_sae, 512):
        sae = setup.itda(d_sae=None if d_sae == setup.d_sae else d_sae)
        amounts = (0.1, 0.2, 0.4, 0.7, 1.0) if d_sae == setup.d_sae else (0.2, 0.7)
        chosen = contrast(setup.lm, sae, data.FOOD, data.NOT_FOOD, by="difference", count=4)
        atoms = [each.atom for each in chosen]
        for tier, amount in itertools.product(("constant", "input", "token"), amounts):
            setting = dict(system="tiers", d_sae=d_sae, tier=tier, amount=amount)

            def compute(tier=tier, amount=amount, sae=sae, atoms=atoms):
                # Per input and per token, steering away where food is mentioned; constant, everywhere.
                gate = Always() if tier == "constant" else FiresAbove(0.0, sign=1, scope=tier)
                edit = Edit(sae, atoms, Add(-amount / math.sqrt(len(atoms)), "norm"), gate)
                found = effects(
                    setup.lm, edit, prompts, data.unrelated(), new_tokens=16, concept=data.FOOD_WORDS,
                    random_draws=1, batch_size=12, temperature=1.0, seed=SEED, progress=False,
                )  # fmt: skip
                return dict(atoms=[[a, str(sae.labels[a])] for a in atoms], effects=flat(found))

            setup.once(compute, **setting)


def sauce(setup: Setup) -> None:
    """Scale a country's atoms by gamma from 1 to -1, with several ways to choose them."""
    country = data.ERASED[0]
    targets, retained = data.about(country, data.LEARNED), data.others(data.LEARNED)
    prompts = [Prompt(*answer) for answer in data.answers(country)]
    ways = [(setup.layer, by) for by in ("difference", "sets", "f1")] + [(10, "difference")]
    for (layer, by), gamma in itertools.product(ways, (0.0, -0.5, -1.0)):
        sae = setup.itda(layer)

        def compute(sae=sae, by=by, gamma=gamma):
            edit = unlearn(setup.lm, sae, targets, retained, gamma=gamma, by=by, count=8)
            found = effects(
                setup.lm, edit, prompts, data.neighbours(country, data.HELD_OUT), random_draws=2,
                progress=False,
            )  # fmt: skip
            kept = [Prompt(*a) for c in (data.KEPT, data.LATER) for a in data.answers(c)]
            other = effects(setup.lm, edit, kept, random_draws=0, progress=False)
            return dict(
                atoms=[[a, str(sae.labels[a])] for a in edit.atoms],
                effects=flat(found),
                others=flat(other),
            )

        setup.once(compute, system="sauce", at=layer, by=by, gamma=gamma)


def signed(setup: Setup) -> None:
    """Both poles of one atom on minimal pairs, beside the difference in means."""
    sae = setup.itda()
    for name, (first, second) in data.PAIRS.items():
        half = len(first) // 2

        def compute(first=first, second=second, half=half):
            on, off = (read_codes(setup.lm, sae, texts) for texts in (first[:half], second[:half]))
            means = [c.sums(c.codes.values) / len(c.codes.values) for c in (on, off)]
            atom = int((means[0] - means[1]).abs().argmax())
            vector = on.x.mean(dim=0) - off.x.mean(dim=0)
            tests = [read_codes(setup.lm, sae, texts) for texts in (first[half:], second[half:])]
            figures = {"atom": [atom, str(sae.labels[atom])]}
            dense = [t.codes.to_dense(sae.cfg.d_sae) for t in tests]
            truth = [1] * len(dense[0]) + [0] * len(dense[1])

            def auc(scores):
                return roc_auc_score(truth, torch.cat(scores).tolist())

            sign = 1 if means[0][atom] > means[1][atom] else -1
            figures["auc_atom"] = auc([sign * d[:, atom] for d in dense])
            figures["auc_positive_part"] = auc([(sign * d[:, atom]).clamp(min=0) for d in dense])
            figures["auc_means"] = auc([t.x @ vector for t in tests])
            generator = torch.Generator().manual_seed(SEED)
            null = []
            for _ in range(20):
                other = int(torch.randint(sae.cfg.d_sae, (1,), generator=generator))
                score = auc([d[:, other] for d in dense])
                null.append(max(score, 1 - score))
            figures["auc_random_atoms"] = sum(null) / len(null)
            return figures

        setup.once(compute, system="signed", pair=name)
        row = setup.results.find(dict(system="signed", pair=name, layer=setup.layer, k=setup.k))
        assert row is not None
        atom = row["atom"][0]
        prompts = [Prompt(*p) for p in data.PAIR_PROMPTS[name]]
        for value in (-0.6, -0.3, 0.3, 0.6):

            def clamped(first=first, second=second, half=half, atom=atom, value=value, prompts=prompts):
                found = effects(
                    setup.lm, Edit(sae, [atom], Clamp(value, "norm")), prompts, data.unrelated(),
                    random_draws=2, progress=False,
                )  # fmt: skip
                on, off = (
                    read_codes(setup.lm, sae, t).x.mean(dim=0) for t in (first[:half], second[:half])
                )
                steered = Edit(direction(on - off, setup.hook()), [0], Add(value, "norm"))
                means = effects(
                    setup.lm, steered, prompts, data.unrelated(), random_draws=0, progress=False
                )
                return dict(effects=flat(found), means=flat(means)["edit"])

            setup.once(clamped, system="signed-clamp", pair=name, value=value)


def exemplar(setup: Setup) -> None:
    """Project one atom's direction out of every activation: does one suffice?"""
    sae = setup.itda()
    for country in data.ERASED[:2]:
        targets, retained = data.about(country, data.LEARNED), data.others(data.LEARNED)
        prompts = [Prompt(*answer) for answer in data.answers(country)]
        for count in (1, 4):
            for way in ("project", "scale"):

                def compute(
                    count=count, way=way, targets=targets, retained=retained, c=country, p=prompts
                ):
                    found = contrast(setup.lm, sae, targets, retained, by="difference", count=count)
                    atoms = [each.atom for each in found]
                    operation = ProjectOut(centred=False) if way == "project" else Scale(0.0)
                    measured = effects(
                        setup.lm, Edit(sae, atoms, operation), p, data.neighbours(c, data.HELD_OUT),
                        random_draws=2, progress=False,
                    )  # fmt: skip
                    return dict(atoms=[[a, str(sae.labels[a])] for a in atoms], effects=flat(measured))

                setup.once(compute, system="exemplar", concept=country, count=count, way=way)


def ioi(setup: Setup) -> None:
    """Supervised evaluation on the IOI task; first, whether the model does the task at all."""
    train, test = task.cases(300, SEED), task.cases(40, SEED + 1)

    def able():
        every = task.Task(setup.lm, setup.hook(20), test)
        logits = every.at_end()
        difference = every.difference(logits)
        found = dict(
            accuracy=(difference > 0).double().mean().item(),
            first=(logits.argmax(dim=1) == every.io).double().mean().item(),
            difference=difference.mean().item(),
        )
        rng = random.Random(SEED)
        for layer in (10, 15, 20, 25):  # where the last token holds the answer
            at = task.Task(setup.lm, setup.hook(layer), test)
            other = task.Task(setup.lm, at.hook, [case.changed("IO", rng) for case in test])
            patched = at.at_end(other.activations())
            rows = torch.arange(len(test))
            found[f"patched_{layer}"] = (
                (patched[rows, other.io] - patched[rows, at.io] > 0).double().mean().item()
            )
        return found

    setup.once(able, system="ioi-able")
    layer = 25  # patched there, the last token carries the answer; at layer 20 it does not yet
    fitted = task.Task(setup.lm, setup.hook(layer), train)
    held = task.Task(setup.lm, setup.hook(layer), test)
    seen, x = fitted.activations(), held.activations()
    clean, ablated = held.at_end(), held.at_end(seen.mean(dim=0).expand_as(x))
    aims = {a: task.aim(held, x, a, random.Random(SEED)) for a in task.ATTRIBUTES}
    made = task.dictionaries(seen, train, d_sae=128, k=8)
    for name, own in made.items():

        def compute(own=own):
            code = own.coded(x, test)
            figures = task.measured(held, own, x, clean, ablated)
            figures |= dict(f1=task.best_f1(code, test), split=task.split(code, test))
            for attribute in task.ATTRIBUTES:
                figures[attribute] = task.controlled(held, own, x, aims[attribute], (2, 4, 8))
            return figures

        setup.once(compute, system="ioi", dictionary=name)


def recsae(setup: Setup) -> None:
    """Ablate the atoms of a category in a small recommender, after RecSAE (arXiv 2411.06112)."""
    for seed in range(3):
        setup.once(lambda seed=seed: recommender.measured(seed), system="recsae", seed=seed)


SYSTEMS = {f.__name__: f for f in (itd, tiers, sauce, signed, exemplar, ioi, recsae)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=[*SYSTEMS])
    parser.add_argument("--out", type=Path, default=Path("control-results"))
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=20)
    arguments = parser.parse_args()
    setup = Setup(arguments.out, arguments.layer, arguments.d_sae, arguments.k)
    SYSTEMS[arguments.system](setup)


if __name__ == "__main__":
    main()

"""Atoms are chosen, and effects of edits measured, as by hand."""

import logging
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from itda_lens import build
from itda_lens.control import (
    Add,
    Edit,
    Excess,
    FiresAbove,
    Interval,
    Prompt,
    Scale,
    applied,
    contrast,
    direction,
    effects,
    exemplar_ablation,
    gate_scores,
    interpret_then_deactivate,
    labelled,
    opening_at,
    output_scores,
    pole,
    swapped,
    tiered,
    typical_coefficients,
    unlearn,
    written,
)
from itda_lens.sources import Tokenization, language_model

HOOK = "blocks.1.hook_resid_post"
TARGETS = ["the cat sat on a mat", "a small cat ran", "cat and dog sat"]
RETAINED = ["that log was big", "red and blue . it was in the log", "said that it was big ."]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return language_model(AutoModelForCausalLM.from_pretrained(tiny_folder))


@pytest.fixture(scope="module")
def itda(model, texts):
    return build(model, texts, HOOK, d_sae=30, k=4, progress=False)[HOOK]


@torch.no_grad()
def dense(model, itda, texts):
    """Codes of each text's tokens that count."""
    tokenization = Tokenization(model.tokenizer, Tokenization(model.tokenizer).cutting)
    found = []
    for context in tokenization.contexts(texts):
        batch = tokenization.batch([context])
        x = model.capture(batch.tokens, batch.attention_mask, [HOOK])[HOOK]
        found.append(itda.encode(x[batch.keep]))
    return found


class TestSelection:
    def test_labels(self, itda):
        tokens = [label.token for label in itda.labels]
        word = tokens[3]
        expected = [i for i, token in enumerate(tokens) if token == word]
        assert labelled(itda, f" {word.upper()}") == expected
        assert labelled(itda, re.compile(rf"\[\[{re.escape(word)}\]\]")) == expected
        assert labelled(itda, lambda label: label.token == word) == expected
        with pytest.raises(ValueError, match=f"none of 30 labels, got '{word}x'; near it are.*'{word}'"):
            labelled(itda, word + "x")
        with pytest.raises(ValueError, match="fits none of 30 labels"):
            labelled(itda, re.compile("zebra"))
        with pytest.raises(ValueError, match="carries no labels"):
            labelled(direction(torch.ones(32), HOOK), "cat")

    def test_difference_and_strongest(self, model, itda):
        on, off = (torch.cat(dense(model, itda, t)).abs().mean(dim=0) for t in (TARGETS, RETAINED))
        for by, scores in (("difference", on - off), ("strongest", on)):
            found = contrast(model, itda, TARGETS, RETAINED, by=by, count=5)
            assert [each.atom for each in found] == scores.argsort(descending=True)[:5].tolist()
            assert found[0].score == pytest.approx(scores.max().item(), rel=1e-5)
            assert found[0].label == itda.labels[found[0].atom]

    def test_sets(self, model, itda):
        def strongest(texts):
            per_text = [c.abs().amax(dim=0) for c in dense(model, itda, texts)]
            return [{i for i in m.topk(3).indices.tolist() if m[i] > 0} for m in per_text]

        targets = strongest(TARGETS)
        expected = set.union(*targets) - set.union(*strongest(RETAINED))
        found = contrast(model, itda, TARGETS, RETAINED, by="sets", top=3, count=30)
        assert {each.atom for each in found} == expected
        for each in found:
            assert each.score == pytest.approx(sum(each.atom in own for own in targets) / 3)
        with pytest.raises(ValueError, match="the contrast is empty: all of their 30 strongest"):
            contrast(model, itda, TARGETS, TARGETS, by="sets", top=30)

    def test_f1(self, model, itda):
        on, off = (
            torch.stack([(c != 0).any(dim=0) for c in dense(model, itda, t)]).sum(dim=0)
            for t in (TARGETS, RETAINED)
        )
        f1 = 2 * on / (on + off + 3)
        found = contrast(model, itda, TARGETS, RETAINED, by="f1", count=30)
        assert {each.atom: pytest.approx(each.score) for each in found} == {
            i: f1[i].item() for i in range(30) if f1[i] > 0
        }
        assert [each.score for each in found] == sorted((e.score for e in found), reverse=True)

    def test_difference_of_a_text_with_itself_is_empty(self, model, itda):
        with pytest.raises(ValueError, match="the contrast is empty"):
            contrast(model, itda, TARGETS, TARGETS)

    def test_output_scores(self, model, itda):
        found = output_scores(model, itda, [4, 9, 2], [" cat", " dog"], RETAINED, amount=0.5)
        assert [each.score for each in found] == sorted((e.score for e in found), reverse=True)
        best = found[0].atom
        ids = [model.tokenizer(w)["input_ids"][-1] for w in ("cat", "dog")]
        change = []
        for edits in ([], [Edit(itda, [best], Add(0.5, "norm"))]):
            total = 0.0
            for text in RETAINED:
                tokens = torch.tensor(
                    [[0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]]
                )
                with torch.no_grad(), applied(model, edits) if edits else torch.no_grad():
                    logits = model.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
                total += logits[0, -1].log_softmax(-1)[ids].mean().item() / 3
            change.append(total)
        assert found[0].score == pytest.approx(change[1] - change[0], abs=1e-5)

    def test_typical_coefficients(self, model, itda):
        codes = torch.cat(dense(model, itda, TARGETS)).abs()
        fires = [i for i in range(30) if (codes[:, i] > 0).any()][:3]
        expected = [codes[codes[:, i] > 0, i].mean().item() for i in fires]
        assert typical_coefficients(model, itda, fires, TARGETS) == pytest.approx(expected, rel=1e-5)
        silent = next(i for i in range(30) if not (codes[:, i] > 0).any())
        with pytest.raises(ValueError, match=f"atom {silent} never does"):
            typical_coefficients(model, itda, [silent], TARGETS)

    def test_swapped_into_its_own_prompt_changes_nothing(self, model, itda):
        tokens = torch.tensor([[0, *model.tokenizer(TARGETS[0], add_special_tokens=False)["input_ids"]]])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        same, other = (swapped(model, itda, range(30), text) for text in (TARGETS[0], RETAINED[1]))
        assert same.read[0] is False
        with torch.no_grad():
            plain = model.logits(tokens, mask)
            with applied(model, Edit(itda, range(30), same)):
                torch.testing.assert_close(model.logits(tokens, mask), plain, atol=1e-5, rtol=1e-5)
            with applied(model, Edit(itda, range(30), other)):
                assert not torch.allclose(model.logits(tokens, mask), plain, atol=1e-3)

    @pytest.mark.parametrize("prompts", [[], "the cat"])
    def test_bad_prompts(self, model, itda, prompts):
        with pytest.raises((TypeError, ValueError), match="targets"):
            contrast(model, itda, prompts, RETAINED)
        with pytest.raises((TypeError, ValueError), match="retained"):
            contrast(model, itda, TARGETS, prompts)


PROMPTS = [Prompt(text, " cat", " dog") for text in TARGETS]


@pytest.fixture(scope="module")
def measured(model, itda):
    edit = Edit(itda, range(12), Scale(-1.0))
    found = effects(
        model, edit, PROMPTS, RETAINED, new_tokens=6, concept=["cat"], batch_size=2, progress=False
    )
    return edit, {effect.name: effect.figures for effect in found}


class TestEffects:
    def test_rows_and_figures(self, measured):
        _, found = measured
        assert list(found) == ["nothing", "edit", "random atoms", "difference in means"]
        names = (
            "probability", "logit difference", "changed", "norm", "KL", "loss", "accuracy", "concept",
            "distinct-2", "perplexity",
        )  # fmt: skip
        for figures in found.values():
            assert tuple(figures) == names
            for interval in figures.values():
                assert interval.low <= interval.mean + 1e-12
                assert interval.mean <= interval.high + 1e-12

    def by_hand(self, model, edits, text):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[0, *ids]])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad(), applied(model, edits) if edits else torch.no_grad():
            return model.logits(tokens, mask)[0].log_softmax(dim=-1), tokens[0]

    def test_answers(self, model, measured):
        edit, found = measured
        cat, dog = (model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("cat", "dog"))
        for name, edits in (("nothing", []), ("edit", [edit])):
            ends = [self.by_hand(model, edits, text)[0][-1] for text in TARGETS]
            probability = sum(end[cat].exp().item() for end in ends) / 3
            difference = sum((end[cat] - end[dog]).item() for end in ends) / 3
            assert found[name]["probability"].mean == pytest.approx(probability, rel=1e-4)
            assert found[name]["logit difference"].mean == pytest.approx(difference, abs=1e-5)

    def test_retained(self, model, measured):
        edit, found = measured
        assert found["nothing"]["KL"] == Interval(0.0, 0.0, 0.0)
        kl, loss, right = [], [], []
        for text in RETAINED:
            p, tokens = self.by_hand(model, [], text)
            q, _ = self.by_hand(model, [edit], text)
            kl.append((p.exp() * (p - q)).sum(dim=-1)[1:].mean().item())
            own = q[1:-1]
            loss.append(-own.gather(1, tokens[2:, None]).mean().item())
            right.append((own.argmax(dim=-1) == tokens[2:]).float().mean().item())
        figures = found["edit"]
        for name, values in (("KL", kl), ("loss", loss), ("accuracy", right)):
            assert figures[name].mean == pytest.approx(sum(values) / 3, abs=1e-5), name

    def test_equal_strength(self, measured, model):
        """Random atoms and the difference in means change the same tokens by as much."""
        _, found = measured
        assert found["nothing"]["changed"].mean == 0
        for name in ("random atoms", "difference in means"):
            for figure in ("changed", "norm"):
                assert found[name][figure].mean == pytest.approx(found["edit"][figure].mean, rel=1e-4)
            assert found[name]["probability"] != found["edit"]["probability"]
        assert found["edit"]["norm"].mean > 0.01
        edit, shares = measured[0], []
        for codes in dense(model, edit.sae, TARGETS):
            shares.append((codes[:, :12] != 0).any(dim=-1).double().mean().item())
        assert found["edit"]["changed"].mean == pytest.approx(sum(shares) / 3)

    def test_generations(self, model, measured):
        _, found = measured
        expected, rate = [], []
        for text in TARGETS:
            ids = [0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
            (own,) = written(model, [ids], 6)
            rate.append("cat" in model.tokenizer.decode(own))
            tokens = torch.tensor([[*ids, *own]])
            with torch.no_grad():
                logits = model.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
            lp = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(own)[:, None])
            expected.append(math.exp(-lp.mean().item()) if own else 1.0)
        assert found["nothing"]["perplexity"].mean == pytest.approx(sum(expected) / 3, rel=1e-3)
        assert found["nothing"]["concept"].mean == pytest.approx(sum(rate) / 3)

    def test_twice_is_the_same(self, model, itda):
        edit = Edit(itda, [1], Add(1.0))
        options = dict(new_tokens=4, temperature=1.0, seed=3, progress=False)
        state = torch.random.get_rng_state()
        one, two = (effects(model, edit, PROMPTS, RETAINED, **options) for _ in range(2))
        assert one == two
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_without_foils_retained_texts_and_generations(self, model, itda):
        found = effects(model, Edit(itda, [1]), [Prompt("the cat", " sat")], progress=False)
        assert [effect.name for effect in found] == ["nothing", "edit", "random atoms"]
        assert list(found[0].figures) == ["probability", "changed", "norm"]
        assert found[1].figures["probability"].low == found[1].figures["probability"].mean

    def test_several_edits_and_a_direction(self, model, itda):
        edits = [Edit(itda, [1], Add(0.5)), Edit(direction(torch.randn(32), HOOK), [0], Scale(0.5))]
        found = {e.name: e.figures for e in effects(model, edits, PROMPTS, RETAINED, progress=False)}
        assert found["edit"]["KL"].mean > 0

    def test_an_edit_that_changes_nothing_is_told(self, model, itda, caplog):
        with caplog.at_level(logging.WARNING):
            effects(model, Edit(itda, [1], gate=FiresAbove(1e9)), PROMPTS, progress=False)
        assert "the edits change none of the 14 tokens of 3 prompts" in caplog.text

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(prompts=[]), "prompts must hold at least one"),
            (dict(prompts=["the cat"]), "prompts.0. must be Prompt"),
            (dict(prompts=[Prompt("the " * 300, " cat")]), "prompts must each fit one context of 128"),
            (dict(prompts=[Prompt("the", "")]), "a word must hold at least one token"),
            (dict(confidence=1.0), "confidence must be between 0 and 1"),
            (dict(batch_size=0), "batch_size must be at least 1"),
            (dict(new_tokens=-1), "new_tokens must be at least 0"),
            (dict(edits=[]), "edits must hold at least one"),
        ],
    )
    def test_bad_input(self, model, itda, change, message):
        options = dict(edits=Edit(itda, [1]), prompts=PROMPTS, progress=False) | change
        with pytest.raises((TypeError, ValueError), match=message):
            effects(model, **options)


def test_intervals_cover_the_mean():
    """Of 200 samples of 30 numbers, the 95 % interval holds the mean of most."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 30, generator=generator, dtype=torch.double) + 1
    found = [Interval.of(sample.tolist(), seed=i) for i, sample in enumerate(samples)]
    share = sum(each.low <= 1 <= each.high for each in found) / 200
    assert 0.88 < share < 0.99
    assert Interval.of([2.0]) == Interval(2.0, 2.0, 2.0)


class TestGateScores:
    def test_by_hand(self, model, itda):
        edit = Edit(itda, range(12), Scale(0.0), Excess(0.0))
        found = gate_scores(model, edit, [*TARGETS, *RETAINED], batch_size=2)
        for score, codes in zip(found, dense(model, itda, [*TARGETS, *RETAINED]), strict=True):
            moved = codes[:, :12] @ itda.W_dec[:12]
            assert score == pytest.approx(moved.square().sum(dim=-1).mean().item(), rel=1e-4)

    def test_opens_on_the_targets(self, model, itda):
        edit = opening_at(model, Edit(itda, range(12)), TARGETS)
        least = min(gate_scores(model, edit, TARGETS))
        assert edit.gate.threshold == pytest.approx(0.99 * least)
        for text in TARGETS + RETAINED:
            tokens = torch.tensor([[0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]])
            with torch.no_grad(), applied(model, edit) as (tally,):
                model.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
            (score,) = gate_scores(model, edit, [text])
            assert (tally.changed > 0) == (score >= edit.gate.threshold)

    def test_bad_input(self, model, itda):
        with pytest.raises(ValueError, match="edit must have a gate `Excess`"):
            gate_scores(model, Edit(itda, [0]), TARGETS)
        with pytest.raises(ValueError, match="margin must be above 0"):
            opening_at(model, Edit(itda, [0]), TARGETS, margin=0.0)
        with pytest.raises(ValueError, match="texts must be a list"):
            gate_scores(model, Edit(itda, [0], gate=Excess(1.0)), [])
        on = torch.stack([(c != 0).any(dim=0) for c in dense(model, itda, TARGETS)])
        rare = next(i for i in range(30) if not on[0, i])
        with pytest.raises(ValueError, match="targets.0. scores 0: none of the edit's 1 atoms fires"):
            opening_at(model, Edit(itda, [rare]), TARGETS)


class TestSystems:
    def test_itd_leaves_what_scores_below_the_gate(self, model, itda):
        edit = interpret_then_deactivate(model, itda, TARGETS, RETAINED, top=4, factor=-2.0)
        assert isinstance(edit.gate, Excess)
        scores = gate_scores(model, edit, RETAINED)
        shut = [t for t, s in zip(RETAINED, scores, strict=True) if s < edit.gate.threshold]
        assert shut
        found = {e.name: e.figures for e in effects(model, edit, PROMPTS, shut, progress=False)}
        assert found["edit"]["KL"] == Interval(0.0, 0.0, 0.0)
        assert found["edit"]["changed"].mean > 0
        free = interpret_then_deactivate(model, itda, TARGETS, RETAINED, top=4, gated=False)
        assert free.atoms == edit.atoms

    def test_the_others(self, model, itda):
        edit = unlearn(model, itda, TARGETS, RETAINED, gamma=-0.5, count=4)
        chosen = contrast(model, itda, TARGETS, RETAINED, count=4)
        assert list(edit.atoms) == [each.atom for each in chosen]
        assert edit.operation == Scale(-0.5)
        changed = []
        for tier in ("constant", "input", "token"):
            with torch.no_grad(), applied(model, tiered(itda, edit.atoms, -0.3, tier)) as (tally,):
                for text in (TARGETS[0], RETAINED[0]):
                    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
                    tokens = torch.tensor([[0, *ids]])
                    model.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
            changed.append(tally.changed)
        assert changed[0] >= changed[1] > changed[2] > 0
        assert pole(itda, 3, -0.5).operation.values == -0.5
        assert exemplar_ablation(itda, [3]).operation.centred is False


class TestWriting:
    def test_every_library_writes_the_same(self, model, tiny):
        ids = [[0, 5, 6, 7], [0, 9]]
        expected = written(model, ids, 5)
        assert written(tiny, ids, 5) == expected
        assert [written(model, [own], 5)[0] for own in ids] == expected

    def test_models_of_ones_own(self, model):
        class Own:
            loader, tokenizer, device = "huggingface", model.tokenizer, model.device
            name, source, max_context = "own", None, model.max_context
            check_hooks, capture, edited = model.check_hooks, model.capture, model.edited

            def logits(self, tokens, mask):
                return model.logits(tokens, mask)

        assert written(Own(), [[0, 5, 6, 7]], 5) == written(model, [[0, 5, 6, 7]], 5)
        drawn = written(Own(), [[0, 5, 6, 7]], 5, temperature=2.0, seed=1)
        assert drawn == written(Own(), [[0, 5, 6, 7]], 5, temperature=2.0, seed=1)
        assert drawn != written(Own(), [[0, 5, 6, 7]], 5, temperature=2.0, seed=2)

"""Edits of a running model: what changes, where, and what must not."""

from dataclasses import dataclass

import pytest
import torch
from sae_lens import (
    SAE,
    HookedSAETransformer,
    JumpReLUSAEConfig,
    StandardSAEConfig,
    TopKSAEConfig,
)
from transformers import AutoModelForCausalLM

from itda_lens import build, fit
from itda_lens.control import (
    Add,
    Always,
    Clamp,
    Edit,
    Excess,
    FiresAbove,
    Masked,
    Positions,
    ProjectOut,
    Scale,
    Swap,
    Tokens,
    applied,
    direction,
)
from itda_lens.sae import coded, reconstructed, sparse_codes
from itda_lens.sources import language_model, register_with_transformer_lens

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
ALL = range(30)
CHOSEN = list(range(0, 30, 2))


@pytest.fixture(scope="module")
def models(tiny, tiny_folder, tokenizer):
    register_with_transformer_lens(tiny_folder, "tiny-control")
    hooked = HookedSAETransformer.from_pretrained_no_processing("tiny-control", device="cpu")
    return {
        "bridge": tiny,
        "hooked": language_model(hooked, tokenizer=tokenizer),
        "huggingface": language_model(AutoModelForCausalLM.from_pretrained(tiny_folder)),
    }


@pytest.fixture(scope="module", params=["bridge", "hooked", "huggingface"])
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="module")
def dictionaries(tiny, texts):
    hooks = [HOOK, OTHER, "blocks.1.attn.hook_z"]
    return build(tiny, texts, hooks, d_sae=30, k=4, progress=False)


@pytest.fixture(scope="module")
def itda(dictionaries):
    return dictionaries[HOOK]


@pytest.fixture
def tokens():
    batch = torch.randint(4, 20, (3, 9))
    batch[:, 0] = 0  # <bos>
    return batch


def mask_of(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


@torch.no_grad()
def logits(model, tokens, edits=None):
    if edits is None:
        return model.logits(tokens, mask_of(tokens))
    with applied(model, edits):
        return model.logits(tokens, mask_of(tokens))


@torch.no_grad()
def at_hook(model, tokens, edits, hook=HOOK):
    with applied(model, edits) as tallies:
        return model.capture(tokens, mask_of(tokens), [hook])[hook], tallies


def other_saes(itda, kind):
    """An SAE of SAELens with random weights."""
    torch.manual_seed(1)
    common = dict(d_in=32, d_sae=30, apply_b_dec_to_input=True, device="cpu")
    kinds = {
        "standard": lambda: StandardSAEConfig(**common),
        "jumprelu": lambda: JumpReLUSAEConfig(**common),
        "topk": lambda: TopKSAEConfig(**common, k=4, rescale_acts_by_decoder_norm=True),
        "layer_norm": lambda: StandardSAEConfig(**common, normalize_activations="layer_norm"),
        "rescaled": lambda: StandardSAEConfig(**common, normalize_activations="constant_norm_rescale"),
    }
    cfg = kinds[kind]()
    cfg.metadata.hook_name = HOOK
    sae = SAE.get_sae_class_for_architecture(cfg.architecture())(cfg)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(30, 32) * torch.rand(30, 1))
        sae.W_enc.copy_(torch.randn(32, 30))
        sae.b_dec.copy_(torch.randn(32))
    return sae


OTHERS = ["standard", "jumprelu", "topk", "layer_norm", "rescaled"]


class TestWhatStays:
    SHUT = [  # noqa: RUF012
        FiresAbove(1e9),
        Positions([500]),
        Tokens([9999]),
        Excess(1e9),
    ]

    @pytest.mark.parametrize("hook", [HOOK, "blocks.1.attn.hook_z"])
    def test_scale_1_keeps_every_bit(self, model, dictionaries, tokens, hook):
        if model.loader == "huggingface" and "hook_z" in hook:
            pytest.skip("Hugging Face's names have no heads")
        plain = logits(model, tokens)
        assert torch.equal(logits(model, tokens, Edit(dictionaries[hook], ALL, Scale(1.0))), plain)
        edited = logits(model, tokens, Edit(dictionaries[hook], ALL))
        assert not torch.allclose(edited, plain, atol=1e-4)
        assert torch.equal(logits(model, tokens), plain)

    @pytest.mark.parametrize("gate", SHUT, ids=lambda gate: type(gate).__name__)
    @pytest.mark.parametrize("replace", [False, True])
    def test_a_shut_gate_keeps_every_bit(self, model, itda, tokens, gate, replace):
        edit = Edit(itda, ALL, Scale(-3.0), gate, replace=replace)
        assert torch.equal(logits(model, tokens, edit), logits(model, tokens))

    def test_one_shut_gate_of_several_is_enough(self, tiny, itda, tokens):
        edit = Edit(itda, ALL, gate=[Always(), FiresAbove(1e9)])
        assert torch.equal(logits(tiny, tokens, edit), logits(tiny, tokens))

    @pytest.mark.parametrize("kind", OTHERS)
    def test_other_saes(self, tiny, itda, tokens, kind):
        sae = other_saes(itda, kind)
        plain = logits(tiny, tokens)
        assert torch.equal(logits(tiny, tokens, Edit(sae, ALL, Scale(1.0))), plain)
        assert not torch.allclose(logits(tiny, tokens, Edit(sae, ALL)), plain, atol=1e-5)

    def test_position_0_special_tokens_and_padding(self, model, itda, tokens):
        tokens[1, 4] = 1  # <eos>
        tokens[0, 0] = 7  # no special token, but the first
        mask = mask_of(tokens)
        mask[2, 6:] = False
        moved = {}
        for special in (False, True):
            x = []
            with torch.no_grad():
                for edits in ([], [Edit(itda, ALL, Add(3.0), special=special)]):
                    with applied(model, edits) if edits else torch.no_grad():
                        x.append(model.capture(tokens, mask, [HOOK])[HOOK])
            moved[special] = (x[0] != x[1]).any(dim=-1)
        expected = mask.clone()
        assert torch.equal(moved[True], expected)
        expected[:, 0] = False
        expected[1, 4] = False
        assert torch.equal(moved[False], expected)

    def test_a_dictionary_of_special_tokens_edits_them(self, tiny, texts, tokens):
        made = build(tiny, texts, HOOK, d_sae=30, k=4, keep_special_tokens=True, progress=False)[HOOK]
        assert Edit(made, [0]).special
        with applied(tiny, Edit(made, ALL, Add(1.0))) as (tally,):
            logits(tiny, tokens)
        assert tally.changed == tokens.numel()


class TestOperations:
    @pytest.fixture
    def x(self, tiny, tokens):
        return tiny.capture(tokens, mask_of(tokens), [HOOK])[HOOK]

    @pytest.fixture
    def after(self, tiny, tokens):
        def run(sae, atoms, operation, **options):
            edit = Edit(sae, atoms, operation, special=True, **options)
            return at_hook(tiny, tokens, edit)[0]

        return run

    def dense(self, sae, x):
        return sparse_codes(sae, x.flatten(0, 1)).to_dense(sae.cfg.d_sae).unflatten(0, x.shape[:2])

    def expected(self, sae, x, atoms, changed):
        """x + decode(new code) - decode(old code), by the SAE's own methods."""
        old = self.dense(sae, x).detach()
        new = old.clone()
        for atom in atoms:
            new[..., atom] = changed(old[..., atom])
        if sae.cfg.normalize_activations != "none":
            pytest.fail("not for these")
        return (x + sae.decode(new) - sae.decode(old)).detach()

    @pytest.mark.parametrize("kind", ["itda", "mirrored", "prefix", "standard", "jumprelu", "topk"])
    @pytest.mark.parametrize("factor", [0.0, -2.0, 0.5])
    def test_scale(self, after, x, itda, kind, factor):
        own = {"itda": itda, "mirrored": itda.nonnegative(), "prefix": itda.prefix(9)}
        sae = own[kind] if kind in own else other_saes(itda, kind)
        atoms = list(range(0, sae.cfg.d_sae, 2))
        expected = self.expected(sae, x, atoms, lambda c: c * factor)
        torch.testing.assert_close(after(sae, atoms, Scale(factor)), expected, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["layer_norm", "rescaled"])
    def test_saes_that_normalise(self, after, x, itda, kind):
        """Removing all latents leaves x - (reconstruction - bias), each scaled back per token."""
        sae = other_saes(itda, kind)
        flat = x.flatten(0, 1)
        ((_, _, whole),) = coded(sae, flat)
        sae.run_time_activation_norm_fn_in(flat)
        bias = sae.decode(torch.zeros(len(flat), 30))
        expected = (flat - (whole - bias)).detach().reshape(x.shape)
        torch.testing.assert_close(after(sae, ALL, Scale(0.0)), expected, atol=2e-5, rtol=1e-4)

    def test_the_error_stays(self, after, x, itda):
        """Without its atoms an activation is b_dec and the error of its reconstruction."""
        left = after(itda, ALL, Scale(0.0))
        error = x - reconstructed(itda, x.flatten(0, 1)).reshape(x.shape)
        torch.testing.assert_close(left, (itda.b_dec + error).detach(), atol=1e-5, rtol=1e-5)

    def test_replace(self, after, x, itda):
        found = after(itda, ALL, Scale(1.0), replace=True)
        flat = reconstructed(itda, x.flatten(0, 1)).detach()
        torch.testing.assert_close(found, flat.reshape(x.shape), atol=1e-6, rtol=1e-6)
        removed = after(itda, ALL, Scale(0.0), replace=True)
        torch.testing.assert_close(removed, itda.b_dec.expand_as(x).detach(), atol=1e-5, rtol=1e-5)

    def test_clamp_and_add(self, after, x, itda):
        for operation, changed in (
            (Clamp(2.0), lambda c: torch.full_like(c, 2.0)),
            (Clamp((2.0, 2.0)), lambda c: torch.full_like(c, 2.0)),
            (Add(-0.5), lambda c: c - 0.5),
        ):
            expected = self.expected(itda, x, [3, 7], changed)
            torch.testing.assert_close(after(itda, [3, 7], operation), expected, atol=1e-5, rtol=1e-5)

    def test_units(self, after, x, itda):
        norms = (x - itda.b_dec).norm(dim=-1, keepdim=True)
        moved = after(itda, [3], Add(0.1, "norm")) - x
        torch.testing.assert_close(moved, (0.1 * norms * itda.W_dec[3]).detach(), atol=1e-5, rtol=1e-4)
        moved = after(itda, [3, 5], Add(2.0, "typical", typical=(0.5, 3.0))) - x
        expected = (itda.W_dec[3] + 6 * itda.W_dec[5]).expand_as(x).detach()
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)

    def test_swap(self, after, x, itda):
        values = [[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]
        found = after(itda, [3, 7], Swap(values, read=[True, True, False]))
        old = self.dense(itda, x).detach()
        new = old.clone()
        new[:, :2][..., [3, 7]] = torch.tensor(values[:2])
        torch.testing.assert_close(found, x + (new - old) @ itda.W_dec.detach(), atol=1e-5, rtol=1e-5)
        assert torch.equal(found[:, 2:], x[:, 2:])

    @pytest.mark.parametrize("centred", [True, False])
    def test_project_out(self, after, x, itda, centred):
        found = after(itda, [3, 7], ProjectOut(centred))
        left = found - itda.b_dec if centred else found
        atoms = itda.W_dec[[3, 7]].detach()
        assert (left @ atoms.T).abs().max() < 1e-5
        other = torch.linalg.svd(atoms).Vh[2:]  # what is orthogonal to both stays
        torch.testing.assert_close(found @ other.T, x @ other.T, atol=1e-5, rtol=1e-5)
        twice = after(fit_twice(itda), [0, 1], ProjectOut(centred))
        once = after(itda, [3], ProjectOut(centred))
        torch.testing.assert_close(twice, once, atol=1e-5, rtol=1e-5)

    def test_an_operation_of_ones_own(self, after, x, itda):
        @dataclass(frozen=True)
        class Squared:
            def change(self, rows):
                return rows.moved(rows.coefficients**2 - rows.coefficients)

        expected = self.expected(itda, x, ALL, lambda c: c**2)
        torch.testing.assert_close(after(itda, ALL, Squared()), expected, atol=1e-4, rtol=1e-4)

    def test_direction(self, after, x):
        vector, mean = torch.randn(32), torch.randn(32)
        made = direction(vector, HOOK, mean)
        unit = vector / vector.norm()
        removed = x - ((x - mean) @ unit)[..., None] * unit
        for operation in (Scale(0.0), ProjectOut()):
            torch.testing.assert_close(after(made, [0], operation), removed, atol=1e-5, rtol=1e-5)


def fit_twice(itda):
    """A dictionary whose first two atoms are both atom 3."""
    made = itda.prefix(4)
    with torch.no_grad():
        made.W_dec[:2] = itda.W_dec[3]
    return made


class TestGates:
    def changed(self, model, tokens, itda, gate, atoms=ALL, operation=Add(1.0)):  # noqa: B008
        with torch.no_grad():
            plain = model.capture(tokens, mask_of(tokens), [HOOK])[HOOK]
        found, _ = at_hook(model, tokens, Edit(itda, atoms, operation, gate, special=True))
        return (found != plain).any(dim=-1)

    def codes(self, model, tokens, itda):
        x = model.capture(tokens, mask_of(tokens), [HOOK])[HOOK]
        return itda.encode(x).detach()

    def test_positions_and_tokens(self, model, itda, tokens):
        found = self.changed(model, tokens, itda, Positions([0, 3]))
        assert found.nonzero()[:, 1].unique().tolist() == [0, 3]
        found = self.changed(model, tokens, itda, Tokens([5, 6]))
        assert torch.equal(found, torch.isin(tokens, torch.tensor([5, 6])))

    def test_tokens_of_texts(self, tokenizer):
        assert Tokens.of(tokenizer, "cat dog").ids == tuple(
            sorted(tokenizer("cat dog", add_special_tokens=False)["input_ids"])
        )

    def test_masked(self, model, itda, tokens):
        found = self.changed(model, tokens, itda, Masked(lambda ids: ids % 3 == 0))
        assert torch.equal(found, tokens % 3 == 0)
        with pytest.raises(ValueError, match="function must give booleans of shape"):
            self.changed(model, tokens, itda, Masked(lambda ids: ids))

    def test_fires_above(self, model, itda, tokens):
        codes = self.codes(model, tokens, itda)
        threshold = codes[codes != 0].abs().quantile(0.3).item()
        for sign, c in ((0, codes.abs()), (1, codes), (-1, -codes)):
            expected = (c[..., CHOSEN] > threshold).any(dim=-1)
            gate = FiresAbove(threshold, sign)
            found = self.changed(model, tokens, itda, gate, CHOSEN)
            assert torch.equal(found, expected)
            gate = FiresAbove(threshold, sign, scope="input")
            found = self.changed(model, tokens, itda, gate, CHOSEN)
            assert torch.equal(found, expected.any(dim=1, keepdim=True).expand_as(found))
        assert expected.any()
        each = FiresAbove((1e9, threshold, *[1e9] * 13))
        found = self.changed(model, tokens, itda, each, CHOSEN)
        assert torch.equal(found, codes[..., CHOSEN[1]].abs() > threshold)

    def test_an_input_that_was_open_does_not_open_the_next_one(self, model, itda, tokens):
        codes = self.codes(model, tokens, itda).abs().amax(dim=1)
        threshold = codes.sort(dim=0).values[1:].mean(dim=0)
        atom = int((codes.max(dim=0).values - threshold).argmax())
        gate = FiresAbove(threshold[atom].item(), scope="input")
        row = int(codes[:, atom].argmax())
        with (
            torch.no_grad(),
            applied(model, Edit(itda, [atom], Add(1.0), gate, special=True)) as (tally,),
        ):
            changed = []
            for one in (row, (row + 1) % 3, (row + 2) % 3):
                model.logits(tokens[[one]], mask_of(tokens[[one]]))
                changed.append(tally.changed)
        assert changed[0] == 9
        expected = (codes[:, atom] > threshold[atom]).sum() * 9
        assert changed[2] == expected < 27

    @pytest.mark.parametrize("whole", [False, True])
    def test_excess(self, model, itda, tokens, whole):
        x = model.capture(tokens, mask_of(tokens), [HOOK])[HOOK]
        codes = self.codes(model, tokens, itda)
        kept = codes.clone()
        kept[..., :10] = 0
        move = (kept - codes) @ itda.W_dec.detach()
        if whole:
            move = itda.decode(kept).detach() - x
        scores = move.square().sum(dim=-1)
        of_inputs = scores.mean(dim=1)
        threshold = of_inputs.sort().values[1:].mean().item()
        found = self.changed(model, tokens, itda, Excess(threshold, whole=whole), range(10), Scale(0.0))
        opened = (of_inputs >= threshold)[:, None].expand_as(found)
        fires = (codes[..., :10] != 0).any(dim=-1)
        assert torch.equal(found, opened & fires)
        assert 0 < opened.float().mean() < 1
        found = self.changed(
            model, tokens, itda, Excess(threshold, "token", whole), range(10), Scale(0.0)
        )
        assert torch.equal(found, (scores >= threshold) & fires)


class TestGeneration:
    def generate(self, model, tokens, n=4):
        options = dict(max_new_tokens=n, do_sample=False)
        if model.loader == "huggingface":
            mask = torch.ones_like(tokens)
            options |= dict(attention_mask=mask, eos_token_id=None, pad_token_id=2)
        else:
            options |= dict(verbose=False, stop_at_eos=False, return_type="tokens")
        with torch.no_grad():
            return model.model.generate(tokens, **options)

    def slow(self, model, tokens, edit, n=4):
        """Greedy generation without a cache."""
        for _ in range(n):
            tokens = torch.cat([tokens, logits(model, tokens, edit)[:, -1:].argmax(dim=-1)], dim=1)
        return tokens

    GATES = [  # noqa: RUF012
        Always(), Positions([3, 4, 10]), FiresAbove(1.0, scope="input"), FiresAbove(0.5), Excess(2.0),
        Masked(lambda ids: (ids % 2 == 0) & (ids[:, :1] == 0)),
    ]  # fmt: skip

    @pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
    def test_with_a_cache_as_without(self, model, itda, tokens, gate):
        edit = Edit(itda, ALL, Scale(-4.0), gate, special=True)
        plain = self.generate(model, tokens)
        with applied(model, edit) as (tally,):
            cached = self.generate(model, tokens)
        assert tally.tokens == 3 * (9 + 3)  # each token once, and the last one never
        if not (isinstance(gate, Excess) or (isinstance(gate, FiresAbove) and gate.scope == "input")):
            assert torch.equal(cached, self.slow(model, tokens, edit))
        assert torch.equal(self.generate(model, tokens), plain)

    def test_what_opened_an_input_holds_for_all_that_follows(self, models, itda, tokens):
        model = models["huggingface"]
        x = model.capture(tokens, mask_of(tokens), [HOOK])[HOOK]
        codes = itda.encode(x).detach()
        codes[:, 0] = 0
        last = codes[:, -1].abs()
        atom = int((codes.abs().amax(dim=1) * (last == 0)).amax(dim=0).argmax())
        threshold = codes[..., atom].abs().max().item() * 0.99
        opened = (codes[..., atom].abs() > threshold).any(dim=1)
        assert 0 < opened.sum() < 3
        gate = FiresAbove(threshold, scope="input")
        with applied(model, Edit(itda, [atom], Add(3.0), gate)) as (tally,):
            self.generate(model, tokens, 5)
        assert tally.changed >= int(opened.sum()) * (8 + 4)
        assert tally.changed < 3 * (8 + 4)

    def test_padding_on_the_left(self, models, itda, tokens):
        """Each prompt alone and in a padded batch: the same tokens are edited."""
        model = models["huggingface"]
        short = tokens[:1, :5]
        edit = Edit(itda, ALL, Scale(-4.0), Positions([2, 3, 5]))
        with applied(model, edit) as (alone,):
            expected = self.generate(model, short)[0, 5:]
        padded = torch.full((1, 9), 2)
        padded[:, 4:] = short
        batch = torch.cat([tokens[1:2], padded])
        with applied(model, edit) as (both,), torch.no_grad():
            made = model.model.generate(
                batch, attention_mask=(batch != 2).long(), max_new_tokens=4, do_sample=False,
                eos_token_id=None, pad_token_id=2,
            )  # fmt: skip
        assert torch.equal(made[1, 9:], expected)
        assert both.tokens == (8 + 3) + alone.tokens

    def test_gradients(self, model, itda, tokens):
        def gradient(edit):
            embedding = model._embedding()
            weight = next(embedding.parameters())
            with applied(model, edit):
                model.logits(tokens, mask_of(tokens))[0, -1].max().backward()
            found, weight.grad = weight.grad, None
            model.model.zero_grad()
            itda.zero_grad()
            return found

        gone, scaled = gradient(Edit(itda, ALL)), gradient(Edit(itda, ALL, Scale(3.0)))
        assert gone.abs().sum() > 0
        assert not torch.allclose(gone, scaled)


class TestSeveral:
    def test_at_one_hook_they_go_by_their_order(self, tiny, itda, tokens):
        first, second = Edit(itda, [3], Add(2.0)), Edit(itda, range(10), Scale(0.0))
        both, _ = at_hook(tiny, tokens, [first, second])
        other, _ = at_hook(tiny, tokens, [second, first])
        with applied(tiny, first):
            nested, _ = at_hook(tiny, tokens, second)
        assert torch.equal(both, nested)
        assert not torch.allclose(both, other)

    def test_at_several_hooks(self, tiny, dictionaries, tokens):
        edits = [Edit(dictionaries[hook], [1], Add(1.0)) for hook in (OTHER, HOOK)]
        both = logits(tiny, tokens, edits)
        for alone in edits:
            assert not torch.allclose(logits(tiny, tokens, alone), both)
        assert torch.equal(logits(tiny, tokens, edits[::-1]), both)

    def test_tally(self, tiny, itda, tokens):
        _, (tally,) = at_hook(tiny, tokens, Edit(itda, [3], Add(2.0), Positions([1, 2])))
        assert (tally.tokens, tally.changed) == (24, 6)
        assert tally.norm == pytest.approx(12, rel=1e-4)
        torch.testing.assert_close(tally.change, 12 * itda.W_dec[3].double())


class Opaque:
    """A model that shows no tokens."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        if name == "watched":
            raise AttributeError(name)
        return getattr(self._inner, name)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(atoms=[]), "atoms must name at least one atom, got none"),
            (dict(atoms=[0, 30]), "atoms must be between 0 and 29, got 30"),
            (dict(atoms=[-1]), "atoms must be between 0 and 29, got -1"),
            (dict(atoms=[4, 4]), "atoms must name each atom once, got 4 twice"),
            (dict(atoms=["cat"]), "atoms.0. must be a whole number"),
            (dict(operation="scale"), "operation must be Operation, got 'scale'"),
            (dict(gate=[]), "gate must hold at least one gate"),
            (dict(gate=3), "gate must be Gate or"),
            (dict(sae=None), "sae must be SAE"),
        ],
    )  # fmt: skip
    def test_edits(self, itda, change, message):
        with pytest.raises((TypeError, ValueError), match=message):
            Edit(**(dict(sae=itda, atoms=[0]) | change))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Scale(float("nan")), "factor must be finite"),
            (lambda: Scale("2"), "factor must be a number"),
            (lambda: Add([1.0, float("inf")]), "amount must be finite"),
            (lambda: Add(1.0, "inches"), "unit must be one of"),
            (lambda: Add(1.0, "typical"), "typical must be given for unit='typical'"),
            (lambda: Clamp(1.0, "norm", typical=[1.0]), "and for no other unit"),
            (lambda: Swap([]), "values must hold a list of coefficients"),
            (lambda: Swap([[1.0], [1.0, 2.0]]), "equally long"),
            (lambda: Positions([]), "positions must name at least one"),
            (lambda: Positions([-1]), "positions must be at least 0, got -1"),
            (lambda: Tokens([]), "ids must name at least one token"),
            (lambda: FiresAbove(-1.0), "threshold must be at least 0"),
            (lambda: FiresAbove(1.0, scope="word"), "scope must be one of"),
            (lambda: FiresAbove(1.0, sign=2), "sign must be one of"),
            (lambda: Excess(-1.0), "threshold must be at least 0"),
            (lambda: direction(torch.zeros(3), HOOK), "vector must be finite and not zero"),
        ],
    )  # fmt: skip
    def test_operations_and_gates(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make()

    def test_numbers_for_another_count_of_atoms(self, tiny, itda, tokens):
        for operation in (Add([1.0, 2.0, 3.0]), Swap([[1.0]] * 9)):
            with pytest.raises(ValueError, match="must hold a number for each of 2 atoms, got"):
                logits(tiny, tokens, Edit(itda, [0, 1], operation))

    def test_hooks(self, tiny, itda, tokens):
        with pytest.raises(ValueError, match="no hook 'blocks.9.hook_resid_post'; near it are"):
            logits(tiny, tokens, Edit(itda, [0], hook_name="blocks.9.hook_resid_post"))
        narrow = fit(torch.randn(100, 8), d_sae=9, k=2)
        with pytest.raises(ValueError, match="names no hook_name"):
            Edit(narrow, [0])
        with pytest.raises(
            ValueError, match="activations of width 32 at .*, but the dictionary has d_in=8"
        ):
            logits(tiny, tokens, Edit(narrow, [0], hook_name=HOOK))

    def test_lists(self, tiny):
        for edits in ([], None, [3], "x"):
            with pytest.raises((TypeError, ValueError), match="edits.* must"), applied(tiny, edits):
                pass

    def test_a_model_that_shows_no_tokens(self, tiny, itda, tokens):
        opaque = Opaque(tiny)
        for edit in (Edit(itda, [0]), Edit(itda, [0], gate=Tokens([3]), special=True)):
            with pytest.raises(ValueError, match="the tokens of each pass, which Opaque does not show"):
                logits(opaque, tokens, edit)
        edit = Edit(itda, ALL, special=True)
        assert torch.equal(logits(opaque, tokens, edit), logits(tiny, tokens, edit))

    def test_embeddings_instead_of_tokens(self, models, itda):
        model = models["huggingface"]
        with (
            applied(model, Edit(itda, [0])),
            pytest.raises(ValueError, match="the model was given embeddings"),
        ):
            model.model(inputs_embeds=torch.randn(1, 4, 32))

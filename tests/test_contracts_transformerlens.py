"""An ITDA inside TransformerLens's and SAELens's models, on the real SmolLM2: what a host promises of an
SAE holds for a dictionary, and what hosts get wrong is known.

Nothing of the hosts is replaced. What an attached dictionary should do is computed from the plain model,
with hooks of PyTorch's own and the reconstruction written out.
"""

import copy
import logging
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from itda_lens import ITDA, build
from itda_lens.analysis import evaluate
from itda_lens.records import Cutting
from itda_lens.samples import reference_prose
from itda_lens.samples import smollm2 as model_package
from itda_lens.sources import Tokenization, language_model

pytestmark = pytest.mark.real

LAYERS = (5, 10)
CLOSE = dict(atol=1e-3, rtol=1e-3)  # of logits: rounding moves them by 1e-4, a splice by 10


class Host(NamedTuple):
    """A model that takes SAEs.

    Attributes:
        model: the model.
        output: what it calls a layer's output.
        plain: the logits of `tokens`, by the model alone.
        inputs: the layers' outputs in that.
    """

    model: Any
    output: str
    plain: torch.Tensor
    inputs: dict[int, torch.Tensor]

    def at(self, layer: int) -> str:
        return f"blocks.{layer}.{self.output}"

    def module(self, layer: int) -> torch.nn.Module:
        return getattr(self.model.blocks[layer], self.output)


@pytest.fixture(scope="module")
def built(smollm2):
    names = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
    options = dict(d_sae=512, k=20, max_tokens=5_000, progress=False)
    found = build(smollm2, reference_prose()[0], names, **options)
    return dict(zip(LAYERS, found.values(), strict=True))


@pytest.fixture(scope="module")
def tokens(smollm2):
    """Two contexts of 10 tokens; the first token is the BOS token."""
    contexts = Tokenization(smollm2.tokenizer, Cutting(10)).contexts(reference_prose()[1])
    return torch.tensor([next(contexts).ids for _ in range(2)])


@pytest.fixture(scope="module")
def hosts(smollm2, tokens):
    hooked = model_package.load_hooked(progress=False)
    models = {
        "HookedSAETransformer": Host(hooked, "hook_resid_post", torch.empty(0), {}),
        "SAETransformerBridge": Host(smollm2.model, "hook_out", torch.empty(0), {}),
    }
    for name, host in models.items():
        read = {layer: partial(host.inputs.__setitem__, layer) for layer in LAYERS}
        with replaced(host, read), torch.no_grad():
            models[name] = host._replace(plain=host.model(tokens))
    return models


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"])
def host(request, hosts):
    yield hosts[request.param]
    assert not hosts[request.param].model.acts_to_saes


@contextmanager
def replaced(host, functions):
    """Put what layers give through functions, without the hosts' own hooks."""

    def hook_of(function):
        return lambda module, args, output: function(output)

    handles = [host.module(n).register_forward_hook(hook_of(f)) for n, f in functions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reconstruction(itda):
    return lambda x: itda.encode_sparse(x).to_dense(itda.cfg.d_sae) @ itda.W_dec + itda.b_dec


@torch.no_grad()
@pytest.mark.parametrize("layers", [(5,), (10, 5)])
def test_a_splice_is_its_reconstructions(host, built, tokens, layers):
    with replaced(host, {layer: reconstruction(built[layer]) for layer in layers}):
        expected = host.model(tokens)
    found = host.model.run_with_saes(tokens, saes=[built[layer] for layer in layers])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - host.plain).abs().max() > 1
    assert torch.equal(host.model(tokens), host.plain)


@torch.no_grad()
def test_error_terms_give_the_exact_logits(host, built, tokens):
    both = list(built.values())
    exact = host.model.run_with_saes(tokens, saes=both, use_error_term=True)
    torch.testing.assert_close(exact, host.plain, **CLOSE)
    _, cache = host.model.run_with_cache_with_saes(tokens, saes=both, use_error_term=True)
    x = host.inputs[10]
    error = cache[f"{host.at(10)}.hook_sae_error"]
    torch.testing.assert_close(error, x - reconstruction(built[10])(x), **CLOSE)
    assert error.norm() > 0.1 * x.norm()


@torch.no_grad()
def test_the_cache_holds_the_codes_of_its_input(host, built, tokens):
    logits, cache = host.model.run_with_cache_with_saes(tokens, saes=list(built.values()))
    for layer, itda in built.items():
        at = {
            point: cache[f"{host.at(layer)}.hook_sae_{point}"]
            for point in ("input", "acts_pre", "acts_post", "recons", "output")
        }
        codes = at["acts_post"]
        assert codes.shape == (*tokens.shape, 512)
        assert 10 < (codes != 0).sum(dim=-1).float().mean() <= 20
        assert (codes < 0).any()
        assert torch.equal(codes, at["acts_pre"])
        assert torch.equal(codes, itda.encode(at["input"]))
        torch.testing.assert_close(at["recons"], codes @ itda.W_dec + itda.b_dec)
        assert torch.equal(at["recons"], at["output"])
    assert torch.equal(logits, host.model.run_with_saes(tokens, saes=list(built.values())))
    # Only layer 5 sees the plain model: layer 10 sees what the splice in layer 5 made of it.
    codes = cache[f"{host.at(5)}.hook_sae_acts_post"]
    torch.testing.assert_close(codes, built[5].encode(host.inputs[5]), **CLOSE)


@torch.no_grad()
def test_attaching_and_detaching(host, built, tokens):
    model = host.model
    one = model.run_with_saes(tokens, saes=[built[5]])
    two = model.run_with_saes(tokens, saes=list(built.values()))
    for itda in built.values():
        model.add_sae(itda)
    assert list(model.acts_to_saes.values()) == list(built.values())
    assert torch.equal(model(tokens), two)
    model.reset_saes(built[10].cfg.metadata.hook_name)
    assert torch.equal(model(tokens), one)
    with model.saes([built[5]], use_error_term=True):
        torch.testing.assert_close(model(tokens), host.plain, **CLOSE)
    assert torch.equal(model(tokens), one)
    model.reset_saes()
    assert torch.equal(model(tokens), host.plain)


@torch.no_grad()
def test_a_block_that_raises_detaches_too(host, built, tokens):
    with pytest.raises(ValueError, match="NaN or infinite"), host.model.saes([built[10]]):
        built[10](torch.full((1, 576), torch.nan))
    assert torch.equal(host.model(tokens), host.plain)


@torch.no_grad()
@pytest.mark.parametrize("use_error_term", [False, True])
def test_edits_of_codes_do_what_they_say(host, built, tokens, use_error_term):
    itda = built[10]
    codes = itda.encode(host.inputs[10])
    atom = int((codes != 0).sum(dim=(0, 1)).argmax())

    def double(acts, hook):
        acts = acts.clone()
        acts[..., atom] *= 2
        return acts

    def expected(x):
        base = x if use_error_term else codes @ itda.W_dec + itda.b_dec
        return base + codes[..., atom, None] * itda.W_dec[atom]

    with replaced(host, {10: expected}):
        wanted = host.model(tokens)
    hooks = [(f"{host.at(10)}.hook_sae_acts_post", double)]
    # run_with_hooks_with_saes has no use_error_term, so the dictionary is attached around the hooks.
    with host.model.saes([itda], use_error_term=use_error_term):
        unedited = host.model(tokens)
        found = host.model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - unedited).abs().max() > 0.1
    if not use_error_term:
        short = host.model.run_with_hooks_with_saes(tokens, saes=[itda], fwd_hooks=hooks)
        assert torch.equal(short, found)


@torch.no_grad()
def test_special_tokens_can_be_left_out(hosts, built, tokens):
    host = hosts["HookedSAETransformer"]  # the other host cannot do it

    def but_for_bos(x):
        return torch.cat([x[:, :1], reconstruction(built[10])(x[:, 1:])], dim=1)

    with replaced(host, {10: but_for_bos}):
        expected = host.model(tokens)
    found = host.model.run_with_saes(tokens, saes=[built[10]], exclude_special_tokens=True)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - host.model.run_with_saes(tokens, saes=[built[10]])).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("hook", ["blocks.99.hook_resid_post", "blocks.10.hook_out"])
def test_hosts_ignore_a_dictionary_for_a_hook_that_they_lack(host, built, tokens, hook, caplog):
    itda = at_hook(built[10], hook)
    with caplog.at_level(logging.WARNING, "sae_lens"):
        found = host.model.run_with_saes(tokens, saes=[itda])
    if hook in host.model.hook_dict:
        assert not torch.equal(found, host.plain)
        return
    # Only a line in the log tells; with our own functions it is an error.
    assert torch.equal(found, host.plain)
    assert f"No hook found for {hook}. Skipping." in caplog.text
    with pytest.raises(ValueError, match=f"the model has no hook '{hook}'"):
        evaluate(host.model, itda, ["The cat sat on the mat."], progress=False)


def at_hook(itda: ITDA, hook: str) -> ITDA:
    """The same dictionary with another hook in its metadata."""
    other = copy.deepcopy(itda)
    other.cfg.metadata.hook_name = hook
    return other


def test_our_functions_refuse_a_hook_that_does_not_fire(host, built, tokens):
    silent = "blocks.10.attn.hook_result"  # only computed on demand
    assert silent in host.model.hook_dict
    lm, text = language_model(host.model), ["The cat sat on the mat."]
    with pytest.raises(ValueError, match="never fired"):
        lm.capture(tokens, torch.ones_like(tokens, dtype=torch.bool), [silent])
    with pytest.raises(ValueError, match="never fired"):
        build(lm, text, silent, d_sae=2, k=1, progress=False)
    with pytest.raises(ValueError, match="never fired"):
        evaluate(lm, at_hook(built[10], silent), text, progress=False)
    # Where a dictionary is attached, the activations that it replaces cannot be read.
    with host.model.saes([built[10]]), pytest.raises(ValueError, match="no hook"):
        evaluate(lm, built[10], text, progress=False)


class TestGradients:
    """Attribution: what a logit difference, or a later code, owes to each atom of layer 5."""

    @pytest.fixture
    def codes(self, host, built, tokens):
        return built[5].encode(host.inputs[5]).detach()

    @pytest.fixture
    def pair(self, host):
        return host.plain[0, -1].topk(2).indices.tolist()

    def test_of_logits(self, host, built, tokens, codes, pair):
        def value(leaf):
            hooks = [(f"{host.at(5)}.hook_sae_acts_post", lambda acts, hook: leaf)]
            with host.model.saes([built[5]], use_error_term=True):
                logits = host.model.run_with_hooks(tokens, fwd_hooks=hooks)
            return logits[0, -1, pair[0]] - logits[0, -1, pair[1]]

        self.check(value, codes)

    def test_of_a_later_code(self, host, built, tokens, codes):
        """From dictionary to dictionary: the gradient runs through the second one's `encode`."""
        supports = []

        def value(leaf):
            later = []
            hooks = [
                (f"{host.at(5)}.hook_sae_acts_post", lambda acts, hook: leaf),
                (f"{host.at(10)}.hook_sae_acts_post", lambda acts, hook: later.append(acts[0, -1])),
            ]
            host.model.run_with_hooks_with_saes(tokens, saes=list(built.values()), fwd_hooks=hooks)
            supports.append(later[0] != 0)
            return later[0][supports[0]].double().sum()

        # The derivative holds while the second dictionary picks the same atoms, and its last picks are
        # close calls: a step of a thousandth changes some.
        self.check(value, codes, 1e-4, holds=lambda: torch.equal(supports[-1], supports[0]))

    def check(self, value, codes, step=0.01, holds=lambda: True):
        leaf = codes.clone().requires_grad_()
        before = value(leaf)
        (gradient,) = torch.autograd.grad(before, leaf)
        assert torch.isfinite(gradient).all()
        attribution = gradient * codes
        # The other context has no part in it.
        assert torch.equal(attribution[0] != 0, codes[0] != 0)
        assert (attribution[1] == 0).all()
        # Weakening a code moves the value as the gradient says (half a step each way: no second order).
        checked = 0
        for index in attribution.flatten().abs().topk(3).indices.tolist():
            values, held = [], True
            for factor in (1 - step / 2, 1 + step / 2):
                changed = codes.clone()
                changed.view(-1)[index] *= factor
                with torch.no_grad():
                    values.append(value(changed))
                held = held and holds()
            if held:
                predicted = -step * attribution.flatten()[index].to(before.dtype)
                assert predicted.abs() > 2e-4  # well above rounding
                torch.testing.assert_close(values[0] - values[1], predicted, rtol=0.05, atol=5e-5)
                checked += 1
        assert checked >= 2

    def test_of_inputs_and_atoms(self, host, built, tokens, codes, pair):
        """Through `encode`: its derivative in x is a projection onto the atoms in use."""
        itda = built[5]
        assert itda.cfg.method == "ols"
        x = host.inputs[5].clone().requires_grad_()
        recons = []
        hooks = [
            (f"{host.at(5)}.hook_sae_input", lambda acts, hook: x),
            (f"{host.at(5)}.hook_sae_recons", lambda acts, hook: recons.append(acts)),
        ]
        logits = host.model.run_with_hooks_with_saes(tokens, saes=[itda], fwd_hooks=hooks)
        difference = logits[0, -1, pair[0]] - logits[0, -1, pair[1]]
        found, at_recons, at_atoms = torch.autograd.grad(difference, (x, recons[0], itda.W_dec))
        for position in (1, 4, 9):
            support = itda.W_dec[codes[0, position] != 0].detach()
            projection = torch.linalg.pinv(support) @ support
            wanted = at_recons[0, position] @ projection
            assert wanted.norm() > 0
            torch.testing.assert_close(found[0, position], wanted, rtol=1e-2, atol=1e-5)
        used = (codes[0] != 0).any(dim=0)
        assert torch.equal((at_atoms != 0).any(dim=-1), used)


def test_our_functions_tell_of_an_attached_dictionary(host, built):
    with host.model.saes([built[10]]), pytest.raises(ValueError, match="attached to the model at"):
        evaluate(host.model, built[10], ["The cat sat."], progress=False)

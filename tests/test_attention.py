"""Outputs of attention heads, on models of either library: together and one by one."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from test_models import FAMILIES
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from itda_lens import build, fit, load
from itda_lens.analysis import decompose, evaluate
from itda_lens.architectures import build_baselines
from itda_lens.compare import activations_of
from itda_lens.records import Cutting, HookPoint, Places
from itda_lens.sae import provenance_of
from itda_lens.sources import ModelSource, ReadableModel, by_head, gathered, language_model
from itda_lens.sources.hugging_face_models import HOOK_Z, output_projection

Z = "blocks.1.attn.hook_z"
TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 9, 8, 7, 6, 5]])
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
OPTIONS = dict(d_sae=24, k=4, progress=False)

PROJECTION = {
    "llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense",
    "falcon": "self_attention.dense", "opt": "self_attn.out_proj", "mixtral": "self_attn.o_proj",
    "bert": "attention.output.dense", "roberta": "attention.output.dense",
    "distilbert": "attention.out_lin", "gemma3": "self_attn.o_proj",
    "t5 encoder": "layer.0.SelfAttention.o", "bart decoder": "self_attn.out_proj",
    "whisper decoder": "self_attn.out_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def hugging(tiny_folder):
    return language_model(str(tiny_folder), loader="huggingface", device="cpu")


class TestHuggingFace:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_output_projection_is_found(self, name, tokenizer):
        make, layer, _ = FAMILIES[name]
        torch.manual_seed(0)
        lm = language_model(make().eval(), tokenizer=tokenizer)
        if name == "mamba":
            with pytest.raises(ValueError, match="layer 1 of MambaForCausalLM it has none"):
                lm.check_hooks([Z])
            return
        module = lm.model.get_submodule(f"{layer}.{PROJECTION[name]}")
        taken = []
        handle = module.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        with torch.no_grad():
            found = lm.capture(TOKENS, MASK, [Z])[Z]
        handle.remove()
        assert torch.equal(found, taken[0].detach())
        assert lm.n_heads(Z) == 4

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
    def test_equals_transformer_lens(self, name, tokenizer, tmp_path):
        torch.manual_seed(0)
        FAMILIES[name][0]().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        bridge = language_model(TransformerBridge.boot_transformers(str(tmp_path), device="cpu"))
        lm = language_model(str(tmp_path), loader="huggingface", device="cpu")
        hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
        theirs, ours = (one.capture(TOKENS, MASK, hooks) for one in (bridge, lm))
        for hook in hooks:
            assert theirs[hook].std() > 1e-4
            torch.testing.assert_close(ours[hook], theirs[hook], rtol=1e-4, atol=1e-5)
        assert lm.n_heads(Z) == bridge.n_heads(Z) == 4

        def second_head(z):
            return z * torch.tensor([0.0, 1, 0, 0])[:, None]

        logits = [one.logits(TOKENS, MASK, {Z: second_head}) for one in (bridge, lm)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits[1], lm.logits(TOKENS, MASK), atol=1e-4)

    def test_dictionaries_are_those_of_transformer_lens(self, tiny, hugging, texts, tmp_path):
        made = {}
        for name, lm in (("bridge", tiny), ("huggingface", hugging)):
            made[name] = build(lm, texts, Z, **OPTIONS)[Z]
            assert made[name].cfg.reshape_activations == "hook_z"
        assert made["bridge"].labels == made["huggingface"].labels
        torch.testing.assert_close(made["bridge"].W_dec, made["huggingface"].W_dec, rtol=1e-4, atol=1e-4)
        (there,) = evaluate(hugging, made["bridge"], texts, progress=False)
        (here,) = evaluate(tiny, made["huggingface"], texts, progress=False)
        assert there.fvu == pytest.approx(here.fvu, rel=1e-3)
        assert there.ce_loss_spliced == pytest.approx(here.ce_loss_spliced, rel=1e-4)

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            (
                dict(self_attn=["o_proj", "out_proj"]),
                r"several .*\(self_attn.o_proj, self_attn.out",
            ),
            (dict(self_attn=["o_proj"], attn=["dense"]), "several .*self_attn.o_proj, attn.dense"),
            (dict(cross_attn=["o_proj"], linear_attn=["out_proj"], mlp=["c_proj"]), "it has none"),
        ],
    )
    def test_a_choice_is_refused(self, parts, message):
        layer = nn.ModuleDict(
            {name: nn.ModuleDict({one: nn.Linear(4, 4) for one in own}) for name, own in parts.items()}
        )
        with pytest.raises(ValueError, match=f"in layer 3 of M {message}.*; use the name of a module"):
            output_projection(layer, "layer 3 of M")

    def test_attention_to_another_text_does_not_count(self):
        config = hf.GPT2Config(
            n_embd=8, n_layer=1, n_head=2, vocab_size=9, add_cross_attention=True, bos_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
        layer = hf.GPT2LMHeadModel(config).transformer.h[0]
        assert output_projection(layer, "") is layer.attn.c_proj

    def test_heads_that_do_not_fit(self, hugging, monkeypatch):
        monkeypatch.setattr(hugging.model.config, "num_attention_heads", 5)
        with pytest.raises(ValueError, match="32 numbers cannot be split into 5 heads"):
            hugging.capture(TOKENS, MASK, [Z])
        nothing = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
        monkeypatch.setattr(hugging.model, "config", nothing)
        with pytest.raises(ValueError, match="LlamaForCausalLM gives no number of heads"):
            hugging._config_heads()

    def test_near_matches(self, hugging):
        with pytest.raises(ValueError, match="near it are .*blocks.1.attn.hook_z"):
            hugging.check_hooks(["blocks.1.hook_z"])
        with pytest.raises(ValueError, match="has no hook 'blocks.3.attn.hook_z'"):
            hugging.check_hooks(["blocks.3.attn.hook_z"])


class TestSingleHeads:
    HOOKS = (Z, "blocks.2.attn.hook_z")

    @pytest.mark.parametrize("kind", ["tiny", "hugging"])
    def test_rows_are_heads(self, kind, request, texts):
        lm = request.getfixturevalue(kind)
        whole = gathered(ModelSource(lm, texts, self.HOOKS, Cutting(16)))
        single = gathered(ModelSource(lm, texts, self.HOOKS, Cutting(16), per_head=True))
        for hook in self.HOOKS:
            values, labels = single[hook]
            assert torch.equal(values, whole[hook].values.unflatten(-1, (4, 8)).flatten(0, 1))
            assert [label.head for label in labels[:5]] == [0, 1, 2, 3, 0]
            assert str(labels[6]).endswith("head 2)")
            assert labels == whole[hook].labels.by_head(4)

    @pytest.mark.parametrize("skip", [0, 1, 3, 4, 5, 80, 399, 400])
    @pytest.mark.parametrize("max_tokens", [None, 100])
    def test_reading_goes_on_where_it_stopped(self, tiny, texts, skip, max_tokens):
        source = ModelSource(
            tiny, texts, Z, Cutting(16), per_head=True, max_tokens=max_tokens, batch_size=4
        )
        values, labels = gathered(source)[Z]
        assert source.n_rows == (None if max_tokens is None else 400)
        assert len(values) == (source.n_rows or len(values)) > 399
        rest = list(source.rows(skip))
        assert Places.joined([rows.places for rows in rest]) == labels[skip:]
        if skip < len(values):
            assert torch.equal(torch.cat([rows.values[Z] for rows in rest]), values[skip:])
        assert source.provenance(Z).n_tokens == (max_tokens or len(values) // 4)

    def test_dictionary(self, tiny, texts, tmp_path):
        made = build(tiny, texts, self.HOOKS, per_head=True, context_size=16, **OPTIONS)
        rows = gathered(ModelSource(tiny, texts, self.HOOKS, Cutting(16), per_head=True))
        for hook, itda in made.items():
            expected = fit(*rows[hook][:1], labels=rows[hook].labels, **OPTIONS)
            assert torch.equal(itda.W_dec, expected.W_dec)
            assert itda.labels == expected.labels
            assert itda.cfg.d_in == 8
            assert itda.cfg.reshape_activations == "none"
            assert {label.head for label in itda.labels} == set(range(4))
        made[Z].save_model(tmp_path)
        itda = load(tmp_path)
        assert provenance_of(itda).per_head
        assert itda.labels == made[Z].labels
        # It takes activations as TransformerLens has them, and so does SAELens's face.
        assert itda(torch.randn(2, 5, 4, 8)).shape == (2, 5, 4, 8)

    def test_can_be_used(self, tiny, texts, tmp_path):
        one, two = (
            build(tiny, texts, hook, per_head=True, context_size=16, **OPTIONS)[hook]
            for hook in self.HOOKS
        )
        (found,) = evaluate(tiny, one, texts, progress=False)
        values, labels = gathered(ModelSource(tiny, texts, Z, Cutting(16), per_head=True))[Z]
        assert found.n_tokens == len(values) // 4
        codes = one.encode_sparse(values)
        error = (values - one.decode_sparse(codes).detach()).square().sum()
        spread = (values - values.mean(dim=0)).square().sum()
        assert found.fvu == pytest.approx(float(error / spread), rel=1e-3)
        assert found.l0 == pytest.approx(float(codes.l0().float().mean()), rel=1e-6)
        assert found.kl > 0

        tokens = decompose(tiny, one, texts[0])
        assert [token.head for token in tokens[:5]] == [0, 1, 2, 3, 0]
        assert tokens[0].token == tokens[3].token
        largest = codes.values[2].abs().argmax()
        assert tokens[2].components[0].atom == int(codes.indices[2][largest])

        x, y = activations_of([one, two], texts, tiny, progress=False)
        assert torch.equal(x.values, values)
        assert y.labels == labels
        whole = build(tiny, texts, Z, context_size=16, **OPTIONS)[Z]
        with pytest.raises(ValueError, match="all of single heads"):
            activations_of([one, whole], texts, tiny, progress=False)
        with pytest.raises(ValueError, match="must not be of single heads"):
            build_baselines([one], ["pca"], tmp_path, texts=texts, model=tiny, progress=False)

    def test_bad_input(self, tiny, texts):
        with pytest.raises(ValueError, match="'blocks.1.hook_resid_post' must be split by head"):
            build(tiny, texts, "blocks.1.hook_resid_post", per_head=True, **OPTIONS)
        with pytest.raises(ValueError, match="must be split by head"):
            build(tiny, texts, "blocks.1.attn.hook_pattern", per_head=True, **OPTIONS)
        hooks = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k"]  # two heads share keys
        with pytest.raises(ValueError, match="4 at 'blocks.1.attn.hook_q', 2 at .*one by one"):
            build(tiny, texts, hooks, per_head=True, **OPTIONS)

        class Foreign:
            tokenizer, name, loader, source = tiny.tokenizer, "foreign", "bridge", ""
            device, max_context = tiny.device, None
            check_hooks, capture, logits, edited = (
                tiny.check_hooks,
                tiny.capture,
                tiny.logits,
                tiny.edited,
            )

        assert isinstance(Foreign(), ReadableModel)
        with pytest.raises(ValueError, match="needs a model that knows its heads, got Foreign"):
            build(Foreign(), texts, Z, per_head=True, **OPTIONS)

    def test_a_size_that_only_heads_allow(self, tiny, texts):
        made = build(tiny, texts, Z, per_head=True, max_tokens=50, d_sae=150, k=2, progress=False)
        assert made[Z].cfg.d_sae == 150
        with pytest.raises(ValueError, match="d_sae=201 for 200 rows"):
            build(tiny, texts, Z, per_head=True, max_tokens=50, d_sae=201, k=2, progress=False)

    def test_by_head(self):
        x = torch.arange(12).float().reshape(2, 6)
        assert by_head(x, 3).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
        assert HookPoint.parse(Z).kind == HOOK_Z


class TestPlans:
    def test_a_plan_of_single_heads(self, tiny, texts, tmp_path):
        options = dict(per_head=True, max_tokens=120, context_size=16, d_sae=140, k=2)
        made = build(tiny, texts, Z, folder=tmp_path, **options, progress=False)[Z]
        expected = build(tiny, texts, Z, **options, progress=False)[Z]
        assert torch.equal(made.W_dec, expected.W_dec)
        assert made.labels == expected.labels
        assert provenance_of(made).per_head

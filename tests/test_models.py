"""Models of every library are read and edited in the same way."""

import shutil
from collections import namedtuple
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from itda_lens import build
from itda_lens.records import Cutting, HookPoint
from itda_lens.sources import (
    HookedModel,
    LanguageModel,
    ReadableModel,
    Tokenization,
    language_model,
)
from itda_lens.sources.hooks import Site, attached, unknown_hook
from itda_lens.sources.models import LIBRARIES

RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def models(tiny_folder) -> dict[str, LanguageModel]:
    """The same weights behind every kind of host."""
    from transformer_lens import supported_models

    path = str(tiny_folder)
    supported_models.OFFICIAL_MODEL_NAMES.append(path)
    supported_models.MODEL_ALIASES[path] = ["tiny-alias"]
    tokenizer = language_model(path, loader="huggingface", device="cpu").tokenizer
    hooked = HookedTransformer.from_pretrained_no_processing("tiny-alias", device="cpu")
    bridge = TransformerBridge.boot_transformers(path, device="cpu")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    hugging = AutoModelForCausalLM.from_pretrained(path)
    return {
        "hooked": language_model(hooked, tokenizer=tokenizer),
        "bridge": language_model(bridge),
        "sae_bridge": language_model(SAETransformerBridge.boot_transformers(path, device="cpu")),
        "huggingface": language_model(hugging),
    }


@pytest.fixture
def batch(tokenizer):
    return next(
        Tokenization(tokenizer, Cutting(12)).batches(["the cat sat on a mat", "dog ran", "a log"], 3)
    )


class TestModels:
    KINDS = ("hooked", "bridge", "sae_bridge", "huggingface")

    @pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", RESID, "blocks.2.hook_resid_post"])
    def test_all_hosts_agree(self, models, batch, hook):
        found = {
            kind: model.capture(batch.tokens, batch.attention_mask, [hook])[hook][batch.keep]
            for kind, model in models.items()
        }
        for kind in self.KINDS:
            torch.testing.assert_close(found[kind], found["huggingface"], atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("kind", ["hooked", "bridge", "sae_bridge"])
    def test_per_head_hooks_are_flattened(self, models, batch, kind):
        hook = "blocks.1.attn.hook_z"
        found = models[kind].capture(batch.tokens, batch.attention_mask, [hook])[hook]
        assert found.shape == (*batch.tokens.shape, 32)

    @pytest.mark.parametrize("kind", KINDS)
    def test_replacing_changes_the_logits_and_nothing_stays(self, models, batch, kind):
        model = models[kind]
        plain = model.logits(batch.tokens, batch.attention_mask)
        zeroed = model.logits(batch.tokens, batch.attention_mask, {RESID: torch.zeros_like})
        same = model.logits(batch.tokens, batch.attention_mask, {RESID: lambda x: x.clone()})
        assert not torch.allclose(plain, zeroed, atol=1e-3)
        torch.testing.assert_close(same, plain)
        torch.testing.assert_close(model.logits(batch.tokens, batch.attention_mask), plain)

    @pytest.mark.parametrize("kind", KINDS)
    def test_padding_does_not_reach_the_tokens(self, models, batch, tokenizer, kind):
        alone = Tokenization(tokenizer, Cutting(12)).batch([batch.contexts[1]])
        together = models[kind].capture(batch.tokens, batch.attention_mask, [RESID])[RESID][1]
        single = models[kind].capture(alone.tokens, alone.attention_mask, [RESID])[RESID][0]
        torch.testing.assert_close(together[: len(single)], single, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_stops_at_the_deepest_hook(self, models, batch, kind):
        model = models[kind]
        later = []
        module = model._site("blocks.2.hook_resid_post").module
        handle = module.register_forward_hook(lambda *args: later.append(1))
        try:
            hooks = ["blocks.0.hook_resid_post", RESID]
            assert list(model.capture(batch.tokens, batch.attention_mask, hooks)) == hooks
            assert not later
            model.logits(batch.tokens, batch.attention_mask)
            assert later
        finally:
            handle.remove()

    def test_training_mode_is_given_back(self, tiny_folder, batch):
        hugging = AutoModelForCausalLM.from_pretrained(tiny_folder).train()
        language_model(hugging).capture(batch.tokens, batch.attention_mask, [RESID])
        assert hugging.training

    @pytest.mark.parametrize("kind", KINDS)
    def test_unknown_hook_names_near_ones(self, models, kind):
        with pytest.raises(
            ValueError, match=r"no hook 'blocks.1.hook_resid_pots'; near it are blocks.1.hook"
        ):
            models[kind].check_hooks(["blocks.1.hook_resid_pots"])

    @pytest.mark.parametrize("kind", ["hooked", "bridge"])
    def test_hook_that_never_fires(self, models, batch, kind):
        # Exists in every TransformerLens model, but runs only after set_use_attn_in(True).
        hook = "blocks.1.hook_attn_in"
        with pytest.raises(ValueError, match="exists but never fired"):
            models[kind].capture(batch.tokens, batch.attention_mask, [hook])
        with pytest.raises(ValueError, match="exists but never fired"):
            models[kind].logits(batch.tokens, batch.attention_mask, {hook: torch.zeros_like})

    def test_hook_that_is_no_activation_per_token(self, models, batch):
        with pytest.raises(ValueError, match="not one activation for each"):
            models["huggingface"].capture(batch.tokens, batch.attention_mask, ["model.rotary_emb"])

    def test_module_names_on_hugging_face(self, models, batch):
        found = models["huggingface"].capture(
            batch.tokens, batch.attention_mask, ["model.layers.1", RESID]
        )
        assert torch.equal(found["model.layers.1"], found[RESID])

    def test_names(self, models, tiny_folder):
        assert {model.name for model in models.values()} == {"tiny-random"}
        assert language_model(str(tiny_folder), name="other", device="cpu").name == "other"
        assert models["hooked"].loader == "hooked_transformer"
        assert models["bridge"].loader == models["sae_bridge"].loader == "bridge"

    def test_damaged_model_and_unknown_device(self, tiny_folder, tmp_path):
        folder = tmp_path / "damaged"
        shutil.copytree(tiny_folder, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        for loader in ("bridge", "huggingface"):
            with pytest.raises(ValueError, match="the model in folder '.*damaged' cannot be loaded"):
                language_model(str(folder), loader=loader, device="cpu")
        for device in ("banana", "meta:7:7", *([] if torch.cuda.is_available() else ["cuda"])):
            with pytest.raises(ValueError, match=f"device '{device}' is not one that PyTorch has"):
                language_model(str(tiny_folder), device=device)

    @pytest.mark.parametrize("kind", ["hooked", "bridge", "sae_bridge"])
    def test_aliases_of_the_embedding(self, models, batch, kind):
        found = models[kind].capture(batch.tokens, batch.attention_mask, ["hook_embed"])
        assert found["hook_embed"].shape == (*batch.tokens.shape, 32)

    def test_unknown_models(self):
        for loader in ("bridge", "huggingface", "hooked_transformer"):
            with pytest.raises(ValueError, match="model 'no-such/model' is neither a folder nor"):
                language_model("no-such/model", loader=loader)
        with pytest.raises(TypeError, match="got Linear"):
            language_model(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="loader must be one of"):
            language_model("gpt2", loader="telepathy")


SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=40)
WIDE = SMALL | dict(intermediate_size=48)
IDS = dict(pad_token_id=2, bos_token_id=0, eos_token_id=1)
DECODER = dict(
    d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=40, decoder_start_token_id=0, **IDS,
)  # fmt: skip
T5 = dict(d_model=32, d_ff=48, num_heads=4, d_kv=8, vocab_size=40)


def gemma3() -> hf.PreTrainedModel:
    """A model that sees images too, whose vision tower comes first and has the same number of layers."""
    text = dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=16, **IDS)
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=WIDE | text, vision_config=vision, mm_tokens_per_image=4, image_token_index=39,
        boi_token_index=38, eoi_token_index=37,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


# Each with the name of its second layer, and the most tokens that it has positions for.
FAMILIES = {
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, max_position_embeddings=20, **IDS)),
        "model.layers.1", 20,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40, n_positions=20, **IDS)
        ),
        "transformer.h.1", 20,
    ),
    "gpt_neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE, max_position_embeddings=20, **IDS)),
        "gpt_neox.layers.1", 20,
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, max_position_embeddings=20, **IDS)),
        "transformer.h.1", 20,
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=20, **IDS)
        ),
        "model.decoder.layers.1", 20,
    ),
    "mixtral": (
        # As many experts in each layer as there are layers.
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**WIDE, num_local_experts=3, num_key_value_heads=2,
                             max_position_embeddings=20, **IDS)
        ),
        "model.layers.1", 20,
    ),
    "bert": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**WIDE, max_position_embeddings=20, **IDS)),
        "bert.encoder.layer.1", 20,
    ),
    "roberta": (
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**WIDE, max_position_embeddings=20, **IDS)),
        "roberta.encoder.layer.1", 17,  # positions start at the padding token's id + 1
    ),
    "distilbert": (
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=40,
                                max_position_embeddings=20, **IDS)
        ),
        "distilbert.transformer.layer.1", 20,
    ),
    "gemma3": (gemma3, "model.language_model.layers.1", 64),
    "t5 encoder": (
        lambda: hf.T5EncoderModel(hf.T5Config(**T5, num_layers=3)), "encoder.block.1", None,
    ),
    "bart decoder": (
        lambda: hf.BartForCausalLM(hf.BartConfig(**DECODER, max_position_embeddings=20)),
        "model.decoder.layers.1", 20,
    ),
    "whisper decoder": (
        lambda: hf.WhisperForCausalLM(hf.WhisperConfig(**DECODER, max_target_positions=20)),
        "model.decoder.layers.1", 20,
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=40, state_size=4, **IDS)
        ),
        "backbone.layers.1", None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tokenizer):
    make, layer, n_positions = FAMILIES[request.param]
    torch.manual_seed(0)
    return language_model(make().eval(), tokenizer=tokenizer), layer, n_positions


def read(lm: LanguageModel, tokens: torch.Tensor, *hooks: str) -> dict[str, torch.Tensor]:
    return lm.capture(tokens, torch.ones_like(tokens, dtype=torch.bool), list(hooks))


def readable_hooks(lm: Any, tokens: torch.Tensor) -> list[str]:
    """The hooks of a model that give one activation for each token."""
    points = getattr(lm.model, "hook_dict", None)
    names = points if points is not None else [name for name, _ in lm.model.named_modules() if name]
    found = []
    for name in names:
        with suppress(ValueError):  # it does not fire, or not for each token
            found += read(lm, tokens, name)
    return found


TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 9, 8, 7, 6, 5]])


class TestFamilies:
    def test_blocks_are_the_layers_of_the_text(self, family):
        lm, layer, _ = family
        modules = dict(lm.model.named_modules())
        outputs = []
        handle = modules[layer].register_forward_hook(lambda module, args, out: outputs.append(out))
        try:
            found = read(lm, TOKENS, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
        finally:
            handle.remove()
        given = outputs[0][0] if isinstance(outputs[0], tuple | list) else outputs[0]
        assert torch.equal(found["blocks.1.hook_resid_post"], given)
        assert torch.equal(found["blocks.1.hook_resid_post"], read(lm, TOKENS, layer)[layer])
        before = read(lm, TOKENS, "blocks.0.hook_resid_post")["blocks.0.hook_resid_post"]
        assert torch.equal(found["blocks.1.hook_resid_pre"], before)
        lm.check_hooks(["blocks.2.hook_resid_post"])
        with pytest.raises(ValueError, match="no hook 'blocks.3.hook_resid_post'; near it are blocks"):
            lm.check_hooks(["blocks.3.hook_resid_post"])

    def test_a_hook_gives_the_same_alone_and_with_others(self, family):
        lm, _, _ = family
        hooks = [*readable_hooks(lm, TOKENS), "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
        assert len(hooks) > 10
        together = read(lm, TOKENS, *hooks)
        for hook in hooks:
            assert torch.equal(read(lm, TOKENS, hook)[hook], together[hook]), hook

    def test_max_context_tokens_fit_and_no_more(self, family):
        lm, _, n_positions = family
        assert lm.max_context == n_positions
        tokens = torch.full((1, n_positions or 8), 5)
        read(lm, tokens, "blocks.2.hook_resid_post")
        tables = [m for m in lm.model.modules() if isinstance(m, nn.Embedding) and "pos" in str(m)]
        if tables:
            with pytest.raises((IndexError, RuntimeError)):
                read(lm, torch.full((1, n_positions + 1), 5), "blocks.2.hook_resid_post")

    def test_edits_reach_the_end(self, family):
        lm, layer, _ = family
        if isinstance(lm.model, hf.T5EncoderModel):
            return
        mask = torch.ones_like(TOKENS, dtype=torch.bool)
        plain = lm.logits(TOKENS, mask)
        for hook in (layer, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"):
            changed = lm.logits(TOKENS, mask, {hook: lambda x: x + torch.arange(32.0)})
            assert not torch.allclose(plain, changed, atol=1e-3)
            assert torch.equal(lm.logits(TOKENS, mask, {hook: lambda x: x}), plain)
        assert torch.equal(lm.logits(TOKENS, mask), plain)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_layers=3)),
                "has layers in an encoder and in a decoder",
            ),
            (
                lambda: hf.XLMWithLMHeadModel(
                    hf.XLMConfig(emb_dim=32, n_layers=3, n_heads=4, vocab_size=40)
                ),
                "not clear which modules .* its 3 layers.*lists are attentions, layer_norm1, ffns",
            ),
            (
                lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**WIDE, embedding_size=16)),
                "not clear which modules .* are its 3 layers",
            ),
        ],
    )
    def test_ambiguous_layers_are_refused(self, tokenizer, model, message):
        lm = language_model(model().eval(), tokenizer=tokenizer)
        with pytest.raises(ValueError, match=message):
            lm.check_hooks(["blocks.1.hook_resid_post"])
        with pytest.raises(ValueError, match="no hook 'nowhere'"):
            lm.check_hooks(["nowhere"])

    def test_lists_inside_layers_are_not_the_layers(self, tokenizer):
        """Two layers of two parts each, of a class that does not name its layers."""
        model = hf.T5EncoderModel(hf.T5Config(**T5, num_layers=2)).eval()
        model._no_split_modules = None
        lm = language_model(model, tokenizer=tokenizer)
        hooks = ["encoder.block.1", "blocks.1.hook_resid_post"]
        found = read(lm, TOKENS, *hooks)
        assert torch.equal(*found.values())

    def test_a_class_that_takes_no_more_than_it_needs(self, tokenizer):
        class Strict(hf.DistilBertForMaskedLM):
            def forward(self, input_ids, attention_mask):
                return super().forward(input_ids, attention_mask)

        config = hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=40, **IDS)
        lm = language_model(Strict(config).eval(), tokenizer=tokenizer)
        mask = torch.ones_like(TOKENS, dtype=torch.bool)
        assert lm.logits(TOKENS, mask).shape == (*TOKENS.shape, 40)

    def test_encoder_and_decoder(self, tokenizer):
        model = hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_layers=3)).eval()
        lm = language_model(model, tokenizer=tokenizer)
        hook = "encoder.block.1"
        expected = model.encoder(TOKENS, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(read(lm, TOKENS, hook)[hook], expected.detach())
        with pytest.raises(ValueError, match="'decoder.block.1' exists but never fired"):
            read(lm, TOKENS, "decoder.block.1")
        with pytest.raises(ValueError, match="gives no logits"):
            lm.logits(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))

    def test_a_module_that_runs_several_times_gives_its_first(self, tokenizer):
        torch.manual_seed(0)
        model = hf.AlbertForMaskedLM(hf.AlbertConfig(**WIDE, embedding_size=16)).eval()
        lm = language_model(model, tokenizer=tokenizer)
        group, after = "albert.encoder.albert_layer_groups.0", "predictions"
        outputs = []
        handle = model.get_submodule(group).register_forward_hook(lambda m, a, out: outputs.append(out))
        model(TOKENS)
        handle.remove()
        assert len(outputs) == 3
        first = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        assert torch.equal(read(lm, TOKENS, group)[group], first)
        assert torch.equal(read(lm, TOKENS, after, group)[group], first)

    def test_without_a_head(self, tiny_folder, models, batch):
        bare = language_model(AutoModel.from_pretrained(tiny_folder))
        found = bare.capture(batch.tokens, batch.attention_mask, [RESID])[RESID]
        expected = models["huggingface"].capture(batch.tokens, batch.attention_mask, [RESID])[RESID]
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="LlamaModel gives no logits for each token"):
            bare.logits(batch.tokens, batch.attention_mask)


def state_of(model: nn.Module) -> list[Any]:
    """Modes and hooks of every module, whether weights take gradients, and torch's own mode."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    whole = [model, getattr(model, "original_model", model)]
    return [
        [(m.training, [len(getattr(m, name)) for name in hooks]) for part in whole
         for m in part.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [vars(part.config).get("use_cache") for part in whole if hasattr(part, "config")],
        torch.is_grad_enabled(),
    ]  # fmt: skip


class TestNothingStaysBehind:
    @pytest.fixture(params=TestModels.KINDS)
    def lm(self, request, models):
        """A model of which some modules are in training, and some are not."""
        lm = models[request.param]
        modules = list(lm.model.modules()) + list(
            getattr(lm.model, "original_model", nn.Module()).modules()
        )
        before = [module.training for module in modules]
        for i, module in enumerate(modules):
            module.training = i % 3 == 0
        yield lm
        for module, training in zip(modules, before, strict=True):
            module.training = training

    def test_after_calls_and_errors(self, lm, batch):
        modes, gradients = [], []

        def note(x):
            modes.append([m for m in lm.model.modules() if m.training])
            gradients.append(torch.is_grad_enabled())
            return x

        def fail(x):
            raise RuntimeError("an edit's own error")

        before = state_of(lm.model)
        lm.capture(batch.tokens, batch.attention_mask, [RESID, "blocks.0.hook_resid_pre"])
        assert state_of(lm.model) == before
        lm.logits(batch.tokens, batch.attention_mask, {RESID: note})
        with lm.edited({"blocks.0.hook_resid_pre": note}):
            lm.capture(batch.tokens, batch.attention_mask, [RESID])
        assert modes == [[], []]  # all modules were in evaluation mode
        assert gradients == [True, False]
        assert state_of(lm.model) == before
        for hooks in (["nowhere"], [RESID, "nowhere"]):
            with pytest.raises(ValueError, match="no hook"):
                lm.capture(batch.tokens, batch.attention_mask, hooks)
            assert state_of(lm.model) == before
        with pytest.raises(RuntimeError, match="an edit's own error"):
            lm.logits(batch.tokens, batch.attention_mask, {RESID: fail})
        assert state_of(lm.model) == before
        with lm.edited({RESID: fail}), pytest.raises(RuntimeError, match="an edit's own error"):
            lm.capture(batch.tokens, batch.attention_mask, ["blocks.2.hook_resid_post"])
        assert state_of(lm.model) == before
        with pytest.raises(ValueError, match="no hook"), lm.edited({RESID: note, "nowhere": note}):
            pass
        assert state_of(lm.model) == before


class TestEdited:
    @pytest.fixture(params=TestModels.KINDS)
    def lm(self, request, models):
        return models[request.param]

    @pytest.fixture
    def call(self, lm, batch):
        """The model's own forward pass."""
        first = batch.tokens[:1]

        def logits():
            found = lm.model(first)
            return found if isinstance(found, torch.Tensor) else found.logits

        return logits

    def test_everything_inside_is_edited(self, lm, batch, call):
        plain, later = call(), "blocks.2.hook_resid_pre"
        with torch.no_grad(), lm.edited({RESID: lambda x: x * 2}):
            edited = call()
            found = lm.capture(batch.tokens, batch.attention_mask, [later])[later]
            same = lm.logits(batch.tokens[:1], batch.attention_mask[:1])
        expected = lm.capture(batch.tokens, batch.attention_mask, [later])[later] * 2
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(edited, plain, atol=1e-3)
        torch.testing.assert_close(same, edited)
        assert torch.equal(call(), plain)

    def test_the_outer_edit_comes_first(self, lm, batch):
        with lm.edited({RESID: lambda x: x + 1}), lm.edited({RESID: lambda x: x * 3}):
            found = lm.capture(batch.tokens, batch.attention_mask, [RESID])[RESID]
        plain = lm.capture(batch.tokens, batch.attention_mask, [RESID])[RESID]
        torch.testing.assert_close(found, (plain + 1) * 3)

    def test_gradients(self, lm, call):
        x = torch.randn(32, requires_grad=True)

        def value():
            with lm.edited({RESID: lambda activation: activation + x}):
                return call()[0, -1, 3]

        (gradient,) = torch.autograd.grad(value(), x)
        step = torch.zeros(32)
        step[7] = 1e-2
        with torch.no_grad():
            x += step
            up = value()
            x -= 2 * step
            down = value()
        torch.testing.assert_close((up - down) / 2e-2, gradient[7], rtol=0.02, atol=1e-4)

    def test_gradients_of_logits(self, lm, batch):
        x = torch.zeros(32, requires_grad=True)
        logits = lm.logits(batch.tokens, batch.attention_mask, {RESID: lambda a: a + x})
        assert torch.autograd.grad(logits[0, 2, 3], x)[0].abs().max() > 0
        with torch.no_grad():
            assert not lm.logits(batch.tokens, batch.attention_mask).requires_grad
        assert not lm.capture(batch.tokens, batch.attention_mask, [RESID])[RESID].requires_grad

    def test_generation_with_a_cache(self, lm, batch):
        lengths = []

        def push(x):
            lengths.append(x.shape[1])
            return x + 3 * torch.arange(32.0).cos()

        prompt = batch.tokens[:1]
        options = dict(max_new_tokens=4, do_sample=False)
        if lm.loader == "huggingface":
            options |= dict(eos_token_id=None, pad_token_id=2)
        else:
            options |= dict(stop_at_eos=False, verbose=False, prepend_bos=False)
        plain = lm.model.generate(prompt, **options)
        with torch.no_grad(), lm.edited({RESID: push}):
            found = lm.model.generate(prompt, **options)
            assert lengths == [prompt.shape[1], 1, 1, 1]
            # The same, by whole passes without a cache.
            tokens = prompt
            for _ in range(4):
                logits = lm.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
                tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
        assert found.tolist() == tokens.tolist() != plain.tolist()
        assert lm.model.generate(prompt, **options).tolist() == plain.tolist()

    @pytest.mark.parametrize("how", ["call", "logits", "generate"])
    def test_a_hook_that_did_not_fire(self, lm, batch, call, how):
        silent = {"huggingface": "model.layers"}.get(lm.loader, "blocks.1.hook_attn_in")
        if silent not in getattr(lm.model, "hook_dict", {silent}):
            silent = "blocks.1.attn.hook_result"
        run = {
            "call": call,
            "logits": lambda: lm.logits(batch.tokens, batch.attention_mask),
            "generate": lambda: lm.model.generate(batch.tokens[:1], max_new_tokens=1),
        }[how]
        with pytest.raises(ValueError, match=f"hook '{silent}' exists but never fired"):  # noqa: SIM117
            with lm.edited({RESID: torch.clone, silent: torch.clone}):
                run()

    def test_an_edit_that_was_not_reached(self, lm, batch):
        with lm.edited({"blocks.2.hook_resid_post": torch.clone}):
            pass  # no forward pass ran
        with lm.edited({"blocks.2.hook_resid_post": torch.clone}):  # one ran, but not to its end
            lm.capture(batch.tokens, batch.attention_mask, [RESID])

    def test_an_error_inside_is_not_hidden(self, lm, batch):
        silent = "blocks.1.attn.hook_result" if lm.loader != "huggingface" else "model.layers"
        with pytest.raises(KeyError), lm.edited({silent: torch.clone}):  # noqa: PT012
            lm.logits(batch.tokens, batch.attention_mask)
            raise KeyError

    @pytest.mark.parametrize("edit", [lambda x: None, lambda x: x[:, :1], lambda x: x.flatten(1)])
    def test_an_edit_must_keep_the_shape(self, lm, batch, edit):
        with pytest.raises(ValueError, match=f"the edit at '{RESID}' must return a tensor of shape"):
            lm.logits(batch.tokens, batch.attention_mask, {RESID: edit})

    def test_first_looks_are_not_edited(self, tiny_folder, batch):
        """The pass that looks at shapes is not one that the user asked for."""
        lm = language_model(AutoModelForCausalLM.from_pretrained(tiny_folder))
        seen = []

        def note(x):
            seen.append(tuple(x.shape[:2]))
            return x

        with lm.edited({"blocks.0.hook_resid_post": note}):
            lm.capture(batch.tokens, batch.attention_mask, [RESID])
        assert seen == [tuple(batch.tokens.shape)]


class TestShapes:
    """Activations that fit [batch, seq, ...] by chance: the model has 4 heads."""

    @pytest.mark.parametrize("kind", ["hooked", "bridge", "sae_bridge"])
    @pytest.mark.parametrize("shape", [(3, 4), (1, 4), (2, 4), (1, 3), (4, 4), (1, 1), (2, 2)])
    def test_attention_patterns_and_positions(self, tiny_folder, models, kind, shape):
        lm = language_model(models[kind].model, tokenizer=models[kind].tokenizer)  # knows no shape yet
        tokens = torch.randint(4, 20, shape)
        hooks = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]
        hooks += [] if kind == "hooked" else ["rotary_emb.hook_cos"]
        for hook in hooks:
            with pytest.raises(ValueError, match="not one activation for each"):
                read(lm, tokens, hook)
        assert read(lm, tokens, "blocks.1.attn.hook_z")["blocks.1.attn.hook_z"].shape == (*shape, 32)

    @pytest.mark.parametrize(
        ("model", "hook", "shape"),
        [
            (
                lambda: hf.BloomForCausalLM(
                    hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=40)
                ),
                "transformer.h.0.self_attention.attention_dropout",
                (2, 4),
            ),
            (FAMILIES["gpt2"][0], "transformer.wpe", (1, 5)),
        ],
    )
    def test_by_hugging_face(self, tokenizer, model, hook, shape):
        model = model().eval()
        model.set_attn_implementation("eager")
        lm = language_model(model, tokenizer=tokenizer)
        with pytest.raises(ValueError, match=f"'{hook}' gives .*not one activation for each"):
            read(lm, torch.randint(4, 20, shape), hook)

    @pytest.mark.parametrize("kind", ["hooked", "bridge"])
    def test_hooks_of_others_do_not_matter(self, tiny_folder, models, batch, kind):
        lm = language_model(models[kind].model, tokenizer=models[kind].tokenizer)
        steering = torch.ones(*batch.tokens.shape, 32)
        add = [("blocks.0.hook_resid_post", lambda x, hook: x + steering)]  # fits this batch only
        with lm.model.hooks(fwd_hooks=add):
            found = lm.capture(batch.tokens, batch.attention_mask, [RESID])[RESID]
        assert not torch.allclose(
            found, lm.capture(batch.tokens, batch.attention_mask, [RESID])[RESID], atol=1e-3
        )

    @pytest.mark.parametrize("kind", ["hooked", "bridge", "sae_bridge"])
    def test_all_hooks_give_what_transformer_lens_gives(self, models, kind):
        lm, tokens = models[kind], torch.randint(4, 20, (2, 7))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        _, cache = lm.model.run_with_cache(tokens)
        per_token = [name for name, x in cache.items() if x.ndim > 2 and x.shape[:2] == tokens.shape]
        assert len(per_token) > 30
        plain = lm.logits(tokens, mask)
        shapes = []

        def note(x):
            shapes.append(x.shape)
            # An edit inside a norm makes a bridge warn that it computes the norm itself.
            return x if "ln" in name else x.clone()

        for name in per_token:
            torch.testing.assert_close(read(lm, tokens, name)[name], cache[name].flatten(2))
            same = lm.logits(tokens, mask, {name: note})
            assert shapes.pop() == cache[name].shape, name
            torch.testing.assert_close(same, plain)

    @pytest.mark.parametrize("kind", ["hooked", "bridge"])
    def test_per_head_hooks_are_those_with_heads(self, models, kind):
        _, cache = models[kind].model.run_with_cache(torch.randint(4, 20, (2, 7)))
        per_token = {name: x for name, x in cache.items() if x.shape[:2] == (2, 7)}
        assert len(per_token) > 30
        for name, x in per_token.items():
            assert HookPoint.parse(name).per_head == (x.ndim == 4), name

    @pytest.mark.parametrize("hook", ["hook_q", "hook_k", "hook_z", "hook_rot_q"])
    def test_dictionaries_of_per_head_hooks_can_be_built(self, models, texts, hook):
        name = f"blocks.1.attn.{hook}"
        itda = build(models["bridge"], texts, name, d_sae=20, k=4, context_size=12, progress=False)[name]
        assert itda.cfg.d_in == {"hook_k": 16}.get(hook, 32)


class TestTokens:
    @pytest.mark.parametrize("kind", TestModels.KINDS)
    @pytest.mark.parametrize("token", [26, 10**6, -1])
    def test_outside_of_the_embedding(self, models, kind, token):
        lm, tokens = models[kind], TOKENS.clone()
        mask = torch.ones_like(tokens, dtype=torch.bool)
        tokens[1, 3] = token
        for run in (lambda: read(lm, tokens, RESID), lambda: lm.logits(tokens, mask)):
            with pytest.raises(
                ValueError, match=f"token {token}.* at position 3 of context 1 .* 26 rows"
            ):
                run()
        # A padding token that was added to the tokenizer alone is never read.
        tokens = TOKENS.clone()
        tokens[1, 4:], mask[1, 4:] = max(token, 26), False
        found = lm.capture(tokens, mask, [RESID])[RESID]
        torch.testing.assert_close(found[1, :4], read(lm, TOKENS, RESID)[RESID][1, :4])
        assert tokens[1, 4] == max(token, 26)

    def test_the_token_is_spelt(self, tiny_folder, tokenizer):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**(WIDE | dict(vocab_size=8)), **IDS))
        with pytest.raises(ValueError, match=r"token 8 \('sat'\) at position 4 of context 0 is outside"):
            read(language_model(model, tokenizer=tokenizer), TOKENS, RESID)

    @pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 0), (2, 3, 4)])
    def test_shape(self, tiny, shape):
        with pytest.raises(ValueError, match=r"tokens must be \[batch, seq\]"):
            read(tiny, torch.zeros(shape, dtype=torch.long), RESID)
        with pytest.raises(ValueError, match="attention_mask of the same shape"):
            tiny.capture(TOKENS, torch.ones(2, 5, dtype=torch.bool), [RESID])

    def test_hooks_are_a_list(self, tiny):
        for run in (tiny.check_hooks, lambda hooks: read(tiny, TOKENS, *[]) or tiny.check_hooks(hooks)):
            with pytest.raises(ValueError, match="hooks must be a list of names, got the string"):
                run(RESID)
        assert read(tiny, TOKENS) == {}


class TestTokenizers:
    def test_by_name(self, tiny_folder, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        for name in (tiny_folder, str(tiny_folder)):
            for lm in (
                language_model(model, tokenizer=name),
                language_model(str(tiny_folder), tokenizer=name, device="cpu"),
            ):
                assert lm.tokenizer.get_vocab() == tokenizer.get_vocab()
        with pytest.raises(ValueError, match="no tokenizer could be loaded for 'no-such/tokenizer'"):
            language_model(model, tokenizer="no-such/tokenizer")

    @pytest.mark.parametrize("bad", [3, object(), ["gpt2"], {}, lambda text: text])
    def test_of_another_type(self, tiny_folder, bad):
        for model in (str(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)):
            with pytest.raises(TypeError, match="tokenizer must be a Hugging Face tokenizer, or the"):
                language_model(model, tokenizer=bad, device="cpu")


class TestDevice:
    def test_offloaded(self, tiny_folder, tmp_path):
        pytest.importorskip("accelerate")
        from accelerate import cpu_offload, disk_offload

        for offload, options in ((cpu_offload, {}), (disk_offload, {"offload_dir": str(tmp_path)})):
            lm = language_model(AutoModelForCausalLM.from_pretrained(tiny_folder))
            expected = read(lm, TOKENS, RESID)[RESID]
            offload(lm.model, execution_device=torch.device("cpu"), **options)
            assert next(lm.model.parameters()).is_meta
            assert lm.device == torch.device("cpu")
            assert torch.equal(read(lm, TOKENS, RESID)[RESID], expected)

    def test_of_a_part_that_is_somewhere(self, models):
        lm = language_model(
            AutoModelForCausalLM.from_pretrained(models["huggingface"].source),
            tokenizer=models["huggingface"].tokenizer,
        )
        embedding = lm.model.model.embed_tokens.to("meta")
        assert lm.device == torch.device("cpu")
        embedding._hf_hook = SimpleNamespace(execution_device="cuda:1")  # accelerate runs it there
        assert lm.device == torch.device("cuda", 1)


Pair = namedtuple("Pair", ["hidden", "note"])

SHAPES_OF_OUTPUT = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "list": lambda x: [x, "more"],
    "named tuple": lambda x: Pair(x, "more"),
    "dictionary": lambda x: {"hidden": x, "note": "more"},
    "output": lambda x: BaseModelOutput(last_hidden_state=x),
}


def first(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return next(iter(value.values())) if isinstance(value, dict) else value[0]


class ToyBlock(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.form = form

    def forward(self, x: Any) -> Any:
        return SHAPES_OF_OUTPUT[self.form](self.linear(first(x)).tanh())


class Toy(nn.Module):
    """A model of a library that nobody knows."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.blocks = nn.Sequential(ToyBlock(form), ToyBlock(form))
        self.unembed = nn.Linear(8, 40)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.unembed(first(self.blocks(self.embed(tokens))))


class ToyModel(HookedModel):
    """All that a library needs."""

    @classmethod
    def loader_of(cls, model):
        return "huggingface" if isinstance(model, Toy) else None

    @classmethod
    def load(cls, name, loader, tokenizer, device, dtype):
        raise NotImplementedError

    @staticmethod
    def described(model):
        return "toy", None

    @property
    def max_context(self):
        return None

    def _site(self, hook):
        modules = dict(self.model.named_modules())
        if hook not in modules:
            raise unknown_hook(hook, modules)
        return Site(modules[hook], "output")

    def _run(self, tokens, attention_mask):
        return self.model(tokens)

    def _logits_of(self, output):
        return output

    def _embedding(self):
        return self.model.embed


class TestLibraries:
    @pytest.mark.parametrize("form", SHAPES_OF_OUTPUT)
    def test_a_new_library_is_a_class_and_a_line(self, monkeypatch, tokenizer, form):
        monkeypatch.setitem(LIBRARIES, ToyModel, ())
        model = Toy(form)
        lm = language_model(model, tokenizer=tokenizer)
        assert isinstance(lm, ReadableModel)
        assert lm.name == "toy"
        x = read(lm, TOKENS, "blocks.0")["blocks.0"]
        assert torch.equal(x, model.blocks[0].linear(model.embed(TOKENS)).tanh())
        mask = torch.ones_like(TOKENS, dtype=torch.bool)
        given = []
        model.blocks[1].register_forward_pre_hook(lambda module, args: given.append(args[0]))
        lm.logits(TOKENS, mask)
        found = lm.logits(TOKENS, mask, {"blocks.0": lambda x: x / 2})
        expected = model.unembed(first(model.blocks[1](x / 2)))
        assert torch.equal(found, expected)
        # The block gives the same kind of thing, edited or not, with all that came beside the tensor.
        assert type(given[1]) is type(given[0])
        if form != "tensor":
            plain, edited = (list(g.values() if isinstance(g, dict) else g)[1:] for g in given[:2])
            assert plain == edited

    def test_inputs_by_position_and_by_name(self):
        class Layer(nn.Module):
            def forward(self, hidden_states: Any, scale: Any) -> Any:
                return hidden_states * scale

        layer, x, scale = Layer(), torch.ones(1, 2, 3), torch.tensor(2.0)
        with attached([(Site(layer, "input"), lambda x: x + 1)]):
            found = layer(x, scale), layer(hidden_states=x, scale=scale), layer(x, scale=scale)
        assert all(torch.equal(one, torch.full((1, 2, 3), 4.0)) for one in found)

    def test_one_of_ones_own(self, tiny):
        class Mine:
            """Nothing but the methods: no base class, no module."""

            tokenizer, name, loader, source = tiny.tokenizer, "mine", "bridge", None
            device, max_context = torch.device("cpu"), None
            capture, logits, check_hooks, edited = (
                tiny.capture, tiny.logits, tiny.check_hooks, tiny.edited,
            )  # fmt: skip

        mine = Mine()
        assert language_model(mine) is mine
        with pytest.raises(TypeError, match="or a ReadableModel, got object"):
            language_model(object(), tokenizer=tiny.tokenizer)

    def test_all_are_readable(self, models):
        for model in models.values():
            assert isinstance(model, LanguageModel)
            assert language_model(model) is model

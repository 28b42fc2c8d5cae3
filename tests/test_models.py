"""Models of every library are read and edited in the same way."""

import shutil

import pytest
import torch
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from itda_lens.sources import LanguageModel, Tokenization, language_model

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
    return next(Tokenization(tokenizer, 12).batches(["the cat sat on a mat", "dog ran", "a log"], 3))


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
        alone = Tokenization(tokenizer, 12).batch([batch.contexts[1]])
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

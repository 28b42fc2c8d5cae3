"""Texts, contexts and models: what counts, where it came from, and how models are read."""

import json
import shutil

from types import SimpleNamespace

import pytest
import torch
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from itda_lens.records import Cutting
from itda_lens.sources import LanguageModel, Tokenization, iterate_texts, language_model

RESID = "blocks.1.hook_resid_post"


class TestTexts:
    def test_list_and_iterator(self):
        assert list(iterate_texts(["a", "b"])) == ["a", "b"]
        assert list(iterate_texts(iter(["a", "b"]))) == ["a", "b"]

    def test_files(self, tmp_path):
        plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
        plain.write_text("one\n\ntwo", encoding="utf-8")
        lines.write_text('{"body": "ä"}\n\n{"body": "b", "x": 1}\n', encoding="utf-8")
        assert list(iterate_texts(plain)) == list(iterate_texts(str(plain))) == ["one\n\ntwo"]
        assert list(iterate_texts(lines, text_field="body")) == ["ä", "b"]

    def test_data_set_by_name(self, tmp_path, monkeypatch):
        # `datasets` takes a local folder of the data set's name first; the hub is the same call.
        folder = tmp_path / "org" / "texts"
        folder.mkdir(parents=True)
        rows = [json.dumps({"text": f"text {i}"}) for i in range(3)]
        (folder / "train.jsonl").write_text("\n".join(rows))
        monkeypatch.chdir(tmp_path)
        assert list(iterate_texts("org/texts")) == ["text 0", "text 1", "text 2"]
        with pytest.raises(ValueError, match=r"no field 'body', only \['text'\]"):
            list(iterate_texts("org/texts", text_field="body"))
        (folder / "train.jsonl").write_text('{"text": null}')
        with pytest.raises(ValueError, match="row 0 .* 'text' is not a string"):
            list(iterate_texts("org/texts"))

    @pytest.mark.parametrize(
        ("texts", "error", "message"),
        [
            (["a", 3], TypeError, "text 1 is int"),
            (7, TypeError, "texts must be strings, a file or the name"),
            ("a plain sentence, not a list", ValueError, r"to use one text, pass \[text\]"),
            ("word " * 1000, ValueError, r"to use one text, pass \[text\]"),
            ("two\nlines", ValueError, r"to use one text, pass \[text\]"),
            ("no-such-file.txt", ValueError, "neither a file nor a data set"),
        ],
    )
    def test_bad_texts(self, texts, error, message):
        with pytest.raises(error, match=message):
            list(iterate_texts(texts))

    @pytest.mark.parametrize("line", ["{", "[]", '{"other": 1}', '{"text": 3}'])
    def test_bad_jsonl(self, tmp_path, line):
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2 of .*a.jsonl"):
            list(iterate_texts(file))

    def test_binary_file(self, tmp_path):
        file = tmp_path / "a.txt"
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="not UTF-8"):
            list(iterate_texts(file))


class TestContexts:
    def test_cut_with_places(self, tokenizer):
        text = "the cat sat on the mat and the dog ran"
        cut = list(Tokenization(tokenizer, Cutting(5)).contexts(["a", "", text]))
        assert [(c.row, c.chunk, len(c.ids)) for c in cut] == [
            (0, 0, 2), (2, 0, 5), (2, 1, 5), (2, 2, 3),
        ]  # fmt: skip
        assert all(context.ids[0] == tokenizer.bos_token_id for context in cut)
        label = Tokenization(tokenizer).batch(cut[2:3]).places()[0]
        assert label.key == (2, 1, 1)
        assert text[slice(*label.chars)] == label.token == "the"
        assert label.chars == (15, 18)
        assert label.context == "the cat sat on [[the]] mat and the dog ran"

    def test_without_bos(self, tokenizer):
        (context,) = Tokenization(tokenizer, Cutting(8, prepend_bos=False)).contexts(["the cat"])
        assert len(context.ids) == 2
        (batch,) = Tokenization(tokenizer, Cutting(8, False, True)).batches(["the cat"], 1)
        assert [label.token for label in batch.places()] == ["the", "cat"]

    def test_masks(self, tokenizer):
        texts = ["the cat sat", "dog <eos> ran on", "a"]
        (batch,) = Tokenization(tokenizer, Cutting(8)).batches(texts, 4)
        assert batch.tokens.shape == (3, 5)
        assert batch.attention_mask.sum(dim=1).tolist() == [4, 5, 2]
        assert batch.keep.tolist() == [
            [False, True, True, True, False],
            [False, True, False, True, True],
            [False, True, False, False, False],
        ]
        assert [label.token for label in batch.places()] == [
            "the",
            "cat",
            "sat",
            "dog",
            "ran",
            "on",
            "a",
        ]
        (kept,) = Tokenization(tokenizer, Cutting(8, keep_special_tokens=True)).batches(texts, 4)
        assert torch.equal(kept.keep, batch.attention_mask)

    def test_batches(self, tokenizer, texts):
        whole = Tokenization(tokenizer, Cutting(16))
        sizes = [len(batch.contexts) for batch in whole.batches(texts, 7)]
        assert sum(sizes) == len(list(whole.contexts(texts)))
        assert set(sizes[:-1]) == {7}

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="only a fast tokenizer gives; got object"):
            Tokenization(object())
        without = SimpleNamespace(is_fast=True, bos_token_id=None)
        assert not Tokenization(without).prepend_bos
        with pytest.raises(ValueError, match="no BOS token"):
            Tokenization(without, Cutting(prepend_bos=True))


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
        module, _ = model._resolve("blocks.2.hook_resid_post")
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

"""Texts and contexts: what counts, and where it came from."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_random_llama
from datasets import Dataset, DatasetDict, IterableDatasetDict
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from itda_lens import fit
from itda_lens.records import Cutting, Places, Provenance
from itda_lens.sources import (
    ArraySource,
    ModelSource,
    Rows,
    Tokenization,
    gathered,
    iterate_texts,
    language_model,
)
from itda_lens.training import build_from, recipe_of

ROWS = Dataset.from_dict({"text": ["a", "b"]})


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
            ("no such file.txt", ValueError, "neither a file nor a data set"),
            ("/no/such/file", ValueError, "neither a file nor a data set"),
            ("~/file", ValueError, "neither a file nor a data set"),
            ("", ValueError, "neither a file nor a data set"),
            (Path("data"), ValueError, "neither a file nor a data set"),
            ({"a", "b"}, TypeError, "got a set; pass a sorted list"),
            ({"train": ["a"], "test": ["b"]}, ValueError, "got dict; choose .*'train', 'test'"),
            (
                DatasetDict(train=Dataset.from_dict({"text": ["a"]})),
                ValueError,
                "got DatasetDict; .*'train'",
            ),
            (
                IterableDatasetDict(test=ROWS.to_iterable_dataset()),
                ValueError,
                "got IterableDatasetDict; .*'test'",
            ),
            (SimpleNamespace(iterrows=list), TypeError, "pass one of its columns"),
            (["fine", "a \ud800"], ValueError, r"text 1 is no valid text: character 2 is the lone"),
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

    @pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.NDJSON", "a.json", "a.Json"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_files_of_many_texts(self, tmp_path, name, mark):
        rows = [json.dumps({"text": text}) for text in ("ä", "b\u2028c")]
        listed = name.lower().endswith(".json")
        file = tmp_path / name
        file.write_bytes(
            mark + ("[" + ", ".join(rows) + ', "d"]' if listed else "\r\n".join(rows)).encode()
        )
        assert list(iterate_texts(file)) == ["ä", "b\u2028c"] + ["d"] * listed

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
        assert list(iterate_texts(tmp_path / "a.txt")) == ["one"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.json", '{"text": "b"}', "must hold a JSON list .*not one an object with 'text'"),
            ("a.json", '{"text": "b"}\n{"text": "c"}', "must end in .jsonl or .ndjson"),
            (
                "a.json",
                '["b", {"body": "c"}]',
                "item 1 of .*a.json .* 'text', but an object with 'body'",
            ),
            ("a.json", '["b", "\\ud800"]', "item 1 of .*a.json is no valid text"),
            ("a.jsonl", '{"text": "b"}\n{"text": "\\udfff"}', "line 2 of .*a.jsonl is no valid text"),
            ("a.jsonl", "[" * 100_000, "line 1 of .*a.jsonl is no JSON object"),
            ("a.csv", "text\nb", "must be a text file, .jsonl, .ndjson or .json, got .*a.csv"),
            ("A.PARQUET", "", "must be a text file"),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            list(iterate_texts(tmp_path / name))

    @pytest.mark.parametrize("rows", [ROWS, ROWS.to_iterable_dataset()])
    def test_data_sets(self, rows):
        assert list(iterate_texts(rows)) == ["a", "b"]
        assert list(iterate_texts(rows["text"])) == ["a", "b"]
        with pytest.raises(ValueError, match=r"row 0 of .*Dataset has no field 'body', only \['text'\]"):
            list(iterate_texts(rows, text_field="body"))

    def test_folders(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\ntwo")
        for folder in (tmp_path, str(tmp_path)):
            with pytest.raises(ValueError, match="is a folder without a data set"):
                list(iterate_texts(folder))
        ROWS.save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match="pass datasets.load_from_disk"):
            list(iterate_texts(tmp_path / "saved"))

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


class TestRows:
    PLACES = Places.of([(3, 0, 1), (3, 0, 2)])

    def test_are_in_full_precision(self):
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            rows = Rows.of(self.PLACES, {"a": torch.ones(2, 4, dtype=dtype), "b": torch.ones(2, 5)})
            assert rows.places is self.PLACES
            assert rows.values["a"].dtype == expected
            assert rows.values["b"].shape == (2, 5)

    @pytest.mark.parametrize("shape", [(3, 4), (1, 4), (2,), (2, 4, 1)])
    def test_one_for_each_place(self, shape):
        with pytest.raises(ValueError, match=r"rows at 'b' must have shape \[2, width\], .*got \("):
            Rows.of(self.PLACES, {"a": torch.ones(2, 4), "b": torch.ones(shape)})

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_are_finite(self, bad):
        x = torch.ones(2, 4)
        x[1, 2] = bad
        with pytest.raises(ValueError, match="infinite activation at 'b', text 3, chunk 0, position 2"):
            Rows.of(self.PLACES, {"a": torch.ones(2, 4), "b": x})


class Fixed:
    """A source that gives these rows."""

    n_rows = None

    def __init__(self, hooks, *rows):
        self.hooks, self._rows = hooks, rows

    def rows(self, skip=0):
        return iter(self._rows)

    def provenance(self, hook):
        return Provenance(hook_name=hook)


class TestSourcesOfOnesOwn:
    def test_dictionaries_are_in_the_order_of_the_hooks(self):
        values = {hook: torch.randn(9, 4) for hook in ("b", "a")}
        source = Fixed(["a", "b"], Rows.of(Places.numbered(0, 9), values))
        made = build_from(source, recipe_of(d_sae=4, k=2), progress=False)
        assert list(made) == ["a", "b"]
        for hook, x in values.items():
            assert torch.equal(made[hook].W_dec, fit(x, d_sae=4, k=2).W_dec)

    @pytest.mark.parametrize("rows", [[], [Rows.of(Places.numbered(0, 9), {"a": torch.ones(9, 4)})]])
    def test_no_rows(self, rows):
        with pytest.raises(ValueError, match="must give at least one row, got none at .*'b'"):
            build_from(Fixed(["a", "b"], *rows), recipe_of(d_sae=4, k=2), progress=False)


class TestSources:
    HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")

    def model_source(self, tiny, texts, **options):
        cutting = Cutting(16)
        return ModelSource(tiny, texts[:30], list(self.HOOKS), cutting, batch_size=4, **options)

    def array_source(self, tiny, texts, **options):
        x = torch.randn(137, 8, generator=torch.Generator().manual_seed(0))
        return ArraySource(x, batch_size=10, **options)

    @pytest.mark.parametrize("kind", ["model_source", "array_source"])
    @pytest.mark.parametrize("skip", [0, 1, 9, 10, 73, 136])
    def test_reading_goes_on_where_it_stopped(self, tiny, texts, kind, skip):
        make = getattr(self, kind)
        options = {"max_tokens": 137} if kind == "model_source" else {}
        source = make(tiny, texts, **options)
        whole = gathered(source)
        left = list(make(tiny, texts, **options).rows(skip))
        assert source.n_rows == 137
        assert Places.joined([rows.places for rows in left]) == next(iter(whole.values())).labels[skip:]
        for hook in source.hooks:
            found = torch.cat([rows.values[hook] for rows in left])
            assert torch.equal(found, whole[hook].values[skip:])

    def test_all_can_be_skipped(self, tiny, texts):
        assert list(self.array_source(tiny, texts).rows(137)) == []
        assert list(self.model_source(tiny, texts, max_tokens=50).rows(50)) == []

    def test_can_be_read_again(self, tiny, texts):
        source = self.model_source(tiny, texts, max_tokens=60)
        first, second = gathered(source), gathered(source)
        for hook in self.HOOKS:
            assert torch.equal(first[hook].values, second[hook].values)

    def test_provenance_is_complete_once_all_is_read(self, tiny, texts):
        source = self.model_source(tiny, texts)
        before = source.provenance(self.HOOKS[0])
        assert before.n_tokens is None
        assert before.cutting == Cutting(16, True, False)
        n = len(gathered(source)[self.HOOKS[0]].labels)
        after = source.provenance(self.HOOKS[0])
        assert after.n_tokens == n
        assert after.texts_read_sha256 != before.texts_read_sha256
        assert after.texts_fingerprint == before.texts_fingerprint

    def test_the_dictionary_of_both_is_one(self, tiny, texts):
        recipe = recipe_of(d_sae=20, k=6, l0=3, update=True)
        built = build_from(self.model_source(tiny, texts), recipe, progress=False)
        for hook, (values, labels) in gathered(self.model_source(tiny, texts)).items():
            itda = build_from(ArraySource(values, labels), recipe, progress=False)["activations"]
            assert torch.equal(itda.W_dec, built[hook].W_dec)
            assert torch.equal(itda.b_dec, built[hook].b_dec)
            assert itda.cfg.threshold == built[hook].cfg.threshold
            assert itda.labels == built[hook].labels

    @pytest.mark.parametrize("hooks", [6, [6], None, {"a"}])
    def test_hooks_that_are_no_names(self, tiny, texts, hooks):
        with pytest.raises(TypeError, match="hook_names.* must be a string"):
            ModelSource(tiny, texts, hooks)

    def test_a_context_may_say_what_counts(self, tokenizer):
        """As chats will: the model's own turns, and no others."""
        tokenization = Tokenization(tokenizer)
        (context,) = tokenization.contexts(["the cat sat on the mat"])
        counts = [i in (2, 3) for i in range(len(context.ids))]
        batch = tokenization.batch([replace(context, counts=counts)])
        assert [label.token for label in batch.places()] == ["cat", "sat"]
        assert batch.attention_mask.all()


def trained(model, trainer, normalizer=None, pre_tokenizer=None, post_processor=None):
    """A tokenizer of its own vocabulary, trained on a line."""
    inner = Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        if part is not None:
            setattr(inner, name, part)
    inner.train_from_iterator(["the cat sat on the mat   with a naive dog"] * 3, trainer)
    if post_processor is not None:
        inner.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def byte_level(prefix=False, trim=False, normalizer=None):
    options = dict(
        special_tokens=["<s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    return trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=300, **options), normalizer=normalizer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        post_processor=processors.ByteLevel(trim_offsets=trim),
    )  # fmt: skip


def byte_fallback():
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "<unk>", *fallback], show_progress=False)
    sentence = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return trained(
        models.BPE(byte_fallback=True, unk_token="<unk>"), trainer,
        normalizer=normalizers.Sequence(sentence),
    )  # fmt: skip


def unigram():
    options = dict(special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False)
    return trained(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=60, **options),
        normalizer=normalizers.NFKC(), pre_tokenizer=pre_tokenizers.Metaspace(),
    )  # fmt: skip


def word_piece():
    trainer = trainers.WordPieceTrainer(special_tokens=["<s>", "<unk>"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="<unk>"), trainer, normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )  # fmt: skip


STRANGE = [
    "Hello  w\u00f6rld \U0001f600\u00e9", " two   spaces ",
    "\u65e5\u672c cafe\u0301 \ufb01 \u2460\t\n\n x\u00a0y", "\r\n a", "a",
]  # fmt: skip
KINDS = {
    "byte level": byte_level(),
    "prefix": byte_level(prefix=True),
    "trims": byte_level(trim=True),
    "prefix, trims": byte_level(prefix=True, trim=True),
    "NFC": byte_level(normalizer=normalizers.NFC()),
    "byte fallback": byte_fallback(),
    "unigram": unigram(),
    "word piece": word_piece(),
}


class TestTokenizers:
    """What labels say, whatever the tokenizer does to a text."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_labels_are_what_the_text_has_there(self, kind):
        tokenizer = KINDS[kind]
        (batch,) = Tokenization(tokenizer, Cutting(64, False, True)).batches(STRANGE, len(STRANGE))
        for context, ids in zip(batch.contexts, batch.tokens.tolist(), strict=True):
            own = [label for label in batch.places() if label.row == context.row]
            spelt = tokenizer.convert_ids_to_tokens(ids[: len(own)])
            for label, token in zip(own, spelt, strict=True):
                assert context.text[slice(*label.chars)] == label.token
                if token.strip(" \u0120\u2581"):
                    assert label.token.strip(" "), (label, token)
                else:  # a space, or no characters: it was added by the tokenizer
                    assert not label.token.strip(" \u00a0"), (label, token)
            covered = {i for label in own for i in range(*label.chars)}
            if "level" in kind or "fallback" in kind:
                assert covered == set(range(len(context.text)))
            if kind == "trims":  # it gives tokens of spaces alone no characters
                assert all(label.token for label in own)
            places = [label.chars for label in own]
            assert places == sorted(places)

    def test_a_text_with_a_bos_token_gets_no_second_one(self, tokenizer):
        cut = Tokenization(tokenizer, Cutting(4))
        plain, own = (list(cut.contexts([text])) for text in ("the cat sat on", "<bos>the cat sat on"))
        assert [context.ids for context in own] == [context.ids for context in plain]
        assert [c.text[slice(*c.spans[1])] for c in own] == ["the", "on"]
        (without,) = Tokenization(tokenizer, Cutting(8, prepend_bos=False)).contexts(["<bos>the cat"])
        assert without.ids[0] == tokenizer.bos_token_id  # as the text says

    @pytest.mark.parametrize("loader", ["bridge", "huggingface"])
    def test_what_the_tokenizer_says_of_bos_decides_not_the_library(self, loader, tokenizer, tmp_path):
        # A bridge gives a tokenizer without a BOS token the EOS token in its place.
        inner = tokenizer._tokenizer
        without = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
        lm = language_model(save_random_llama(tmp_path / "tiny", without), loader=loader, device="cpu")
        assert not Tokenization(lm.tokenizer).prepend_bos
        (context,) = Tokenization(lm.tokenizer).contexts(["the cat"])
        assert len(context.ids) == 2
        both = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<eos>", eos_token="<eos>")
        assert Tokenization(both).prepend_bos  # GPT-2's have one token for both

    def test_tokens_declared_special_do_not_count(self, tokenizer):
        own = copy.deepcopy(tokenizer)
        own.add_tokens([AddedToken("<turn>", special=True), AddedToken("plain", special=False)])
        (batch,) = Tokenization(own).batches(["the <turn> plain cat"], 1)
        assert [label.token for label in batch.places()] == ["the", "plain", "cat"]
        assert own.convert_tokens_to_ids("<turn>") not in own.all_special_ids

    def test_a_lone_surrogate_is_told(self, tokenizer):
        with pytest.raises(ValueError, match="text 1 is no valid text: character 2"):
            list(Tokenization(tokenizer).contexts(["fine", "a \ud800"]))

"""Texts wherever they are: folders, packed files, token ids, configurations; and names of many hooks."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from itda_lens import build
from itda_lens.analysis import evaluate
from itda_lens.compare import diff_models
from itda_lens.records import Cutting
from itda_lens.sae import provenance_of
from itda_lens.saebench.folder import OutputFolder
from itda_lens.sources import (
    ModelSource,
    Tokenization,
    describe_texts,
    hook_list,
    iterate_texts,
    language_model,
    names_data_set,
    unknown_hook,
)

OPTIONS = dict(d_sae=16, k=4, progress=False)
RESID = "blocks.1.hook_resid_post"


class TestFolders:
    def test_each_file_is_a_text(self, tmp_path):
        for name, text in {
            "b.txt": "B", "a.md": "A\r\nA", "c/d/e.rst": "E", "c/0": "0", ".hidden": "\0", ".git/x": "x",
            "c/.y": "y",
        }.items():  # fmt: skip
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(text.encode())
        (tmp_path / "f.text.gz").write_bytes(gzip.compress(b"F"))
        for folder in (tmp_path, str(tmp_path)):
            assert list(iterate_texts(folder)) == ["A\nA", "B", "0", "E", "F"]
            assert not names_data_set(folder)
        described = describe_texts(tmp_path, "text", "train")
        assert described["texts"] == str(tmp_path)
        assert "split" not in described

    def test_a_data_set_is_still_one(self, tmp_path):
        (tmp_path / "README.md").write_text("card")
        with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
            file.write('{"text": "one"}\n')
        assert names_data_set(tmp_path)
        assert list(iterate_texts(tmp_path)) == ["one"]

    def test_bad_folders(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder without a text file or data set"):
            list(iterate_texts(tmp_path))
        (tmp_path / "cat.png").write_bytes(b"\x89PNG")
        with pytest.raises(ValueError, match="cat.png is not UTF-8 text"):
            list(iterate_texts(tmp_path))


class TestPacked:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.gz", "one", ["one"]),
            ("a.txt.gz", "\ufeffone\r\ntwo", ["one\ntwo"]),
            ("a.JSONL.GZ", '{"text": "one"}\n\n{"text": [3, 4]}\n', ["one", (3, 4)]),
            ("a.json.gz", '["one", {"text": "two"}, [5]]', ["one", "two", (5,)]),
        ],
    )
    def test_read_as_what_is_inside(self, tmp_path, name, content, expected):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert list(iterate_texts(tmp_path / name)) == expected

    @pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
    @pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"no" + data])
    def test_damaged(self, tmp_path, name, damage):
        (tmp_path / name).write_bytes(damage(gzip.compress(b'{"text": "one"}')))
        with pytest.raises(ValueError, match=f"{name} is no .gz file, or a damaged one"):
            list(iterate_texts(tmp_path / name))

    def test_other_packings_are_refused(self, tmp_path):
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x"))
        with pytest.raises(ValueError, match=r"must be a text file.*got .*a.csv.gz"):
            list(iterate_texts(tmp_path / "a.csv.gz"))


class TestItems:
    def test_dicts(self):
        rows = [{"text": "a", "id": 1}, {"text": "b"}, "c"]
        assert list(iterate_texts(rows)) == ["a", "b", "c"]
        assert list(iterate_texts(iter([{"body": "a"}]), text_field="body")) == ["a"]
        with pytest.raises(ValueError, match="text 1 is no JSON object with a field 'text'.*'body'"):
            list(iterate_texts([{"text": "a"}, {"body": "b"}]))

    @pytest.mark.parametrize(
        "ids", [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4]), np.array([3, 4], np.uint16)]
    )
    def test_ids(self, ids):
        assert list(iterate_texts([ids, {"text": ids}, "a"])) == [(3, 4), (3, 4), "a"]
        assert list(iterate_texts(torch.tensor([[3, 4], [5, 6]]))) == [(3, 4), (5, 6)]
        rows = Dataset.from_dict({"input_ids": [[3, 4], [5]]})
        assert list(iterate_texts(rows, text_field="input_ids")) == [(3, 4), (5,)]
        with pytest.raises(ValueError, match="for token ids pass text_field='input_ids'"):
            list(iterate_texts(rows))

    @pytest.mark.parametrize(
        ("item", "error", "message"),
        [
            ([1.0], TypeError, "text 0 is list"),
            ([True], TypeError, "text 0 is list"),
            (["a"], TypeError, "text 0 is list"),
            (torch.ones(2), TypeError, "text 0 is Tensor"),
            (torch.ones(2, 2, dtype=torch.long), TypeError, "text 0 is Tensor"),
            ([5, -100], ValueError, "text 0 is no list of token ids: it holds -100"),
            ({"text": 3}, ValueError, "text 0: 'text' is not a string, nor a list of token ids"),
        ],
    )
    def test_bad_items(self, item, error, message):
        with pytest.raises(error, match=message):
            list(iterate_texts([item]))


def byte_pairs(corpus):
    """A byte-level tokenizer, of which a character may be several tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


class TestIds:
    def test_give_the_dictionary_of_their_text(self, tiny, texts):
        ids = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        bos = tiny.tokenizer.bos_token_id
        ids = [[bos, *own] if i % 2 else own for i, own in enumerate(ids)]  # as some data sets have it
        expected = build(tiny, texts, RESID, context_size=16, **OPTIONS)[RESID]
        made = build(tiny, ids, RESID, context_size=16, **OPTIONS)[RESID]
        assert torch.equal(made.W_dec, expected.W_dec)
        assert [label.token for label in made.labels] == [label.token for label in expected.labels]
        assert [label.key for label in made.labels] == [label.key for label in expected.labels]
        without = [own[1:] if i % 2 else own for i, own in enumerate(ids)]
        exact = build(tiny, without, RESID, context_size=16, **OPTIONS)[RESID]
        assert exact.labels == expected.labels
        ours, theirs = provenance_of(exact), provenance_of(expected)
        assert ours.texts_read_sha256 == theirs.texts_read_sha256
        assert ours.texts_fingerprint == theirs.texts_fingerprint

    def test_stay_as_they_are(self):
        tokenizer = byte_pairs(["the naïve cat sat on the mat and the cat sat"] * 3)
        tokenization = Tokenization(tokenizer, Cutting(64, prepend_bos=False))
        text = "the naïve cat 😀 sat on the mat"
        own = tokenizer(text)["input_ids"]
        whole = list(tokenization.contexts([text]))
        assert list(tokenization.contexts([tuple(own)])) == whole
        letters = tuple(i for c in "the cat" for i in tokenizer(c)["input_ids"])  # no merges
        assert len(letters) == 7 > len(tokenizer("the cat")["input_ids"])
        (context,) = tokenization.contexts([letters])
        assert (context.text, tuple(context.ids)) == ("the cat", letters)
        assert [context.text[slice(*span)] for span in context.spans] == list("the cat")
        (split,) = tokenization.contexts([letters[:4] + tuple(tokenizer("😀!")["input_ids"])])
        assert split.text == "the 😀!"
        assert [split.text[slice(*span)] for span in split.spans] == [*"the ", *"😀😀😀😀", "!"]

    @pytest.mark.parametrize("start", range(1, 14))
    def test_of_a_block_that_begins_anywhere(self, start):
        tokenizer = byte_pairs(["the naïve cat sat on the mat and the cat sat"] * 3)
        ids = tuple(tokenizer("on 😀 the naïve mat, and the cat sat")["input_ids"])[start:]
        (context,) = Tokenization(tokenizer, Cutting(64, prepend_bos=False)).contexts([ids])
        assert tuple(context.ids) == ids
        assert context.text == tokenizer.decode(ids)
        pieces = [context.text[slice(*span)] for span in dict.fromkeys(context.spans)]
        assert "".join(pieces).replace(" ", "") == context.text.replace(" ", "")
        assert context.spans == sorted(context.spans)

    def test_wherever_texts_go(self, tiny, texts, tmp_path):
        ids = [tiny.tokenizer(text)["input_ids"] for text in texts]
        itda = build(tiny, texts, RESID, **OPTIONS)[RESID]
        assert evaluate(tiny, itda, ids, progress=False) == evaluate(tiny, itda, texts, progress=False)
        (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"x": own}) for own in ids))
        source = ModelSource(tiny, tmp_path / "ids.jsonl", RESID, text_field="x")
        assert (
            sum(len(rows.places) for rows in source.rows())
            == evaluate(tiny, itda, texts, progress=False)[0].n_tokens
        )
        assert diff_models(
            tiny, tiny, iter(ids), RESID, d_sae=8, k=2, max_tokens=400, progress=False
        ) == diff_models(tiny, tiny, texts, RESID, d_sae=8, k=2, max_tokens=400, progress=False)
        with pytest.raises(ValueError, match="texts must be strings for SAEBench, got token ids"):
            OutputFolder(tmp_path / "out", None).plan_texts(ids, "text", "train")

    def test_in_a_plan(self, tiny, texts, tmp_path):
        rows = [{"ids": tiny.tokenizer(text)["input_ids"]} for text in texts]
        options = dict(text_field="ids", context_size=16, **OPTIONS)
        made = build(tiny, rows, RESID, folder=tmp_path, **options)[RESID]
        expected = build(tiny, rows, RESID, **options)[RESID]
        assert torch.equal(made.W_dec, expected.W_dec)
        assert made.labels == expected.labels

    def test_outside_of_the_vocabulary(self, tiny):
        with pytest.raises(ValueError, match="token 4000 .*outside of the model's embedding"):
            build(tiny, [[5, 6, 4000]] * 30, RESID, **OPTIONS)


class TestDataSetsByName:
    @pytest.fixture
    def loaded(self, monkeypatch):
        """What `load_dataset` was asked for; the hub has every data set but those called "missing"."""
        import datasets

        asked = []

        def load(name, configuration, **options):
            asked.append((name, configuration, options["split"]))
            if configuration is None and name == "org/several":
                raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")
            return [{"text": "one"}]

        def info(self, name, timeout):
            if name.startswith("missing"):
                response = SimpleNamespace(headers={}, status_code=404, request=None)
                raise RepositoryNotFoundError("404", response=response)
            if name.startswith("unreachable"):
                raise OSError("Name or service not known")

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(HfApi, "dataset_info", info)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return asked

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("org/name:wikitext-2-raw-v1", ("org/name", "wikitext-2-raw-v1")),
            ("name:20220301.en", ("name", "20220301.en")),
            ("org/name", ("org/name", None)),
        ],
    )
    def test_configurations(self, loaded, name, expected):
        assert list(iterate_texts(name, split="test")) == ["one"]
        assert loaded == [(*expected, "test")]
        assert names_data_set(name)

    def test_a_configuration_that_is_missing(self, loaded):
        with pytest.raises(ValueError, match="pick one among: .*; name one as in 'owner/name:config'"):
            list(iterate_texts("org/several"))

    def test_what_is_not_there_is_told_after_one_request(self, loaded, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="'missing' is neither a file nor a data set on the hub"):
            list(iterate_texts("missing"))
        (tmp_path / "missing").mkdir()
        with pytest.raises(ValueError, match=r"a file \(the folder 'missing' has no such file\)"):
            list(iterate_texts("missing/train"))
        with pytest.raises(ValueError, match="'unreachable' is no file, and the hub.*cannot be reached"):
            list(iterate_texts("unreachable"))
        assert loaded == []


class TestHooks:
    def test_stars(self, tiny, texts):
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
        made = build(tiny, texts, "blocks.*.hook_resid_post", **OPTIONS)
        assert list(made) == hooks
        expected = build(tiny, texts, hooks, **OPTIONS)
        assert all(torch.equal(made[hook].W_dec, expected[hook].W_dec) for hook in hooks)
        source = ModelSource(tiny, texts, ["blocks.2.hook_mlp_out", "blocks.*.attn.hook_z"])
        assert source.hooks == ["blocks.2.hook_mlp_out", *(f"blocks.{i}.attn.hook_z" for i in range(3))]
        with pytest.raises(ValueError, match="has no hook 'blocks.0.nowhere'"):
            ModelSource(tiny, texts, "blocks.*.nowhere")
        with pytest.raises(ValueError, match="hook_names must be one or more different"):
            ModelSource(tiny, texts, [RESID, "blocks.*.hook_resid_post"])

    def test_stars_on_hugging_face(self, tiny_folder, texts):
        lm = language_model(str(tiny_folder), loader="huggingface", device="cpu")
        assert ModelSource(lm, texts, "model.layers.*.mlp").hooks == [
            f"model.layers.{layer}.mlp" for layer in range(3)
        ]

    def test_layers_that_lack_the_hook_are_passed_over(self, tiny, texts, monkeypatch):
        def check(hooks):
            if any(int(hook.split(".")[1]) not in (3, 4, 20) for hook in hooks):
                raise ValueError("no such hook")

        monkeypatch.setattr(tiny, "check_hooks", check)
        found = ModelSource(tiny, texts, "blocks.*.attn.hook_z").hooks
        assert found == [f"blocks.{layer}.attn.hook_z" for layer in (3, 4, 20)]

    def test_numbers_of_layers(self, tiny, texts):
        assert list(build(tiny, texts, 1, **OPTIONS)) == [RESID]
        assert hook_list([0, "x", 2]) == ["blocks.0.hook_resid_post", "x", "blocks.2.hook_resid_post"]
        with pytest.raises(ValueError, match="hook_names must be one or more different names"):
            hook_list([1, RESID])
        with pytest.raises(ValueError, match="has no hook 'blocks.3.hook_resid_post'; near"):
            build(tiny, texts, 3, **OPTIONS)
        with pytest.raises(TypeError, match="hook_names"):
            build(tiny, texts, True, **OPTIONS)

    @pytest.mark.parametrize(
        "name", ["1", "layer 1", "layers.1", "blocks.1", "h.1", "L1", "resid_post_1", "1.resid_post"]
    )
    @pytest.mark.parametrize("kind", ["bridge", "huggingface"])
    def test_a_layer_alone_suggests_its_output(self, tiny, tiny_folder, name, kind):
        lm = tiny
        if kind == "huggingface":
            lm = language_model(str(tiny_folder), loader="huggingface", device="cpu")
        elif name == "blocks.1":
            pytest.skip("a bridge has a hook of this name")
        with pytest.raises(ValueError, match=f"no hook '{name}'; near it are {RESID}"):
            lm.check_hooks([name])

    def test_other_names_suggest_what_is_like_them(self):
        known = [RESID, "blocks.1.hook_mlp_out"]
        assert str(unknown_hook("blocks.1.hook_mlp_in", known)).endswith(
            "blocks.1.hook_mlp_out, " + RESID
        )

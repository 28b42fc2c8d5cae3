"""Chats, filters of tokens, single heads, token ids and names for layers, taken together."""

import json
from typing import Any

import pytest
import torch
from conftest import WORDS, save_random_llama, word_tokenizer
from test_chats import CHATML, said

from itda_lens import Chats, TokenFilter, build, union
from itda_lens.analysis import decompose, evaluate
from itda_lens.architectures import build_baselines
from itda_lens.compare import activations_of
from itda_lens.dictionary import RunningFVU
from itda_lens.sae import ITDA, coded, provenance_of
from itda_lens.sources import ChatSource, by_head, gathered, iterate_texts, language_model
from itda_lens.training import build_from, collect, plan_from, recipe_of

Z = "blocks.1.attn.hook_z"
RESID = "blocks.1.hook_resid_post"
SIZE: dict[str, Any] = dict(d_sae=12, k=3)
OPTIONS: dict[str, Any] = SIZE | dict(progress=False)
CHATS = [
    said("the cat sat", "it was big ."),
    said("a dog , and a cat", "the log", "red or blue", system="the small mat"),
    said("in the log", "that cat said it was on a mat"),
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    tokenizer = word_tokenizer([*WORDS, "system", "user", "assistant", ":"])
    tokenizer.chat_template = CHATML
    folder = save_random_llama(tmp_path_factory.mktemp("heads") / "tiny-chat", tokenizer)
    return language_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def of_heads(lm) -> ITDA:
    return build(lm, Chats(CHATS), Z, per_head=True, **OPTIONS)[Z]


class TestHeadsOfChats:
    def test_rows_are_those_of_whole_tokens_split(self, lm, of_heads):
        tokens = TokenFilter(roles=["assistant"])
        whole = collect(lm, Chats(CHATS), Z, tokens=tokens, progress=False)[Z]
        found = collect(lm, Chats(CHATS), Z, tokens=tokens, per_head=True, progress=False)[Z]
        assert torch.equal(found.values, by_head(whole.values, 4))
        assert [label.head for label in found.labels] == [0, 1, 2, 3] * len(whole.labels)
        for i, label in enumerate(whole.labels):
            for split in found.labels[4 * i : 4 * i + 4]:
                assert (split.role, split.special) == (label.role, label.special)
                assert (split.role, split.chars, split.kind) == ("assistant", label.chars, "chat")
        assert provenance_of(of_heads).per_head
        assert provenance_of(of_heads).chats["read"] == len(CHATS)

    def test_evaluation_apart_for_contents_and_form(self, lm, of_heads):
        x = collect(lm, Chats(CHATS), Z, per_head=True, progress=False)[Z]
        (found,) = evaluate(lm, of_heads, Chats(CHATS), batch_size=2, progress=False)
        ((_, codes, reconstruction),) = coded(of_heads, x.values, batch_size=len(x.values))
        special = torch.tensor([label.special for label in x.labels])
        later = torch.tensor([label.position > 0 for label in x.labels])
        for value, rows in ((found.fvu_content, ~special & later), (found.fvu_form, special & later)):
            expected = RunningFVU()
            expected.update(x.values[rows], reconstruction[rows])
            assert value == pytest.approx(expected.value(), rel=1e-3)
        assert found.n_tokens == len(x.values) // 4
        assert found.n_form == int((special & later).sum()) // 4
        assert found.l0 == pytest.approx(float((codes.values != 0).sum(dim=1).float().mean()), rel=1e-6)

    def test_decompose_a_conversation(self, lm, of_heads):
        found = decompose(lm, of_heads, CHATS[1])
        assert [token.head for token in found] == [0, 1, 2, 3] * (len(found) // 4)
        assert {token.role for token in found if not token.special} == {"system", "user", "assistant"}
        whole = decompose(lm, build(lm, Chats(CHATS), Z, **OPTIONS)[Z], CHATS[1])
        assert [(one.position, one.role, one.special) for one in found[::4]] == [
            (one.position, one.role, one.special) for one in whole
        ]
        assert {one.head for one in whole} == {None}

    def test_in_shards(self, lm, of_heads, tmp_path):
        source = ChatSource(lm, CHATS, Z, per_head=True, batch_size=1)
        made = plan_from(source, recipe_of(**SIZE), folder=tmp_path, shard_rows=40)
        assert len(made.shards) == len(CHATS)
        made.run_all(progress=False)
        itda = made.finish(progress=False)[Z]
        expected = build_from(ChatSource(lm, CHATS, Z, per_head=True), recipe_of(**SIZE), progress=False)
        assert torch.equal(itda.W_dec, expected[Z].W_dec)
        assert itda.labels == expected[Z].labels == of_heads.labels

    def test_activations_of(self, lm, of_heads):
        (x,) = activations_of([of_heads], Chats(CHATS), lm, progress=False)
        assert torch.equal(x.values, gathered(ChatSource(lm, CHATS, Z, per_head=True))[Z].values)

    def test_a_hook_that_is_not_split(self, lm):
        with pytest.raises(ValueError, match="'blocks.1.hook_resid_post' must be split by head"):
            build(lm, Chats(CHATS), RESID, per_head=True, **OPTIONS)


def test_layers_by_number_and_star(lm):
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    named = collect(lm, Chats(CHATS), names, progress=False)
    for short in ([0, 1, 2], "blocks.*.hook_resid_post"):
        found = collect(lm, Chats(CHATS), short, progress=False)
        assert list(found) == names
        assert all(torch.equal(found[hook].values, named[hook].values) for hook in names)
    assert list(build(lm, Chats(CHATS), 2, **OPTIONS)) == names[2:]
    with pytest.raises(ValueError, match="one or more different names"):
        collect(lm, Chats(CHATS), [1, RESID])


class TestFiltersOfIds:
    TOKENS = TokenFilter(drop="the|,", kinds=["word"])

    def test_are_those_of_the_text(self, lm, texts, tmp_path):
        ids = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        options = dict(tokens=self.TOKENS, context_size=16, max_tokens=200)
        expected = build(lm, texts, RESID, **options, **OPTIONS)[RESID]
        made = build(lm, ids, RESID, **options, **OPTIONS)[RESID]
        assert torch.equal(made.W_dec, expected.W_dec)
        assert made.labels == expected.labels
        assert not any(label.token in ("the", ",") for label in made.labels)
        records = [provenance_of(itda) for itda in (made, expected)]
        assert records[0].tokens == records[1].tokens == self.TOKENS.record()
        here, there = (
            evaluate(lm, made, given, tokens=self.TOKENS, max_tokens=200, progress=False)
            for given in (ids, texts)
        )
        assert here == there
        in_shards = build(lm, ids, RESID, folder=tmp_path, **options, **OPTIONS)[RESID]
        assert torch.equal(in_shards.W_dec, expected.W_dec)

    def test_of_single_heads(self, lm, texts, tmp_path):
        options = dict(tokens=self.TOKENS, per_head=True, context_size=16, **OPTIONS)
        made = build(lm, texts, Z, **options)[Z]
        in_shards = build(lm, texts, Z, folder=tmp_path, **options)[Z]
        assert torch.equal(in_shards.W_dec, made.W_dec)
        assert in_shards.labels == made.labels
        assert provenance_of(in_shards).per_head


def test_a_union_of_single_heads_is_of_single_heads(lm, of_heads):
    other = build(lm, Chats(CHATS), Z, per_head=True, seed=1, **OPTIONS)[Z]
    both = union(of_heads, other)
    assert provenance_of(both).per_head
    (found,) = evaluate(lm, both, Chats(CHATS), progress=False)
    (one,) = evaluate(lm, of_heads, Chats(CHATS), progress=False)
    assert found.n_tokens == one.n_tokens
    assert found.fvu < one.fvu
    again = ITDA.from_atoms(both.W_dec, k=3, metadata=dict(both.cfg.metadata.items()))
    assert again.cfg.reshape_activations == "none"
    assert union(both, again).cfg.d_sae == 48


def test_baselines_of_token_ids_are_told_from_those_of_others(lm, texts, tmp_path):
    file = tmp_path / "ids.jsonl"
    ids = [lm.tokenizer(text)["input_ids"] for text in texts]
    itda = build(lm, texts, RESID, max_tokens=60, **OPTIONS)[RESID]

    def built():
        file.write_text("\n".join(json.dumps({"x": own}) for own in ids))
        return build_baselines(
            [itda], ["pca"], tmp_path / "b", texts=file, text_field="x", model=lm, progress=False
        )

    assert built() == built()
    ids[0] = ids[0][:-1]
    with pytest.raises(ValueError, match="is a baseline of other texts or settings"):
        built()


@pytest.mark.parametrize(
    "item", [CHATS[0], {"messages": CHATS[0]}, CHATS[0][0]], ids=["messages", "object", "message"]
)
def test_conversations_among_texts_are_told(item, lm):
    with pytest.raises(TypeError, match=r"text 0 is \w+; conversations are passed as itda_lens.Chats"):
        list(iterate_texts([item]))
    # Whoever names a field of messages has texts in mind.
    assert list(iterate_texts(CHATS[0], text_field="content")) == ["the cat sat", "it was big ."]


def test_a_folder_of_texts_holds_no_conversations(lm, tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(ValueError, match=r"a.txt must be a list of messages, got str"):
        collect(lm, Chats(tmp_path), RESID)

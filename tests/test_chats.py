"""Conversations: rendered by the model's own template, each read alone, every token with its role."""

import io
import json
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import WORDS, save_random_llama, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.activations_store import tokenize_with_chat_template
from transformers import AutoModelForCausalLM, AutoTokenizer

import itda_lens
from itda_lens import Chats, TokenFilter
from itda_lens.analysis import decompose, evaluate
from itda_lens.compare import activations_of, diff_models
from itda_lens.dictionary import RunningFVU
from itda_lens.records import Cutting
from itda_lens.reports import decomposition_table, evaluation_table
from itda_lens.sae import coded, provenance_of
from itda_lens.sources import (
    ChatReading,
    ChatSource,
    ChatTemplate,
    RenderedChat,
    gathered,
    language_model,
)
from itda_lens.sources.chat_templates import Part
from itda_lens.training import build_from, collect, plan_from, recipe_of

COLUMNS = "200"
"""Width of the terminal in which `itda_command` runs."""

HOOK = "blocks.1.hook_resid_post"
OPTIONS: dict[str, Any] = dict(d_sae=12, k=3, progress=False)

# One of each shape that templates have. White space makes words of everything.
CHATML = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ ' system : it was log . <eos> ' }}"
    "{% endif %}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ ' ' + m['role'] + ' : ' + (m['content'] | trim) }}"
    "{{ ' <eos>' }}{% endfor %}"
)
MERGED = (  # the system prompt goes into the first message of the user
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' , ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ ' user : ' + (first if loop.first else '') + m['content'] + ' .' }}{% else %}"
    "{{ ' assistant : ' + m['content'] + ' <eos>' }}{% endif %}{% endfor %}"
)
RENAMED = (
    "{% for m in messages %}{{ ('dog' if m['role'] == 'assistant' else m['role']) + ' : ' + "
    "m['content'] + ' <eos> ' }}{% endfor %}"
)
GENERATION = (  # marks answers, and rewrites them
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'].split('</think>')[-1] | trim + ' <eos>' }}{% endgeneration %}{{ ' ' }}{% else %}"
    "{{ m['content'] + ' <eos> ' }}{% endif %}{% endfor %}"
)
TRICKY = ["a", " ", "\n", "<eos>", "user", ":", "assistant : ", " <eos> user : ", "\u00e9"]
"""Parts of contents that look like form."""

TEMPLATES = dict(chatml=CHATML, trimmed=TRIMMED, merged=MERGED, renamed=RENAMED, generation=GENERATION)


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    """Forty conversations of one to four messages of one to nine words, some with a system prompt."""
    generator = torch.Generator().manual_seed(3)

    def number(most):
        return int(torch.randint(1, most + 1, (), generator=generator))

    def words():
        return " ".join(WORDS[number(len(WORDS)) - 1] for _ in range(number(9)))

    return [
        said(*(words() for _ in range(number(4))), system=words() if i % 3 == 0 else None)
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = word_tokenizer([*WORDS, "system", "user", "assistant", ":"])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def chat_folder(chat_tokenizer, tmp_path_factory):
    return save_random_llama(tmp_path_factory.mktemp("chats") / "tiny-chat", chat_tokenizer)


@pytest.fixture(scope="module")
def lm(chat_folder):
    return language_model(str(chat_folder), device="cpu")


def template(source, tokenizer, **options):
    copied = word_tokenizer([*WORDS, "system", "user", "assistant", ":"])
    copied.chat_template = source
    return ChatTemplate(copied, options)


def pieces(chat: RenderedChat) -> list[tuple[str | None, bool, str]]:
    return [(part.role, part.special, str(chat[part.start : part.end])) for part in chat.parts]


class TestTemplates:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_contents_and_form_of_every_message(self, name, chat_tokenizer):
        """The last word of a content is the first word of the form that follows, and stands there
        twice."""
        found = pieces(template(TEMPLATES[name], chat_tokenizer).rendered(said("the .", "user :", "a")))
        contents = [("user", False, "the ."), ("assistant", False, "user :"), ("user", False, "a")]
        assert [piece for piece in found if not piece[1]] == contents
        ends = {"merged": " .", "trimmed": " <eos>"}.get(name, " <eos> ")
        assert found[-1] == ("user", True, ends)
        if name == "chatml":
            assert found[:2] == [(None, True, "<bos> system : it was log . <eos> "), (
                "user", True, "user : ",
            )]  # fmt: skip
            assert found[3:5] == [("user", True, " <eos> "), ("assistant", True, "assistant : ")]
        if name == "renamed":
            assert found[2:4] == [("user", True, " <eos> "), ("assistant", True, "dog : ")]
        if name == "merged":  # a conversation of the user alone would be refused: nothing to compare
            assert found[:2] == [(None, True, "<bos>"), ("user", True, " user : ")]

    def test_a_system_prompt_inside_the_first_message(self, chat_tokenizer):
        chat = template(MERGED, chat_tokenizer).rendered(said("the cat", "sat", system="it was"))
        assert ("system", False, "it was") in pieces(chat)
        assert ("user", False, "the cat") in pieces(chat)

    @given(
        contents=st.lists(
            st.lists(st.sampled_from(TRICKY), min_size=1, max_size=6).map("".join).filter(str.strip),
            min_size=1,
            max_size=5,
        ),
        name=st.sampled_from(["chatml", "trimmed", "renamed"]),
    )
    def test_every_character_belongs_to_one_part_and_contents_are_whole(
        self, contents, name, chat_tokenizer
    ):
        made = template(TEMPLATES[name], chat_tokenizer)
        chat = made.rendered(said(*contents))
        assert str(chat) == made.tokenizer.apply_chat_template(said(*contents), tokenize=False)
        assert "".join(chat[part.start : part.end] for part in chat.parts) == chat
        own = [content.strip() if name == "trimmed" else content for content in contents]
        assert [text for _, special, text in pieces(chat) if not special] == own

    def test_answers_that_the_template_marks_may_be_rewritten(self, chat_tokenizer):
        made = template(GENERATION, chat_tokenizer)
        chat = made.rendered(said("the cat", "big </think> sat on", "dog"))
        contents = [piece for piece in pieces(chat) if not piece[1]]
        assert contents == [
            ("user", False, "the cat"), ("assistant", False, "sat on"), ("user", False, "dog"),
        ]  # fmt: skip
        assert any(piece[0] is None and piece[1] for piece in pieces(chat))
        unmarked = GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        with pytest.raises(ValueError, match="conversation 3, message 1: content cannot be told"):
            template(unmarked, chat_tokenizer).rendered(
                said("the cat", "big </think> sat"), "conversation 3"
            )

    def test_contents_are_those_that_the_template_marks(self, chat_tokenizer):
        """transformers' own mask of the assistant's tokens, where nothing is rewritten."""
        made = template(GENERATION, chat_tokenizer)
        messages = said("the cat", "sat on the mat", "dog", "ran")
        encoded = made.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs=dict(return_offsets_mapping=True),
        )  # fmt: skip
        parts = made.rendered(messages).of_tokens(encoded["offset_mapping"])
        eos = made.tokenizer.eos_token_id
        ours = [part.role == "assistant" and not part.special for part in parts]
        theirs = [
            bool(mask) and token != eos
            for mask, token in zip(encoded["assistant_masks"], encoded["input_ids"], strict=True)
        ]
        assert ours == theirs
        assert sum(ours) == 5

    @pytest.mark.parametrize(
        ("source", "told"),
        [
            ("{{ messages[0]['content'] }}", "message 1: content .* leaves it out"),
            (
                "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
                "writes it 2 times",
            ),
            ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "leaves it out"),
            ("{% for m in messages %}{{ m['text'] + 'x' }}{% endfor %}", "refuses it"),
            ("{{ raise_exception('system prompts are not supported') }}", "refuses it: system prompts"),
        ],
    )
    def test_a_template_that_cannot_be_followed_is_told(self, source, told, chat_tokenizer):
        with pytest.raises(ValueError, match=told):
            template(source, chat_tokenizer).rendered(said("the cat", "sat"))

    def test_options_reach_the_template(self, chat_tokenizer):
        source = "{{ day }}{% for m in messages %}{{ ' : ' + m['content'] }}{% endfor %}"
        assert template(source, chat_tokenizer, day="log").rendered(said("a")) == "log : a"

    def test_a_token_across_a_border_is_content(self):
        chat = RenderedChat("ab cd ef", [Part(0, 3, "user", True), Part(3, 8, "user", False)])
        assert [p.special for p in chat.of_tokens([(0, 2), (2, 5), (5, 8)])] == [True, False, False]
        assert [p.special for p in chat.of_tokens([(0, 0), (3, 3)])] == [True, False]


def alone(folder, messages) -> torch.Tensor:
    """Activations after the second layer, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[2][0]


class TestReading:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("loader", ["bridge", "hooked_transformer", "huggingface"])
    def test_each_is_read_as_if_it_were_alone(self, chat_folder, conversations, loader, side):
        if loader == "hooked_transformer":
            from itda_lens.sources import register_with_transformer_lens

            register_with_transformer_lens(chat_folder, "tiny-chat")
            own = language_model("tiny-chat", loader=loader, device="cpu")
        else:
            own = language_model(str(chat_folder), loader=loader, device="cpu")
        own.tokenizer.padding_side = side
        for batch_size in (1, 8):
            x = collect(
                own, Chats(conversations[:8]), HOOK, batch_size=batch_size, progress=False
            )[HOOK]  # fmt: skip
            expected = torch.cat([alone(chat_folder, messages) for messages in conversations[:8]])
            torch.testing.assert_close(x.values, expected, rtol=1e-4, atol=1e-5)

    def test_tokens_are_saelenss_one_conversation_a_context(self, lm, conversations):
        """SAELens has the same tokens, but joins conversations, or drops those that fill no context."""
        reading = ChatReading(lm, Chats(conversations))
        contexts = list(reading.tokenization.contexts(reading.rendered()))
        theirs = [tokenize_with_chat_template(messages, lm.tokenizer) for messages in conversations]
        assert [context.ids for context in contexts] == [tokens.tolist() for tokens in theirs]
        assert [(context.row, context.chunk) for context in contexts] == [(i, 0) for i in range(40)]
        joined = list(concat_and_batch_sequences(iter(theirs), context_size=64))
        assert max(int((block == lm.tokenizer.bos_token_id).sum()) for block in joined) > 1
        kept = concat_and_batch_sequences(iter(theirs), context_size=64, disable_concat_sequences=True)
        assert len(list(kept)) == sum(len(tokens) >= 64 for tokens in theirs) < 40

    def test_bos_is_the_templates(self, chat_folder, conversations, chat_tokenizer):
        """A BOS token that it writes is not doubled, and where it writes none there is none."""
        own = language_model(str(chat_folder), device="cpu")
        bos = own.tokenizer.bos_token_id
        for source, first in ((CHATML, 1), (RENAMED, 0)):
            own.tokenizer.chat_template = source
            reading = ChatReading(own, Chats(conversations))
            for context in reading.tokenization.contexts(reading.rendered()):
                assert context.ids.count(bos) == first
                assert (context.ids[0] == bos) == bool(first)

    def test_labels_say_who_spoke(self, lm):
        x = collect(lm, Chats([said("the cat", "sat", system="big dog")]), HOOK, progress=False)[HOOK]
        found = [(label.token, label.role, label.special) for label in x.labels]
        assert found == [
            ("<bos>", "system", True),
            ("system", "system", True), (":", "system", True), ("big", "system", False),
            ("dog", "system", False), ("<eos>", "system", True),
            ("user", "user", True), (":", "user", True), ("the", "user", False), ("cat", "user", False),
            ("<eos>", "user", True),
            ("assistant", "assistant", True), (":", "assistant", True), ("sat", "assistant", False),
            ("<eos>", "assistant", True),
        ]  # fmt: skip
        assert str(x.labels[3]) == "'big' (chat 0, position 3, system)"
        assert str(x.labels[5]) == "'<eos>' (chat 0, position 5, system, special)"

    def test_longer_ones_are_cut_and_it_is_told(self, lm, conversations, caplog):
        source = ChatSource(lm, Chats(conversations), HOOK, context_size=12)
        with caplog.at_level(logging.WARNING, "itda_lens"):
            labels = gathered(source)[HOOK].labels
        lengths = [len(tokenize_with_chat_template(m, lm.tokenizer)) for m in conversations]
        assert Counter(labels.row.tolist()) == {i: min(n, 12) for i, n in enumerate(lengths)}
        assert set(labels.chunk.tolist()) == {0}
        cut = sum(n > 12 for n in lengths)
        assert 0 < cut < 40
        assert f"{cut} of 40 conversations were longer than context_size=12" in caplog.text
        known = source.provenance(HOOK)
        assert known.context_size == 12
        assert (known.chats["read"], known.chats["cut"]) == (40, cut)

    def test_goes_on_where_it_stopped(self, lm, conversations):
        source = ChatSource(lm, Chats(conversations, "cap"), HOOK, batch_size=7)
        every = gathered(source)[HOOK]
        for skip in (1, 30, 100):
            rest = torch.cat([rows.values[HOOK] for rows in source.rows(skip)])
            assert torch.equal(rest, every.values[skip:])
        few = gathered(ChatSource(lm, Chats(conversations, "cap"), HOOK, batch_size=7, max_tokens=50))
        assert torch.equal(few[HOOK].values, every.values[:50])


class TestWhichTokensCount:
    def rows(self, lm, chats, **options):
        return collect(lm, chats, HOOK, progress=False, **options)[HOOK]

    def test_policies(self, lm, conversations):
        every, none = (self.rows(lm, Chats(conversations, policy)) for policy in ("keep", "exclude"))
        lengths = [len(tokenize_with_chat_template(m, lm.tokenizer)) for m in conversations]
        assert len(every.labels) == sum(lengths)
        words = [len(m["content"].split()) for messages in conversations for m in messages]
        assert len(none.labels) == sum(words)
        assert not any(tag.special for tag in none.labels.tags)
        content = torch.tensor([not tag.special for tag in every.labels.tags])
        assert torch.equal(every.values[content], none.values)

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.45])
    def test_a_cap_holds_in_each_conversation(self, lm, conversations, share):
        capped = self.rows(lm, Chats(conversations, "cap", share))
        special = torch.tensor([tag.special for tag in capped.labels.tags])
        row = torch.tensor(capped.labels.row)
        for i, messages in enumerate(conversations):
            n, own = int((row == i).sum()), int(special[row == i].sum())
            assert own <= share * n
            ordinary = sum(len(message["content"].split()) for message in messages)
            assert n - own == ordinary
            form = len(tokenize_with_chat_template(messages, lm.tokenizer)) - ordinary
            assert own == form or own + 1 > share * (n + 1)  # no more than one is missing
        assert special.any()
        again = self.rows(lm, Chats(conversations, "cap", share), batch_size=3)
        assert again.labels == capped.labels
        position = torch.tensor(capped.labels.position)[special]
        assert len(set(position.tolist())) > 5  # not the first ones only

    def test_a_special_token_in_a_content_is_special(self, lm):
        x = self.rows(lm, Chats([said("the <eos> cat")], "exclude"))
        assert [label.token for label in x.labels] == ["the", "cat"]
        every = self.rows(lm, Chats([said("the <eos> cat")])).labels
        assert [(label.token, label.special) for label in every[-4:-1]] == [
            ("the", False), ("<eos>", True), ("cat", False),
        ]  # fmt: skip

    def test_filters(self, lm, conversations):
        chats = Chats(conversations)
        every = list(self.rows(lm, chats).labels)
        for tokens, counts in [
            (TokenFilter(roles=["assistant"]), lambda label: label.role == "assistant"),
            (TokenFilter(kinds=["punctuation"]), lambda label: not label.token.strip("<>").isalpha()),
            (TokenFilter(kinds=["word"], roles=["user", "system"]),
             lambda label: label.token.strip("<>").isalpha() and label.role in ("user", "system")),
            (TokenFilter(only=r"the|\bc"), lambda label: label.token in ("the", "cat")),
            (TokenFilter(drop=r"\bca"), lambda label: label.token != "cat"),
            (TokenFilter(drop=r"user : (\w+|[.,])"), None),
        ]:  # fmt: skip
            found = [label.key for label in self.rows(lm, chats, tokens=tokens).labels]
            if counts is None:  # the word after the header of a user goes too
                form = [label for label in every if label.role == "user" and label.special]
                headers = {label.key for label in form if label.token in ("user", ":")}
                after = {(r, c, p + 2) for r, c, p in headers if (r, c, p + 1) in headers}
                assert found == [label.key for label in every if label.key not in after | headers]
            else:
                assert found == [label.key for label in every if counts(label)]
            assert 0 < len(found) < len(every)

    def test_filters_of_texts(self, lm, texts):
        plain = collect(lm, texts, HOOK, progress=False)[HOOK]
        own = collect(lm, texts, HOOK, tokens=TokenFilter(drop="the|,"), progress=False)[HOOK]
        kept = [label.token not in ("the", ",") for label in plain.labels]
        assert torch.equal(own.values, plain.values[torch.tensor(kept)])
        itda = itda_lens.build(lm, texts, HOOK, tokens=TokenFilter(drop="the|,"), **OPTIONS)[HOOK]
        assert provenance_of(itda).tokens == {"drop": "the|,"}
        (found,) = evaluate(lm, itda, texts, tokens=TokenFilter(only="cat"), progress=False)
        assert found.n_tokens == sum(label.token == "cat" for label in plain.labels)
        assert found.fvu_form is None
        with pytest.raises(ValueError, match="roles are those of chats"):
            collect(lm, texts, HOOK, tokens=TokenFilter(roles=["user"]), progress=False)


@pytest.fixture(scope="module")
def itda(lm, conversations):
    return itda_lens.build(lm, Chats(conversations[:30]), HOOK, **OPTIONS)[HOOK]


class TestDictionaries:
    def test_are_those_of_the_rows(self, lm, conversations, itda, tmp_path):
        x = collect(lm, Chats(conversations[:30]), HOOK, progress=False)[HOOK]
        fitted = itda_lens.fit(x.values, labels=x.labels, **OPTIONS)
        assert torch.equal(itda.W_dec, fitted.W_dec)
        assert itda.labels == fitted.labels
        source = ChatSource(lm, conversations[:30], HOOK)
        assert torch.equal(
            build_from(source, recipe_of(d_sae=12, k=3), progress=False)[HOOK].W_dec, itda.W_dec
        )
        itda.save_model(tmp_path)
        loaded = itda_lens.load(tmp_path)
        assert loaded.labels == itda.labels
        assert {label.role for label in loaded.labels} >= {"user", "assistant"}
        assert {label.kind for label in loaded.labels} == {"chat"}
        assert provenance_of(loaded).chats == provenance_of(itda).chats

    def test_provenance(self, lm, itda, conversations, chat_tokenizer):
        known = provenance_of(itda)
        assert known.chats == {
            "special_tokens": "keep", "template_sha256": ChatTemplate(chat_tokenizer).sha256(),
            "read": 30, "cut": 0,
        }  # fmt: skip
        assert known.cutting == Cutting(256, True, True)  # of the model's 256 positions
        capped = ChatSource(lm, Chats(conversations, "cap", 0.2, {"a": 1}), HOOK).provenance(HOOK)
        assert capped.chats["special_share"] == 0.2
        assert capped.chats["template_options"] == {"a": 1}

    def test_evaluation_apart_for_contents_and_form(self, lm, conversations, itda):
        held_out = Chats(conversations[30:])
        x = collect(lm, held_out, HOOK, progress=False)[HOOK]
        (found,) = evaluate(lm, itda, held_out, progress=False)
        special = torch.tensor([tag.special for tag in x.labels.tags])
        later = torch.tensor(x.labels.position) > 0
        parts = {"all": torch.ones_like(later), "content": ~special & later, "form": special & later}
        for name, own in (("all", found.fvu), ("content", found.fvu_content), ("form", found.fvu_form)):
            meter = RunningFVU()
            for part in coded(itda, x.values[parts[name]]):
                meter.update(part.x, part.reconstruction)
            assert own == pytest.approx(meter.value(), rel=1e-4), name
        assert found.n_form == int(parts["form"].sum())
        assert found.n_tokens == len(x.values)
        (content,) = evaluate(lm, itda, Chats(conversations[30:], "exclude"), progress=False)
        assert content.fvu == pytest.approx(found.fvu_content, rel=1e-4)
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(evaluation_table([found]))
        shown = console.export_text()
        assert f"{found.fvu_form:.3f}" in shown
        assert "FVU content" in shown

    def test_dictionaries_of_texts_and_of_chats_are_measured_beside(
        self, lm, conversations, itda, texts
    ):
        plain = itda_lens.build(lm, texts, HOOK, context_size=8, **OPTIONS)[HOOK]
        both = evaluate(lm, [itda, plain], Chats(conversations[30:]), progress=False)
        apart = [
            evaluate(lm, one, Chats(conversations[30:]), progress=False)[0] for one in (itda, plain)
        ]
        assert both == apart
        (own,) = evaluate(lm, itda, texts, progress=False)  # cut at its own 256 tokens
        assert own.n_tokens == sum(len(text.split()) + 1 for text in texts)
        with pytest.raises(ValueError, match="agree in context_size"):
            evaluate(lm, [itda, plain], texts, progress=False)

    def test_decompose_a_conversation(self, lm, itda):
        tokens = decompose(lm, itda, said("the cat", "sat", system="big dog"))
        assert [(t.token, t.role, t.special) for t in tokens[3:7]] == [
            ("big", "system", False), ("dog", "system", False), ("<eos>", "system", True),
            ("user", "user", True),
        ]  # fmt: skip
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(decomposition_table(tokens, 2, HOOK))
        shown = console.export_text()
        assert "assistant" in shown
        assert "(user, form)" in shown or "(system, form)" in shown
        assert [t.role for t in decompose(lm, itda, "the cat")] == [None] * 3  # BOS counts: "keep"

    def test_in_shards(self, lm, conversations, texts, tmp_path):
        """A plan of chats is made from their source. A plan of texts keeps the conditions on tokens."""
        chats = Chats(conversations[:30])
        itda = itda_lens.build(lm, chats, HOOK, batch_size=4, **OPTIONS)[HOOK]
        source = ChatSource(lm, chats, HOOK, batch_size=4)
        recipe = recipe_of(d_sae=12, k=3)
        made = plan_from(source, recipe, folder=tmp_path / "chats", shard_rows=100)
        assert len(made) > 2
        made.run_all(progress=False)
        merged = made.finish(progress=False)[HOOK]
        assert torch.equal(merged.W_dec, itda.W_dec)
        assert merged.labels == itda.labels
        assert provenance_of(merged).chats == provenance_of(itda).chats
        options = OPTIONS | dict(tokens=TokenFilter(drop="the"))
        split = itda_lens.build(lm, texts, HOOK, folder=tmp_path / "texts", **options)[HOOK]
        assert torch.equal(split.W_dec, itda_lens.build(lm, texts, HOOK, **options)[HOOK].W_dec)
        with pytest.raises(ValueError, match="holds a plan"):
            itda_lens.build(lm, texts, HOOK, folder=tmp_path / "texts", **OPTIONS)
        with pytest.raises(ValueError, match="texts must be texts to be split into shards, got Chats"):
            itda_lens.build(lm, Chats(conversations), HOOK, folder=tmp_path / "c", **OPTIONS)

    def test_comparing(self, lm, chat_folder, conversations, itda):
        chats = Chats(conversations)
        (x,) = activations_of([itda], chats, lm, progress=False)
        assert torch.equal(x.values, collect(lm, chats, HOOK, progress=False)[HOOK].values)
        other = itda_lens.build(lm, Chats(conversations[:30]), HOOK, seed=1, **OPTIONS)[HOOK]
        assert 0 < itda_lens.jaccard(itda, other) <= 1
        found = diff_models(lm, lm, Chats(conversations), HOOK, **OPTIONS)
        assert all(abs(one.excess) < 1e-9 for one in found)
        own = language_model(str(chat_folder), device="cpu")
        own.tokenizer.chat_template = RENAMED
        with pytest.raises(ValueError, match="one chat template"):
            diff_models(lm, own, Chats(conversations), HOOK, **OPTIONS)


class TestFiles:
    def test_all_forms_are_read_alike(self, conversations, tmp_path):
        import datasets

        objects = [{"messages": messages, "id": i} for i, messages in enumerate(conversations)]
        lines = tmp_path / "chats.jsonl"
        lines.write_text("\n".join(map(json.dumps, objects)))
        other = tmp_path / "talk.ndjson"
        other.write_text("\n".join(json.dumps({"talk": o["messages"]}) for o in objects))
        whole = tmp_path / "chats.json"
        whole.write_text(json.dumps(objects))
        rows = datasets.Dataset.from_list(objects)
        for chats in (
            Chats(conversations), Chats(iter(conversations)), Chats(objects), Chats(lines),
            Chats(str(lines)), Chats(other, field="talk"), Chats(whole), Chats(rows),
        ):  # fmt: skip
            assert list(chats) == conversations
            assert list(chats) == conversations  # and once more
            assert set(chats.roles) == {"user", "assistant", "system"}

    def test_empty_entries_are_no_entries(self):
        (read,) = Chats([[{"role": "user", "content": "a", "name": None}]])
        assert read == [{"role": "user", "content": "a"}]

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ([], "at least one conversation"),
            ([said("a"), []], "conversation 1 must have at least one message"),
            ([said("a"), "text"], "conversation 1 must be a list of messages, got str"),
            ([said("a"), said(" ", "")], "conversation 1 must have some content"),
            ([[{"from": "human", "value": "a"}]], "must have 'role' and 'content', got an object with"),
            ([["a"]], "message 0 must have 'role' and 'content', got 'a'"),
            ([[{"role": 3, "content": "a"}]], "role must be a string, got 3"),
            ([[{"role": "user", "content": ["a"]}]], "content must be a string, got"),
            ([[{"role": "user", "content": None}]], "content must be a string, got None"),
            ([said("a \ud800")], "conversation 0, message 0 is no valid text"),
            ([{"text": "a"}], "conversation 0 has no field 'messages', only"),
            ([*[said("a")] * 40, [{"role": "asistant", "content": "b"}]],
             "conversation 40, message 0: role must be one of system, .*got 'asistant'"),
            ("missing.jsonl", "conversations must be a file that is there, got 'missing.jsonl'"),
        ],
    )  # fmt: skip
    def test_bad_ones_are_told_before_the_model_runs(self, given, told, lm, monkeypatch):
        monkeypatch.setattr(type(lm), "capture", lambda *_: pytest.fail("the model ran"))
        for read in (
            lambda chats: collect(lm, chats, HOOK, progress=False),
            lambda chats: evaluate(lm, itda_lens.fit(torch.randn(9, 32), d_sae=4, k=2,
                                   metadata={"hook_name": HOOK}), chats, progress=False),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=told) as caught:
                read(Chats(given))
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (dict(prepend_bos=False), "prepend_bos and keep_special_tokens are for texts"),
            (dict(keep_special_tokens=True), "prepend_bos and keep_special_tokens are for texts"),
            (dict(context_size=300), "context_size must be at most the model's 256"),
            (dict(tokens=TokenFilter(only="nowhere")), "gave no token that counts"),
        ],
    )
    def test_settings_that_do_not_go_together(self, lm, conversations, options: dict[str, Any], told):
        with pytest.raises(ValueError, match=told):
            collect(lm, Chats(conversations), HOOK, progress=False, **options)

    def test_what_goes_where(self, lm, tiny, conversations):
        with pytest.raises(ValueError, match="chats need a model with a chat template, but the tok"):
            collect(tiny, Chats(conversations), HOOK)
        with pytest.raises(TypeError, match=r"conversations are passed as itda_lens.Chats"):
            collect(lm, conversations, HOOK)
        with pytest.raises(TypeError, match="got a single one; pass .conversation."):
            Chats(conversations[0])
        with pytest.raises(TypeError, match="got dict; of a DatasetDict, pass one of its splits"):
            Chats({"train": conversations})
        with pytest.raises(ValueError, match="special_share must be more than 0 and less than 1, got 1"):
            Chats(conversations, special_share=1)
        with pytest.raises(ValueError, match=r"only must be a regular expression, got '\('"):
            TokenFilter(only="(")
        with pytest.raises(ValueError, match="roles must be one or more"):
            TokenFilter(roles=[])


class TestCommand:
    def test_build_and_eval(self, itda_command, chat_folder, conversations, tmp_path, lm):
        file = tmp_path / "chats.jsonl"
        file.write_text("\n".join(json.dumps({"messages": m}) for m in conversations))
        out = tmp_path / "out"
        arguments = ["build", chat_folder, "--chats", file, "--hook", HOOK, "--out", out, "--d-sae", 12,
                     "--k", 3, "--device", "cpu", "--special-tokens", "cap", "--role", "assistant",
                     "--drop", "dog"]  # fmt: skip
        code, shown, _ = itda_command(*arguments)
        assert code == 0
        assert "--chats HELD_OUT_FILE" in " ".join(shown.split())
        itda = itda_lens.load(out / HOOK)
        expected = itda_lens.build(
            lm, Chats(file, "cap"), HOOK, tokens=TokenFilter(["assistant"], drop="dog"), **OPTIONS
        )[HOOK]
        assert torch.equal(itda.W_dec, expected.W_dec)
        assert itda.labels == expected.labels
        code, shown, _ = itda_command("eval", out, "--chats", file, "--device", "cpu")
        assert code == 0
        assert "FVU form" in " ".join(shown.split()) or "form" in shown

    def test_one_of_texts_and_chats(self, itda_command, chat_folder, tmp_path):
        for options in ([], ["--texts", "a.txt", "--chats", "a.jsonl"]):
            code, _, err = itda_command(
                "build", chat_folder, *options, "--hook", HOOK, "--out", tmp_path / "out"
            )
            assert code != 0
            assert "pass one of --texts and --chats" in err
        text = tmp_path / "a.txt"
        text.write_text("the cat")
        code, _, err = itda_command(
            "build", chat_folder, "--texts", text, "--special-tokens", "cap", "--hook", HOOK,
            "--out", tmp_path / "out",
        )  # fmt: skip
        assert "--special-tokens is for --chats" in err
        assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_the_real_template(smollm2):
    """The default system prompt belongs to nobody, and every token is transformers' own."""
    messages = said("What is 2 + 2?", " 4.\n")
    x = collect(smollm2, Chats([messages]), HOOK, progress=False)[HOOK]
    ids = smollm2.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert len(x.labels) == len(ids)
    contents: dict[str | None, str] = Counter()  # pyright: ignore
    for label in x.labels:
        if not label.special:
            contents[label.role] = (contents[label.role] or "") + (label.token or "")
    assert contents == {"user": "What is 2 + 2?", "assistant": " 4.\n"}
    assert x.labels[0].role is None
    assert x.labels[0].special

"""Labels, places, cutting and provenance."""

import base64
import copy
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.saes.sae import SAEMetadata

from itda_lens.records import (
    BUILD_KEY,
    Cutting,
    Label,
    Labels,
    Places,
    Provenance,
    Tag,
    agreed,
    agreed_cutting,
    mix64,
    text_digest,
)


class TestLabels:
    LABELS = Labels(
        [
            Label(3, 1, 17, (5, 9), "cat", "the [[cat]] sat", 0.5),
            Label(2**40),
            Label(0, token='ünï"\n', context="😀 \ud83d"),
        ]
    )

    def test_round_trip_through_json_and_copies(self):
        text = json.loads(json.dumps(copy.deepcopy(self.LABELS.to_compact())))
        assert Labels.from_compact(text) == self.LABELS

    def test_sequence(self):
        assert len(self.LABELS) == 3
        assert self.LABELS[0].key == (3, 1, 17)
        assert self.LABELS[1:] == Labels(list(self.LABELS)[1:])
        assert self.LABELS[-1].token == 'ünï"\n'

    @pytest.mark.parametrize(
        ("label", "said"),
        [
            (Label(3, 1, 17, token="a"), "'a' (text 3, chunk 1, position 17)"),
            (Label(391, kind="image", name="cat"), "image 391: cat"),
            (Label(391, position=4, kind="image"), "image 391, position 4"),
            (Label(8, kind="row"), "row 8"),
            (
                Label(2, 0, 5, token="<|im_end|>", role="user", special=True),
                "'<|im_end|>' (text 2, chunk 0, position 5, user, special)",
            ),
            (Label(2, head=4), "text 2, chunk 0, position 0, head 4"),
        ],
    )
    def test_each_kind_reads_as_what_it_is(self, label, said):
        assert str(label) == said
        labels = Labels([label, Label(0)])
        assert Labels.from_compact(labels.to_compact()) == labels

    def test_fields_that_nothing_uses_are_not_written(self):
        """Versions before 0.2 read labels of texts, byte for byte."""
        text = Labels([Label(1, token="a")]).to_compact()
        columns = json.loads(zlib.decompress(base64.b64decode(text.removeprefix("zlib+base64:"))))
        assert list(columns) == ["row", "chunk", "position", "chars", "token", "context", "cosine"]

    @pytest.mark.parametrize("damage", [lambda t: t[:-9], lambda t: "x" + t, lambda t: None])
    def test_damage_is_told(self, damage):
        with pytest.raises(ValueError, match="damaged labels"):
            Labels.from_compact(damage(self.LABELS.to_compact()))


class TestPlaces:
    TEXT = "The cat sat. " * 20

    def tokens(self, n=40):
        start = np.arange(n) * 5
        return Places.tokens(
            np.full(n, 3), np.arange(n) // 16, np.arange(n) % 16, np.stack([start, start + 3], 1),
            np.array([self.TEXT] * n, dtype=object), np.full(n, text_digest(self.TEXT), np.uint64),
        )  # fmt: skip

    def test_at_is_of_without_objects(self):
        row, chunk, position = np.repeat(np.arange(3), 4), np.tile([0, 1], 6), np.arange(12) % 4
        triples = list(zip(row.tolist(), chunk.tolist(), position.tolist(), strict=True))
        places, same = Places.at(row, chunk, position), Places.of(triples)
        assert places == same
        assert list(places) == [Label(*triple, kind="row") for triple in triples]
        assert (places.identity == same.identity).all()
        assert len(set(places.identity.tolist())) == 12
        assert list(Places.at(np.array([4, 2]))) == [Label(4, kind="row"), Label(2, kind="row")]

    def test_tags(self):
        cat, dog = Tag("image", "cat"), Tag("image", "dog")
        images = Places.at(np.array([391, 4, 7]), tags=[cat, dog, cat])
        assert list(images.take(np.array([2, 0]))) == [
            Label(7, kind="image", name="cat"), Label(391, kind="image", name="cat"),
        ]  # fmt: skip
        spoken = self.tokens().tagged(Tag(role="user"))
        everywhere = Places.joined([images, spoken, self.tokens().tagged([None] * 40)])
        for same in (
            everywhere.quoting(),
            Places.restored(everywhere.state()),
            everywhere.take(slice(99)),
        ):
            assert list(same) == list(everywhere)
        assert [label.role for label in everywhere.bare()][2:5] == [None, "user", "user"]
        assert (spoken.identity == self.tokens().identity).all()
        with pytest.raises(ValueError, match="3 tags for 40 rows"):
            self.tokens().tagged([cat, dog, None])

    def test_heads(self):
        tokens = self.tokens(5)
        heads = tokens.by_head(3)
        assert [label.key for label in heads][:4] == [
            (3, 0, 0, 0),
            (3, 0, 0, 1),
            (3, 0, 0, 2),
            (3, 0, 1, 0),
        ]
        assert heads[7] == replace(tokens[2], head=1)
        assert len(set(heads.identity.tolist()) | set(tokens.identity.tolist())) == 20
        shuffled = heads.take(np.random.default_rng(0).permutation(15))
        assert shuffled.take(shuffled.order()) == heads
        assert list(Places.restored(heads.state())) == list(Places.of(list(heads))) == list(heads)
        assert len(set(Places.of([Label(1, head=0), Label(1, head=1)]).identity.tolist())) == 2

    def test_labels_are_made_on_demand(self):
        places = self.tokens()
        label = places[17]
        assert label.key == (3, 1, 1)
        assert label.chars == (85, 88)
        assert label.token == self.TEXT[85:88]
        assert label.context == f"{self.TEXT[45:85]}[[{self.TEXT[85:88]}]]{self.TEXT[88:128]}"
        assert list(places)[17] == label

    @given(st.lists(st.integers(0, 39), max_size=30))
    def test_parts_and_quotations_have_the_same_labels(self, indices):
        places = self.tokens()
        part = places.take(np.array(indices, dtype=int))
        assert list(part) == [places[i] for i in indices]
        assert list(part.quoting()) == list(part)
        assert list(part.quoting().quoting()) == list(part)
        assert list(Places.joined([part, places[3:5]])) == [*part, *places[3:5]]
        assert [label.key for label in part.bare()] == [label.key for label in part]

    def test_state(self):
        places = Places.joined(
            [self.tokens(), Places.of([Label(1, chars=(2, 3), token="a")]), self.tokens().bare()]
        )
        again = Places.restored(places.state())
        assert list(again) == list(places)
        assert (again.identity == places.identity).all()

    def test_given_labels_come_back_as_they_are(self):
        labels = [Label(4, 1, 2, (3, 5), "ab", "x[[ab]]y", 0.5), Label(2), Label(2)]
        places = Places.of(labels)
        assert list(places.quoting()) == labels
        assert Places.of(places) is places
        assert len(set(places.identity.tolist())) == 3  # rows of one label are told apart
        assert Places.of([(1, 2, 3)])[0] == Label(1, 2, 3)

    @pytest.mark.parametrize(
        "bad",
        [
            "text", (1, 2), None, ("a", "b", "c"), (1, 2, 0.5), Label("a"), Label(1, head=0.5),
            Label(1, kind=None), Label(1, special="no"),
        ],
    )  # fmt: skip
    def test_what_is_no_label(self, bad):
        with pytest.raises(TypeError, match="labels must"):
            Places.of([Label(0), bad])

    def test_numbers_of_numpy_can_be_saved(self):
        given = [
            Label(np.int64(3), chars=(np.int32(1), 2), cosine=np.float32(0.5)),
            np.arange(3)[[2, 1, 0]],
        ]
        labels = Labels(list(Places.of([given[0], tuple(given[1])])))
        assert Labels.from_compact(labels.to_compact())[0] == Label(3, chars=(1, 2), cosine=0.5)
        assert labels[1] == Label(2, 1, 0)

    def test_order_of_the_stream(self):
        places = Places.of([(1, 0, 0), (0, 2, 1), (0, 2, 0), (0, 1, 9)])
        assert [label.key for label in places.take(places.order())] == sorted(p.key for p in places)

    def test_identity_does_not_depend_on_cuts_or_on_the_number_of_the_text(self):
        one = self.tokens()
        start = np.arange(40) * 5
        other = Places.tokens(
            np.full(40, 77), np.zeros(40, int), np.arange(40), np.stack([start, start + 2], 1),
            np.array([self.TEXT] * 40, dtype=object), np.full(40, text_digest(self.TEXT), np.uint64),
        )  # fmt: skip
        assert (one.identity == other.identity).all()
        assert len(set(one.identity.tolist())) == 40

    def test_hashes_are_the_same_everywhere(self):
        """Dictionaries depend on them: a change of these is a change of every dictionary."""
        assert mix64(np.arange(2, dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
        assert text_digest("a") == 0x2F42665B399EF840
        assert text_digest("\ud83d") != text_digest("?")


class TestCutting:
    @pytest.mark.parametrize("size", [1, 0, -3])
    def test_contexts_of_one_token_hold_nothing(self, size):
        with pytest.raises(ValueError, match=f"context_size must be at least 2, got {size}"):
            Cutting(size)


class TestProvenance:
    FULL = Provenance(
        model_name="tiny", hook_name="blocks.1.hook_resid_post", model="/models/tiny", loader="bridge",
        context_size=16, prepend_bos=False, keep_special_tokens=True, texts="book.txt", n_tokens=7,
        recipe={"k": 3}, versions={"torch": "1"},
    )  # fmt: skip

    @pytest.mark.parametrize("make", [dict, SAEMetadata])
    def test_round_trip(self, make):
        metadata = make()
        self.FULL.into(metadata)
        assert Provenance.of(metadata) == self.FULL
        if make is SAEMetadata:
            again = SAEMetadata.from_dict(json.loads(json.dumps(metadata.to_dict())))
            assert Provenance.of(again) == self.FULL

    def test_nothing_is_recorded(self):
        assert Provenance.of(SAEMetadata()) == Provenance()
        assert Provenance().cutting == Cutting()

    def test_files_of_version_0_1(self):
        record = {
            "d_sae": 24, "k": 4, "preset": "best", "method": "ols", "context_size": 64,
            "prepend_bos": True, "keep_special_tokens": False, "model": "m", "n_tokens": 600,
            "versions": {"torch": "2"}, "something": "else",
        }  # fmt: skip
        found = Provenance.of({"hook_name": "h", BUILD_KEY: record})
        assert found.recipe == {"d_sae": 24, "k": 4, "preset": "best", "method": "ols"}
        assert found.cutting == Cutting(64, True, False)
        assert (found.model, found.n_tokens, found.hook_name) == ("m", 600, "h")
        assert found.others == {"something": "else"}
        assert Provenance.of(_written(found)) == found

    def test_entries_that_saelens_knows_count_before_the_record(self):
        """A user who corrects one of them in the metadata is believed, everywhere."""
        found = Provenance.of({"context_size": 16, BUILD_KEY: {"context_size": 128}})
        assert found.context_size == 16

    def test_every_field_of_a_cutting_may_stand_beside_the_record(self):
        beside = {"context_size": 16, "prepend_bos": False, "keep_special_tokens": True}
        assert Provenance.of(beside).cutting == Cutting(16, False, True)

    def test_agreed(self):
        found = agreed([self.FULL, Provenance(model="/models/tiny")], "model", "loader", "split")
        assert (found.model, found.loader, found.split) == ("/models/tiny", "bridge", None)
        assert found.texts is None  # was not asked for
        with pytest.raises(ValueError, match="must agree in context_size, got 16 and 128"):
            agreed_cutting([self.FULL, Provenance(context_size=128)])
        assert agreed_cutting([self.FULL, Provenance()]) == Cutting(16, False, True)

    def test_a_field_that_is_needed(self):
        with pytest.raises(ValueError, match="names no hook_name, sorry"):
            Provenance().needed("hook_name", ", sorry")


def _written(provenance):
    metadata = {}
    provenance.into(metadata)
    return metadata

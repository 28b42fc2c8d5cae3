"""Label similarity: sets, unions, weights, other tokenizers, and what cannot be compared."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from itda_lens import Label, build, fit, jaccard
from itda_lens.compare import usage, weighted_jaccard
from itda_lens.compare.places import n_overlapping

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def labelled(labels):
    """A dictionary with these labels: of as many rows as atoms, all are chosen, in some order."""
    x = torch.eye(len(labels), 12) + 0.01 * torch.randn(len(labels), 12)
    return fit(x, d_sae=len(labels), k=1, labels=labels)


def places(numbers):
    return [(0, 0, i) for i in numbers]


def word(row, start, text, position=1):
    """The label of a token `text` that begins at character `start`."""
    return Label(row, 0, position, chars=(start, start + len(text)), token=text)


def recorded(itda, **record):
    """As if built with these settings."""
    itda.cfg.metadata.itda_build = dict(itda.cfg.metadata.itda_build) | record
    return itda


def test_closed_form():
    a, b = labelled(places(range(6))), labelled(places(range(4, 9)))
    assert jaccard(a, b) == jaccard(b, a) == pytest.approx(2 / 9)
    assert jaccard(a, a) == 1
    assert jaccard(a, labelled([(0, 1, 0), (1, 0, 0), (2, 0, 0)])) == 0


def test_rows_of_other_kinds_are_other_places():
    """Image 5, vocabulary token 5 and text 5 are three things; heads of a token are apart too."""
    texts = labelled([Label(i) for i in range(4)])
    images = labelled([Label(i, kind="image") for i in range(4)])
    assert jaccard(texts, images) == 0
    assert jaccard(images, images) == 1
    assert jaccard(texts, labelled([Label(i, kind="row") for i in range(4)])) == 1
    assert jaccard(texts, labelled([Label(i, head=1) for i in range(4)])) == 0


def test_unions_over_layers():
    first, second = labelled(places(range(4))), labelled(places(range(2, 8)))
    other = labelled(places(range(6, 10)))
    assert jaccard([first, second], other) == pytest.approx(2 / 10)
    assert jaccard([first, second], [second, first]) == 1
    assert jaccard([first], first) == 1
    assert jaccard({"hook": first, "other": second}, other) == pytest.approx(2 / 10), "as build returns"


def weights_of(itda, by_position):
    """A usage for the atoms, wherever selection has put them."""
    return torch.tensor([float(by_position[label.position]) for label in itda.labels])


def test_weighted_closed_form():
    a, b = labelled(places([0, 1, 2])), labelled(places([1, 2, 3]))
    u, v = weights_of(a, {0: 2, 1: 4, 2: 4}), weights_of(b, {1: 1, 2: 2, 3: 1})
    # Shares .2 .4 .4 0 and 0 .25 .5 .25: minima .65, maxima 1.35.
    assert weighted_jaccard(a, b, u, v) == pytest.approx(0.65 / 1.35)
    assert weighted_jaccard(a, b, 7 * u, v / 3) == pytest.approx(0.65 / 1.35)
    same = torch.ones(3)
    assert weighted_jaccard(a, b, same, same) == pytest.approx(jaccard(a, b))
    assert weighted_jaccard(a, a, u, u) == pytest.approx(1)
    # A union of a dictionary with itself is that dictionary.
    assert weighted_jaccard([a, a], b, [u, u], v) == pytest.approx(0.65 / 1.35)


def test_usage_is_the_share_of_squared_coefficients():
    x = torch.randn(200, 12)
    itda = fit(x, d_sae=20, k=3)
    shares = usage(itda, x, batch_size=64)
    expected = itda.encode(x).double().square().sum(dim=0)
    torch.testing.assert_close(shares, expected / expected.sum())
    assert (usage(itda, itda.b_dec.detach()[None]) == 0).all()
    with pytest.raises(ValueError, match="at least one row"):
        usage(itda, x[:0])


def test_usage_of_another_sae():
    """Squared coefficients also where latents are few, where there are none, and in slices."""
    x = torch.randn(200, 12)
    sae = StandardSAE(StandardSAEConfig(d_in=12, d_sae=20))
    expected = sae.encode(x).double().square().sum(dim=0)
    torch.testing.assert_close(usage(sae, x, batch_size=64), expected / expected.sum())
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    assert (usage(sae, x) == 0).all()
    with pytest.raises(ValueError, match="got one of topk in training"):
        usage(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=12, d_sae=20, k=3)), x)


def test_other_tokenizers_by_span():
    """White space that one tokenizer counts to its tokens, and special tokens, make no difference."""
    bos = Label(0, 0, 0, chars=(0, 0), token="")
    a = labelled([bos, word(0, 0, "The"), word(0, 3, " cat"), word(1, 0, "sat"), word(1, 3, " ")])
    b = labelled(
        [word(0, 4, "cat", 2), word(0, 0, "The", 3), word(0, 7, " mat", 9), word(1, 0, "sa", 4)]
    )
    assert jaccard(a, b) == 0, "by position: no metadata says that tokenizers differ"
    assert jaccard(a, b, match="span") == jaccard(b, a, match="span") == pytest.approx(2 / 6)
    # "sat" and "sa" overlap; so do The/The and cat/cat.
    assert jaccard(a, b, match="overlap") == jaccard(b, a, match="overlap") == pytest.approx(3 / 5)
    recorded(a, vocabulary_sha256="one")
    recorded(b, vocabulary_sha256="another")
    assert jaccard(a, b) == pytest.approx(2 / 6), "metadata says it"
    with pytest.raises(ValueError, match="cannot be matched by position: vocabulary_sha256 is"):
        jaccard(a, b, match="position")
    u = weights_of(a, {0: 1, 1: 1})
    assert weighted_jaccard(a, b, u, torch.ones(4)) == pytest.approx(
        weighted_jaccard(b, a, torch.ones(4), u)
    )


SPANS = (
    st.sets(st.integers(0, 40), max_size=14).map(sorted).map(lambda cuts: set(itertools.pairwise(cuts)))
)


@given(SPANS, SPANS, st.integers(0, 3), st.integers(0, 3))
def test_overlaps_are_a_largest_matching(a, b, skip_a, skip_b):
    left, right = (
        {(0, *span) for i, span in enumerate(sorted(spans)) if i % 4 != skip}
        for spans, skip in ((a, skip_a), (b, skip_b))
    )
    meets = [[x < v and u < y for _, u, v in sorted(right)] for _, x, y in sorted(left)]
    expected = 0
    if left and right:
        graph = csr_array(torch.tensor(meets).int().numpy())
        expected = int((maximum_bipartite_matching(graph) >= 0).sum())
    assert n_overlapping(left, right) == n_overlapping(right, left) == expected
    assert n_overlapping(left, {(1, *span) for _, *span in right}) == 0


def test_layers_of_a_model(tiny, texts):
    built = build(tiny, texts, HOOKS, d_sae=60, k=4, context_size=16, progress=False)
    first, last = (built[hook] for hook in HOOKS)
    assert 0 < jaccard(first, last) < 1
    assert jaccard(first, last) == jaccard(first, last, match="span")


def test_contexts_cut_otherwise_are_matched_by_characters(tiny, texts):
    options = dict(d_sae=30, k=4, progress=False)
    one, cut = (
        build(tiny, texts, HOOKS[0], context_size=size, **options)[HOOKS[0]] for size in (16, 12)
    )
    assert jaccard(one, cut) == jaccard(one, cut, match="span") > 0
    with pytest.raises(ValueError, match="context_size is 16 and 12; use match='span'"):
        jaccard(one, cut, match="position")


def test_refuses_what_cannot_be_compared(tiny, texts):
    options = dict(d_sae=30, k=4, progress=False, context_size=16)
    one = build(tiny, texts, HOOKS[0], **options)[HOOKS[0]]
    other = build(tiny, texts[::-1], HOOKS[0], **options)[HOOKS[0]]
    with pytest.raises(ValueError, match="labels of different texts .* texts_fingerprint is"):
        jaccard(one, other)
    with pytest.raises(ValueError, match="match must be one of"):
        jaccard(one, one, match="luck")
    with pytest.raises(ValueError, match="a must be one dictionary or more"):
        jaccard([], one)
    with pytest.raises(ValueError, match="without characters can only be matched by position"):
        jaccard(labelled(places(range(3))), one, match="span")
    blank = labelled([dataclasses.replace(word(0, 0, ""), position=i) for i in range(3)])
    with pytest.raises(ValueError, match="all are of special tokens"):
        jaccard(blank, blank, match="span")
    other.cfg.metadata.itda_labels = None
    other.cfg.metadata.itda_build = None
    with pytest.raises(ValueError, match="no labels"):
        jaccard(one, other)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), "usage_b must hold a number for each atom"),
        ([torch.ones(3)] * 2, "usage_b must hold a number for each atom"),
        (torch.tensor([1.0, -1, 1]), "must be finite, not negative"),
        (torch.tensor([1.0, float("nan"), 1]), "must be finite, not negative"),
        (torch.zeros(3), "not all zero"),
    ],
)
def test_bad_weights(weights, message):
    a = labelled(places(range(3)))
    with pytest.raises(ValueError, match=message):
        weighted_jaccard(a, a, torch.ones(3), weights)
    with pytest.raises(ValueError, match="no weighted form"):
        weighted_jaccard(a, a, torch.ones(3), torch.ones(3), match="overlap")

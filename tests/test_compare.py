"""Label similarity."""

import pytest
import torch

from itda_lens import build, fit, jaccard

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def labelled(keys):
    """A dictionary whose labels are `keys`: of as many rows as atoms, all are chosen."""
    x = torch.eye(len(keys), 12) + 0.01 * torch.randn(len(keys), 12)
    return fit(x, d_sae=len(keys), k=1, labels=keys)


def test_closed_form():
    a = labelled([(0, 0, i) for i in range(6)])
    b = labelled([(0, 0, i) for i in range(4, 9)])
    assert jaccard(a, b) == jaccard(b, a) == pytest.approx(2 / 9)
    assert jaccard(a, a) == 1
    assert jaccard(a, labelled([(0, 1, 0), (1, 0, 0), (2, 0, 0)])) == 0


def test_layers_of_a_model(tiny, texts):
    built = build(tiny, texts, HOOKS, d_sae=60, k=4, context_size=16, progress=False)
    first, last = (built[hook] for hook in HOOKS)
    assert 0 < jaccard(first, last) < 1


def test_refuses_what_cannot_be_compared(tiny, texts):
    options = dict(d_sae=30, k=4, progress=False)
    one = build(tiny, texts, HOOKS[0], context_size=16, **options)[HOOKS[0]]
    other = build(tiny, texts[::-1], HOOKS[0], context_size=16, **options)[HOOKS[0]]
    with pytest.raises(ValueError, match="different texts or contexts .* texts_fingerprint"):
        jaccard(one, other)
    cut = build(tiny, texts, HOOKS[0], context_size=12, **options)[HOOKS[0]]
    with pytest.raises(ValueError, match="context_size is 16 for one dictionary and 12"):
        jaccard(one, cut)
    other.cfg.metadata.itda_labels = None
    other.cfg.metadata.itda_build = None
    with pytest.raises(ValueError, match="no labels"):
        jaccard(one, other)

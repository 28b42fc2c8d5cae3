"""`ITDA.extended`: more atoms for the error that a dictionary leaves."""

import pytest
import torch

import itda_lens
from itda_lens import ITDA, Label, fit
from itda_lens.dictionary import EnergyRule, extension
from itda_lens.pursuit import Coding
from itda_lens.records import BUILD_KEY, Places, Tag

D, K = 24, 3


def domain(seed, n, rows_seed=0):
    """Sums of three of forty directions, and a little noise, around 1."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(40, D, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(100 + rows_seed)
    picks = torch.rand(n, 40, generator=generator).argsort(dim=1)[:, :K]
    weights = torch.rand(n, K, 1, generator=generator) + 0.5
    noise = 0.01 * torch.randn(n, D, generator=generator)
    return (directions[picks] * weights).sum(dim=1) + noise + 1


def fvu(itda, x):
    return ((itda(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()).item()


OLD, NEW = domain(1, 1500), domain(2, 1500)
OLD_TEST, NEW_TEST = domain(1, 400, 1), domain(2, 400, 1)


@pytest.fixture(scope="module")
def itda():
    return fit(OLD, d_sae=150, k=K)


@pytest.fixture(scope="module")
def more(itda):
    return itda.extended(NEW, 150)


def test_old_atoms_come_first_and_do_not_change(itda, more):
    assert more.cfg.d_sae == 300
    assert torch.equal(more.W_dec[:150], itda.W_dec)
    assert torch.equal(more.b_dec, itda.b_dec)
    assert more.labels[:150] == itda.labels
    for name in ("k", "method", "signed", "threshold"):
        assert getattr(more.cfg, name) == getattr(itda.cfg, name)
    torch.testing.assert_close(more.W_dec.norm(dim=1), torch.ones(300))
    assert itda.cfg.d_sae == 150  # ours is as it was


def test_new_atoms_are_activations_and_say_which(itda, more):
    for atom, label in zip(more.W_dec[150:], more.labels[150:], strict=True):
        row = torch.nn.functional.normalize(NEW[label.row] - itda.b_dec, dim=0)
        torch.testing.assert_close(atom, row, atol=1e-6, rtol=0)
        assert label == Label(label.row, kind="row")
    assert len({label.row for label in more.labels[150:]}) == 150


def test_it_learns_the_new_domain_and_keeps_the_old(itda, more):
    assert fvu(more, NEW_TEST) < 0.6 * fvu(itda, NEW_TEST)
    assert fvu(more, OLD_TEST) < 1.02 * fvu(itda, OLD_TEST)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:150]
    random = itda_lens.union(itda, ITDA.from_atoms(NEW[order] - itda.b_dec, k=K))
    assert fvu(more, NEW_TEST) < fvu(random, NEW_TEST)


def test_codes_without_a_step_to_a_new_atom_stay(itda, more):
    old, new = itda.encode(OLD_TEST), more.encode(OLD_TEST)
    changed = (new[:, :150] != old).any(dim=1) | (new[:, 150:] != 0).any(dim=1)
    assert 0 < changed.double().mean() < 1
    few = itda.extended(NEW, 1)
    dense = few.encode(OLD)
    unused = dense[:, 150] == 0
    same = (dense[:, :150] == itda.encode(OLD)).all(dim=1)
    assert same[unused].double().mean() > 0.99  # OLS may try an atom and drop it again


def test_an_energetic_few_come_first(itda, more):
    energy = more.encode(NEW)[:, 150:].square().sum(dim=0)
    assert energy[:50].sum() > energy[-50:].sum()


def test_equal_inputs_give_equal_bits_and_places_decide(itda):
    labels = [Label(i // 10, 0, i % 10, kind="module") for i in range(len(NEW))]
    first = itda.extended(NEW, 20, labels=labels, seed=3)
    again = itda.extended(NEW.clone(), 20, labels=Places.of(labels), seed=3)
    assert torch.equal(first.W_dec, again.W_dec)
    assert first.labels == again.labels
    assert first.labels[150].kind == "module"
    order = torch.randperm(len(NEW), generator=torch.Generator().manual_seed(1))
    shuffled = itda.extended(NEW[order], 20, labels=[labels[i] for i in order.tolist()], seed=3)
    assert torch.equal(first.W_dec, shuffled.W_dec)
    assert first.labels == shuffled.labels


def test_the_seed_draws_the_samples(itda, monkeypatch):
    monkeypatch.setattr(extension, "RULE", EnergyRule(min_candidates=16, candidates_per_atom=1))
    first, again, other = (itda.extended(NEW, 20, seed=seed).W_dec for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_of_every_kind(itda):
    named = itda.extended(NEW, 5, labels=[f"user {i}" for i in range(len(NEW))])
    assert all(label.name == f"user {label.row}" for label in named.labels[150:])
    tagged = itda.extended(NEW, 5, labels=Places.at(torch.arange(len(NEW)).numpy(), tags=Tag("image")))
    assert {label.kind for label in tagged.labels[150:]} == {"image"}


def test_the_record_and_files(itda, more, tmp_path):
    twice = more.extended(OLD, 4, seed=1)
    record = twice.cfg.metadata[BUILD_KEY]
    assert record["extended"] == [
        {"first": 150, "n": 150, "rows": 1500, "seed": 0},
        {"first": 300, "n": 4, "rows": 1500, "seed": 1},
    ]
    assert record["recipe"] == itda.cfg.metadata[BUILD_KEY]["recipe"]
    twice.save_model(tmp_path)
    loaded = itda_lens.load(tmp_path)
    assert torch.equal(loaded.encode(NEW_TEST), twice.encode(NEW_TEST))
    assert loaded.labels == twice.labels


def test_dictionaries_of_other_kinds():
    x = OLD.view(-1, 4, D // 4)
    heads = fit(OLD, d_sae=40, k=K, l0=2.0, metadata=dict(hook_name="blocks.0.attn.hook_z"))
    more = heads.extended(NEW.view(-1, 4, D // 4), 10)
    assert more(x).shape == x.shape
    assert (more.cfg.l0, more.cfg.threshold) == (None, heads.cfg.threshold)
    unsigned = fit(OLD, d_sae=40, k=K, signed=False).extended(NEW, 10)
    assert (unsigned.encode(NEW) >= 0).all()
    half = fit(OLD.half(), d_sae=40, k=K).bfloat16()
    assert half.extended(NEW, 10).W_dec.dtype == torch.bfloat16
    bare = fit(OLD, d_sae=40, k=K)
    del vars(bare.cfg.metadata)["itda_labels"]
    assert str(bare.extended(NEW, 3).labels[7]) == "atom 7"


def test_bad_input(itda):
    for x, n, message in (
        (NEW[:0], 1, "n must be at most the number of activations, 0"),
        (NEW, 0, "n must be at least 1"),
        (NEW[:5], 6, "n must be at most the number of activations, 5, got 6"),
        (NEW / 0, 5, "activations must be finite, but row 0"),
        (NEW[:, :3], 5, "d_in=24"),
        (NEW[:1].repeat(50, 1), 2, "in directions of their own: got n=2, but only 1"),
    ):
        with pytest.raises(ValueError, match=message):
            itda.extended(x, n)
    with pytest.raises(ValueError, match="3 labels for 1500 rows"):
        itda.extended(NEW, 5, labels=["a"] * 3)
    with pytest.raises(TypeError, match="labels"):
        itda.extended(NEW, 5, labels=[2.5] * 1500)
    with pytest.raises(ValueError, match="extend the dictionary first"):
        itda.nonnegative().extended(NEW, 5)
    with pytest.raises(TypeError, match="n must be a whole number"):
        itda.extended(NEW, 5.0)


def test_candidates_are_kept_by_the_energy_that_they_carry_beside_the_atoms():
    atoms, candidates = torch.eye(8)[:3], torch.eye(8)[3:]
    x = torch.zeros(100, 8)
    x[:, 0], x[:, 3], x[:40, 5], x[:70, 6] = 9.0, 0.1, 1.0, 1.0
    kept = extension.keep_by_energy(x, atoms, candidates, 2, Coding(3, "mp"), progress=False)
    assert kept.tolist() == [3, 2]  # of 70 and of 40 rows

"""Labels, samples and the rules that choose atoms."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from itda_lens.dictionary import EnergyRule, GreedyRule, Request, Resumable, RunningFVU
from itda_lens.dictionary.folds import assign_folds
from itda_lens.dictionary.mean import LEAST_BIN, WINDOW, ExactSum
from itda_lens.dictionary.outliers import OUTLIER, limit_outliers, robust_centre
from itda_lens.dictionary.rows import RowStore
from itda_lens.dictionary.sampling import StreamSample
from itda_lens.dictionary.selection import (
    FEW,
    SAME_DIRECTION,
    energy_by_atom,
    first_of_direction,
    nearest_rows,
    normalize_rows,
    order_by_energy,
    prune_by_energy,
)
from itda_lens.dictionary.update import (
    PAST_WEIGHT,
    RIDGE,
    hold_near,
    least_squares_atoms,
    update_atoms,
)
from itda_lens.pursuit import Coding, SparseCodes, encode
from itda_lens.records import Label, Places, mix64
from itda_lens.records.places import CONTEXT_CHARS

CPU = torch.device("cpu")


def rows(n=500, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def planted():
    """4,000 rows made of two each of 24 directions, and those."""
    generator = torch.Generator().manual_seed(0)
    true = normalize_rows(rows(24, 32))[0]
    code = torch.zeros(4000, 24)
    picked = torch.rand(4000, 24, generator=generator).topk(2).indices
    code.scatter_(1, picked, 2 * torch.randn(4000, 2, generator=generator))
    return code @ true + 0.02 * rows(4000, 32, seed=3), true


def energy(d_sae=40, k=4, seed=0, d=16, signed=True, thorough=False, **settings):
    if thorough:
        settings = dict(refine=True, rounds=8, min_updated=49_152) | settings
    return EnergyRule(**settings).selector(Request(d, d_sae, k, signed, seed))


def greedy(max_atoms, k=4, tau=0.2, d=16):
    return GreedyRule(tau).selector(Request(d, max_atoms, k))


def feed(selector, x, batch=64):
    places = Places.numbered(0, len(x))
    for start in range(0, len(x), batch):
        selector.update(x[start : start + batch], places[start : start + batch])
    return selector.finish(progress=False)


class TestRowStore:
    def test_copies_grow_linearly(self, monkeypatch):
        copied = 0
        store = RowStore(4, torch.float32, CPU, limit=10**6)
        expected = rows(20_000, 4)
        for i in range(0, len(expected), 10):
            size_before = len(store._buffer)
            store.append(expected[i : i + 10])
            if len(store._buffer) != size_before:
                copied += i
        assert torch.equal(store.rows, expected)
        assert copied <= 2 * len(expected)

    def test_limit(self):
        store = RowStore(4, torch.float32, CPU, limit=5)
        store.append(rows(5, 4))
        assert len(store._buffer) == 5
        assert store.room == 0
        with pytest.raises(ValueError, match="exceed the limit of 5"):
            store.append(rows(1, 4))


def uneven(n=500, d=3, dtype=torch.float64, seed=0):
    """Numbers of very different sizes, whose sums lose digits in any floating-point order."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 41, (n, d), generator=generator)
    return torch.ldexp(torch.randn(n, d, generator=generator, dtype=torch.float64), exponents).to(dtype)


class TestExactSum:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equals_fsum(self, dtype):
        x = uneven(dtype=dtype)
        exact = ExactSum(3)
        exact.update(x)
        assert exact.total().tolist() == [math.fsum(column) for column in x.double().T.tolist()]
        assert x.double().sum(dim=0).tolist() != exact.total().tolist()

    @pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
    def test_numbers_of_any_size(self, scale):
        x = rows(300, 3).double() * scale
        exact = ExactSum(3)
        exact.update(x)
        # Under half the unit of the least bin numbers are dropped, 300 of them here at the most.
        dropped = 300 * 2.0 ** (WINDOW * LEAST_BIN - 1)
        for found, column in zip(exact.total().tolist(), x.T.tolist(), strict=True):
            assert abs(found - math.fsum(column)) <= dropped
            if scale > 1e-280:
                assert found == math.fsum(column)

    @given(st.permutations(range(6)), st.integers(1, 200))
    def test_any_order_batches_and_parts(self, order, size):
        x = uneven(600)
        whole = ExactSum(3)
        whole.update(x)
        parts = [ExactSum(3) for _ in range(3)]
        for i in order:
            for batch in x[100 * i : 100 * (i + 1)].split(size):
                parts[i % 3].update(batch)
        merged = ExactSum(3)
        for part in parts:
            merged.merge(part)
        assert merged.n == 600
        assert torch.equal(merged.total(), whole.total())
        assert torch.equal(merged.mean(), whole.mean())

    def test_the_mean_is_rounded_once(self):
        x = 1e3 + rows(1000)
        exact = ExactSum(16)
        exact.update(x)
        sums = [sum(map(Fraction, column)) for column in x.T.tolist()]
        assert exact.mean().tolist() == [float(total / 1000) for total in sums]

    def test_before_the_first_row(self):
        assert ExactSum(4).mean().tolist() == [0.0] * 4
        empty = ExactSum(4)
        empty.update(torch.zeros(3, 4))
        assert empty.n == 3
        assert empty.total().tolist() == [0.0] * 4

    def test_keeps_no_reference_to_the_batch(self):
        x = rows(10)
        exact = ExactSum(16)
        exact.update(x)
        expected = exact.mean()
        x.zero_()
        assert torch.equal(exact.mean(), expected)


class TestStreamSample:
    @staticmethod
    def sample(x, batch, distinct, capacity=50, seed=0, order=None):
        sample = StreamSample(x.shape[1], capacity, seed, x.dtype, CPU, distinct=distinct, labelled=True)
        places = Places.numbered(0, len(x))
        order = torch.arange(len(x)) if order is None else order
        for part in order.split(batch):
            sample.update(x[part], places.take(part.numpy()))
        return sample

    @pytest.mark.parametrize("distinct", [True, False])
    def test_does_not_depend_on_batches(self, distinct):
        x = rows(400)
        whole = self.sample(x, 400, distinct)
        parts = self.sample(x, 7, distinct)
        assert torch.equal(whole.rows(), parts.rows())
        assert whole.places() == parts.places()
        assert len(whole) == 50
        assert torch.equal(x[[label.row for label in whole.places()]], whole.rows())

    @pytest.mark.parametrize("distinct", [True, False])
    def test_does_not_depend_on_the_width(self, distinct):
        """Models of different widths choose among the same tokens: their labels can be compared."""
        x = rows(400)
        narrow, wide = (self.sample(y, 30, distinct) for y in (x, torch.cat([x, x], dim=1)))
        assert narrow.places() == wide.places()

    @pytest.mark.parametrize("distinct", [True, False])
    def test_is_uniform(self, distinct):
        x = rows(100)
        counts = torch.zeros(100)
        for seed in range(400):
            places = self.sample(x, 30, distinct, capacity=25, seed=seed).places()
            counts[places.row] += 1
        # 400 draws of probability 1/4: standard deviation 8.7; five of them for a hundred rows.
        assert (counts - 100).abs().max() < 5 * 8.7
        assert counts.std() > 4

    @pytest.mark.parametrize("distinct", [True, False])
    def test_holds_the_smaller_samples_of_its_seed(self, distinct):
        x = rows(400)[torch.arange(400) % 300]
        large, small = (self.sample(x, 30, distinct, capacity=n) for n in (90, 40))
        assert torch.equal(large.rows(40), small.rows())
        assert torch.equal(large.rows(1000), large.rows())

    def test_distinct_takes_each_row_once(self):
        x = rows(30).repeat(20, 1)
        for batch in (17, 600):
            sample = self.sample(x, batch, distinct=True)
            assert sorted(label.row % 30 for label in sample.places()) == list(range(30))
            assert torch.equal(x[[label.row for label in sample.places()]], sample.rows())
        assert len(self.sample(x, 17, distinct=False)) == 50

    def test_distinct_prefers_the_frequent(self):
        x = torch.cat([rows(1, seed=9).repeat(300, 1), rows(300)])
        held = [
            any(label.row < 300 for label in self.sample(x, 50, True, capacity=20, seed=s).places())
            for s in range(20)
        ]
        assert all(held)

    def test_short_stream_is_kept_whole(self):
        x = rows(20)
        assert torch.equal(self.sample(x, 6, distinct=True).rows(), x)

    @pytest.mark.parametrize("distinct", [True, False])
    @settings(max_examples=30)
    @given(data=st.data())
    def test_any_order_and_any_parts(self, distinct, data):
        """Samples of parts, in any number and order, merge into that of the whole."""
        x = rows(300)[torch.arange(300) % 200]
        whole = self.sample(x, 300, distinct)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        order = torch.randperm(300, generator=generator)
        shuffled = self.sample(x, data.draw(st.integers(1, 300)), distinct, order=order)
        shards = order.split(data.draw(st.integers(40, 300)))
        first, *others = [self.sample(x, 50, distinct, order=shard) for shard in shards]
        for other in others:
            first.merge(other)
        for found in (shuffled, first):
            assert torch.equal(found.rows(), whole.rows())
            assert found.places() == whole.places()
            assert found.n_seen == 300

    def test_other_contexts_and_tokenizers_choose_the_same_places(self):
        """A place is its text and first character, however the text was cut and numbered."""
        digests = mix64(np.arange(40, dtype=np.uint64))
        texts = np.array([f"text {i}" for i in range(40)], dtype=object)

        def places(length, step, order):
            row, start = (part.flatten() for part in np.meshgrid(order, np.arange(0, 120, step)))
            span = np.stack([start, start + step], axis=1)
            number = np.argsort(order)[row]
            return Places.tokens(number, start // length, start % length, span, texts[row], digests[row])

        def chosen(places):
            sample = StreamSample(2, 200, 0, torch.float32, CPU, distinct=False, labelled=True)
            sample.update(torch.zeros(len(places), 2), places)
            return {(p.context, p.chars[0]) for p in sample.places()}

        one = chosen(places(128, 3, np.arange(40)))
        other = chosen(places(32, 3, np.arange(40)[::-1].copy()))
        assert one == other
        finer = places(64, 1, np.arange(40))  # three tokens where the others have one
        fine = {start for _, start in chosen(finer)}
        assert fine - {start for _, start in one}
        shared = chosen(finer.take(np.flatnonzero(finer.start % 3 == 0)))
        assert {start for _, start in shared} == {start for _, start in one}

    def test_keeps_no_more_of_a_text_than_labels_quote(self):
        text = "x" * 10_000
        n = 100
        places = Places.tokens(
            np.zeros(n, int),
            np.zeros(n, int),
            np.arange(n),
            np.stack([np.arange(n) * 100] * 2, 1),
            np.array([text] * n, dtype=object),
            np.zeros(n, np.uint64),
        )
        sample = StreamSample(2, 5, 0, torch.float32, CPU, distinct=False, labelled=True)
        sample.update(torch.zeros(n, 2), places)
        assert all(len(origin) <= 2 * CONTEXT_CHARS for origin in sample._places._origins)


class TestPieces:
    def test_first_of_direction(self):
        x = torch.tensor([[1.0, 0], [0, 1], [1, 1e-4], [-1, 0], [0.9, 0.1]])
        unit, _ = normalize_rows(x)
        assert first_of_direction(unit, 0.999, signed=True).tolist() == [1, 1, 0, 0, 1]
        assert first_of_direction(unit, 0.999, signed=False).tolist() == [1, 1, 0, 1, 1]
        assert first_of_direction(unit[1:], 0.999, True, known=unit[:1]).tolist() == [1, 0, 0, 1]

    @pytest.mark.parametrize("block", [1, 3, 512])
    def test_first_of_direction_does_not_depend_on_blocks(self, block):
        unit, _ = normalize_rows(rows(60, 3))
        expected = []
        for i, row in enumerate(unit):
            expected.append(all((row @ unit[j]).abs() < 0.97 for j in range(i) if expected[j]))
        assert 10 < sum(expected) < 60
        assert first_of_direction(unit, 0.97, signed=True, block=block).tolist() == expected

    def test_normalize_rows_tells_zero_rows(self):
        unit, usable = normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-7, 0.0]]))
        assert usable.tolist() == [True, False, False]
        torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]]))

    def test_pruning_finds_the_atoms_that_made_the_data(self):
        true = torch.linalg.qr(rows(16, 16)).Q[:10]
        code = torch.randn(400, 10) * (torch.rand(400, 10) < 0.3)
        noise, _ = normalize_rows(rows(50, 16, seed=2))
        candidates = torch.cat([noise[:25], true, noise[25:]])
        kept = prune_by_energy(code @ true, candidates, 10, Coding(4, "mp"), drop=0.2, progress=False)
        assert kept.tolist() == list(range(25, 35))

    def test_order_nests_what_pruning_leaves(self):
        x, atoms = rows(2000), normalize_rows(rows(400, seed=1))[0]
        options = dict(coding=Coding(4, "mp"), drop=0.5)
        order = order_by_energy(x, atoms, **options)
        assert order.sort().values.tolist() == list(range(400))
        for size in (200, 100, FEW):
            left = prune_by_energy(x, atoms, size, progress=False, **options)
            assert order[:size].sort().values.tolist() == left.tolist()
        few = order[:FEW]
        energy = energy_by_atom(encode(x, atoms[left], 4), FEW)
        assert few.tolist() == left[energy.argsort(descending=True)].tolist()

    def test_running_fvu(self):
        x, y = rows(100) + 5, rows(100, seed=1) + 5
        running = RunningFVU()
        assert running.value() != running.value()
        for a, b in zip(x.split(30), y.split(30), strict=True):
            running.update(a, b)
        expected = (x - y).square().sum() / (x - x.mean(dim=0)).square().sum()
        assert running.value() == pytest.approx(expected.item(), rel=1e-5)


class TestEnergySelector:
    def test_atoms_are_centred_activations_with_their_labels(self):
        x = rows() + 3
        found = feed(energy(), x)
        assert found.atoms.shape == (40, 16)
        torch.testing.assert_close(found.mean, x.mean(dim=0))
        origin = x[[label.row for label in found.labels]] - found.mean
        cosine = torch.nn.functional.cosine_similarity(found.atoms, origin)
        assert (cosine > 1 - 1e-6).all()
        torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(40))

    def test_bit_equal_whatever_the_batches(self):
        x = rows(2000)
        first, second = feed(energy(), x, batch=2000), feed(energy(), x, batch=37)
        assert torch.equal(first.atoms, second.atoms)
        assert torch.equal(first.mean, second.mean)
        assert first.labels == second.labels

    def test_first_atoms_matter_most(self):
        centres = rows(64, 32, seed=3)
        weights = torch.linspace(3, 0.3, 64)[
            torch.randperm(64, generator=torch.Generator().manual_seed(1))
        ]
        x = (weights[:, None] * centres).repeat_interleave(40, 0) + 0.05 * rows(64 * 40, 32, seed=4)
        found = feed(energy(d_sae=64, k=1, d=32), x)
        strength = [float(weights[label.row // 40]) for label in found.labels]
        assert sum(strength[:32]) > 2 * sum(strength[32:])

    def test_any_order_and_any_parts(self):
        x = rows(2000)
        places = Places.numbered(0, 2000)
        whole = feed(energy(update=True), x)
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
        runs = [energy(update=True) for _ in range(3)]
        for run, shard in zip(runs, order.split(700), strict=True):
            run.update(x[shard], places.take(shard.numpy()))
        first, second, third = runs
        third.merge(first)
        third.merge(second)
        found = third.finish(progress=False)
        assert torch.equal(found.atoms, whole.atoms)
        assert torch.equal(found.mean, whole.mean)
        assert found.labels == whole.labels

    def test_stopped_and_moved(self, tmp_path):
        """The state goes through a file, to another process if one likes, and the work goes on."""
        x = rows(2000)
        labels = [
            Label(i // 10, 0, i % 10, (3 * i, 3 * i + 2), "to", f"be [[to]] {i}") for i in range(2000)
        ]
        places = Places.of(labels)
        settings = dict(update=True, min_candidates=300, min_updated=700)
        whole = energy(**settings)
        whole.update(x, places)
        first, second = energy(**settings), energy(**settings)
        assert isinstance(first, Resumable)
        first.update(x[:900], places[:900])
        save_file(first.state(), tmp_path / "state.safetensors")
        second.load(load_file(tmp_path / "state.safetensors"))
        second.update(x[900:], places[900:])
        expected, found = whole.finish(False), second.finish(False)
        assert torch.equal(found.atoms, expected.atoms)
        assert torch.equal(found.mean, expected.mean)
        assert found.labels == expected.labels
        assert found.labels[0].context.startswith("be [[to]]")

    def test_seed_matters(self):
        x = rows(2000)
        assert feed(energy(seed=0), x).labels != feed(energy(seed=1), x).labels

    def test_better_than_random_atoms_on_clustered_data(self):
        centres = rows(60, 16, seed=3)
        x = centres[torch.randint(60, (3000,))] + 0.1 * rows(3000, seed=4)
        found = feed(energy(d_sae=60, k=1), x)
        chosen, _ = normalize_rows(x[:60] - found.mean)

        def error(atoms):
            return (x - found.mean - encode(x - found.mean, atoms, 1).decode(atoms)).square().sum()

        assert error(found.atoms) < 0.6 * error(chosen)

    def test_near_duplicates_are_dropped_while_there_are_others(self):
        base = rows(60)
        x = torch.cat([base, base + 1e-4 * rows(60, seed=1), base * 1.001])
        found = feed(energy(d_sae=50), x)
        cosines = (found.atoms @ found.atoms.T).fill_diagonal_(0).abs()
        assert cosines.max() < 0.99

    def test_duplicates_fill_up_by_degrees(self):
        base, _ = normalize_rows(rows(40, 64))
        # Four versions of each: cosines of about 0.87 and 0.97 to the first.
        x = torch.cat([base, base + 0.07 * rows(40, 64, 1), base + 0.03 * rows(40, 64, 2)])
        selector = energy(d_sae=60, d=64)
        found = feed(selector, torch.cat([x, -x]))
        assert len(found.labels) == 60

    def test_too_few_directions(self):
        x = rows(30).repeat(10, 1)
        with pytest.raises(ValueError, match="got d_sae=40, but 300 activations point in only 30"):
            feed(energy(), x)

    def test_guide_for_progress_bars(self):
        selector = energy(d_sae=100)
        selector.update(rows(90), Places.numbered(0, 90))
        assert selector.n_atoms == 90
        assert selector.running_fvu() != selector.running_fvu()
        selector.update(rows(300, seed=1), Places.numbered(90, 390))
        assert selector.n_atoms == 100
        assert 0 < selector.running_fvu() < 1


class TestOutliers:
    def test_ordinary_rows_are_left_alone(self):
        x = rows(2000) + 3
        mean = x.mean(dim=0)
        assert robust_centre(x, mean) is mean
        assert torch.equal(limit_outliers(x - mean), x - mean)

    @pytest.mark.parametrize("share", [1, 40, 400])
    def test_the_centre_is_that_of_the_others(self, share):
        x = rows(2000) + 3
        x[:share] = 500 * torch.sign(rows(share, seed=1).abs())  # all on one side
        found = robust_centre(x, x.mean(dim=0))
        distance = (found - x[share:].mean(dim=0)).norm()
        assert distance < 1e-5

    def test_a_long_row_counts_as_one_at_the_limit(self):
        x = rows(99)
        x[7] *= 1000
        limited = limit_outliers(x)
        assert torch.equal(limited[8:], x[8:])
        assert limited[7].norm() == pytest.approx(OUTLIER * x.norm(dim=1).median().item(), rel=1e-5)
        assert torch.nn.functional.cosine_similarity(limited[7], x[7], dim=0) > 0.9999

    def test_more_than_half_of_the_rows_at_the_centre(self):
        x = torch.cat([torch.zeros(30, 4), torch.eye(4)])
        assert torch.equal(limit_outliers(x), x)

    @pytest.mark.parametrize("update", [False, True])
    def test_selection_serves_the_other_activations(self, update):
        x = rows(3000, 32) @ torch.diag(torch.linspace(2, 0.1, 32)) + 1
        spoiled = x.clone()
        spoiled[::100] = 300 * (1 + 0.1 * rows(30, 32, seed=9))
        others = torch.ones(3000, dtype=torch.bool)
        others[::100] = False

        def error(data):
            found = feed(energy(d_sae=60, d=32, update=update), data)
            centred = x[others] - found.mean
            return (centred - encode(centred, found.atoms, 4).decode(found.atoms)).square().sum()

        assert error(spoiled) < 1.15 * error(x)


class TestUpdate:
    def test_solves_the_ridge_problem(self):
        x, atoms = rows(400).double(), normalize_rows(rows(30, seed=1).double())[0]
        codes = encode(x, atoms, 4)
        found = least_squares_atoms(x, codes, atoms, steps=60)
        dense = codes.to_dense(30)
        ridge = RIDGE * dense.square().sum(dim=0).mean()
        normal = dense.T @ dense + ridge * torch.eye(30)
        expected = torch.linalg.solve(normal, dense.T @ x + ridge * atoms)
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)

    def test_few_steps_already_lower_the_error(self):
        x, atoms = rows(400), normalize_rows(rows(30, seed=1))[0]
        codes = encode(x, atoms, 4)
        errors = [
            (x - codes.decode(least_squares_atoms(x, codes, atoms, steps))).square().sum()
            for steps in (0, 1, 4)
        ]
        assert errors[0] > errors[1] > errors[2]

    def test_an_unused_atom_stays(self):
        x, atoms = rows(500), normalize_rows(rows(30, seed=1))[0]
        codes = encode(x, atoms[:29], 3)
        found = least_squares_atoms(x, codes, atoms)
        assert torch.equal(found[29], atoms[29])
        assert not torch.isclose(found[:29], atoms[:29]).all(dim=1).any()

    def test_no_code_at_all(self):
        atoms = normalize_rows(rows(5))[0]
        nothing = encode(torch.zeros(3, 16), atoms, 2)
        assert torch.equal(least_squares_atoms(torch.zeros(3, 16), nothing, atoms), atoms)

    def test_recovers_what_made_the_data(self):
        x, true = planted()
        start = normalize_rows(true + 0.15 * rows(24, 32, seed=2))[0]
        found = update_atoms(x.split(1000), start, Coding(2, "mp"), least_cosine=0.5, progress=False)
        before, after = ((atoms * true).sum(dim=1).min() for atoms in (start, found))
        assert before < 0.9
        assert after > 0.995

    def test_earlier_rounds_count_by_their_weight(self):
        """A round solves for what its codes ask, and for what those of the one before ask by half."""
        x, atoms = rows(600).double(), normalize_rows(rows(30, seed=1).double())[0]
        options = dict(coding=Coding(4, "mp"), least_cosine=0.0, progress=False)
        between = update_atoms([x[:400]], atoms, **options)
        # The third does not know of the first.
        second = update_atoms([x[:400], x[400:]], atoms, **options)
        third = update_atoms([x[:400], x[400:], x[:300]], atoms, **options)
        codes = [encode(part, a, 4) for part, a in ((x[400:], between), (x[:300], second))]
        faded = PAST_WEIGHT**0.5
        both = SparseCodes(
            torch.cat([c.indices for c in codes]),
            torch.cat([faded * codes[0].values, codes[1].values]),
        )
        expected = least_squares_atoms(torch.cat([faded * x[400:], x[:300]]), both, second)
        torch.testing.assert_close(third, normalize_rows(expected)[0], atol=1e-12, rtol=0)

        codes = [encode(part, a, 4) for part, a in ((x[:400], atoms), (x[400:], between))]
        scale = [PAST_WEIGHT**0.5] * 400 + [1.0] * 200
        weighted = x * torch.tensor(scale, dtype=x.dtype)[:, None]
        both = SparseCodes(
            torch.cat([c.indices for c in codes]),
            torch.cat([c.values for c in codes]) * torch.tensor(scale, dtype=x.dtype)[:, None],
        )
        expected = normalize_rows(least_squares_atoms(weighted, both, between))[0]
        found = update_atoms([x[:400], x[400:]], atoms, **options)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

    def test_is_no_reason_to_choose_other_atoms(self):
        """Its samples are larger than the one that candidates are scored on, and hold that one."""
        x = rows(900) + 1
        sizes = dict(min_scored=300, min_updated=500)
        pure, moved = feed(energy(**sizes), x), feed(energy(update=True, **sizes), x)
        assert [a.key for a in moved.labels] == [a.key for a in pure.labels]
        assert not torch.equal(moved.atoms, pure.atoms)

    def test_selector_starts_from_the_pure_atoms_and_says_how_far_they_moved(self):
        x = torch.cat([rows(2000), 3 * rows(20, seed=5).repeat(40, 1) + 0.3 * rows(800, seed=6)]) + 1
        pure, moved = feed(energy(), x), feed(energy(update=True), x)
        assert [a.key for a in moved.labels] == [a.key for a in pure.labels]
        assert all(label.cosine == 1 for label in pure.labels)
        cosines = (pure.atoms * moved.atoms).sum(dim=1)
        expected = torch.tensor([label.cosine for label in moved.labels])
        torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)
        assert 0 < cosines.min() < 0.99
        assert torch.equal(moved.atoms, feed(energy(update=True), x, batch=7).atoms)

    @pytest.mark.parametrize("least_cosine", [0.0, 0.985, 1.0])
    def test_no_atom_leaves_the_activation_of_its_label(self, least_cosine):
        x = torch.cat([rows(2000), 3 * rows(20, seed=5).repeat(40, 1) + 0.3 * rows(800, seed=6)]) + 1
        pure = feed(energy(), x)
        moved = feed(energy(update=True, least_cosine=least_cosine), x)
        cosines = (pure.atoms * moved.atoms).sum(dim=1)
        assert cosines.min() >= least_cosine - 1e-6
        torch.testing.assert_close(moved.atoms.norm(dim=1), torch.ones(40))
        if least_cosine == 0.985:  # it holds those that would go farther, and no others
            assert (cosines < least_cosine + 1e-6).any()
            assert (cosines > least_cosine + 1e-3).any()
        if least_cosine == 0:  # it lets them go where they are drawn to
            assert cosines.min() < 0.98
        if least_cosine == 1:
            assert torch.equal(moved.atoms, pure.atoms)

    def test_held_atoms_are_the_nearest_that_are_allowed(self):
        origin, aside = (normalize_rows(rows(50, seed=seed).double())[0] for seed in (1, 2))
        atoms = normalize_rows(origin + 0.5 * aside)[0]
        assert torch.equal(hold_near(origin, origin, 1 - 1e-9), origin)
        held = hold_near(atoms, origin, 0.9)
        near = (atoms * origin).sum(dim=1) >= 0.9
        assert near.any()
        assert not near.all()
        assert torch.equal(held[near], atoms[near])
        assert ((held * origin).sum(dim=1)[~near] - 0.9).abs().max() < 1e-6
        # On the cap around the origin no other point is nearer to where the atom was.
        others = rows(4000, seed=3).double()
        for atom, start, found in zip(atoms[~near], origin[~near], held[~near], strict=True):
            away = others - (others @ start)[:, None] * start
            cap = 0.9 * start + (1 - 0.9**2) ** 0.5 * normalize_rows(away)[0]
            assert (cap @ atom).max() <= found @ atom + 1e-9

    def test_outliers_of_one_direction_are_no_duplicates_of_each_other(self):
        # Two massive activations with a cosine of 0.995: what one leaves of the other is 25 times as
        # long as an ordinary activation.
        axis, aside = torch.zeros(16), torch.zeros(16)
        axis[0] = aside[1] = 1
        massive = 1000 * (axis[None] + torch.tensor([[0.0], [0.1]]) * aside)
        x = rows(2000)
        x[::50] = massive[0]
        x[7::50] = massive[1]
        found = feed(energy(), x)
        for activation in massive - found.mean:
            cosine = found.atoms @ activation / activation.norm()
            assert cosine.abs().max() > 1 - 1e-6
        # So near that what is left is less than that of ordinary ones: repetitions.
        spray = rows(2000)
        spray[::20] = 1000 * axis + 0.2 * spray[::20]
        atoms = feed(energy(d_sae=100), spray).atoms
        assert (atoms[:, 0].abs() > 0.99).sum() == 1
        # Ordinary activations that are as near to each other do repeat each other.
        x = rows(2000)
        x[::50], x[7::50] = 3 * axis, 3 * (axis + 0.1 * aside)
        atoms = feed(energy(d_sae=100), x).atoms
        assert (atoms @ atoms.T).fill_diagonal_(0).abs().max() < 0.85

    def test_an_outlier_and_an_ordinary_activation_of_one_direction_are_one(self):
        y = rows(20)
        x = torch.cat([y, -y, 1000 * y[:3], -1000 * y[:3]])
        with pytest.raises(ValueError, match="in only 20 directions"):
            feed(energy(d_sae=23, k=3), x)
        atoms = feed(energy(d_sae=20, k=3), x).atoms
        assert (atoms @ atoms.T).fill_diagonal_(0).abs().max() < 0.999

    @pytest.mark.parametrize("make", [torch.sign, lambda x: x.bfloat16().float()])
    def test_rows_of_few_digits_are_told_apart(self, make):
        x = make(rows(100_000, 32)).unique(dim=0)
        sample = StreamSample(32, len(x), 0, x.dtype, CPU, distinct=True, labelled=False)
        sample.update(x, Places.numbered(0, len(x)))
        assert len(sample) == len(x)

    def test_an_unused_atom_stays_through_all_rounds(self):
        atoms = normalize_rows(rows(30, seed=1))[0]
        x = 3 * atoms[:20] + 0.01 * rows(20, seed=2)
        found = update_atoms([x, x], atoms, Coding(1, "mp"), least_cosine=0.9, progress=False)
        assert torch.equal(found[20:], atoms[20:])
        assert not torch.equal(found[:20], atoms[:20])


class TestRefine:
    @pytest.mark.parametrize("signed", [True, False])
    def test_nearest_rows_by_a_slow_loop(self, signed):
        """In so few dimensions many atoms are nearest to one row, and all rows but a few are taken."""
        pool = normalize_rows(rows(45, 3).double())[0]
        pool = torch.cat([pool, -pool[:5], pool[5:10]])
        atoms = normalize_rows(rows(40, 3, seed=1).double())[0]
        cosines = atoms @ pool.T
        similar = pool @ pool.T
        if signed:
            cosines, similar = cosines.abs(), similar.abs()
        expected, free = {}, torch.ones(len(pool), dtype=torch.bool)
        first = cosines.argmax(dim=1)
        for atom in range(40):
            if free[first[atom]]:
                expected[atom] = int(first[atom])
                free &= similar[first[atom]] < SAME_DIRECTION
        assert len(expected) < 35
        for atom in sorted(set(range(40)) - set(expected)):
            expected[atom] = int(cosines[atom].masked_fill(~free, -2).argmax())
            free &= similar[expected[atom]] < SAME_DIRECTION
        found = nearest_rows(atoms, pool, signed)
        # By row, not by index: of two rows that are equal, rounding decides.
        assert torch.equal(pool[found], pool[[expected[atom] for atom in range(40)]])
        distinct = (pool[found] @ pool[found].T).fill_diagonal_(0)
        assert (distinct.abs() if signed else distinct).max() < SAME_DIRECTION

    def test_finds_the_activations_nearest_to_what_made_the_data(self):
        x, true = planted()
        unit = normalize_rows(x)[0]
        start = normalize_rows(true + 0.15 * rows(24, 32, seed=2))[0]
        moved = update_atoms([x] * 8, start, Coding(2, "mp"), least_cosine=0.0, progress=False)
        found = nearest_rows(moved, unit, signed=True)
        before, after = ((atoms * true).sum(dim=1).abs().min() for atoms in (start, unit[found]))
        assert before < 0.9
        assert after > 0.985
        nearest = (unit @ true.T).abs().max(dim=0).values.min()
        assert after > nearest - 0.01

    def test_a_taken_row_is_not_taken_again_where_cosines_are_rounded(self):
        # In float32 and many uneven dimensions the cosine of a row to itself can be below the limit.
        scales = (1.5 * rows(1, 4096, seed=2)).exp()
        atoms = rows(20, 4096).repeat(15, 1) + 0.01 * rows(300, 4096, seed=1)
        pool = rows(20, 4096).repeat(20, 1) + 0.3 * rows(400, 4096, seed=3)
        atoms, pool = (normalize_rows(x * scales)[0] for x in (atoms, pool))
        assert len(nearest_rows(atoms, pool, signed=True).unique()) == 300

    def test_more_atoms_than_directions_get_different_rows(self):
        pool = normalize_rows(rows(5, seed=1))[0].repeat(4, 1)
        found = nearest_rows(normalize_rows(rows(20))[0], pool, signed=True)
        assert sorted(found.tolist()) == list(range(20))

    @pytest.mark.parametrize("signed", [True, False])
    def test_selector_gives_activations_that_reconstruct_better(self, signed):
        centres = 3 * rows(30, seed=5)
        centres = torch.cat([centres, -centres]).repeat(60, 1)  # an atom of the wrong sign is of no use
        x = centres + 0.8 * rows(3600, seed=6) + 1
        options = dict(signed=signed, d_sae=30)
        best, found = feed(energy(**options), x), feed(energy(thorough=True, **options), x)
        origin = x[[label.row for label in found.labels]] - found.mean
        torch.testing.assert_close(found.atoms, normalize_rows(origin)[0])
        assert all(label.cosine == 1 for label in found.labels)
        assert len({label.row for label in found.labels}) == 30

        def error(dictionary):
            centred = centres + 0.8 * rows(3600, seed=7) + 1 - dictionary.mean
            codes = encode(centred, dictionary.atoms, 4, signed=signed)
            return (centred - codes.decode(dictionary.atoms)).square().sum()

        assert error(found) < 0.97 * error(best)

    def test_refines_the_atoms_of_best_by_more_activations_than_candidates(self):
        sizes = dict(min_candidates=300, min_scored=300, min_updated=700, min_replacements=900)
        x = 3 * rows(60, seed=5).repeat(40, 1) + 0.8 * rows(2400, seed=6) + 1
        best, thorough = (feed(energy(thorough=t, **sizes), x) for t in (False, True))
        sample = StreamSample(16, 300, 0, torch.float32, CPU, distinct=True, labelled=False)
        sample.update(x, Places.numbered(0, len(x)))
        candidates = {label.row for label in sample.places()}
        assert {label.row for label in best.labels} <= candidates
        assert not {label.row for label in thorough.labels} <= candidates
        # Nothing moves: each is nearest to itself.
        unmoved = feed(energy(thorough=True, rounds=0, **sizes), x)
        assert unmoved.labels == best.labels
        assert torch.equal(unmoved.atoms, best.atoms)

    def test_labels_are_of_rows_that_have_a_direction(self):
        half = rows(300)
        x = torch.cat([torch.zeros(5, 16), half, -half])  # the first five are the mean
        found = feed(energy(thorough=True), x)
        origin = x[[label.row for label in found.labels]] - found.mean
        torch.testing.assert_close(found.atoms, normalize_rows(origin)[0])

    def test_one_huge_activation_does_not_hide_the_others(self):
        x = rows(2000)
        sample = StreamSample(16, 1024, 0, torch.float32, CPU, distinct=True, labelled=False)
        sample.update(x, Places.numbered(0, len(x)))
        unseen = set(range(2000)) - {label.row for label in sample.places()}
        x[min(unseen)] *= 1e7
        found = feed(energy(thorough=True), x)
        assert len({label.row for label in found.labels}) == 40

    def test_bit_equal_whatever_the_batches(self):
        x = rows(2000)
        first, second = (feed(energy(thorough=True, update=True), x, batch=b) for b in (2000, 37))
        assert torch.equal(first.atoms, second.atoms)
        assert first.labels == second.labels

    def test_an_update_begins_at_the_refined_atoms(self):
        x = 3 * rows(60, seed=5).repeat(60, 1) + 0.8 * rows(3600, seed=6) + 1
        pure, moved = feed(energy(thorough=True), x), feed(energy(thorough=True, update=True), x)
        assert [a.key for a in moved.labels] == [a.key for a in pure.labels]
        cosines = (pure.atoms * moved.atoms).sum(dim=1)
        expected = torch.tensor([label.cosine for label in moved.labels])
        torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)
        assert 0.9 - 1e-6 < cosines.min() < 0.999

    def test_as_many_atoms_as_there_are_directions(self):
        x = torch.cat([rows(40), rows(40)])
        found = feed(energy(thorough=True), x)
        assert sorted(label.row % 40 for label in found.labels) == list(range(40))


class TestFolds:
    def test_texts_stay_together_and_folds_are_even(self):
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(0, 200, (3000,), generator=generator).square() // 200  # of any size
        labels = [Label(text, i) for i, text in enumerate(texts.tolist())]
        in_rows, in_atoms = assign_folds(labels[:2000], labels[2000:])
        fold_of = {}
        for label, fold in zip(labels, torch.cat([in_rows, in_atoms]).tolist(), strict=True):
            assert fold_of.setdefault(label.row, fold) == fold
        for folds in (in_rows, in_atoms):
            shares = folds.bincount(minlength=8) / len(folds)
            assert shares.min() > 0.06
            assert shares.max() < 0.2

    def test_rows_without_texts_stay_with_their_neighbours(self):
        labels = Places.numbered(0, 6400)
        folds, _ = assign_folds(labels[:3200:2], labels[1:6400:3])
        assert sorted(folds.unique().tolist()) == list(range(8))
        # 1,600 of them, half of those that 64 runs are made of: about 32 runs begin.
        assert 8 <= (folds.diff() != 0).sum() <= 64

    @pytest.mark.parametrize(
        ("share", "contexts", "together"), [(0.2, 1, 200), (0.3, 100, 3), (0.3, 1, 1)]
    )
    def test_what_stays_together_where_one_text_has_most(self, share, contexts, together):
        many = int(share * 1000)
        labels = [Label(0, i * contexts // many, i) for i in range(many)]
        labels += [Label(1 + i) for i in range(1000 - many)]
        folds = assign_folds(labels, labels)[0][:many].reshape(-1, together)
        assert (folds == folds[:, :1]).all()
        assert (len(folds.unique()) == 1) == (together == many)

    @pytest.mark.parametrize("labels", [[Label(0)] * 900, [Label(i) for i in range(3)]])
    def test_too_few_places_make_no_folds(self, labels):
        rows_in, atoms_in = assign_folds(labels, labels[:2])
        assert (rows_in == 0).all()
        assert (atoms_in == -1).all()

    @given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=60), st.data())
    def test_no_fold_has_all_atoms(self, places, data):
        labels = [Label(*place) for place in places]
        atoms = data.draw(st.lists(st.sampled_from(labels), min_size=1, max_size=60))
        folds, atom_folds = assign_folds(labels, atoms)
        for fold in folds.unique():
            assert (atom_folds != fold).any()
        again = assign_folds(labels, atoms)
        assert torch.equal(folds, again[0])
        assert torch.equal(atom_folds, again[1])


class TestGreedySelector:
    def test_equals_a_slow_loop(self):
        x = rows(300) + 1
        found = feed(greedy(None, tau=0.3), x, batch=50)

        # The paper's rule, literally: no row repeats, so the first d_in rows are the most frequent.
        unit = torch.nn.functional.normalize(x, dim=1)
        chosen = list(range(16))
        for start in range(0, 300, 50):
            atoms = unit[chosen]
            for i in range(start, start + 50):
                reconstruction = encode(x[i], atoms, 4).decode(atoms)
                if (x[i] - reconstruction).square().sum() > 0.3 * x[i].square().sum():
                    chosen.append(i)
        assert [label.row for label in found.labels] == chosen
        torch.testing.assert_close(found.atoms, unit[chosen])
        assert (found.mean == 0).all()

    def test_starts_from_the_most_frequent(self):
        x = rows(20)
        stream = torch.cat([x, x[7:8], x[7:8], x[11:12]])
        found = feed(greedy(16), stream, batch=100)
        first = [label.row for label in found.labels]
        assert first == [7, 11, *[i for i in range(20) if i not in (7, 11)][:14]]

    @pytest.mark.parametrize("start", ["first", "random"])
    def test_the_start_decides_ties_only(self, start):
        x = rows(60)
        stream = torch.cat([x, x[37:38], x[37:38], x[51:52]])

        def starts(seed):
            selector = GreedyRule(start=start).selector(Request(16, 16, 4, seed=seed))
            return [label.row for label in feed(selector, stream, batch=100).labels]

        found = starts(0)
        assert found[:2] == [37, 51]
        assert found == starts(0)
        assert (found == starts(1)) == (start == "first")
        assert (sorted(found[2:]) == list(range(14))) == (start == "first")

    def test_a_random_start_draws_from_everywhere(self):
        drawn = [
            label.row
            for seed in range(200)
            for label in feed(
                GreedyRule(start="random").selector(Request(4, 4, 2, seed=seed)), rows(40, 4), 40
            ).labels
        ]
        counts = torch.tensor(drawn).bincount(minlength=40)
        assert len(drawn) == 800
        assert counts.min() >= 7  # 20 each on average, standard deviation 4.2
        assert counts.max() <= 33

    def test_crop_and_duplicates(self):
        x = rows(100)
        stream = torch.cat([x, x, -x])
        found = feed(greedy(60, tau=0.01), stream)
        assert len(found.labels) == 60
        keys = [label.row % 100 for label in found.labels]
        assert len(set(keys)) == 60

    def test_lower_threshold_gives_more_atoms(self):
        sizes = [len(feed(greedy(None, tau=tau), rows(1000)).labels) for tau in (0.6, 0.4, 0.2)]
        assert sizes == sorted(set(sizes))

    def test_fewer_than_asked_for_is_told(self):
        with pytest.warns(UserWarning, match="has 16 atoms, not 400.* loss_threshold=0.99"):
            feed(greedy(400, tau=0.99), rows(500))

    def test_zero_rows_are_no_atoms(self):
        with pytest.raises(ValueError, match="norm above 0"), warnings.catch_warnings():
            feed(greedy(10), torch.zeros(20, 16))

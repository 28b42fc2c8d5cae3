"""Builds in shards: stopped, moved, killed, run in any order, and merged."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open

from itda_lens import build, fit, load, open_plan, plan
from itda_lens.dictionary import EnergyRule, PriorityBound, StreamSample
from itda_lens.records import Places
from itda_lens.records.files import alone_in
from itda_lens.sae import provenance_of
from itda_lens.sources import ArraySource, Listed, ModelSource
from itda_lens.training import plan_from, recipe_of

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
SMALL = EnergyRule(min_candidates=90, min_scored=150, min_updated=200)
"""Samples that are smaller than the stream, so that most rows stay out of them."""

SETTINGS = dict(d_sae=40, k=4, rule=SMALL, batch_size=4, context_size=16)


def same(found, expected):
    assert list(found) == list(expected)
    for hook in expected:
        assert torch.equal(found[hook].W_dec, expected[hook].W_dec)
        assert torch.equal(found[hook].b_dec, expected[hook].b_dec)
        assert found[hook].labels == expected[hook].labels
        record, wanted = provenance_of(found[hook]), provenance_of(expected[hook])
        assert found[hook].cfg.threshold == expected[hook].cfg.threshold
        assert {**vars(record), "seconds": 0} == {**vars(wanted), "seconds": 0}


@pytest.fixture
def planned(tiny, texts, tmp_path):
    return plan(tiny, texts, HOOKS, folder=tmp_path / "run", shard_rows=100, **SETTINGS)


class TestPlan:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            dict(update=True, seed=3),
            dict(l0=2.5, k=6),
            dict(max_tokens=777),
            dict(rule=EnergyRule()),
            dict(rule=None, preset="thorough", prepend_bos=False, keep_special_tokens=True),
        ],
        ids=str,
    )
    def test_is_build_bit_for_bit(self, tiny, texts, tmp_path, settings):
        settings = SETTINGS | settings
        made = plan(tiny, texts, HOOKS, folder=tmp_path, shard_rows=100, **settings)
        indices = list(range(len(made)))
        assert len(indices) > 5
        random.Random(0).shuffle(indices)
        for i in indices:
            made.run(i)
        expected = build(tiny, texts, HOOKS, progress=False, **settings)
        same(made.finish(progress=False), expected)

    def test_shards_are_whole_passes_of_every_token_once(self, planned, tiny, texts):
        source = ModelSource(
            tiny, texts, HOOKS, batch_size=4, cutting=planned.source.tokenization.cutting
        )
        sizes = [len(rows.places) for rows in source.rows()]
        assert planned.n_rows == sum(sizes)
        for shard in planned.shards:
            assert sum(sizes[: shard.n_batches]) == shard.n_rows
            del sizes[: shard.n_batches]
        assert sizes == []
        assert all(shard.n_rows >= 100 for shard in planned.shards[:-1])

    def test_shards_hold_no_more_than_the_samples(self, planned):
        """Rows that cannot enter a sample are known before the forward pass."""
        planned.run_all(progress=False)
        rows = {}
        for i in range(len(planned)):
            with safe_open(planned.folder / f"shard-{i:06d}.safetensors", "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith(".rows"):
                        rows[name] = rows.get(name, 0) + file.get_slice(name).get_shape()[0]
        candidates, scored = rows["0.selector.1.rows"], rows["0.selector.2.rows"]
        assert scored == SMALL.scored_per_atom * 40 or scored == SMALL.min_scored
        assert 160 < candidates <= 2 * 160  # four an atom, and room for equal ones
        assert planned.n_rows > 4 * candidates / 2

    def test_goes_on_in_another_process(self, tiny_folder, texts, tmp_path):
        file = tmp_path / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made = plan(
            str(tiny_folder), str(file), HOOKS, folder=tmp_path / "run", shard_rows=300,
            loader="huggingface", device="cpu", **SETTINGS,
        )  # fmt: skip
        made.run(1)
        script = (
            "import sys, itda_lens\n"
            "plan = itda_lens.open_plan(sys.argv[1])\n"
            "assert 1 not in plan.pending()\n"
            "plan.run_all(progress=False)\n"
        )
        moved = tmp_path / "elsewhere"
        shutil.move(made.folder, moved)
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(
            [sys.executable, "-c", script, str(moved)], check=True, env=environment, cwd=tmp_path
        )
        again = open_plan(moved)
        assert again.pending() == []
        expected = build(
            str(tiny_folder), str(file), HOOKS, loader="huggingface", device="cpu", progress=False,
            **SETTINGS,
        )  # fmt: skip
        same(again.finish(progress=False), expected)

    def test_build_with_a_folder(self, tiny, texts, tmp_path):
        settings = SETTINGS | dict(progress=False)
        expected = build(tiny, texts, HOOKS, **settings)
        same(build(tiny, texts, HOOKS, folder=tmp_path, **settings), expected)
        shards = sorted(tmp_path.glob("shard-*"))
        times = [shard.stat().st_mtime_ns for shard in shards]
        same(build(tiny, list(texts), HOOKS, folder=tmp_path, **settings), expected)
        assert [shard.stat().st_mtime_ns for shard in shards] == times

    def test_killed_thirty_times(self, planned, tiny, texts):
        """Kill -9 at any moment: finished shards stay, and the dictionary is that of one run."""
        start = time.perf_counter()
        planned.run(0, again=True)
        one = time.perf_counter() - start
        draw, kills = random.Random(0), 0
        while kills < 30:
            before = set(planned.pending())
            child = _forked(lambda: planned.run_all(progress=False))
            time.sleep(draw.uniform(0, 3 * one))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            assert set(planned.pending()) <= before
            if not planned.pending():
                for i in draw.sample(range(len(planned)), len(planned) // 2):
                    planned._file(i).unlink()
        planned.run_all(progress=False)
        same(planned.finish(progress=False), build(tiny, texts, HOOKS, progress=False, **SETTINGS))
        assert sorted(path.name for path in planned.folder.iterdir()) == sorted(
            ["plan.json", "texts.jsonl", *(f"shard-{i:06d}.safetensors" for i in range(len(planned)))]
        )

    def test_a_failed_write_loses_nothing(self, planned, monkeypatch):
        planned.run(0)
        monkeypatch.setattr("itda_lens.training.shards.write_tensors", _full_disk)
        with pytest.raises(OSError, match=r"No space left.*shard-000001"):
            planned.run_all(progress=False)
        assert planned.pending() == list(range(1, len(planned)))
        monkeypatch.undo()
        planned.run_all(progress=False)
        assert planned.pending() == []

    def test_two_runs_of_one_plan(self, planned):
        with (
            alone_in(planned.folder),
            pytest.raises(BlockingIOError, match="another process is writing"),
        ):
            planned.run_all(progress=False)
        planned.run_all(progress=False)

    def test_own_source_and_rule(self, tmp_path):
        x = torch.randn(900, 12, generator=torch.Generator().manual_seed(0))
        source = ArraySource(x, batch_size=64)
        assert isinstance(source, Listed)
        recipe = recipe_of(d_sae=30, k=3, rule=SMALL, l0=2.0)
        made = plan_from(source, recipe, folder=tmp_path, shard_rows=200)
        made.run(2)
        again = open_plan(tmp_path, source=source)
        again.run_all(progress=False)
        found = again.finish(progress=False)["activations"]
        expected = fit(x, d_sae=30, k=3, rule=SMALL, l0=2.0, batch_size=64)
        assert torch.equal(found.W_dec, expected.W_dec)
        assert found.cfg.threshold == expected.cfg.threshold
        assert found.labels == expected.labels

    def test_texts_that_repeat(self, tiny, texts, tmp_path):
        """Equal activations count once, so that more rows than a sample's size may be needed."""
        many = [text for text in texts[:20] for _ in range(5)]
        expected = build(tiny, many, HOOKS, progress=False, **SETTINGS)
        same(build(tiny, many, HOOKS, folder=tmp_path / "a", progress=False, **SETTINGS), expected)

    def test_too_little_spare_is_told(self, tmp_path):
        x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).repeat(9, 1)
        recipe = recipe_of(d_sae=20, k=3, rule=SMALL)
        source = ArraySource(x, batch_size=64)
        made = plan_from(source, recipe, folder=tmp_path / "a", shard_rows=200, spare=0.0)
        made.run_all(progress=False)
        with pytest.raises(ValueError, match="spare must be larger: .* sample of 90 .* got"):
            made.finish(progress=False)
        made = plan_from(source, recipe, folder=tmp_path / "b", shard_rows=200, spare=9.0)
        made.run_all(progress=False)
        found = made.finish(progress=False)["activations"]
        assert torch.equal(found.W_dec, fit(x, d_sae=20, k=3, rule=SMALL, batch_size=64).W_dec)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine."""
    ray = pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of what its next versions will do
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


class TestRay:
    def test_a_worker_is_killed(self, cluster, tiny_folder, texts, tmp_path):
        """Two workers, one of which is killed at work: nothing is lost, and the bits are the same."""
        settings = SETTINGS | dict(loader="huggingface", device="cpu")
        made = plan(str(tiny_folder), texts, HOOKS, folder=tmp_path / "run", shard_rows=50, **settings)
        killed = []
        killer = threading.Thread(target=kill_one_worker, args=(killed,))
        killer.start()
        made.run_all(engine="ray", workers=2, options={"num_cpus": 0.5}, progress=False)
        killer.join()
        assert len(killed) == 1
        assert made.pending() == []
        expected = build(str(tiny_folder), texts, HOOKS, progress=False, **settings)
        same(made.finish(progress=False), expected)

    def test_a_fault_of_the_shard_is_raised(self, cluster, tiny_folder, texts, tmp_path):
        file = tmp_path / "texts.txt"
        file.write_text(" ".join(texts))
        settings = SETTINGS | dict(loader="huggingface", device="cpu")
        made = plan(str(tiny_folder), str(file), HOOKS, folder=tmp_path / "run", **settings)
        file.write_text(" ".join(texts[::-1]))
        with pytest.raises(ValueError, match="other tokens than were planned"):
            made.run_all(engine="ray", progress=False)


def kill_one_worker(killed):
    """Kill the first worker that is seen: it opens the plan, loads the model or runs a shard."""
    end = time.monotonic() + 300
    while not killed and time.monotonic() < end:
        for process in psutil.process_iter(["cmdline"]):
            if "::_Worker" in str(process.info["cmdline"]):
                process.kill()
                killed.append(process.pid)
                break
        time.sleep(0.02)


class TestCommands:
    def test_parts_and_whole(self, itda_command, tiny_folder, texts, tmp_path):
        file, run, out = tmp_path / "texts.txt", tmp_path / "run", tmp_path / "out"
        file.write_text(" ".join(texts))
        command = ["build", tiny_folder, "--texts", file, "--hook", HOOKS[0], "--d-sae", 40, "--k", 4]
        command += ["--batch-size", 2]
        parts = [*command, "--folder", run, "--shard-rows", 200]
        code, said, _ = itda_command(*parts, "--plan-only")
        assert code == 0
        assert "in 5 parts, 5 of them to do Each: itda build-shard" in " ".join(said.split())
        code, said, _ = itda_command("build-shard", run, "--index", 3, "--index", 1)
        assert (code, said.rstrip().endswith("2 of 5 parts are finished")) == (0, True)
        code, _, told = itda_command("build-finish", run, "--out", out)
        assert code == 2
        assert "all shards must be finished first: 3 of 5 are not" in told
        assert not out.exists()
        for i in (0, 2, 4):
            assert itda_command("build-shard", run, "--index", i)[0] == 0
        assert itda_command("build-finish", run, "--out", out)[0] == 0
        assert itda_command(*parts, "--out", tmp_path / "again")[0] == 0
        assert itda_command(*command, "--out", tmp_path / "plain")[0] == 0
        plain = load(tmp_path / "plain" / HOOKS[0])
        for folder in (out, tmp_path / "again"):
            same({"a": load(folder / HOOKS[0])}, {"a": plain})

    def test_options_that_do_not_go_together(self, itda_command, tmp_path):
        command = ["build", "no-model", "--texts", "x.txt", "--hook", "a"]
        for more, told in (
            (["--plan-only"], "--plan-only and --shard-rows need --folder"),
            (["--out", tmp_path / "o", "--shard-rows", 9], "need --folder"),
            (["--folder", tmp_path / "f"], "--out is needed, or else --plan-only"),
            (
                ["--folder", tmp_path / "f", "--out", tmp_path / "o", "--plan-only"],
                "or else --plan-only",
            ),
        ):
            code, _, error = itda_command(*command, *more)
            assert (code, told in error) == (2, True), error


class TestBadInput:
    def test_other_settings(self, planned, tiny, texts):
        for changed, told in (
            (dict(seed=1), "another recipe"),
            (dict(shard_rows=50), "another shard_rows"),
            (dict(batch_size=8), "another source"),
            (dict(spare=0.5), "another spare"),
            (dict(d_sae=41), "another recipe"),
        ):
            settings = dict(shard_rows=100) | SETTINGS | changed
            with pytest.raises(ValueError, match=told):
                plan(tiny, texts, HOOKS, folder=planned.folder, **settings)
        settings = dict(folder=planned.folder, shard_rows=100) | SETTINGS
        with pytest.raises(ValueError, match="another hooks"):
            plan(tiny, texts, HOOKS[:1], **settings)
        with pytest.raises(ValueError, match="other texts: text 3 differs"):
            plan(tiny, [*texts[:3], "else", *texts[4:]], HOOKS, **settings)
        with pytest.raises(ValueError, match="other texts: text 59 differs"):
            plan(tiny, texts[:-1], HOOKS, **settings)
        assert plan(tiny, texts, HOOKS, **settings).pending() == planned.pending()

    def test_texts_that_change_between_planning_and_running(self, tiny, texts, tmp_path):
        file = tmp_path / "texts.txt"
        file.write_text("\n".join(texts[:20]))
        made = plan(tiny, file, HOOKS, folder=tmp_path / "run", **(SETTINGS | dict(d_sae=9)))
        file.write_text("\n".join(texts[20:40]))
        made = open_plan(made.folder, model=tiny)
        with pytest.raises(ValueError, match="other tokens than were planned"):
            made.run(0)

    def test_damage(self, planned):
        with pytest.raises(ValueError, match="all shards must be finished.*first is number 0"):
            planned.finish()
        planned.run_all(progress=False)
        file = planned.folder / "shard-000002.safetensors"
        whole = file.read_bytes()
        for damaged in (whole[:-20], b"", whole[:-4] + bytes([1, 2, 3, 4])):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"shard-000002.* is damaged: run\(2, again=True\)"):
                planned.finish()
        planned.run(2, again=True)
        assert file.read_bytes()[:100] is not None
        planned.finish(progress=False)

    def test_shard_of_another_plan(self, planned, tiny, texts, tmp_path):
        settings = SETTINGS | dict(seed=9)
        other = plan(tiny, texts, HOOKS, folder=tmp_path / "other", shard_rows=100, **settings)
        other.run(1)
        planned.run_all(progress=False)
        shutil.copy(other._file(1), planned._file(1))
        with pytest.raises(ValueError, match="of another plan"):
            planned.finish()

    def test_folders_without_a_plan(self, planned, tmp_path):
        with pytest.raises(ValueError, match="holds no plan"):
            open_plan(tmp_path)
        file = planned.folder / "plan.json"
        content = json.loads(file.read_text())
        for damaged in ("{", "[]", "{}", json.dumps(content | {"shards": None})):
            file.write_text(damaged)
            with pytest.raises(ValueError, match="is damaged"):
                open_plan(planned.folder)
        content["settings"]["format"] = 99
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="another version"):
            open_plan(planned.folder)

    def test_arguments(self, planned, tiny, texts, tmp_path):
        with pytest.raises(ValueError, match="rule must not depend on the order"):
            plan(tiny, texts, HOOKS, folder=tmp_path / "a", d_sae=9, k=2, preset="paper")
        with pytest.raises(TypeError, match="no argument 'colour'"):
            plan(tiny, texts, HOOKS, folder=tmp_path / "a", d_sae=9, k=2, colour=1)
        with pytest.raises(ValueError, match="shard_rows must be at least 1"):
            plan(tiny, texts, HOOKS, folder=tmp_path / "b", d_sae=9, k=2, shard_rows=0)
        with pytest.raises(ValueError, match="d_sae must be at most the number of activations"):
            plan(tiny, texts[:2], HOOKS, folder=tmp_path / "c", d_sae=900, k=2)
        with pytest.raises(ValueError, match=r"index must be between 0 and \d+, got 99"):
            planned.run(99)
        source = ArraySource(torch.randn(90, 8))
        made = plan_from(source, recipe_of(d_sae=9, k=2), folder=tmp_path / "d")
        with pytest.raises(ValueError, match="source must be given"):
            open_plan(made.folder).run(0)
        with pytest.raises(ValueError, match="rule must be that of the plan"):
            open_plan(planned.folder, rule=EnergyRule())


class TestBound:
    @pytest.mark.parametrize("distinct", [False, True])
    @pytest.mark.parametrize("seed", [0, 5])
    def test_nothing_of_the_sample_is_beyond_it(self, distinct, seed):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(500, 4, generator=generator)[torch.randint(0, 500, (3000,), generator=generator)]
        places = Places.at(np.arange(3000))

        def sample():
            return StreamSample(
                4, 100, seed, x.dtype, x.device, distinct=distinct, labelled=True
            )  # fmt: skip

        free, limited = sample(), sample()
        bound = limited.bound(spare=1.0)
        for part in range(0, 3000, 250):
            bound.update(places[part : part + 250])
        assert isinstance(bound, PriorityBound)
        limited.limit(bound.value())
        for one in (free, limited):
            one.update(x[:1700], places[:1700])
            one.update(x[1700:], places[1700:])
        limited.check_whole()
        assert torch.equal(free.rows(), limited.rows())
        assert free.places() == limited.places()
        assert (limited._priorities <= bound.value()).all()
        assert limited._n_beyond > 2000


def _forked(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, which run no torch
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def _full_disk(state, file, metadata=None):
    raise OSError(28, "No space left on device", str(file))

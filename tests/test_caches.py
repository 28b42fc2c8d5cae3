"""Caches of activations: whole or not at all, and the rows of their source bit for bit."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from itda_lens import Label, fit
from itda_lens.records import Places, Tag
from itda_lens.sources import ArraySource, CachedSource, ModelSource, Rows, cache, gathered
from itda_lens.sources.caches import CLOSE, RECORD
from itda_lens.training import build_from, recipe_of

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
X = torch.randn(600, 8, generator=torch.Generator().manual_seed(5))
QUIET = dict(progress=False)
SMALL = dict(shard_bytes=600, progress=False)


def source_of(tiny, texts, **options):
    return ModelSource(tiny, texts, HOOKS, batch_size=4, **options)


def rows_of(source, skip=0):
    return list(source.rows(skip))


def same_rows(a: list[Rows], b: list[Rows]) -> bool:
    return len(a) == len(b) and all(
        one.places == other.places
        and list(one.places) == list(other.places)
        and (one.places.identity == other.places.identity).all()
        and all(torch.equal(x, other.values[hook]) and x.dtype == other.values[hook].dtype
                for hook, x in one.values.items())
        for one, other in zip(a, b, strict=True)
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A cache of several shards."""
    cache(ArraySource(X, [f"name {i}" for i in range(600)], item="image", batch_size=50), tmp_path / "c",
          shard_bytes=5000, **QUIET)  # fmt: skip
    return tmp_path / "c"


class TestSameRows:
    @pytest.mark.parametrize("shard_bytes", [1, 4000, 2**28])
    def test_of_a_model(self, tiny, texts, tmp_path, shard_bytes):
        source = source_of(tiny, texts)
        kept = cache(source, tmp_path / "c", shard_bytes=shard_bytes, **QUIET)
        assert same_rows(rows_of(kept), rows_of(source))
        assert kept.hooks == HOOKS
        for skip in (0, 1, 37, 200, kept.n_rows - 1, kept.n_rows):
            assert same_rows(rows_of(kept, skip), rows_of(source, skip))
        for hook in HOOKS:
            assert kept.provenance(hook) == source.provenance(hook)

    @pytest.mark.parametrize("preset", ["best", "paper"])
    def test_dictionaries_are_equal(self, tiny, texts, tmp_path, preset):
        recipe = recipe_of(d_sae=16, k=3, preset=preset, l0=2.0)
        source = source_of(tiny, texts)
        built = build_from(source, recipe, **QUIET)
        kept = cache(source_of(tiny, texts), tmp_path / "c", shard_bytes=3000, **QUIET)
        again = build_from(CachedSource(kept.folder), recipe, **QUIET)
        for hook, itda in built.items():
            assert torch.equal(again[hook].W_dec, itda.W_dec)
            assert torch.equal(again[hook].b_dec, itda.b_dec)
            assert list(again[hook].labels) == list(itda.labels)
            if preset == "best":  # the paper's rule may stop before the source ends
                assert again[hook].cfg.to_dict() == itda.cfg.to_dict()

    def test_places_and_tags(self, tmp_path):
        labels = [Label(i, 0, 1, kind="text", role="user", special=i % 2 == 0) for i in range(600)]
        triples = [(0, 0, 0)] * 600  # told apart by their order
        tagged = Places.at(
            torch.arange(600).numpy(), tags=[Tag("user", f"u{i % 9}") for i in range(600)]
        )
        by_head = Places.numbered(0, 300).by_head(2)
        for i, given in enumerate((labels, triples, tagged, by_head, ["ä\ud800"] * 600, None)):
            source = ArraySource(X, given, batch_size=70)
            kept = cache(source, tmp_path / str(i), shard_bytes=6000, **QUIET)
            assert same_rows(rows_of(kept), rows_of(source))

    def test_fit_and_evaluate_take_one(self, folder):
        from itda_lens.analysis import evaluate_rows

        itda = fit(CachedSource(folder), d_sae=8, k=2)
        one = fit(X, labels=[f"name {i}" for i in range(600)], item="image", d_sae=8, k=2)
        assert torch.equal(itda.W_dec, one.W_dec)
        assert str(itda.labels[0]) == str(one.labels[0])
        (found,) = evaluate_rows(itda, CachedSource(folder), **QUIET)
        (expected,) = evaluate_rows(one, X, batch_size=50, **QUIET)
        assert found == expected


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_exact_is_the_dtype_of_the_numbers(self, dtype, tmp_path):
        source = ArraySource(X.to(dtype))
        kept = cache(source, tmp_path / "c", **QUIET)
        assert same_rows(rows_of(kept), rows_of(source))
        with safe_open(next(kept.folder.glob("*.safetensors")), "pt") as file:
            assert file.get_tensor("values.0").dtype == (
                torch.float32 if dtype == torch.float64 else dtype  # X is drawn in float32
            )

    def test_rounding_is_asked_for(self, tmp_path):
        kept = cache(ArraySource(X), tmp_path / "c", dtype="bfloat16", **QUIET)
        values = gathered(kept)["activations"].values
        assert torch.equal(values, X.bfloat16().float())
        with pytest.raises(ValueError, match="dtype must hold all activations, but 1e.08.*'float16'"):
            cache(ArraySource(X.abs().clamp(min=1e8)), tmp_path / "d", dtype="float16", **QUIET)
        with pytest.raises(ValueError, match="dtype is 'bfloat16' there, 'exact' here"):
            cache(ArraySource(X), tmp_path / "c", **QUIET)


class TestAnotherSource:
    def test_is_refused(self, tiny, texts, tmp_path):
        made = cache(source_of(tiny, texts), tmp_path / "c", **QUIET)
        assert cache(source_of(tiny, texts), tmp_path / "c", **QUIET).n_rows == made.n_rows
        for other, message in [
            (source_of(tiny, texts[1:]), "texts_fingerprint is .* there, .* here"),
            (source_of(tiny, texts, max_tokens=50), "n_rows is None there, 50 here"),
            (ModelSource(tiny, texts, HOOKS[0], batch_size=4), "hooks is "),
            (ArraySource(X), "source is 'ModelSource' there, 'ArraySource' here"),
        ]:
            with pytest.raises(ValueError, match=f"is the cache of another source: .*{message}"):
                cache(other, tmp_path / "c", **QUIET)
            with pytest.raises(ValueError, match=f"is the cache of another source: .*{message}"):
                CachedSource(tmp_path / "c", made_by=other)

    def test_other_weights_of_the_same_name(self, tiny, texts, tmp_path):
        cache(source_of(tiny, texts), tmp_path / "c", **SMALL)
        block = tiny.model.blocks[0].mlp
        weight = next(p for p in block.parameters() if p.ndim == 2)
        before = weight.detach().clone()
        try:
            weight.data *= 3
            with pytest.raises(ValueError, match="is the cache of another model: at 'blocks.0"):
                cache(source_of(tiny, texts), tmp_path / "c", **SMALL)
        finally:
            weight.data.copy_(before)

    @pytest.mark.parametrize("by", [CLOSE * 0.5, CLOSE * 2])
    def test_rounding_of_another_device_is_no_other_model(self, by, tmp_path):
        cache(ArraySource(X), tmp_path / "c", **QUIET)
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
        other = ArraySource(X + by * X.norm() / noise.norm() * noise)
        if by < CLOSE:
            cache(other, tmp_path / "c", **QUIET)
        else:
            with pytest.raises(ValueError, match="cache of another model"):
                cache(other, tmp_path / "c", **QUIET)

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("a")
        for call in (lambda: cache(ArraySource(X), tmp_path / "notes", **QUIET),
                     lambda: CachedSource(tmp_path / "notes")):  # fmt: skip
            with pytest.raises(ValueError, match="is no cache of activations: it has no cache.json"):
                call()
        (tmp_path / "empty").mkdir()
        assert cache(ArraySource(X), tmp_path / "empty", **QUIET).n_rows == 600
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            CachedSource(tmp_path / "missing")


class TestDamage:
    def test_a_missing_or_short_shard(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        data = shard.read_bytes()
        shard.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=f"damaged: its shard {shard.name} has .* bytes, but"):
            CachedSource(folder)
        shard.unlink()
        with pytest.raises(ValueError, match=f"damaged: its shard {shard.name} is missing"):
            CachedSource(folder)

    def test_a_changed_byte_anywhere(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        data = bytearray(shard.read_bytes())
        for at in (0, 9, len(data) // 2, len(data) - 1):
            shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            source = CachedSource(folder)
            next(source.rows())  # the first shard is sound
            with pytest.raises(ValueError, match=f"its shard {shard.name} has another checksum"):
                gathered(source)

    def test_a_changed_record(self, folder):
        record = json.loads((folder / RECORD).read_text())
        for changes, message in [
            ({"format": 2}, "is of form 2, and this version reads form 1"),
            ({"complete": False}, "is not finished: call cache again"),
            ({"made_by": {}}, "cache.json was changed"),
            ({"shards": [{"file": "x"}]}, "lists no shards of a cache"),
            ({"shards": [record["shards"][0] | {"file": "../x"}]}, "lists no shards of a cache"),
            ({"dtypes": {"activations": "load"}}, "names no dtypes of rows"),
        ]:
            (folder / RECORD).write_text(json.dumps(record | changes))
            with pytest.raises(ValueError, match=message):
                CachedSource(folder)
        for text, message in [("{", "is no JSON"), ("[]", "is another file"), ("{}", "is another file")]:
            (folder / RECORD).write_text(text)
            with pytest.raises(ValueError, match=message):
                CachedSource(folder)


class Stops:
    """A source that fails after some rows, and counts the rows that it gives."""

    def __init__(self, inner, after=10**9):
        self.inner, self.after, self.given = inner, after, 0
        self.hooks, self.n_rows, self.provenance = inner.hooks, inner.n_rows, inner.provenance

    def rows(self, skip=0):
        for rows in self.inner.rows(skip):
            if self.given >= self.after:
                raise RuntimeError("stopped")
            self.given += len(rows.places)
            yield rows


class TestGoingOn:
    @pytest.mark.parametrize(("after", "stored"), [(50, 0), (250, 150), (550, 450)])
    def test_after_a_failure(self, tmp_path, after, stored):
        source = ArraySource(X, batch_size=50)
        options = dict(shard_bytes=4000, **QUIET)  # three batches a shard
        cache(Stops(source), tmp_path / "whole", **options)
        with pytest.raises(RuntimeError, match="stopped"):
            cache(Stops(source, after), tmp_path / "c", **options)
        assert not (tmp_path / "c").exists()
        with pytest.raises(FileNotFoundError, match="c.unfinished is not finished: call cache again"):
            CachedSource(tmp_path / "c")
        with pytest.raises(ValueError, match="is not finished" if stored else "has no cache.json"):
            CachedSource(tmp_path / "c.unfinished")
        counting = Stops(source)
        kept = cache(counting, tmp_path / "c", **options)
        assert counting.given == 600 - max(0, stored - 50)  # the last batch is read again, to compare
        assert same_rows(rows_of(kept), rows_of(source))
        for file in kept.folder.iterdir():
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]

    def test_with_another_source(self, tmp_path):
        source = ArraySource(X, batch_size=50)
        with pytest.raises(RuntimeError):
            cache(Stops(source, 300), tmp_path / "c", shard_bytes=4000, **QUIET)
        with pytest.raises(ValueError, match="cache of another source: batch_size is 50 there, 60 here"):
            cache(Stops(ArraySource(X, batch_size=60)), tmp_path / "c", **QUIET)
        with pytest.raises(ValueError, match="cache of another model"):
            cache(Stops(ArraySource(-X, batch_size=50)), tmp_path / "c", **QUIET)

    def test_bad_rows_leave_no_cache(self, tmp_path):
        class Bad(Stops):
            def rows(self, skip=0):
                raise ValueError("NaN")
                yield

        with pytest.raises(ValueError, match="NaN"):
            cache(Bad(ArraySource(X)), tmp_path / "c", **QUIET)
        assert not (tmp_path / "c").exists()


SLOWLY = """
    import sys, time, torch
    from itda_lens.sources import ArraySource, cache

    class Slow(ArraySource):
        def rows(self, skip=0):
            for rows in super().rows(skip):
                time.sleep(0.02)
                yield rows

    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(5))
    print("ready", flush=True)
    kept = cache(Slow(x, batch_size=20), sys.argv[1], shard_bytes=600, progress=False)
    print(kept.n_rows)
"""


def slowly(folder: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SLOWLY), str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_kills_and_a_second_writer(tmp_path):
    """Killed in the middle, then taken up by one process while another tries too."""
    work = tmp_path / "c.unfinished"
    process = slowly(tmp_path / "c")
    wait_for(lambda: len(list(work.glob("*.safetensors"))) > 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "c").exists()
    n = len(list(work.glob("*.safetensors")))
    processes = [slowly(tmp_path / "c"), slowly(tmp_path / "c")]
    results = [(p.communicate(timeout=120), p.returncode) for p in processes]
    done = [out for (out, _), code in results if code == 0]
    refused = [err for (_, err), code in results if code != 0]
    assert done
    assert all(out.split() == ["ready", "600"] for out in done)
    assert all("another process is writing there" in err for err in refused)
    assert 5 < n < 30
    kept = CachedSource(tmp_path / "c")
    assert torch.equal(gathered(kept)["activations"].values, X)
    assert not work.exists()


def test_texts_are_kept_once_a_shard(tiny, tmp_path):
    long = " ".join(["the cat sat on a mat"] * 400)
    kept = cache(ModelSource(tiny, [long], HOOKS[0], batch_size=4), tmp_path / "c", **QUIET)
    (shard,) = kept.folder.glob("*.safetensors")
    state = load_file(shard)
    assert len(state["places.origins"]) < 2 * len(long)
    assert kept.n_rows > 2000

"""Activations of any form: each gives the dictionary of one tensor of the same rows, bit for bit."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from itda_lens import Label, build, fit, load
from itda_lens.__main__ import main
from itda_lens.analysis import evaluate, evaluate_rows
from itda_lens.records import Places, Tag
from itda_lens.reports import evaluation_table, labels_table
from itda_lens.sources import ArraySource, as_source, gathered
from itda_lens.terminal import make_console
from itda_lens.training import build_from, collect, recipe_of

N, D = 500, 12
X = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
NAMES = [f"class {i % 7}" for i in range(N)]
SETTINGS = dict(d_sae=32, k=4, preset="best")
CUTS = [0, 1, 8, 130, 300, 301, N]


def in_batches():
    return [X[a:b] for a, b in itertools.pairwise(CUTS)]


def table(**more) -> pyarrow.Table:
    vectors = pyarrow.FixedSizeListArray.from_arrays(X.flatten().numpy(), D)
    return pyarrow.table({"id": list(range(N)), "x": vectors, "name": NAMES, **more})


def data_set() -> Dataset:
    classes = ClassLabel(names=sorted(set(NAMES)))
    vector = Sequence(Value("float32"), length=D)
    return Dataset.from_dict(
        {"id": list(range(N)), "x": X.numpy(), "name": NAMES},
        features=Features(id=Value("int64"), x=vector, name=classes),
    )


def reused_buffer():
    """Fills one buffer again and again, as readers of files do."""
    buffer = np.empty((64, D), dtype=np.float32)
    for start in range(0, N, 64):
        part = X[start : start + 64].numpy()
        buffer[: len(part)] = part
        yield buffer[: len(part)]


class Items(torch.utils.data.Dataset):
    """A map-style data set that ends by its length alone."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i % N], NAMES[i % N]


def form(name: str, folder: Path):
    """The rows of X in a form, and the arguments that go with it."""
    match name:
        case "numpy":
            return X.numpy(), {}
        case "read-only":
            frozen = X.numpy().copy()
            frozen.flags.writeable = False
            return frozen, {}
        case "big-endian":
            return X.numpy().astype(">f4"), {}
        case "reversed":
            return X.numpy()[::-1].copy()[::-1], {}
        case "memory map":
            X.numpy().tofile(folder / "x.raw")
            return np.memmap(folder / "x.raw", dtype=np.float32, mode="r", shape=(N, D)), {}
        case "npy":
            np.save(folder / "x.npy", X.numpy())
            return str(folder / "x.npy"), {}
        case "safetensors":
            save_file({"x": X, "name": torch.zeros(N)}, folder / "x.safetensors")
            return folder / "x.safetensors", {}
        case "parquet":
            pyarrow.parquet.write_table(table(), folder / "x.parquet", row_group_size=90)
            return folder / "x.parquet", {}
        case "h5py":  # anything whose slices numpy reads
            inner = X.numpy()
            return type(
                "H5", (), {"shape": inner.shape, "dtype": inner.dtype, "__len__": lambda _: N,
                           "__getitem__": lambda _, part: inner[part]}
            )(), {}  # fmt: skip
        case "list of batches":
            return in_batches(), {}
        case "list of rows":
            return list(X), {}
        case "lists of numbers":
            return X.tolist(), {}
        case "generator":
            return (part.numpy() for part in in_batches()), {}
        case "generator of one buffer":
            return reused_buffer(), {}
        case "loader":
            return DataLoader(TensorDataset(X), batch_size=33), {}
        case "loader of a tensor":
            return DataLoader(X, batch_size=33), {}  # pyright: ignore[reportArgumentType]
        case "map-style":
            return TensorDataset(X), {}
        case "data set":
            return data_set(), {}
        case "column":
            return data_set()["x"], {}
        case "streamed":
            return data_set().to_iterable_dataset(num_shards=3), dict(column="x")
        case "streamed column":
            return data_set().to_iterable_dataset()["x"], {}
        case "with a transform":
            return data_set().with_transform(lambda batch: {"x": batch["x"], "id": batch["id"]}), dict(
                column="x"
            )
        case "source":
            return ArraySource(X), {}


FORMS = [
    "numpy", "read-only", "big-endian", "reversed", "memory map", "npy", "safetensors", "parquet",
    "h5py", "list of batches", "list of rows", "lists of numbers", "generator",
    "generator of one buffer", "loader", "loader of a tensor", "map-style", "data set",
    "column", "streamed", "streamed column",
    "with a transform", "source",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return fit(X, **SETTINGS)


def metadata_but_rows_read(itda):
    """Of rows that no array holds, only those that were looked at are counted."""
    record = itda.cfg.to_dict()["metadata"]
    return record | {"itda_build": {**record["itda_build"], "n_tokens": None, "batch_size": None}}


class TestForms:
    @pytest.mark.parametrize("name", FORMS)
    def test_gives_the_dictionary_of_one_tensor(self, name, expected, tmp_path):
        activations, options = form(name, tmp_path)
        itda = fit(activations, **options, **SETTINGS)
        assert torch.equal(itda.W_dec, expected.W_dec)
        assert torch.equal(itda.b_dec, expected.b_dec)
        assert itda.labels == expected.labels
        assert itda.cfg.to_dict() == expected.cfg.to_dict()

    @pytest.mark.parametrize("name", ["memory map", "parquet", "list of rows", "generator", "loader"])
    def test_a_rule_that_depends_on_batches_and_a_threshold(self, name, tmp_path):
        activations, options = form(name, tmp_path)
        settings = dict(d_sae=32, k=4, preset="paper", batch_size=64, l0=2.0)
        one, other = fit(X, **settings), fit(activations, **options, **settings)
        assert torch.equal(other.W_dec, one.W_dec)
        assert other.cfg.threshold == one.cfg.threshold > 0
        assert metadata_but_rows_read(other) == metadata_but_rows_read(one)

    @pytest.mark.parametrize("name", [name for name in FORMS if "generator" not in name])
    def test_goes_on_where_it_stopped(self, name, tmp_path):
        activations, options = form(name, tmp_path)
        source = (
            as_source(activations, **options)
            if name == "source"
            else as_source(activations, batch_size=64, **options)
        )
        every = gathered(source)["activations"]
        assert torch.equal(every.values, X)
        for skip in (1, 64, 100, N - 1, N):
            rest = list(source.rows(skip))
            assert torch.equal(torch.cat([X[:0], *(p.values["activations"] for p in rest)]), X[skip:])
            assert Places.joined([part.places for part in rest]) == every.labels[skip:]

    def test_half_precision_and_float64(self):
        for x in (X.half(), X.double()):
            one = fit(x, **SETTINGS)
            for other in (x.numpy(), iter(x.split(70))):
                assert torch.equal(fit(other, **SETTINGS).W_dec, one.W_dec)
        one = fit(X.bfloat16(), **SETTINGS)
        assert torch.equal(fit(iter(X.bfloat16().split(70)), **SETTINGS).W_dec, one.W_dec)

    def test_an_iterator_is_read_once(self):
        source = as_source(iter(in_batches()))
        build_from(source, recipe_of(d_sae=8, k=2), progress=False)
        with pytest.raises(ValueError, match="iterator, which can be read only once"):
            build_from(source, recipe_of(d_sae=8, k=2), progress=False)

    def test_a_source_of_several_hook_points_is_for_build_from(self):
        rows = SimpleNamespace(hooks=["a", "b"], n_rows=4, rows=iter, provenance=iter)
        with pytest.raises(ValueError, match="one hook point, got a source with .'a', 'b'.*build_from"):
            fit(rows, d_sae=2, k=1)
        with pytest.raises(ValueError, match="labels must be left out"):
            fit(ArraySource(X), labels=NAMES, d_sae=2, k=1)


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [
            NAMES, tuple(NAMES), np.array(NAMES), np.array(NAMES, dtype=object),
            list(map(int, range(N))), np.arange(N), torch.arange(N),
        ],
    )  # fmt: skip
    def test_names(self, labels, expected):
        itda = fit(X, labels=labels, item="image", **SETTINGS)
        assert torch.equal(itda.W_dec, expected.W_dec)
        for label, bare in zip(itda.labels, expected.labels, strict=True):
            name = str(labels[label.row].item() if hasattr(labels[0], "item") else labels[label.row])
            assert label == Label(bare.row, kind="image", name=name)
            assert str(label) == f"image {label.row}: {name}"

    def test_an_item_without_a_name(self, expected):
        itda = fit(X, item="user", **SETTINGS)
        assert [str(label) for label in itda.labels] == [f"user {i.row}" for i in expected.labels]
        assert str(expected.labels[0]).startswith("row ")

    def test_triples_and_labels(self):
        triples = [(i // 5, i % 5, 0) for i in range(N)]
        one = fit(X, labels=triples, **SETTINGS)
        assert one.labels[0].kind == "text"
        other = fit(X, labels=triples, item="scan", **SETTINGS)
        assert torch.equal(one.W_dec, other.W_dec)
        assert str(other.labels[0]).startswith(f"scan {other.labels[0].row}")
        own = [Label(i, kind="gene", name="x") for i in range(N)]
        assert fit(X, labels=own, item="scan", **SETTINGS).labels[0].kind == "gene"

    def test_labels_that_come_with_batches(self, expected):
        one = [(str(label), label) for label in fit(X, labels=NAMES, **SETTINGS).labels]
        triples = [(0, 0, i % 3) for i in range(N)]  # rows of one label are told apart
        by_triples = fit(X, labels=triples, **SETTINGS)
        own = [(X[a:b], NAMES[a:b]) for a, b in itertools.pairwise(CUTS)]
        for activations in (
            own, iter(own), DataLoader(Items(), batch_size=33), Items(),
            [{"x": X[i], "name": NAMES[i]} for i in range(N)],
        ):  # fmt: skip
            options = (
                dict(column="x", labels="name")
                if isinstance(activations, list) and isinstance(activations[0], dict)
                else {}
            )
            found = fit(activations, **options, **SETTINGS)
            assert [(str(label), label) for label in found.labels] == one
        split = iter([(X[a:b], triples[a:b]) for a, b in itertools.pairwise(CUTS)])
        found = fit(split, **SETTINGS)
        assert torch.equal(found.W_dec, by_triples.W_dec)
        assert found.labels == by_triples.labels

    @pytest.mark.parametrize("name", ["parquet", "data set", "streamed"])
    def test_a_column_of_labels(self, name, tmp_path):
        activations, options = form(name, tmp_path)
        one = fit(X, labels=NAMES, **SETTINGS)
        other = fit(activations, labels="name", **options, **SETTINGS)
        assert list(other.labels) == list(one.labels)

    def test_a_column_without_a_name_in_a_row(self, tmp_path):
        names = [None if i % 2 else name for i, name in enumerate(NAMES)]
        pyarrow.parquet.write_table(table(other=names), tmp_path / "x.parquet")
        itda = fit(tmp_path / "x.parquet", labels="other", item="cell", **SETTINGS)
        assert {label.name for label in itda.labels if label.row % 2} == {None}
        assert str(next(label for label in itda.labels if label.row % 2 == 0)).count(": class ")

    def test_numbers_of_a_safetensors_file(self, tmp_path):
        save_file({"x": X, "y": torch.arange(N)}, tmp_path / "x.safetensors")
        itda = fit(tmp_path / "x.safetensors", labels="y", **SETTINGS)
        assert all(label.name == str(label.row) for label in itda.labels)

    def test_labels_survive_a_file(self, tmp_path):
        itda = fit(X, labels=[f"ä{name}\n" for name in NAMES], item="image", **SETTINGS)
        itda.save_model(tmp_path)
        assert list(load(tmp_path).labels) == list(itda.labels)


class TestBadInput:
    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (NAMES[:-1], ValueError, "labels must be one per row: 499 labels for 500 rows"),
            ([*NAMES, "x"], ValueError, "labels must be one per row: 501 labels"),
            ([*NAMES[:-1], (0, 0, 0)], TypeError, "labels must all be of one form.*for row 499"),
            ([None] * N, TypeError, "labels must be Label or .* got None"),
            ([0.5] * N, TypeError, "labels must be Label or .* got 0.5"),
            ([True] * N, TypeError, "labels must be Label or .* got True"),
            (torch.rand(N), TypeError, "labels must be one for each row"),
            (dict(enumerate(NAMES)), TypeError, "labels must be one for each row"),
            (["x" * 2000] * N, ValueError, "labels must take at most 1000 bytes each, got 2002"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_labels(self, labels, error, message, stream):
        with pytest.raises(
            error, match=message if not stream or "one per row" not in message else "one per"
        ):
            fit(iter(in_batches()) if stream else X, labels=labels, **SETTINGS)

    def test_labels_twice(self):
        with pytest.raises(ValueError, match="labels must come with the rows or apart from them"):
            fit([(X, NAMES)], labels=NAMES, **SETTINGS)

    @pytest.mark.parametrize("item", ["", 3])
    def test_item(self, item):
        with pytest.raises((ValueError, TypeError), match="item must be"):
            fit(X, item=item, **SETTINGS)
        with pytest.raises(ValueError, match="item goes with strings"):
            fit(X, item="image", labels=Places.numbered(0, N), **SETTINGS)

    @pytest.mark.parametrize("where", [0, 127, 499])
    @pytest.mark.parametrize("name", ["tensor", "memory map", "generator", "loader", "parquet"])
    def test_nan_is_told_with_its_row(self, where, name, tmp_path, monkeypatch):
        x = X.clone()
        x[where, 3] = torch.nan
        monkeypatch.setitem(globals(), "X", x)
        activations = x if name == "tensor" else form(name, tmp_path)[0]
        with pytest.raises(ValueError, match=f"activations must be finite, but row {where} has NaN"):
            fit(activations, **SETTINGS)

    @pytest.mark.parametrize("factor", [1e-20, 1e25])
    def test_sizes_that_overflow_or_vanish(self, factor):
        row = int((X.abs().amax(1)).argmax()) if factor < 1 else 0
        for activations in (X * factor, iter((X * factor).split(70))):
            with pytest.raises(ValueError, match="must be between .* in row [0-9]+; multiply") as told:
                fit(activations, **SETTINGS)
            assert factor > 1 or f"in row {row};" in str(told.value)

    @pytest.mark.parametrize(
        ("activations", "error", "message"),
        [
            ([], ValueError, "at least one row, got none"),
            (iter([]), ValueError, "at least one row, got none"),
            ([X, X[:, :5]], ValueError, "but from row 500 on they have 5 numbers"),
            ([X, X.double()], ValueError, "one width and one dtype, but from row 500 on"),
            ([X.long()], TypeError, "must be a floating-point tensor, got torch.int64"),
            (np.arange(6).reshape(2, 3), TypeError, "must be a floating-point tensor, got int64"),
            (X[None], ValueError, r"must have shape \[n_tokens, d_in\], got \(1, 500, 12\)"),
            ([X[None]], ValueError, r"must have shape \[n_tokens, d_in\], got \(1, 500, 12\)"),
            ("missing.npy", FileNotFoundError, "there is none at 'missing.npy'"),
            ("x.csv", ValueError, "must be a file that ends in .npy, .safetensors, .parquet"),
            ("x.pt", ValueError, "must be a file that ends in .npy, .safetensors, .parquet"),
            (pandas.DataFrame({"a": [1.0]}), TypeError, "give table.columns..to_numpy"),
            (DatasetDict(train=Dataset.from_dict({"x": [[1.0]]})), TypeError, "'train'; give one of"),
            (DataLoader(TensorDataset(X), shuffle=True), ValueError, "make it with shuffle=False"),
            (7, TypeError, "activations must be a floating-point tensor or array, a file"),
            ([["a"]], TypeError, "activations must be rows of numbers"),
            ([object()], TypeError, "activations must come as batches"),
        ],
    )  # fmt: skip
    def test_forms(self, activations, error, message):
        with pytest.raises(error, match=message):
            fit(activations, **SETTINGS)

    def test_columns(self, tmp_path):
        pyarrow.parquet.write_table(table(y=table()["x"]), tmp_path / "two.parquet")
        pyarrow.parquet.write_table(table().drop(["x"]), tmp_path / "none.parquet")
        ragged = pyarrow.table({"x": [[1.0, 2.0]] * 9 + [[1.0]]})
        pyarrow.parquet.write_table(ragged, tmp_path / "ragged.parquet")
        holes = pyarrow.table({"x": [[1.0, 2.0]] * 8 + [[1.0, None]]})
        pyarrow.parquet.write_table(holes, tmp_path / "holes.parquet")
        missing = pyarrow.table({"x": [[1.0, 2.0]] * 7 + [None]})
        pyarrow.parquet.write_table(missing, tmp_path / "missing.parquet")
        (tmp_path / "no.parquet").write_text("no")
        (tmp_path / "no.npy").write_text("no")
        (tmp_path / "no.safetensors").write_text("no")
        save_file({"a": X, "b": X + 1}, tmp_path / "two.safetensors")
        for file, options, message in [
            ("two.parquet", {}, "column must name .*: 2 columns hold .*: 'x', 'y', of 'id', 'x'"),
            ("two.parquet", dict(column="z"), "column must be one of 'id', 'x', 'name', 'y', got 'z'"),
            ("two.parquet", dict(column="id"), "column must name .* 'id' holds int64"),
            ("two.parquet", dict(column="x", labels="z"), "labels must be one of the columns 'id'"),
            ("two.parquet", dict(column="x", labels="y"), "labels must name a column of strings or"),
            ("none.parquet", {}, "column must name .*: 0 columns hold"),
            ("ragged.parquet", {}, "one width, but row 9 has 1 numbers, and row 0 has 2"),
            ("holes.parquet", {}, "must be finite, but row 8 lacks a number"),
            ("missing.parquet", {}, "there in each row, but row 7 has none"),
            ("no.parquet", {}, "no.parquet is none"),
            ("no.npy", {}, "no.npy holds none that is read"),
            ("no.safetensors", {}, "no.safetensors is none"),
            ("two.safetensors", {}, "column must name the tensor .* 2 with rows, of 'a', 'b'"),
            ("two.safetensors", dict(column="c"), "column must be one of 'a', 'b', got 'c'"),
        ]:
            with pytest.raises(ValueError, match=message):
                fit(tmp_path / file, d_sae=2, k=1, **options)
        with pytest.raises(ValueError, match="column goes with tables and dicts"):
            fit(X, column="x", **SETTINGS)


FLAT = """
import sys, threading, time
import numpy as np, torch
from itda_lens.sources import as_source
from itda_lens.training import build_from, recipe_of

def anonymous():  # memory of the process's own, without pages of files, which the system may drop
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

d, n = 256, int(sys.argv[2])
x = np.memmap(sys.argv[1], dtype=np.float16, mode="r", shape=(n, d))
recipe = recipe_of(d_sae=64, k=4)
build_from(as_source(np.asarray(x[:20_000])), recipe, progress=False)  # everything is imported, compiled
before, most, done = anonymous(), 0.0, threading.Event()

def watch():
    global most
    while not done.wait(0.01):
        most = max(most, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
(itda,) = build_from(as_source(x, item="image"), recipe, progress=False).values()
done.set(); watcher.join()
print(most - before, str(itda.labels[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's own memory")
def test_a_file_larger_than_the_memory_it_takes(tmp_path):
    """128 MB on the disk are read in less than 64 MB."""
    n, d = 2**18, 256
    x = np.memmap(tmp_path / "x.raw", dtype=np.float16, mode="w+", shape=(n, d))
    block = np.random.default_rng(0).standard_normal((2**14, d)).astype(np.float16)
    for start in range(0, n, len(block)):
        x[start : start + len(block)] = block
        x[start : start + len(block), 0] += start / n  # no block repeats another
    x.flush()
    command = [sys.executable, "-c", FLAT, str(tmp_path / "x.raw"), str(n)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, label = run.stdout.split(" ", 1)
    assert label.startswith("image ")
    assert float(megabytes) < 64


def test_tags_are_shared():
    source = as_source(X, labels=NAMES, item="image")
    tags = next(iter(source.rows())).places.tags
    assert len({id(tag) for tag in tags}) == 7
    assert tags[3] == Tag("image", "class 3")


class TestEvaluation:
    def test_figures(self):
        itda = fit(X, **SETTINGS)
        held_out = torch.randn(200, D, generator=torch.Generator().manual_seed(9))
        (found,) = evaluate_rows(itda, held_out, progress=False)
        codes = itda.encode_sparse(held_out)
        error = (held_out - itda(held_out).detach()).square().sum()
        assert found.fvu == pytest.approx(
            float(error / (held_out - held_out.mean(dim=0)).square().sum()), rel=1e-5
        )
        assert found.l0 == pytest.approx(float((codes.values != 0).sum() / 200))
        used = torch.zeros(32).index_add_(
            0, codes.indices.flatten(), (codes.values != 0).float().flatten()
        )
        assert torch.allclose(found.feature_density, used / 200)
        assert found.alive_fraction == pytest.approx(float((used > 0).float().mean()))
        assert (found.n_rows, found.d_sae, found.k, found.hook_name) == (200, 32, 4, "activations")
        for other in (held_out.numpy(), iter(held_out.split(33))):
            assert evaluate_rows([itda], other, batch_size=50, progress=False)[0].l0 == found.l0

    def test_figures_are_those_of_evaluate(self, tiny, texts):
        hook = "blocks.1.hook_resid_post"
        itda = build(tiny, texts, hook, d_sae=16, k=3, progress=False)[hook]
        x = collect(tiny, texts, hook, progress=False)[hook].values
        (one,) = evaluate(tiny, itda, texts, progress=False)
        (other,) = evaluate_rows(itda, x, progress=False)
        assert (one.n_tokens, one.l0, one.alive_fraction) == (
            other.n_rows,
            other.l0,
            other.alive_fraction,
        )
        assert one.fvu == pytest.approx(other.fvu)

    def test_table(self, capsys):
        itda = fit(X, labels=NAMES, item="[b]image", **SETTINGS)
        make_console().print(evaluation_table(evaluate_rows(itda, X, progress=False)))
        make_console().print(labels_table(itda, 2))
        shown = capsys.readouterr().out
        assert "on 500 rows" in shown
        assert "FVU" in shown
        assert "KL" not in shown
        assert f"[b]image {itda.labels[0].row}: class" in " ".join(shown.split())

    def test_bad_input(self):
        itda = fit(X, **SETTINGS)
        for call, message in [
            (lambda: evaluate_rows([], X), "dictionaries must be one or more"),
            (
                lambda: evaluate_rows(itda, X[:, :5], progress=False),
                "width of the dictionary, d_in=12, got 5",
            ),
            (lambda: evaluate_rows(itda, [], progress=False), "at least one row"),
            (lambda: evaluate_rows(itda, "missing.csv"), "must be a file that ends in"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()


class TestCommand:
    def run(self, *arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return exit_.value.code

    def test_fit(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        pyarrow.parquet.write_table(table(), tmp_path / "x.parquet")
        options = ["--labels=name", "--item=image", "--d-sae=32", "--k=4", "--column=x"]
        held_out = f"--held-out={tmp_path / 'x.parquet'}"
        assert self.run("fit", tmp_path / "x.parquet", "-o", tmp_path / "out", held_out, *options) == 0
        assert "on 500 rows" in capsys.readouterr().out
        itda, one = load(tmp_path / "out"), fit(X, labels=NAMES, item="image", **SETTINGS)
        assert torch.equal(itda.W_dec, one.W_dec)
        assert list(itda.labels) == list(one.labels)
        assert self.run("info", tmp_path / "out") == 0
        assert f"image {one.labels[0].row}: {one.labels[0].name}" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["missing.npy", "x.csv"])
    def test_bad_input(self, name, tmp_path, capsys):
        assert self.run("fit", name, "-o", tmp_path / "out") == 2
        assert "activations must be a file" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()

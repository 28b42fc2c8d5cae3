"""Saved work: files and folders appear whole, belong together, and take the place of nothing else."""

# Blocks that must not begin stand inside of `pytest.raises`, with their context managers.
# ruff: noqa: PT012, SIM117

import base64
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.training.upload_saes_to_huggingface import _build_sae_path, _validate_sae_path
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import itda_lens
from itda_lens.pursuit import SparseCodes
from itda_lens.records import Label, Labels, is_leftover, replacing
from itda_lens.records import labels as labels_module
from itda_lens.sae import is_dictionary, load_sparsity, save_sparsity
from itda_lens.sae.saved import REQUIRED, WEIGHTS_KEY
from itda_lens.training import fit, output_folder, save_all

DATA = Path(__file__).parent / "data" / "saved-by-0.1.0"
NAMES = ("best", "mirrored", "half", "paper", "omp", "nonnegative_omp", "mean_l0")
D_IN, D_SAE = 8, 12


def dictionary(seed: int = 0, d_sae: int = D_SAE) -> itda_lens.ITDA:
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(seed))
    return fit(x, d_sae=d_sae, k=3, labels=[(i, 0, seed) for i in range(200)])


@pytest.fixture
def itda():
    return dictionary()


def read(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", NAMES)
class TestSavedByTheVersionBefore:
    def test_load_and_encode_as_they_did(self, name):
        expected = load_file(DATA / "expected.safetensors")
        for itda in (itda_lens.load(DATA / name), SAE.load_from_disk(DATA / name)):
            codes = itda.encode_sparse(expected["x"].to(itda.dtype))
            if name == "nonnegative_omp":
                self.check_changed_rule(itda, codes, expected)
                continue
            assert torch.equal(codes.indices, expected[f"{name}.indices"])
            # Equal bit for bit where they were made. One unit in the last place elsewhere: the order of
            # a sum depends on the processor.
            for found, kind in ((codes.values, "values"), (itda.decode_sparse(codes), "decoded")):
                ulp = torch.finfo(found.dtype).eps
                wanted = expected[f"{name}.{kind}"]
                torch.testing.assert_close(found.float(), wanted, rtol=ulp, atol=0)

    def check_changed_rule(self, itda, codes, expected):
        """Since 0.2 each pick is followed by a fit that may drop an atom and take back another: a few
        codes are others, and none is worse."""
        x, d_sae = expected["x"].to(itda.dtype), itda.cfg.d_sae
        wanted = SparseCodes(expected["nonnegative_omp.indices"], expected["nonnegative_omp.values"])
        found, before = codes.to_dense(d_sae), wanted.to_dense(d_sae)
        assert torch.isclose(found, before, atol=1e-4).all(dim=1).float().mean() > 0.95
        left, left_before = ((x - itda.decode(c)).norm(dim=1) for c in (found, before))
        assert (left <= left_before * (1 + 1e-5)).all()

    def test_their_labels_are_read_and_saving_them_adds_digests(self, name, tmp_path):
        itda = itda_lens.load(DATA / name)
        assert len(itda.labels) == itda.cfg.d_sae
        itda.save_model(tmp_path)
        old, new = (json.loads((f / "cfg.json").read_text()) for f in (DATA / name, tmp_path))
        assert set(new["metadata"].pop(WEIGHTS_KEY)) == {"W_dec", "b_dec"}
        assert new == old
        assert torch.equal(itda_lens.load(tmp_path).W_dec, itda.W_dec)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestReplacing:
    def test_modes_follow_the_umask(self, itda, tmp_path):
        for umask in (0o022, 0o077, 0o007):
            before = os.umask(umask)
            try:
                with output_folder(tmp_path / f"{umask}") as folder:
                    save_all({"a": itda}, folder)
                    save_sparsity(folder / "a", torch.full((D_SAE,), 0.5))
            finally:
                os.umask(before)
            for file in (tmp_path / f"{umask}").rglob("*"):
                everything = 0o777 if file.is_dir() else 0o666
                assert stat.S_IMODE(file.stat().st_mode) == everything & ~umask, file

    @pytest.mark.parametrize("exists", [True, False])
    def test_links_are_followed_and_stay(self, tmp_path, exists):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        if exists:
            (elsewhere / "real").write_text("old")
        link = tmp_path / "link"
        link.symlink_to(elsewhere / "real")
        with replacing(link) as (file,):
            file.write_text("new")
        assert link.is_symlink()
        assert (elsewhere / "real").read_text() == "new"
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["elsewhere", "link", "real"]

    def test_places_that_cannot_be_written_are_told_before_the_work(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "file")
        for name in ("folder", "file/inside", "nowhere", "missing/file", "n" * 300):
            with pytest.raises(OSError, match=r"(folder|file|missing|nn)'$"):
                with replacing(tmp_path / name):
                    pytest.fail("the work has begun")

    def test_planted_files_and_links_are_not_met(self, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("mine")
        out = tmp_path / "out"
        out.mkdir()
        for name in (".a.tmp.txt", f".a.{os.getpid()}.tmp.txt", f".out.{os.getpid()}.tmp"):
            (out / name).symlink_to(victim)
        with replacing(out / "a.txt") as (file,):
            assert not file.parent.stat().st_mode & 0o077  # nobody else can plant one there
            file.write_text("new")
        assert victim.read_text() == "mine"
        assert (out / "a.txt").read_text() == "new"

    @pytest.mark.parametrize("stop_at", [0, 1, 2])
    def test_an_interrupt_between_renames_completes_them(self, tmp_path, monkeypatch, stop_at):
        targets = [tmp_path / name for name in "ab"]
        for target in targets:
            target.write_text("old")
        calls, rename = [], Path.replace

        def interrupted(self, target):
            if len(calls) < 2 and len(calls) == stop_at:
                calls.append(None)
                raise KeyboardInterrupt
            calls.append(None)
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", interrupted)
        try:
            with replacing(*targets) as files:
                for file in files:
                    file.write_text("new")
        except KeyboardInterrupt:
            assert stop_at < 2
        assert [target.read_text() for target in targets] == ["new", "new"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

    def test_a_second_rename_that_fails_keeps_the_file_and_says_where(self, tmp_path, monkeypatch):
        targets = [tmp_path / "a.txt", tmp_path / "b.txt"]
        rename = Path.replace

        def refuses(self, target):
            if Path(target).name == "b.txt":
                raise OSError(errno.EPERM, "Operation not permitted", str(self))
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", refuses)
        with pytest.raises(OSError, match=r"a\.txt is new already.*b\.kept-\w+\.txt.*b\.txt'$") as told:
            with replacing(*targets) as files:
                for file in files:
                    file.write_text("new")
        assert told.value.errno == errno.EPERM
        (kept,) = tmp_path.glob("b.kept-*.txt")
        assert kept.read_text() == "new"

    def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_stay(self, tmp_path):
        code = (
            "import sys, time; from pathlib import Path; from itda_lens.records.files import replacing\n"
            "with replacing(Path(sys.argv[1])) as (file,):\n"
            "    file.write_text('half'); print('ready', flush=True); time.sleep(60)"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        processes[0].kill()
        processes[0].wait()
        try:
            with replacing(tmp_path / "a") as (file,):
                file.write_text("whole")
            left = [p for p in tmp_path.iterdir() if is_leftover(p)]
            assert len(left) == 1
            assert (left[0] / "a").read_text() == "half"
        finally:
            processes[1].kill()
            processes[1].wait()
            for process in processes:
                process.stdout.close()
        with replacing(tmp_path / "a") as (file,):
            file.write_text("whole")
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


class TestFullDisk:
    CALLS = (
        "itda_lens.records.files.probe",
        "itda_lens.records.files._new_folder",
        "itda_lens.records.files._finish",
        "itda_lens.sae.saved.save_file",
        "pathlib.Path.write_text",
        "pathlib.Path.replace",
        "os.fsync",
    )

    @pytest.mark.parametrize("call", CALLS)
    def test_every_call_names_the_place_and_keeps_what_was_there(self, tmp_path, monkeypatch, call):
        dictionary(0).save_model(tmp_path / "a")
        before = read(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            with pytest.raises(OSError, match="No space left on device: '.*/a") as told:
                dictionary(1).save_model(tmp_path / "a")
        assert ".itda-tmp" not in str(told.value)
        assert read(tmp_path) == before
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
            ["cfg.json", "sae_weights.safetensors"]
        )

    def test_a_real_full_disk(self, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", disk], capture_output=True
        ).returncode:  # fmt: skip
            pytest.skip("file systems cannot be mounted here")
        try:
            large = dictionary(d_sae=150)
            dictionary(0).save_model(disk / "a")
            before = read(disk / "a")
            (disk / "filler").write_bytes(bytes(90 * 1024))
            large.cfg.metadata.note = os.urandom(60_000).hex()
            with pytest.raises(OSError, match=r"No space left on device.*: '.*/disk/a"):
                large.save_model(disk / "a")
            assert read(disk / "a") == before
            # Nothing is left for the probe: told before the work.
            with pytest.raises(OSError, match="No space left on device: '.*/disk/out'"):
                (disk / "more").write_bytes(bytes(30 * 1024))
                with output_folder(disk / "out"):
                    pytest.fail("the work has begun")
            assert sorted(p.name for p in disk.iterdir()) == ["a", "filler", "more"]
            # The mount point itself cannot be replaced; nor can a link to it.
            (tmp_path / "link").symlink_to(disk)
            for place in (disk, tmp_path / "link"):
                with pytest.raises(FileExistsError, match="disk is a mount point"):
                    with output_folder(place, overwrite=True):
                        pytest.fail("the work has begun")
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_finished_dictionaries_are_saved_elsewhere(self, itda, tmp_path, monkeypatch):
        elsewhere = tmp_path / "tmp"
        elsewhere.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
        save = itda_lens.ITDA.save_model

        def some_are_refused(self, path):
            return (
                full()
                if Path(path).name == "b" and elsewhere not in Path(path).parents
                else save(self, path)
            )

        monkeypatch.setattr(itda_lens.ITDA, "save_model", some_are_refused)
        with pytest.raises(OSError, match="No space left") as told:
            with output_folder(tmp_path / "out") as folder:
                save_all({"a": itda, "b": dictionary(1)}, folder)
        (kept,) = tmp_path.glob("out.kept-*")
        (saved,) = elsewhere.iterdir()
        assert str(kept) in str(told.value)
        assert f"saved in {saved} instead: b" in str(told.value)
        assert torch.equal(itda_lens.load(kept / "a").W_dec, itda.W_dec)
        assert is_dictionary(saved / "b")
        assert not (tmp_path / "out").exists()


def changed(config: Path, **changes) -> None:
    """Write a configuration again with some fields changed, or removed where they are `...`."""
    values = json.loads(config.read_text()) | changes
    config.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


class TestOneSave:
    """Weights and configuration of two saves are never taken for one dictionary."""

    @pytest.mark.parametrize("foreign", ["cfg.json", "sae_weights.safetensors"])
    def test_of_every_mixture_the_weights_decide(self, tmp_path, caplog, foreign):
        for seed in (0, 1):
            dictionary(seed).save_model(tmp_path / f"{seed}")
        shutil.copy(tmp_path / "0" / foreign, tmp_path / "1")
        for dtype in (None, "float64"):
            loaded = itda_lens.load(tmp_path / "1", dtype=dtype)
            wanted = dictionary(1 if foreign == "cfg.json" else 0)
            assert torch.equal(loaded.W_dec, wanted.W_dec.to(loaded.dtype))
            assert loaded.labels == wanted.labels
        assert loaded.cfg.metadata == wanted.cfg.metadata
        assert "cfg.json is not of the save that" in caplog.text
        with pytest.raises(ValueError, match="_dec is not of the save"):
            SAE.load_from_disk(tmp_path / "1")

    def test_mixtures_with_weights_of_earlier_versions_are_told(self, tmp_path):
        for seed in (0, 1):
            dictionary(seed).save_model(tmp_path / f"{seed}")
        weights = tmp_path / "1" / "sae_weights.safetensors"
        save_file(load_file(weights), weights)  # without a header
        itda_lens.load(tmp_path / "1")
        shutil.copy(tmp_path / "0" / "cfg.json", tmp_path / "1")
        with pytest.raises(ValueError, match=r"sae_weights\.safetensors and .*cfg\.json are not of"):
            itda_lens.load(tmp_path / "1")

    @pytest.mark.parametrize("name", ["d_in", "k", "method", "architecture", "metadata"])
    def test_a_damaged_header_is_told(self, itda, tmp_path, name):
        weights, cfg = itda.save_model(tmp_path)
        config = json.loads(cfg.read_text())
        state = load_file(weights)
        for value in (..., [], "no", -1):
            header = {key: one for key, one in (config | {name: value}).items() if one is not ...}
            save_file(
                {"W_dec": state["W_dec"] * 2, "b_dec": state["b_dec"]},
                weights,
                {"itda_cfg": json.dumps(header)},
            )
            with pytest.raises(ValueError, match="sae_weights.safetensors"):
                itda_lens.load(tmp_path)
            save_file(state, weights, {"itda_cfg": json.dumps(header)})
            itda_lens.load(tmp_path)  # not looked at while the two belong together
        cfg.write_text(
            json.dumps(config | {"metadata": config["metadata"] | {WEIGHTS_KEY: {"W_dec": "float32:0"}}})
        )
        for text in ("", "{", "[]", "3", "[" * 100_000):
            save_file(state, weights, {"itda_cfg": text})
            with pytest.raises(ValueError, match="sae_weights.safetensors is truncated or damaged"):
                itda_lens.load(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_every_changed_bit_of_the_weights_is_told(self, itda, tmp_path, dtype, monkeypatch):
        monkeypatch.setattr("itda_lens.sae.loading.PAUSE_SECONDS", 0)
        weights, _ = itda.to(dtype=dtype).save_model(tmp_path)
        state = load_file(weights)
        generator = torch.Generator().manual_seed(0)
        for trial in range(20):
            edited = {name: tensor.clone() for name, tensor in state.items()}
            tensor = edited[("W_dec", "b_dec")[trial % 2]].view(torch.uint8).flatten()
            at = int(torch.randint(tensor.numel(), (1,), generator=generator))
            tensor[at] ^= 1 << (trial % 7)
            save_file(edited, weights)
            with pytest.raises(ValueError, match="not of one save"):
                itda_lens.load(tmp_path, dtype=("bfloat16", None)[trial % 2])
            if dtype in (torch.float32, torch.bfloat16, torch.float16):  # wider ones are compared too
                with pytest.raises(ValueError, match="not of the save"):
                    SAE.load_from_disk(tmp_path, dtype="float32")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("wanted", [None, "float32", "float64", "bfloat16", "float16"])
    def test_no_false_alarm_in_any_dtype(self, itda, tmp_path, dtype, wanted):
        itda.to(dtype=dtype).save_model(tmp_path)
        for loaded in (
            itda_lens.load(tmp_path, dtype=wanted),
            SAE.load_from_disk(tmp_path, dtype=wanted),
        ):
            assert torch.equal(loaded.W_dec, itda.W_dec.to(loaded.dtype))
            assert str(loaded.dtype) == f"torch.{wanted or loaded.cfg.dtype}"
            loaded.save_model(tmp_path / "again")
            assert torch.equal(itda_lens.load(tmp_path / "again").W_dec, loaded.W_dec)
        # Weights in another dtype than the configuration says, as `.data` can make them.
        itda.W_dec.data = itda.W_dec.data.half()
        itda.save_model(tmp_path / "mixed")
        assert torch.equal(itda_lens.load(tmp_path / "mixed").W_dec.half(), itda.W_dec)

    def test_edits_in_memory_and_what_saelens_does_raise_no_alarm(self, itda, tmp_path):
        itda.save_model(tmp_path / "a")
        loaded = itda_lens.load(tmp_path / "a")
        assert loaded.cfg == itda.cfg  # the digest is of files only
        digest = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"][WEIGHTS_KEY]
        loaded.W_dec.data[0].mul_(3)
        loaded.save_model(tmp_path / "a")
        saved = json.loads((tmp_path / "a" / "cfg.json").read_text())
        assert saved["metadata"][WEIGHTS_KEY]["W_dec"] != digest["W_dec"]
        assert saved["metadata"][WEIGHTS_KEY]["b_dec"] == digest["b_dec"]
        assert torch.equal(itda_lens.load(tmp_path / "a").W_dec, loaded.W_dec)
        # A dictionary made from the saved configuration is another one: no digest goes along.
        other = SAE.from_dict(saved)
        assert WEIGHTS_KEY not in other.cfg.to_dict()["metadata"]
        for made in (other, loaded.prefix(5), loaded.nonnegative()):
            made.save_model(tmp_path / "b")
            assert torch.equal(SAE.load_from_disk(tmp_path / "b").W_dec, made.W_dec)
        # SAELens's own way of saving, which knows no digests, over files of ours.
        loaded.W_dec.data.mul_(2)
        SAE.save_model(loaded, tmp_path / "a")
        assert torch.equal(itda_lens.load(tmp_path / "a").W_dec, loaded.W_dec)
        # What its upload sends.
        path = _build_sae_path(loaded, str(tmp_path / "upload"))
        _validate_sae_path(path)
        assert torch.equal(SAE.load_from_disk(path, dtype="bfloat16").W_dec, loaded.W_dec.bfloat16())
        folded = itda_lens.load(path)
        folded.fold_activation_norm_scaling_factor(3.0)
        folded.save_model(path)
        assert torch.equal(itda_lens.load(path).W_dec, folded.W_dec)

    @pytest.mark.parametrize("renames", [1, 2])
    def test_a_kill_after_each_rename_leaves_the_old_or_the_new(self, tmp_path, renames):
        old = dictionary(0)
        old.save_model(tmp_path)
        code = (
            "import os, sys; from pathlib import Path; import itda_lens\n"
            "itda = itda_lens.load(sys.argv[1]); itda.W_dec.data.mul_(2); itda.cfg.threshold = 0.5\n"
            "rename = Path.replace\n"
            "def kill(self, target):\n"
            "    rename(self, target); kill.done += 1\n"
            "    kill.done == int(sys.argv[2]) and os.kill(os.getpid(), 9)\n"
            "kill.done = 0; Path.replace = kill; itda.save_model(sys.argv[1])"
        )
        assert subprocess.run([sys.executable, "-c", code, tmp_path, f"{renames}"]).returncode == -9
        assert is_dictionary(tmp_path)
        loaded = itda_lens.load(tmp_path)
        assert torch.equal(loaded.W_dec, renames * old.W_dec)
        assert loaded.cfg.threshold == (0.0, 0.5)[renames - 1]
        assert loaded.labels == old.labels
        dictionary(1).save_model(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
        assert torch.equal(itda_lens.load(tmp_path).W_dec, dictionary(1).W_dec)

    def test_a_kill_while_weights_of_earlier_versions_are_replaced_names_the_new_ones(self, tmp_path):
        shutil.copytree(DATA / "best", tmp_path, dirs_exist_ok=True)
        code = (
            "import os, sys; from pathlib import Path; import itda_lens\n"
            "itda = itda_lens.load(sys.argv[1]); itda.W_dec.data.mul_(2); rename = Path.replace\n"
            "def kill(self, target):\n"
            "    rename(self, target); os.kill(os.getpid(), 9)\n"
            "Path.replace = kill; itda.save_model(sys.argv[1])"
        )
        assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
        with pytest.raises(
            ValueError, match=r"the weights of this configuration are in (\S*): move"
        ) as told:
            itda_lens.load(tmp_path)
        left = str(told.value).split("are in ")[1].split(": move")[0]
        shutil.move(left, tmp_path / "sae_weights.safetensors")
        assert torch.equal(itda_lens.load(tmp_path).W_dec, 2 * itda_lens.load(DATA / "best").W_dec)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
    def test_kills_at_random_points(self, tmp_path):
        """Twenty kills of a loop that saves leave one state or the other."""
        states = [dictionary(0), dictionary(1)]
        for seed, itda in enumerate(states):
            itda.save_model(tmp_path / f"{seed}")
        target = tmp_path / "target"
        code = """if True:
            import os, random, sys, time
            import itda_lens
            states = [itda_lens.load(path) for path in sys.argv[2:]]
            states[0].save_model(sys.argv[1])
            random.seed(0)
            for _ in range(20):
                child = os.fork()
                while child == 0:
                    random.choice(states).save_model(sys.argv[1])
                time.sleep(random.uniform(0.005, 0.1))
                os.kill(child, 9)
                os.waitpid(child, 0)
                loaded = itda_lens.load(sys.argv[1])
                print([i for i in (0, 1) if loaded.labels == states[i].labels
                       and loaded.W_dec.equal(states[i].W_dec)])
        """
        command = [sys.executable, "-W", "ignore", "-c", code, target, tmp_path / "0", tmp_path / "1"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found = run.stdout.splitlines()
        assert len(found) == 20
        assert set(found) <= {"[0]", "[1]"}
        assert is_dictionary(target)
        states[0].save_model(target)
        assert sorted(p.name for p in target.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
        assert torch.equal(itda_lens.load(target).W_dec, states[0].W_dec)

    def test_writers_and_readers_at_once(self, tmp_path):
        """What is read is one of the states; what remains after two writers is one of them, always."""
        states = [dictionary(0), dictionary(1)]
        states[0].save_model(tmp_path)
        stop = threading.Event()
        failures = []

        def write(itda):
            while not stop.is_set():
                try:
                    itda.save_model(tmp_path)
                except BaseException as error:
                    failures.append(error)

        threads = [threading.Thread(target=write, args=(itda,)) for itda in states]
        for thread in threads:
            thread.start()
        try:
            for _ in range(40):
                loaded = itda_lens.load(tmp_path)
                (which,) = [s for s in states if torch.equal(s.W_dec, loaded.W_dec)]
                assert loaded.labels == which.labels
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
        itda_lens.load(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]

    def test_a_sparsity_of_other_weights_is_told(self, itda, tmp_path):
        itda.save_model(tmp_path)
        save_sparsity(tmp_path, torch.full((D_SAE,), 0.5))
        kept = (tmp_path / "sparsity.safetensors").read_bytes()
        assert torch.allclose(load_sparsity(tmp_path), torch.tensor(0.5, dtype=torch.float64))
        dictionary(1).save_model(tmp_path)
        assert load_sparsity(tmp_path) is None
        (tmp_path / "sparsity.safetensors").write_bytes(kept)
        with pytest.raises(ValueError, match=r"sparsity\.safetensors was measured with other weights"):
            load_sparsity(tmp_path)
        with safe_open(tmp_path / "sparsity.safetensors", framework="pt") as tensors:
            assert list(tensors.keys()) == ["sparsity"]


class TestConfiguration:
    """A configuration that was edited, or made by somebody else."""

    @pytest.mark.parametrize("field", [*REQUIRED, "metadata"])
    def test_every_missing_or_misspelt_field_is_named(self, itda, tmp_path, field):
        _, config = itda.save_model(tmp_path)
        whole = config.read_text()
        value = json.loads(whole)[field]
        for misspelt in ({}, {field + "_": value}, {field.upper(): value}):
            config.write_text(whole)
            changed(config, **{field: ...}, **misspelt)
            with pytest.raises(ValueError, match=rf"cfg\.json is not a complete config.*'{field}'"):
                itda_lens.load(tmp_path)
            if field not in ("metadata", "dtype"):  # SAELens reads these before it asks the class
                with pytest.raises(ValueError, match=f"'{field}'"):
                    itda_lens.ITDA.load_from_disk(tmp_path)

    @pytest.mark.parametrize("value", ["x", "", -1, 1.5, True, None, [], {}, [3], {"a": 1}])
    def test_every_field_of_another_type_is_named(self, itda, tmp_path, value):
        _, config = itda.save_model(tmp_path)
        whole = json.loads(config.read_text())
        allowed = {
            bool: ("apply_b_dec_to_input", "signed", "mirrored"),
            float: ("threshold", "rtol", "l0"),
            type(None): ("l0",),
            dict: ("metadata",),
            str: ("device",),  # any name of one; what is asked for takes its place
        }
        for field in [*REQUIRED, "l0", "metadata", "device"]:
            if field in allowed.get(type(value), ()):
                continue
            config.write_text(json.dumps(whole | {field: value}))
            with pytest.raises(ValueError, match=rf"cfg\.json.*{field}"):
                itda_lens.load(tmp_path)
        kinds = {"hook_name": str, "context_size": int, "prepend_bos": bool}
        for field in ("itda_build", WEIGHTS_KEY, "itda_labels", *kinds):
            if value is None or (type(value) is kinds.get(field, dict) and value != {"a": 1}):
                continue
            if field == "itda_build" and value == {"a": 1}:  # an entry of a newer version
                continue
            config.write_text(json.dumps(whole | {"metadata": whole["metadata"] | {field: value}}))
            with pytest.raises(ValueError, match=rf"(?s)cfg\.json.*({field}|save)"):
                itda_lens.load(tmp_path)

    def test_configurations_made_in_code_keep_their_defaults(self):
        assert itda_lens.ITDAConfig(d_in=4, d_sae=40).k == 32
        made = SAE.from_dict({"architecture": "itda", "d_in": 4, "d_sae": 40})
        assert made.cfg.k == 32

    @pytest.mark.parametrize(
        "change",
        [
            dict(apply_b_dec_to_input="no"), dict(mirrored="no"), dict(mirrored=1), dict(dtype="int8"),
            dict(reshape_activations="hook_q"), dict(device=torch.device("cpu")),
        ],
    )  # fmt: skip
    def test_fields_of_saelens_are_checked_in_code_too(self, change):
        (name,) = change
        with pytest.raises(ValueError, match=name):
            itda_lens.ITDAConfig(**(dict(d_in=4, d_sae=40, k=3) | change))

    def test_nesting_without_end(self, itda, tmp_path):
        _, config = itda.save_model(tmp_path)
        config.write_text("[" * 100_000)
        with pytest.raises(ValueError, match=r"cfg\.json is truncated or damaged"):
            itda_lens.load(tmp_path)
        assert not is_dictionary(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
    def test_weights_that_are_no_floats(self, itda, tmp_path, dtype):
        weights, _ = itda.save_model(tmp_path)
        save_file({name: t.to(dtype) for name, t in load_file(weights).items()}, weights)
        with pytest.raises(ValueError, match=r"sae_weights\.safetensors.*must be of 16, 32 or 64 bit"):
            itda_lens.load(tmp_path)

    def test_truncated_at_every_length(self, itda, tmp_path):
        for file in itda.save_model(tmp_path):
            whole = file.read_bytes()
            for length in range(0, len(whole), max(1, len(whole) // 40)):
                file.write_bytes(whole[:length])
                with pytest.raises(ValueError, match=file.name) as told:
                    itda_lens.load(tmp_path)
                assert "\n" not in str(told.value)
            file.write_bytes(whole)
        itda_lens.load(tmp_path)

    def test_devices_and_dtypes_by_torchs_own_objects(self, itda, tmp_path):
        itda.save_model(tmp_path)
        loaded = itda_lens.load(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
        assert (loaded.dtype, loaded.device, loaded.cfg.device) == (
            torch.bfloat16,
            torch.device("cpu"),
            "cpu",
        )
        json.dumps(loaded.cfg.to_dict())
        for arguments in (dict(device="gpu"), dict(dtype="int8")):
            (name,) = arguments
            with pytest.raises(ValueError, match=f"^{name} must be one of"):
                itda_lens.load(tmp_path, **arguments)


class TestLabels:
    @staticmethod
    def packed(columns) -> str:
        text = columns if isinstance(columns, str) else json.dumps(columns)
        return "zlib+base64:" + base64.b64encode(zlib.compress(text.encode())).decode()

    @staticmethod
    def columns(**changes):
        label = Label(1, token="a", context="b", chars=(0, 1))
        columns = {name: [value] for name, value in vars(label).items()}
        return json.loads(json.dumps(columns)) | changes

    @pytest.mark.parametrize("count", [None, 12])
    def test_what_unpacks_to_gigabytes_is_not_unpacked(self, count):
        """Eight hundred megabytes of zeros in one megabyte of text, as a file can have them."""
        pieces, compressor = [], zlib.compressobj(9)
        pieces.append(compressor.compress(b'{"row":['))
        for _ in range(48):
            pieces.append(compressor.compress(b"0," * 2**23))
        pieces.append(compressor.flush())
        bomb = "zlib+base64:" + base64.b64encode(b"".join(pieces)).decode()
        resource = pytest.importorskip("resource")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match="damaged labels: they unpack to more than"):
            Labels.from_compact(bomb, count)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024

    def test_what_is_written_is_read(self):
        fits = Labels([Label(0, context="x" * 60_000)])
        assert Labels.from_compact(fits.to_compact(), 1) == fits
        with pytest.raises(ValueError, match="labels must be shorter: 1 of them take"):
            Labels([Label(0, context="x" * 70_000)]).to_compact()
        _, each = labels_module.MOST_BYTES
        many = Labels([Label(0, context="é" * (each // 8))] * 200)
        assert Labels.from_compact(many.to_compact(), 200) == many

    @pytest.mark.parametrize(
        "columns",
        [
            columns(row=["x"]), columns(row=[1.5]), columns(row=[None]), columns(token=[3]),
            columns(context=[[]]), columns(chars=[[1]]), columns(chars=["ab"]), columns(chars=[3]),
            columns(cosine=["x"]), columns(cosine=[float("nan")]), columns(cosine=[None]),
            columns(row=[1, 2]), columns(row=3), columns(row=None), {}, [], "[" * 100_000, "",
        ],
    )  # fmt: skip
    def test_hostile_columns(self, itda, tmp_path, columns):
        with pytest.raises(ValueError, match="damaged labels"):
            Labels.from_compact(TestLabels.packed(columns))
        itda.cfg.metadata.itda_labels = TestLabels.packed(columns)
        itda.save_model(tmp_path)
        with pytest.raises(ValueError, match=r"cfg\.json.*itda_labels.*damaged labels"):
            itda_lens.load(tmp_path)

    def test_another_number_of_labels(self, itda, tmp_path):
        itda.cfg.metadata.itda_labels = Labels([Label(0)] * 3).to_compact()
        itda.save_model(tmp_path)
        with pytest.raises(ValueError, match=r"cfg\.json.*3 of them for 12 atoms"):
            itda_lens.load(tmp_path)


def dictionaries(place: Path) -> None:
    with output_folder(place) as folder:
        save_all({"theirs": dictionary(5)}, folder)


APPEARS = dict(
    dictionaries=dictionaries,
    a_folder=lambda place: place.mkdir(),
    other_things=lambda place: (place.mkdir(), (place / "thesis.tex").write_text("mine")),
    a_file=lambda place: place.write_text("mine"),
    a_link=lambda place: (place.with_name("real").mkdir(), place.symlink_to(place.with_name("real"))),
    a_dead_link=lambda place: place.symlink_to(place.with_name("nowhere")),
)

CHANGES = dict(
    a_new_dictionary=lambda place: dictionary(6).save_model(place / "new"),
    other_weights=lambda place: dictionary(6).save_model(place / "old"),
    a_sparsity=lambda place: save_sparsity(place / "old", torch.full((D_SAE,), 0.5)),
    other_things=lambda place: (place / "old" / "notes.txt").write_text("mine"),
    a_hidden_file=lambda place: (place / ".notes").write_text("mine"),
    replaced=lambda place: (shutil.rmtree(place), dictionaries(place)),
    a_file=lambda place: (shutil.rmtree(place), place.write_text("mine")),
    a_link=lambda place: (place.rename(place.with_name("moved")), place.symlink_to("moved")),
)  # fmt: skip


def everything(folder: Path) -> dict[str, object]:
    return {
        str(f.relative_to(folder)): f.readlink() if f.is_symlink() else f.is_dir() or f.read_bytes()
        for f in folder.rglob("*")
    }


class TestOutputFolder:
    """What is at the output at the end is looked at again; nothing of others is ever removed."""

    def conflict(self, tmp_path, itda, overwrite, happens):
        """The state before the end is the state after it, but for the new dictionaries beside."""
        target = tmp_path / "out"
        with pytest.raises(FileExistsError, match="made or changed while this ran") as told:
            with output_folder(target, overwrite) as folder:
                save_all({"a": itda}, folder)
                happens(target)
                before = {k: v for k, v in everything(tmp_path).items() if ".itda-tmp" not in k}
        (kept,) = tmp_path.glob("out.kept-*")
        assert str(kept) in str(told.value)
        assert torch.equal(itda_lens.load(kept / "a").W_dec, itda.W_dec)
        shutil.rmtree(kept)
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("what", APPEARS)
    def test_whatever_appears_stays(self, tmp_path, itda, what, overwrite):
        self.conflict(tmp_path, itda, overwrite, APPEARS[what])

    @pytest.mark.parametrize("what", CHANGES)
    def test_whatever_changes_stays(self, tmp_path, itda, what):
        with output_folder(tmp_path / "out") as folder:
            save_all({"old": dictionary(1)}, folder)
        self.conflict(tmp_path, itda, True, CHANGES[what])

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_of_two_at_once_one_wins_and_nothing_is_lost(self, tmp_path, overwrite):
        target = tmp_path / "out"
        if overwrite:
            dictionaries(target)
        first, second = output_folder(target, overwrite), output_folder(target, overwrite)
        for writer, seed in ((first, 1), (second, 2)):
            save_all({"a": dictionary(seed)}, writer.__enter__())
        second.__exit__(None, None, None)
        with pytest.raises(FileExistsError, match="the new dictionaries are in"):
            first.__exit__(None, None, None)
        (kept,) = tmp_path.glob("out.kept-*")
        assert torch.equal(itda_lens.load(target / "a").W_dec, dictionary(2).W_dec)
        assert torch.equal(itda_lens.load(kept / "a").W_dec, dictionary(1).W_dec)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([kept.name, "out"])

    def test_what_changes_between_the_last_look_and_the_move_stays(self, tmp_path, itda, monkeypatch):
        with output_folder(tmp_path / "out") as folder:
            save_all({"old": dictionary(1)}, folder)
        rename = os.rename

        def late(source, target):
            if Path(source).name == "out":
                (Path(source) / "thesis.tex").write_text("mine")
            rename(source, target)

        monkeypatch.setattr("os.rename", late)
        with pytest.raises(FileExistsError, match="made or changed while this ran"):
            with output_folder(tmp_path / "out", overwrite=True) as folder:
                save_all({"a": itda}, folder)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
        assert is_dictionary(tmp_path / "out" / "old")

    @pytest.mark.parametrize("exists", [False, True])
    def test_links_are_followed_and_stay(self, tmp_path, itda, exists):
        real = tmp_path / "disk" / "real"
        real.parent.mkdir()
        if exists:
            dictionaries(real)
        (tmp_path / "out").symlink_to(real)
        with output_folder(tmp_path / "out", overwrite=exists) as folder:
            save_all({"a": itda}, folder)
        assert (tmp_path / "out").is_symlink()
        assert [p.name for p in real.iterdir()] == ["a"]
        assert [p.name for p in real.parent.iterdir()] == ["real"]

    def test_a_link_to_nowhere_is_told_before_the_work(self, tmp_path):
        (tmp_path / "out").symlink_to(tmp_path / "unplugged" / "out")
        with pytest.raises(FileNotFoundError, match="out is a link to .*unplugged/out, whose folder"):
            with output_folder(tmp_path / "out"):
                pytest.fail("the work has begun")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_links_inside_are_removed_and_not_what_they_lead_to(self, tmp_path, itda):
        dictionary(3).save_model(tmp_path / "mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "link").symlink_to(tmp_path / "mine")
        with output_folder(tmp_path / "out", overwrite=True) as folder:
            save_all({"a": itda}, folder)
        assert is_dictionary(tmp_path / "mine")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]

    def test_an_empty_folder_may_be_the_output(self, tmp_path, itda):
        (tmp_path / "out").mkdir()
        with output_folder(tmp_path / "out") as folder:
            save_all({"a": itda}, folder)
        assert is_dictionary(tmp_path / "out" / "a")

    @pytest.mark.parametrize("at", range(4))
    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("kill", [False, True])
    def test_a_stop_at_every_rename_leaves_the_old_or_the_new(self, tmp_path, itda, at, after, kill):
        if kill and not hasattr(os, "fork"):
            pytest.skip("kills forked processes")
        target = tmp_path / "out"
        dictionaries(target)
        count, rename = [], os.rename

        def stop():
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt

        def stopping(source, goal):
            count.append(None)
            if len(count) == at + 1 and not after:
                stop()
            rename(source, goal)
            if len(count) == at + 1 and after:
                stop()

        def work():
            with pytest.MonkeyPatch.context() as patch:
                with output_folder(target, overwrite=True) as folder:
                    save_all({"new": itda}, folder)
                    patch.setattr("os.rename", stopping)
                    patch.setattr(Path, "rename", lambda self, goal: stopping(self, goal))

        if kill:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 warns of forks where there are threads
                child = os.fork()
            if child == 0:
                try:
                    work()
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
        else:
            with suppress(KeyboardInterrupt):
                work()
            assert [p.name for p in target.iterdir()] in (["theirs"], ["new"])
        # The next one is not blocked, and finds the old or the new in place.
        with output_folder(target, overwrite=True) as folder:
            save_all({"next": itda}, folder)
        assert [p.name for p in target.iterdir()] == ["next"]
        assert not [p for p in tmp_path.iterdir() if is_leftover(p)]

    def test_what_a_killed_run_had_finished_is_kept(self, tmp_path, itda, caplog):
        from itda_lens.records.files import temporary_folder

        with temporary_folder(tmp_path, "out") as dead:
            itda.save_model(dead / "new" / "a")
        with temporary_folder(tmp_path, "out") as dead:
            (dead / "new" / "half").mkdir(parents=True)
        with output_folder(tmp_path / "out") as folder:
            save_all({"b": itda}, folder)
        (kept,) = tmp_path.glob("out.kept-*")
        assert is_dictionary(kept / "a")
        assert f"a run that was killed had finished {kept}" in caplog.text
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", kept.name])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_tables_of_gram_rows_are_free_after_a_fork():
    from itda_lens.pursuit.gram_rows import GramRows, WholeGram

    tables = [GramRows(torch.eye(4), 10_000), WholeGram(torch.zeros(4, 4, dtype=torch.int16))]
    for table in tables:
        table.lock.acquire()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks where there are threads
        child = os.fork()
    if child == 0:
        free = all(table.lock.acquire(timeout=1) for table in tables)
        os._exit(0 if free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestBench:
    @pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups")
    def test_a_kill_leaves_no_process(self):
        psutil = pytest.importorskip("psutil")
        worker = (
            "import os, subprocess, sys; from itda_lens.saebench.worker import _end_with\n"
            "child = subprocess.Popen(['sleep', '100'])\n"
            "print(os.getpid(), child.pid, flush=True); _end_with(int(sys.argv[1]))"
        )
        runner = (
            "import os, sys; from itda_lens.saebench.runner import _process\n"
            f"command = [sys.executable, '-c', {worker!r}, str(os.getpid())]\n"
            "with _process(command, dict(os.environ), sys.stdout) as process: process.wait()"
        )
        command = [sys.executable, "-c", runner]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            pids = [int(pid) for pid in process.stdout.readline().split()]
            process.kill()
            process.wait()
        assert len(pids) == 2

        def alive(pid):
            try:
                return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False

        end = time.monotonic() + 20
        while any(map(alive, pids)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(alive, pids))

    @pytest.mark.parametrize("at", range(6))
    def test_a_stop_while_the_folder_is_made_blocks_nothing(self, tmp_path, monkeypatch, at):
        from itda_lens.saebench.folder import OutputFolder

        count, mkdir = [], Path.mkdir

        def stopping(self, *args, **kwargs):
            count.append(None)
            if len(count) == at + 1:
                raise KeyboardInterrupt
            return mkdir(self, *args, **kwargs)

        folder = OutputFolder(tmp_path / "out", None)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "mkdir", stopping)
            folder.prepare([], {"saelens": {}}, None, "model")
        folder.check([], {"saelens": {}}, "model")
        folder.prepare([], {"saelens": {}}, None, "model")
        # What a kill leaves of the record itself is none of another's things either.
        (tmp_path / "out" / "bench.json").unlink()
        for inside in ("work", "logs", "saelens"):
            (tmp_path / "out" / inside).rmdir()
        (tmp_path / "out" / ".files.0123456789abcdef.itda-tmp").mkdir()
        folder.check([], {"saelens": {}}, "model")

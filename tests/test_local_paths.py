"""Paths of this machine: known where a dictionary was built, and in no file that travels."""

import json
import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import save_random_llama
from huggingface_hub.utils import filter_repo_objects
from sae_lens import SAE
from sae_lens.training import upload_saes_to_huggingface as uploading

import itda_lens
from itda_lens import fit
from itda_lens.__main__ import main
from itda_lens.architectures import build_baselines, save_inference
from itda_lens.compare import activations_of, recorded_settings
from itda_lens.records import Provenance, is_local_path, known_name, without_paths
from itda_lens.sae import is_dictionary, provenance_of
from itda_lens.sae.saved import LOCAL_FILENAME
from itda_lens.saebench import bench, worker
from itda_lens.saebench.job import Entry, Job
from itda_lens.saebench.subjects import subjects_of
from itda_lens.training import collect, output_folder

HOOK = "blocks.1.hook_resid_post"
MARK = "jane-doe-secret"
OPTIONS = dict(d_sae=30, k=3, context_size=12, device="cpu", progress=False)


@pytest.fixture(scope="module")
def home(tokenizer, texts, tmp_path_factory):
    """A user's folder, whose path nobody else may read, with a model and a text."""
    home = tmp_path_factory.mktemp(MARK)
    save_random_llama(home / "tiny-random", tokenizer)
    (home / "book.txt").write_text(" ".join(texts))
    return home


@pytest.fixture(scope="module")
def built(home):
    return itda_lens.build(str(home / "tiny-random"), home / "book.txt", HOOK, **OPTIONS)[HOOK]


@pytest.fixture
def uploaded(monkeypatch):
    """All that SAELens uploads of a dictionary or folder, by file name; nothing leaves the machine."""

    def upload(sae):
        found = {}

        class Hub:
            def upload_folder(self, *, folder_path, allow_patterns, **_):
                names = [file.name for file in folder_path.iterdir()]
                for name in filter_repo_objects(names, allow_patterns=allow_patterns):
                    found[name] = (folder_path / name).read_bytes()

        monkeypatch.setattr(uploading, "HfApi", Hub)
        monkeypatch.setattr(uploading, "_repo_exists", lambda *_: True)
        uploading.upload_saes_to_huggingface(
            {"x": sae}, "org/name", show_progress=False, add_default_readme=False
        )
        assert {"cfg.json", "sae_weights.safetensors"} <= set(found)
        return found

    return upload


def is_free_of_paths(files):
    return not any(MARK.encode() in content for content in files.values())


class TestNothingTravels:
    def test_of_a_build(self, built, home, uploaded, tmp_path):
        assert provenance_of(built).model == str(home / "tiny-random")
        assert is_free_of_paths(uploaded(built))
        built.save_model(tmp_path / "ours")
        SAE.save_model(built, tmp_path / "theirs")
        save_inference(built, tmp_path / "inference")
        for view in ("prefix", "nonnegative"):
            made = built.prefix(8) if view == "prefix" else built.nonnegative()
            made.save_model(tmp_path / view)
        for folder in tmp_path.iterdir():
            assert is_free_of_paths(uploaded(folder)), folder
        # The names stay.
        config = json.loads((tmp_path / "ours" / "cfg.json").read_text())["metadata"]
        assert (config["model_name"], config["dataset_path"]) == ("tiny-random", "book.txt")
        assert config["itda_build"]["texts"] == "book.txt"
        assert config["itda_build"]["loader"] == "bridge"
        assert "model" not in config["itda_build"]
        assert MARK in (tmp_path / "ours" / LOCAL_FILENAME).read_text()

    def test_of_relative_paths(self, home, uploaded, tmp_path, monkeypatch):
        (tmp_path / MARK).mkdir()
        monkeypatch.chdir(tmp_path / MARK)
        (tmp_path / MARK / "tiny-random").symlink_to(home / "tiny-random")
        (tmp_path / MARK / "data").mkdir()
        shutil.copy(home / "book.txt", "data/book.txt")
        (itda,) = itda_lens.build("./tiny-random", f"../{MARK}/data/book.txt", HOOK, **OPTIONS).values()
        assert provenance_of(itda).texts == str(tmp_path / MARK / "data" / "book.txt")
        assert is_free_of_paths(uploaded(itda))

    def test_of_a_folder_that_is_a_data_set(self, home, texts, uploaded):
        (home / "prose").mkdir()
        lines = (json.dumps({"text": text}) for text in texts)
        (home / "prose" / "train.jsonl").write_text("\n".join(lines))
        (itda,) = itda_lens.build(
            str(home / "tiny-random"), str(home / "prose"), HOOK, **OPTIONS
        ).values()
        assert itda.cfg.metadata.dataset_path == str(home / "prose")
        files = uploaded(itda)
        assert is_free_of_paths(files)
        assert json.loads(files["cfg.json"])["metadata"]["dataset_path"] == "prose"

    def test_of_a_fit(self, home, uploaded):
        model = str(home / "tiny-random")
        found = collect(model, home / "book.txt", HOOK, context_size=12, device="cpu", progress=False)
        metadata = {"hook_name": HOOK, "model_name": model, "dataset_path": str(home / "book.txt")}
        itda = fit(found[HOOK].values, d_sae=30, k=3, metadata=metadata)
        assert is_free_of_paths(uploaded(itda))
        assert itda.cfg.metadata.model_name == model  # in memory it is as it was given

    def test_of_a_loaded_model_whose_folder_is_gone(self, home, tokenizer, uploaded, tmp_path):
        from transformers import AutoModelForCausalLM

        folder = save_random_llama(tmp_path / MARK / "moved", tokenizer)
        model = AutoModelForCausalLM.from_pretrained(folder)
        shutil.rmtree(folder)
        (itda,) = itda_lens.build(
            model, home / "book.txt", HOOK, tokenizer=tokenizer, **OPTIONS
        ).values()
        assert itda.cfg.metadata.model_name == "moved"
        assert is_free_of_paths(uploaded(itda))

    def test_of_the_command(self, home, uploaded, tmp_path):
        arguments = ["build", str(home / "tiny-random"), "--texts", str(home / "book.txt")]
        arguments += ["--hook", HOOK, "--out", str(tmp_path / "out"), "--d-sae", "30", "--k", "3"]
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--device", "cpu"])
        assert exit_.value.code == 0
        assert is_free_of_paths(uploaded(tmp_path / "out" / HOOK))

    def test_of_baselines(self, built, home, uploaded, tmp_path):
        options = dict(texts=home / "book.txt", epochs=1, progress=False)
        kinds = ["random", "pca", "topk"]
        folders = build_baselines([built], kinds, tmp_path, model=str(home / "tiny-random"), **options)
        for folder in folders:
            assert is_free_of_paths(uploaded(folder)), folder
        # They are known again by the texts, wherever these are.
        (tmp_path / "elsewhere").mkdir()
        moved = shutil.copy(home / "book.txt", tmp_path / "elsewhere" / "book.txt")
        assert build_baselines([built], kinds, tmp_path, model=None, **options | {"texts": moved})
        (tmp_path / "elsewhere" / "book.txt").write_text("other texts")
        with pytest.raises(ValueError, match="baseline of other texts"):
            build_baselines([built], kinds, tmp_path, model=None, **options | {"texts": moved})

    def test_of_a_bench(self, built, home, tmp_path):
        (tmp_path / "saes").mkdir()
        built.save_model(tmp_path / "saes" / "new")
        save_as_before(built, tmp_path / "saes" / "old")
        # Without a word of the model's folder, which the dictionaries know.
        results = bench(
            [tmp_path / "saes"], ["saelens"], tmp_path / "out", texts=home / "book.txt",
            baselines=["pca"], train_texts=home / "book.txt", device="cpu", progress=False,
            settings={"saelens": {"n_eval_reconstruction_batches": 1,
                                  "n_eval_sparsity_variance_batches": 1}},
        )  # fmt: skip
        assert [result.failure for result in results] == [None] * 3
        travelling = [*(tmp_path / "out" / "saelens").iterdir()]
        travelling += (tmp_path / "out" / "baselines").rglob("*.[js]*")
        assert len(travelling) == 5
        assert is_free_of_paths({file: file.read_bytes() for file in travelling})

    def test_of_the_configuration_that_saebench_writes(self, built, tmp_path):
        save_as_before(built, tmp_path / "old")
        job = Job("core", {}, [], "tiny-random", None, "cpu", str(tmp_path), str(tmp_path))
        sae = worker.load(Entry("old", str(tmp_path / "old")), job)
        assert MARK not in repr(asdict(sae.cfg))  # which is how its results hold it


def save_as_before(itda, folder):
    """The files of a dictionary as earlier versions wrote them: with paths in `cfg.json`."""
    itda.save_model(folder)
    config = json.loads((folder / "cfg.json").read_text())
    for name in ("dataset_path", "itda_build"):
        config["metadata"][name] = itda.cfg.metadata[name]
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / LOCAL_FILENAME).unlink()


class TestTheModelIsFound:
    @pytest.fixture(params=["new", "old", "moved"])
    def saved(self, request, built, tmp_path):
        """A dictionary's folder: of this version, of an earlier one, and moved to another place."""
        folder = tmp_path / "one" / HOOK
        if request.param == "old":
            save_as_before(built, folder)
        else:
            built.save_model(folder)
        if request.param == "moved":
            shutil.move(tmp_path / "one", tmp_path / "another")
            folder = tmp_path / "another" / HOOK
        return folder

    def test_by_every_reader(self, saved, home, built, capsys):
        assert provenance_of(itda_lens.load(saved)) == provenance_of(built)
        model, texts = str(home / "tiny-random"), str(home / "book.txt")
        assert recorded_settings([itda_lens.load(saved)]).model == model
        (found,) = activations_of([itda_lens.load(saved)], texts, max_tokens=20, progress=False)
        assert found.values.shape == (20, 32)
        assert subjects_of([saved])[0].model_source == model
        for command in (
            ["eval", str(saved), "--texts", texts, "--max-tokens", "50"],
            ["decompose", str(saved), "the cat sat"],
            ["compare", str(saved), str(saved.parent), "--measure", "cka", "--texts", texts],
        ):
            with pytest.raises(SystemExit) as exit_:
                main([*command, "--device", "cpu"])
            assert exit_.value.code == 0, capsys.readouterr().err

    def test_saved_anew_without_the_path(self, saved, home, uploaded, tmp_path):
        itda_lens.load(saved).save_model(tmp_path / "anew")
        assert is_free_of_paths(uploaded(tmp_path / "anew"))
        again = provenance_of(itda_lens.load(tmp_path / "anew"))
        assert again == provenance_of(itda_lens.load(saved))
        assert again.model == str(home / "tiny-random")

    def test_elsewhere_the_user_is_asked(self, built, home, tmp_path, capsys):
        built.save_model(tmp_path / "one")
        (tmp_path / "one" / LOCAL_FILENAME).unlink()
        arguments = ["eval", str(tmp_path / "one"), "--texts", str(home / "book.txt")]
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "pass --model: nothing here says where the dictionaries' model is" in error
        assert "which is called tiny-random" in error
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--model", str(home / "tiny-random"), "--max-tokens", "20"])
        assert exit_.value.code == 0

    def test_a_model_of_the_hub_is_named(self, tmp_path):
        metadata = {"model_name": "gpt2", "hook_name": HOOK, "itda_build": {"model": "gpt2"}}
        itda = fit(torch.randn(40, 6), d_sae=8, k=2, metadata=metadata)
        itda.save_model(tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "cfg.json", "sae_weights.safetensors",
        ]  # fmt: skip
        assert provenance_of(itda_lens.load(tmp_path)).model == "gpt2"


class TestTheFileBeside:
    def test_belongs_to_the_dictionary(self, built, tmp_path):
        built.save_model(tmp_path / "d")
        assert is_dictionary(tmp_path / "d")
        with output_folder(tmp_path, overwrite=True) as folder:
            built.save_model(folder / "d")
        assert is_dictionary(tmp_path / "d")

    def test_goes_when_another_dictionary_takes_the_place(self, built, tmp_path):
        built.save_model(tmp_path)
        other = fit(torch.randn(40, 6), d_sae=8, k=2)
        other.save_model(tmp_path)
        assert not (tmp_path / LOCAL_FILENAME).exists()
        # SAELens leaves it; its names are not those of the other dictionary.
        built.save_model(tmp_path)
        SAE.save_model(other, tmp_path)
        assert provenance_of(itda_lens.load(tmp_path)).local == {}

    @pytest.mark.parametrize("content", ["{", "[1]", '{"model": 3}', '["x"]', "[" * 100_000, "\0\xff"])
    def test_damaged_is_told_and_passed_over(self, built, content, tmp_path, caplog):
        built.save_model(tmp_path)
        (tmp_path / LOCAL_FILENAME).write_text(content, encoding="latin-1")
        with caplog.at_level(logging.WARNING):
            itda = itda_lens.load(tmp_path)
        assert f"{LOCAL_FILENAME} is damaged" in caplog.text
        assert torch.equal(itda.W_dec, built.W_dec)
        assert provenance_of(itda).model is None

    def test_entries_of_others_are_left_out(self, built, tmp_path):
        built.save_model(tmp_path)
        (tmp_path / LOCAL_FILENAME).write_text(
            json.dumps({"model": "/x/y", "model_name": "other", "texts": "/x/other.txt", "new": "z"})
        )
        found = provenance_of(itda_lens.load(tmp_path))
        assert (found.model, found.texts, found.dataset_path) == (None, "book.txt", "book.txt")


class TestPaths:
    @pytest.mark.parametrize(
        ("value", "name"),
        [
            ("/home/me/model", "model"), ("/home/me/model/", "model"), ("C:\\Users\\me\\model", "model"),
            ("C:/Users/me/model", "model"), ("\\\\server\\share\\model", "model"), ("~/model", "model"),
            ("../model", "model"), ("./a.txt", "a.txt"),
        ],
    )  # fmt: skip
    def test_paths(self, value, name):
        assert is_local_path(value)
        assert known_name(value) == name

    @pytest.mark.parametrize("value", ["gpt2", "org/name", "list", "a.txt", "", "a:b", "data/x.txt"])
    def test_names(self, value):
        assert not is_local_path(value)
        assert known_name(value) == value

    def test_without_paths(self):
        metadata = {
            "model_name": "/home/me/m", "dataset_path": "/home/me/t.txt", "hook_name": "/odd/hook",
            "itda_build": {"model": "/home/me/m", "texts": "/home/me/t.txt", "loader": "bridge"},
        }  # fmt: skip
        before = json.dumps(metadata)
        shared = without_paths(metadata)
        assert json.dumps(metadata) == before
        assert shared == {
            "model_name": "m", "dataset_path": "t.txt", "hook_name": "/odd/hook",
            "itda_build": {"texts": "t.txt", "loader": "bridge"},
        }  # fmt: skip
        record = Provenance.of(metadata)
        assert Provenance.of(shared).with_local(record.local) == record
        assert without_paths({"itda_build": None, "texts": 3}) == {"itda_build": None, "texts": 3}

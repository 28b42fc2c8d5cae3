"""The commands, run as a user runs them, on the tiny model."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import itda_lens
from itda_lens.__main__ import BAD_INPUT, FAILURE, INTERRUPTED, main

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def itda_command(capsys, monkeypatch):
    """Run `itda` with arguments; exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return exit_.value.code, shown.out, " ".join(shown.err.split())

    return run


@pytest.fixture(scope="module")
def text_file(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text(" ".join(texts))
    return file


@pytest.fixture(scope="module")
def built(tiny_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dictionaries"
    with pytest.raises(SystemExit) as exit_:
        main(build_arguments(tiny_folder, text_file, out))
    assert exit_.value.code == 0
    return out


def build_arguments(model, text_file, out, **changes):
    options = {"texts": text_file, "hook": HOOK, "out": out, "d-sae": 30, "k": 3, "context-size": 12}
    options |= {"device": "cpu"} | {name.replace("_", "-"): value for name, value in changes.items()}
    return ["build", str(model), *[f"--{name}={value}" for name, value in options.items()]]


def test_build_writes_a_loadable_dictionary(built, tiny_folder):
    itda = itda_lens.load(built / HOOK)
    assert (itda.cfg.d_sae, itda.cfg.k, itda.cfg.d_in) == (30, 3, 32)
    assert itda.cfg.metadata.itda_build["model"] == str(tiny_folder)


def test_build_with_a_mean_l0_and_an_update(itda_command, tiny_folder, text_file, tmp_path):
    arguments = build_arguments(tiny_folder, text_file, tmp_path / "out", k=6, l0=2.5)
    code, _, _ = itda_command(*arguments, "--update")
    assert code == 0
    itda = itda_lens.load(tmp_path / "out" / HOOK)
    assert (itda.cfg.k, itda.cfg.l0) == (6, 2.5)
    assert itda.cfg.threshold > 0
    assert min(label.cosine for label in itda.labels) < 0.999
    _, out, _ = itda_command("info", tmp_path / "out")
    assert "mean L0" in out
    assert f"{itda.cfg.threshold:.4g}" in out


def test_info(itda_command, built):
    code, out, _ = itda_command("info", built)
    assert code == 0
    for expected in ("tiny-random", HOOK, "d_sae", "texts_fingerprint", "First 10 atoms", "position"):
        assert expected in out


def test_eval(itda_command, built, text_file):
    code, out, _ = itda_command("eval", built, "--texts", text_file, "--max-tokens", 200)
    assert code == 0
    for expected in (HOOK, "FVU", "CE-loss score", "KL", "alive", "L0"):
        assert expected in out
    assert not (built / HOOK / "sparsity.safetensors").exists()


def test_eval_keeps_densities(itda_command, built, text_file, tmp_path):
    folder = tmp_path / "dictionary"
    shutil.copytree(built / HOOK, folder)
    code, _, _ = itda_command("eval", folder, "--texts", text_file, "--save-density")
    assert code == 0
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (30,)
    # At most k = 3 of the 30 atoms fire at a token.
    assert 0 < (10**sparsity).sum() <= 3.001
    code, _, _ = itda_command("info", folder, "--neuronpedia", tmp_path / "atoms.jsonl")
    assert code == 0
    records = [json.loads(line) for line in (tmp_path / "atoms.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == [str(i) for i in range(30)]
    assert {(record["modelId"], record["layer"]) for record in records} == {
        ("tiny-random", "1-res-itda")
    }
    assert [record["frac_nonzero"] for record in records] == pytest.approx(
        (10**sparsity).tolist(), abs=1e-6
    )
    assert records[3]["explanations"][0]["description"] == itda_lens.load(folder).labels[3].context
    (folder / "sparsity.safetensors").write_bytes(b"broken")
    code, _, err = itda_command("info", folder, "--neuronpedia", tmp_path / "atoms.jsonl")
    assert code == BAD_INPUT
    assert "truncated or damaged" in err


def test_decompose(itda_command, built):
    code, out, _ = itda_command("decompose", built / HOOK, "the cat sat")
    assert code == 0
    for expected in ("'the'", "'cat'", "'sat'", "coefficient", "came from"):
        assert expected in out
    assert "+" in out


@pytest.mark.parametrize(
    "command", [[], ["build"], ["info"], ["eval"], ["decompose"], ["demo"], ["compare"]]
)
def test_help(itda_command, command):
    code, out, _ = itda_command(*command, "--help")
    assert code == 0
    assert " ".join(["Usage: itda", *command]) in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="no-such/model"), "model 'no-such/model' is neither a folder nor a model"),
        (dict(hook="blocks.9.hook_resid_post"), "no hook 'blocks.9.hook_resid_post'; near it are"),
        (dict(k=31), "k must be between 1 and d_sae=30, got 31"),
        (dict(d_sae=100_000), "d_sae"),
        (dict(texts="no-such-file.txt"), "neither a file nor a data set"),
        (dict(preset="fast"), "'fast' is not one of 'best', 'thorough', 'paper'"),
        (dict(loader="telepathy"), "is not one of 'bridge', 'hooked_transformer', 'huggingface'"),
        (dict(method="lasso"), "'lasso' is not one of 'mp', 'omp', 'ols'"),
        (dict(k=0), "'--k': Input should be greater than or equal to 1"),
        (dict(max_tokens=0), "'--max-tokens': Input should be greater than or equal to 1"),
        (dict(context_size=1), "'--context-size': Input should be greater than or equal to 2"),
        (dict(rtol=-1), "'--rtol': Input should be greater than or equal to 0"),
    ],
)
def test_bad_input_is_one_clear_line(itda_command, tiny_folder, text_file, tmp_path, changes, message):
    changes = {"model": tiny_folder} | changes
    arguments = build_arguments(changes.pop("model"), text_file, tmp_path / "out", **changes)
    code, _, err = itda_command(*arguments)
    assert code == BAD_INPUT
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_work_begins(itda_command, built, tiny_folder, text_file):
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    code, _, err = itda_command(*build_arguments(tiny_folder, text_file, built))
    assert code == BAD_INPUT
    assert "exists; choose another folder" in err
    assert {file: file.stat().st_mtime_ns for file in built.rglob("*")} == before


def test_overwrite(itda_command, tiny_folder, text_file, tmp_path):
    for k, flags in ((3, []), (2, ["--overwrite"])):
        code, _, _ = itda_command(*build_arguments(tiny_folder, text_file, tmp_path / "o", k=k), *flags)
        assert code == 0
    assert itda_lens.load(tmp_path / "o" / HOOK).cfg.k == 2


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), INTERRUPTED), (OSError(28, "No space left"), FAILURE)]
)
def test_interrupt_and_full_disk_leave_nothing(
    itda_command, tiny_folder, text_file, tmp_path, monkeypatch, error, code
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("itda_lens.training.save_all", fail)
    found, _, err = itda_command(*build_arguments(tiny_folder, text_file, tmp_path / "out"))
    assert found == code
    assert "Traceback" not in err
    assert ("interrupted" if code == INTERRUPTED else "error: [Errno 28] No space left") in err
    assert list(tmp_path.iterdir()) == []


def test_loading_something_else(itda_command, tmp_path):
    code, _, err = itda_command("info", tmp_path / "nothing")
    assert code == BAD_INPUT
    assert "no folder" in err

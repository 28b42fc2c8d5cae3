"""The commands, run as a user runs them, on the tiny model."""

import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
from safetensors.torch import load_file

import itda_lens
from itda_lens import analysis, cli, compare, control, sae, saebench, sources
from itda_lens.__main__ import BAD_INPUT, FAILURE, INTERRUPTED, TERMINATED, main
from itda_lens.cli import choices
from itda_lens.cli.options import completing

HOOK = "blocks.1.hook_resid_post"


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
    _, out, _ = itda_command("info", tmp_path / "out", "--all")
    assert "mean L0" in out
    assert f"{itda.cfg.threshold:.4g}" in out


def test_info(itda_command, built):
    code, out, _ = itda_command("info", built, "--all")
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


COMMANDS = [
    *(
        "demo",
        "build",
        "build-shard",
        "build-finish",
        "fit",
        "info",
        "decompose",
        "find",
        "eval",
        "bench",
    ),
    *("compare", "report", "steer", "erase", "push"),
]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(itda_command, command):
    code, out, _ = itda_command(*command, "--help")
    assert code == 0
    assert " ".join(["Usage: itda", *command]) in out
    assert out.isascii()  # also a terminal that knows nothing else shows it


def test_help_shows_brackets_choices_and_ranges(itda_command):
    _, out, _ = itda_command("bench", "--help")
    assert "pip install 'itda-lens[saebench]'" in out
    _, out, _ = itda_command("build", "--help")
    assert "<best|thorough|paper>" in out
    assert "x>=1" in out


def test_version(itda_command):
    code, out, _ = itda_command("--version")
    assert code == 0
    assert out.strip() == f"itda-lens {itda_lens.__version__}"


HEAVY = "torch numpy scipy numba sae_lens transformer_lens transformers datasets matplotlib".split()


def run_python(code, *arguments, **changes):
    environment = os.environ | {"COLUMNS": "100"} | changes
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip


def test_help_version_and_usage_errors_import_nothing_heavy():
    code = f"""
import sys
from itda_lens.__main__ import main
for arguments in [["--help"], ["--version"], ["build", "--preset", "x"]] + [
    [name, "--help"] for name in {COMMANDS}
]:
    try:
        main(arguments)
    except SystemExit as exit_:
        assert exit_.code in (0, 2)
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_completion(tmp_path):
    done = run_python(
        "from itda_lens.__main__ import main; main([])",
        _ITDA_COMPLETE="complete_bash", COMP_WORDS="itda build --preset ", COMP_CWORD="3",
    )  # fmt: skip
    assert done.stdout.split() == ["best", "thorough", "paper"]


def test_completion_of_several_names():
    complete = completing(["saelens", "core", "scr"])
    assert complete("s") == ["saelens", "scr"]
    assert complete("saelens,") == ["saelens,core", "saelens,scr"]
    assert complete("saelens,core,s") == ["saelens,core,scr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evals", "core,cores"], "'--evals': 'cores' is not one of 'saelens', 'core',"),
        (["--baselines", "sae"], "'--baselines': 'sae' is not one of 'random', 'pca',"),
        (["--codes", "unsigned"], "'unsigned' is not one of 'both', 'signed', 'nonnegative'"),
        (["--batch-size", "0"], "'--batch-size': Input should be greater than or equal to 1"),
    ],
)
def test_bench_refuses_other_names(itda_command, tmp_path, options, message):
    code, _, err = itda_command("bench", tmp_path, "--out", tmp_path / "out", *options)
    assert code == BAD_INPUT
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_choices_are_those_of_the_library():
    for ours, theirs in (
        (choices.Preset, parameter_type(itda_lens.build, "preset")),
        (choices.Method, parameter_type(itda_lens.build, "method")),
        (choices.Loader, parameter_type(itda_lens.build, "loader")),
        (choices.Measure, parameter_type(compare.compare, "measure")),
        (choices.Match, parameter_type(compare.compare, "match")),
        (choices.Contrast, parameter_type(control.contrast, "by")),
        (choices.Codes, parameter_type(saebench.bench, "codes")),
        (choices.Exposed, parameter_type(sae.push, "labels")),
        (choices.Evaluation, tuple(saebench.EVALUATIONS)),
        (choices.Baseline, flat(saebench.Baseline)),
        (choices.SpecialTokens, sources.SpecialTokens),
    ):
        assert flat(ours) == flat(theirs)


def parameter_type(function, name):
    return inspect.signature(function).parameters[name].annotation


def flat(literal):
    """The strings of a Literal, of one in a union with None, or of a tuple."""
    if isinstance(literal, str):
        return (literal,)
    parts = literal if isinstance(literal, tuple) else get_args(literal)
    return tuple(name for part in parts if part is not type(None) for name in flat(part))


# Options of a command that the Python function has under another name.
RENAMED = {"hook": "hook_names", "folder": "sae", "folders": "dictionaries"}
# Defaults that differ, and why.
EXCEPTIONS = {
    (cli.build_command, "d_sae"): "Python has none: the size of a dictionary is a decision",
    (cli.build_command, "k"): "Python has none: the length of codes is a decision",
    (cli.build_command, "texts"): "or --chats: one of the two",
    (cli.eval_command, "texts"): "or --chats: one of the two",
    (cli.eval_command, "model"): "the command takes the model that the dictionaries name",
    (cli.eval_command, "loader"): "and loads it as they say",
    (cli.decompose_command, "model"): "as for eval",
    (cli.decompose_command, "loader"): "as for eval",
    (cli.bench_command, "evals"): "Python has none",
    (cli.bench_command, "baselines"): "none in both, but one string with commas",
    (cli.compare_command, "texts"): "Python's activations_of must have them; jaccard needs none",
}


@pytest.mark.parametrize(
    ("command", "functions"),
    [
        (cli.build_command, [itda_lens.build]),
        (cli.eval_command, [analysis.evaluate]),
        (cli.decompose_command, [analysis.decompose]),
        (cli.bench_command, [saebench.bench]),
        (cli.compare_command, [compare.compare, compare.diff, compare.activations_of]),
    ],
)
def test_defaults_are_those_of_python(command, functions):
    shared = set()
    for name, option in inspect.signature(command).parameters.items():
        for function in functions:
            known = inspect.signature(function).parameters
            argument = known.get(RENAMED.get(name, name))
            if argument is None:
                continue
            shared.add(name)
            if (command, name) not in EXCEPTIONS:
                assert option.default == argument.default, name
    assert len(shared) >= 5
    assert {name for of, name in EXCEPTIONS if of is command} <= shared


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


def test_python_refuses_what_the_options_refuse(tiny, texts, built):
    itda = itda_lens.load(built / HOOK)
    for name in ("max_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            analysis.evaluate(tiny, itda, texts, **{name: 0})


STOPPED_BUILD = """
import sys, time
import itda_lens.training
from itda_lens.__main__ import main

def save_half(dictionaries, folder):
    (folder / "half").write_text("a half")
    print("working", flush=True)
    time.sleep(100)

itda_lens.training.build = lambda *_, **__: {}
itda_lens.training.save_all = save_half
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGTERM, TERMINATED, "terminated"), (signal.SIGINT, INTERRUPTED, "interrupted")],
)
def test_a_signal_leaves_nothing_half_written(tmp_path, sent, code, said):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPPED_BUILD, *build_arguments("model", "text", out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "working\n"
        assert len(list(tmp_path.rglob("half"))) == 1
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in err.splitlines()
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_second_sigterm_does_not_stop_the_tidying_up(itda_command, monkeypatch, tmp_path):
    tidied = []

    def stopped(*args, **kwargs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)

    monkeypatch.setattr("itda_lens.training.build", stopped)
    code, _, err = itda_command(*build_arguments("model", "text", tmp_path / "out"))
    assert (code, tidied) == (TERMINATED, [True])
    assert "terminated" in err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_sigterm_that_was_set_stays(itda_command, monkeypatch, tmp_path):
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        itda_command("info", tmp_path)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


HOSTILE = "[x]:dog:\x1b[31m\u202e"
SEEN = r"[x]:dog:\x1b[31m\u202e"


def test_errors_show_paths_literally(itda_command, tmp_path):
    code, _, err = itda_command("info", tmp_path / HOSTILE)
    assert code == BAD_INPUT
    # Our messages quote names, which doubles backslashes; what matters is that nothing else is there.
    assert SEEN in err
    assert err.isprintable()


def test_errors_are_one_line(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError(f"first\n  second {HOSTILE}")

    monkeypatch.setattr("itda_lens.sae.load", fail)
    with pytest.raises(SystemExit):
        main(["info", "folder"])
    assert capsys.readouterr().err.splitlines() == [f"error: first second {SEEN}"]


def test_messages_and_tables_show_paths_literally(itda_command, tiny_folder, text_file, tmp_path):
    out = tmp_path / HOSTILE
    code, shown, _ = itda_command(*build_arguments(tiny_folder, text_file, out))
    assert code == 0
    assert shown.count(SEEN) == 2
    shutil.copy(text_file, tmp_path / f"{HOSTILE}.txt")
    for arguments in (
        ["info", out / HOOK],
        ["eval", out / HOOK, "--texts", tmp_path / f"{HOSTILE}.txt", "--max-tokens", 100],
    ):
        code, shown, _ = itda_command(*arguments)
        assert code == 0
        assert SEEN in "".join(shown.split())
        assert shown.replace("\n", "").isprintable()


def test_logs_show_text_literally(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    with pytest.raises(SystemExit):
        main(["--version"])
    (handler,) = root.handlers
    record = logging.LogRecord("itda", logging.WARNING, "", 0, "path %s\nnext", (HOSTILE,), None)
    assert handler.format(record) == f"itda: path {SEEN}\nnext"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["bench", "-h"], 0), (["build", "--preset", "猫"], 2), (["info", "猫"], 2)],
)
def test_a_terminal_that_knows_ascii_only(arguments, code):
    program = "import sys; from itda_lens.__main__ import main; main(sys.argv[1:])"
    done = run_python(program, *arguments, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == code
    assert "Unicode" not in done.stderr
    assert "Traceback" not in done.stderr


def test_loading_something_else(itda_command, tmp_path):
    code, _, err = itda_command("info", tmp_path / "nothing")
    assert code == BAD_INPUT
    assert "no folder" in err

"""`bench`: bad input everywhere; the real SAEBench on a tiny model where it is installed."""

import csv
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TINY, save_random_llama, word_tokenizer
from sae_lens import SAE

import itda_lens
from itda_lens import fit
from itda_lens.__main__ import main
from itda_lens.architectures import build_baselines, save_inference, train_sae
from itda_lens.reports import bench_table, make_console, pareto_plot
from itda_lens.reports.benchmarks import family_of
from itda_lens.saebench import EVALUATIONS, Result, bench
from itda_lens.saebench.results import read_metrics
from itda_lens.saebench.subjects import subjects_of
from itda_lens.training import collect

HOOK = "blocks.1.hook_resid_post"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
D_IN = TINY["hidden_size"]

WITHOUT_SAEBENCH = pytest.mark.skipif(
    importlib.util.find_spec("sae_bench") is None, reason="sae-bench is not installed"
)


def needs_saebench(item):
    """For the second environment of `make test`, which runs what is marked so."""
    return pytest.mark.saebench(WITHOUT_SAEBENCH(item))


# SAEBench and its plots warn of their own imports when a configuration is made.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Words of every letter, and those of absorption's prompt."""
    generator = random.Random(0)
    made = {first + "".join(generator.choices(LETTERS, k=2)) for first in LETTERS for _ in range(14)}
    return ["has", "the", "first", "letter", ":", *sorted(made - {"has", "the"})]


@pytest.fixture(scope="module")
def model_folder(words, tmp_path_factory) -> Path:
    """A random model whose vocabulary has words of every letter."""
    folder = tmp_path_factory.mktemp("models") / "tiny-letters"
    return save_random_llama(folder, word_tokenizer(words), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def texts(words) -> list[str]:
    generator = random.Random(1)
    return [" ".join(generator.choices(words, k=60)) for _ in range(60)]


@pytest.fixture(scope="module")
def activations(model_folder, texts):
    found = collect(
        str(model_folder), texts, [HOOK], max_tokens=3000, context_size=16, device="cpu", progress=False
    )
    return found[HOOK]


@pytest.fixture(scope="module")
def metadata(model_folder):
    return dict(model_name=model_folder.name, hook_name=HOOK, context_size=16, prepend_bos=True)


@pytest.fixture(scope="module")
def saes(activations, metadata, tmp_path_factory) -> Path:
    """An ITDA and a TopK SAE of the same activations."""
    folder = tmp_path_factory.mktemp("saes")
    x, labels = activations
    fit(x, d_sae=60, k=4, labels=labels, metadata=metadata).save_model(folder / "itda")
    save_inference(train_sae(x, d_sae=60, k=4, epochs=1, metadata=metadata), folder / "topk")
    return folder


@pytest.fixture
def run(saes, model_folder, texts):
    """`bench` on the two, quickly."""

    def call(evals, out, sources=None, **options):
        options = dict(model=model_folder, texts=texts, device="cpu", progress=False) | options
        return bench([saes] if sources is None else sources, evals, out, **options)

    return call


SAELENS = {"saelens": dict(n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=2)}


class TestSAELens:
    def test_figures_names_and_folders(self, run, saes, activations, tmp_path, monkeypatch):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        before = sorted(saes.rglob("*"))
        named = {"a [1] b": saes / "itda", "itda_2": Path(os.path.relpath(saes / "topk"))}
        results = run(["saelens"], "../out", named, settings=SAELENS)
        assert [r.dictionary for r in results] == ["a [1] b", "itda_2"]
        # Nothing is written elsewhere.
        assert list(elsewhere.iterdir()) == []
        assert sorted(saes.rglob("*")) == before
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "bench.json",
            "logs",
            "saelens",
            "work",
        }
        itda = itda_lens.load(saes / "itda")
        x = activations.values
        with torch.no_grad():
            error = (x - itda(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
        for result in results:
            assert result.failure is None
            assert result.codes == "signed"
            assert 1 < result.metrics["L0"] <= 4
            assert 0.5 < result.metrics["alive"] <= 1
        # Other tokens of the same texts: the same figure up to sampling.
        assert results[0].metrics["explained variance"] == pytest.approx(1 - error.item(), abs=0.1)
        assert results[0].metrics["explained variance"] > results[1].metrics["explained variance"]

    def test_goes_on_and_refuses_to_mix(self, run, saes, activations, metadata, tmp_path):
        out = tmp_path / "out"
        first = run(["saelens"], out, [saes / "itda"], settings=SAELENS)
        stamp = first[0].file.stat().st_mtime_ns
        # What a killed run leaves is not taken for results.
        half = out / "work" / "results" / "saelens" / "topk_custom_sae_eval_results.json"
        half.write_text('{"eval_result_metrics": {"sparsity"')
        (out / "work" / "artifacts").mkdir()
        (out / "work" / "artifacts" / "half.pt").write_text("")
        second = run(["saelens"], out, settings=SAELENS)
        assert not (out / "work" / "artifacts").exists()
        assert second[1].metrics["L0"] > 1
        assert second[0] == first[0]
        assert second[0].file.stat().st_mtime_ns == stamp
        assert second[1].file is not None
        with pytest.raises(ValueError, match="other settings of 'saelens'"):
            run(["saelens"], out)
        other = tmp_path / "other" / "itda"
        fit(activations.values, d_sae=50, k=4, metadata=metadata).save_model(other)
        with pytest.raises(ValueError, match="holds results of another dictionary named 'itda'"):
            run(["saelens"], out, [other], settings=SAELENS)

    def test_a_dictionary_that_fails_does_not_stop_the_others(self, run, saes, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in (saes / "itda").iterdir():
            (broken / file.name).write_bytes(
                file.read_bytes()[: 1000 if file.suffix != ".json" else None]
            )
        results = run(["saelens"], tmp_path / "out", [broken, saes / "topk"], settings=SAELENS)
        assert results[0].file is None
        assert "SafetensorError" in results[0].failure
        assert results[1].metrics["L0"] > 0

    def test_an_interrupt_keeps_what_is_done(self, run, saes, model_folder, texts, tmp_path):
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        out = tmp_path / "out"
        settings = tmp_path / "settings.json"
        settings.write_text(json.dumps(SAELENS))
        shutil.copytree(saes / "itda", tmp_path / "saes" / "itda")
        for i in range(8):  # enough work after the first result for an interrupt to fall into
            shutil.copytree(saes / "topk", tmp_path / "saes" / f"topk{i}")
        command = [sys.executable, "-m", "itda_lens", "bench", str(tmp_path / "saes"), "--out", str(out)]
        command += ["--texts", str(tmp_path / "texts.txt"), "--model", str(model_folder)]
        command += ["--evals", "saelens", "--device", "cpu", "--settings", str(settings)]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background of a shell have interrupts ignored, and pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            done = out / "saelens" / "itda_custom_sae_eval_results.json"
            while process.poll() is None and not done.exists():
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        # Whatever is there is whole; the same call completes it.
        for file in (out / "saelens").iterdir():
            json.loads(file.read_text())
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
        for expected in ("itda", "topk", "L0", "explained", "alive"):
            assert expected in finished.stdout


@pytest.fixture(scope="module")
def data(words, tmp_path_factory) -> Path:
    """A folder with a data set shaped like LabHC/bias_in_bios: texts by profession and gender."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(2)
    themes = {profession: generator.sample(words, 6) for profession in range(28)}
    genders = {gender: generator.sample(words, 6) for gender in range(2)}
    target = folder / "LabHC" / "bias_in_bios"
    target.mkdir(parents=True)
    for split, n in (("train", 40), ("test", 24)):
        with (target / f"{split}.jsonl").open("w") as file:
            for profession in themes:
                for gender in genders:
                    for _ in range(n):
                        said = generator.choices(themes[profession] + genders[gender], k=12)
                        row = dict(hard_text=" ".join(said), profession=profession, gender=gender)
                        file.write(json.dumps(row) + "\n")
    return folder


PROBES = dict(
    dataset_names=["LabHC/bias_in_bios_class_set1"],
    context_length=16,
    sae_batch_size=64,
)
SMALL = {
    **SAELENS,
    "core": dict(n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, context_size=16),
    "sparse_probing": PROBES | dict(probe_train_set_size=64, probe_test_set_size=32),
    "tpp": PROBES | dict(train_set_size=64, test_set_size=32, probe_epochs=2, n_values=[2, 20]),
    "scr": PROBES
    | dict(
        train_set_size=64,
        test_set_size=32,
        probe_epochs=2,
        n_values=[2, 20],
        column1_vals_lookup={"LabHC/bias_in_bios_class_set1": [("professor", "nurse")]},
    ),
    "sparse_probing_sae_probes": dict(
        dataset_names=["119_us_state_TX"], reg_type="l2", include_llm_baseline=False
    ),
    "absorption": dict(
        max_k_value=2,
        k_sparse_probe_num_epochs=2,
        min_GT_probe_f1=-1.0,
        min_feats_for_eval=1,
        precalc_k_sparse_probe_sae_acts=True,
        words=330,
    ),
    "meta_structure": dict(train_steps=5, train_batch_size=32),
    "autointerp": dict(
        total_tokens=2000, llm_context_size=16, n_latents=3, dead_latent_threshold=5, buffer=2
    ),
}


@needs_saebench
class TestSAEBench:
    @pytest.mark.parametrize(
        "name",
        "core sparse_probing sparse_probing_sae_probes absorption scr tpp meta_structure".split(),
    )
    def test_evaluation(self, name, run, data, tmp_path):
        evaluation = EVALUATIONS[name]
        out = tmp_path / "out"
        results = run([name], out, data=data, settings=SMALL)
        expected = [("itda", "signed"), ("itda", "nonnegative")] if evaluation.sign_matters else []
        expected = (expected or [("itda", "signed")]) + [("topk", "signed")]
        assert [(r.dictionary, r.codes) for r in results] == expected
        for result in results:
            assert result.failure is None, result.failure
            assert set(result.metrics) == {metric.name for metric in evaluation.metrics}
            # SCR has no figure where its two directions tie, as they may on a random model.
            assert name == "scr" or all(value == value for value in result.metrics.values())
            # SAEBench's own file.
            written = json.loads(result.file.read_text())
            assert written["eval_config"].get("model_name", "tiny-letters") == "tiny-letters"
            assert written["sae_lens_id"] == "custom_sae"
            assert written["eval_config"].get("words") == (330 if name == "absorption" else None)
        if name == "absorption":
            tables = (out / "work" / "artifacts").rglob("*_df.csv")
            words = [
                row["token"]
                for file in tables
                for row in csv.DictReader(file.read_text().splitlines(True))
            ]
            assert len(words) == len(set(words)) == 330
        if name == "core":
            # Reconstruction does not depend on the sign.
            for figure in ("CE-loss score", "KL score"):
                signed, nonnegative = (r.metrics[figure] for r in results[:2])
                assert signed == pytest.approx(nonnegative, abs=1e-4)
        # Nothing outside the output folder.
        package = Path(importlib.util.find_spec("sae_bench").origin).parent
        assert not (package / "artifacts").exists()

    def test_a_model_whose_letters_cannot_be_read(self, run, saes, tmp_path):
        settings = {"absorption": dict(max_k_value=1, k_sparse_probe_num_epochs=1)}
        results = run(["absorption"], tmp_path / "out", [saes / "topk"], settings=settings)
        assert results[0].file is None
        assert "too few letters can be read off this model" in results[0].failure

    def test_a_bare_assertion_says_where(self, run, saes, data, tmp_path):
        settings = {"scr": SMALL["scr"] | dict(test_set_size=4000)}
        results = run(["scr"], tmp_path / "out", [saes / "topk"], data=data, settings=settings)
        assert results[0].failure.startswith("AssertionError: assert min_count == min_samples")

    def test_errors_that_core_swallows_are_told(self, run, saes, tmp_path):
        settings = {"core": SMALL["core"] | dict(context_size=4096)}
        results = run(["core"], tmp_path / "out", [saes / "topk"], settings=settings)
        assert results[0].file is None
        assert "Failed to evaluate" in results[0].failure

    def test_autointerp_against_a_server(self, run, saes, tmp_path, monkeypatch):
        asked = []

        class Server(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                scoring = len(asked[-1]["messages"][0]["content"]) and "1" in str(
                    asked[-1]["messages"][-1]
                )
                said = "1, 2, 3" if scoring else "words of one letter"
                message = dict(role="assistant", content=said)
                answer = dict(
                    id="x", object="chat.completion", created=0, model="m",
                    choices=[dict(index=0, finish_reason="stop", message=message)],
                )  # fmt: skip
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        with HTTPServer(("127.0.0.1", 0), Server) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
            monkeypatch.setenv("OPENAI_API_KEY", "none")
            results = run(["autointerp"], tmp_path / "out", settings=SMALL)
            server.shutdown()
        assert asked
        for result in results:
            assert result.failure is None, result.failure
            assert 0 <= result.metrics["autointerp"] <= 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("evals", "options", "message"),
        [
            (["cores"], {}, "evals must be among saelens, core, .*; got 'cores'"),
            ([], {}, "evals must be among .*; got 'none'"),
            (["saelens", "saelens"], {}, "evals must be different ones"),
            (["saelens"], dict(codes="unsigned"), "codes must be one of"),
            (["saelens"], dict(settings={"corn": {}}), "settings must be of .*; got 'corn'"),
            (["saelens"], dict(settings={"saelens": {"k": 1}}), "settings of saelens .*; got 'k'"),
            (["saelens"], dict(texts=[]), "at least one text"),
            (["saelens"], dict(model="no-such-model"), "does not know 'no-such-model'; pass --model"),
            (["saelens"], dict(baselines=["pca"]), "baselines need train_texts"),
            (
                ["saelens"],
                dict(texts="no/such-set"),
                "saelens cannot .* data set 'no/such-set'",
            ),
            (["saelens"], dict(texts=None), "saelens cannot run here; it needs data set 'Skylion007"),
        ],
    )
    def test_settings(self, run, tmp_path, evals, options, message):
        with pytest.raises(ValueError, match=message):
            run(evals, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_another_models_dictionary(self, run, activations, metadata, tmp_path):
        narrow = fit(activations.values[:, :16], d_sae=20, k=2, metadata=metadata)
        narrow.save_model(tmp_path / "narrow")
        with pytest.raises(ValueError, match="narrow has d_in=16, but tiny-letters gives .* 32 at"):
            run(["saelens"], tmp_path / "out", [tmp_path / "narrow"])
        deep = fit(activations.values, d_sae=20, k=2, metadata=metadata | {"hook_name": "blocks.7.x"})
        deep.save_model(tmp_path / "deep")
        with pytest.raises(
            ValueError, match=r"deep belongs to blocks.7.x, but tiny-letters has 3 layers"
        ):
            run(["saelens"], tmp_path / "out", [tmp_path / "deep"])

    def test_absorption_elsewhere(self, run, activations, metadata, tmp_path, monkeypatch):
        monkeypatch.setattr("itda_lens.saebench.checks.check_package", lambda evaluations: None)
        other = metadata | {"hook_name": "blocks.1.hook_mlp_out"}
        fit(activations.values, d_sae=20, k=2, metadata=other).save_model(tmp_path / "mlp")
        with pytest.raises(ValueError, match="hook_resid_post only, but mlp belongs to"):
            run(["absorption"], tmp_path / "out", [tmp_path / "mlp"])

    def test_folders(self, run, saes, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
            run(["saelens"], tmp_path / "out", [tmp_path / "nowhere"])
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="no cfg.json in .*empty"):
            run(["saelens"], tmp_path / "out", [tmp_path / "empty"])
        (tmp_path / "empty" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds other things than results"):
            run(["saelens"], tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="no folder .* for data"):
            run(["saelens"], tmp_path / "out", data=tmp_path / "nowhere")
        with pytest.raises(ValueError, match="one or more, got none"):
            run(["saelens"], tmp_path / "out", [])
        with pytest.raises(ValueError, match="two SAEs go by the name 'itda'"):
            run(["saelens"], tmp_path / "out", [saes / "itda", saes / "itda"])

    def test_sources(self, run, saes, activations, tmp_path):
        nameless = fit(activations.values, d_sae=20, k=2)
        nameless.save_model(tmp_path / "nameless")
        with pytest.raises(ValueError, match="pass --model: the SAEs name 0 models"):
            run(["saelens"], tmp_path / "out", [tmp_path / "nameless"], model=None)
        (tmp_path / "nameless" / "cfg.json").write_text("{")
        with pytest.raises(ValueError, match="truncated or damaged"):
            run(["saelens"], tmp_path / "out", [tmp_path / "nameless"])

    def test_saebench_missing(self, run, tmp_path, monkeypatch):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "sae_bench" else real(name)
        )
        with pytest.raises(ValueError, match=r"pip install 'itda-lens\[saebench\]'"):
            run(["core"], tmp_path / "out")

    @needs_saebench
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tpp", "data set 'LabHC/bias_in_bios' \\(neither a folder .* in --data nor"),
            ("autointerp", "the environment variable OPENAI_API_KEY"),
            ("ravel", "one of the models gemma-2-2b"),
            ("unlearning", "the WMDP corpus"),
            ("mdl", "a CUDA device, not 'cpu'"),
        ],
    )
    def test_what_an_evaluation_lacks(self, run, tmp_path, monkeypatch, name, message):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(ValueError, match=f"{name} cannot run here; it needs .*{message}"):
            run([name], tmp_path / "out", settings={"tpp": {"dataset_names": PROBES["dataset_names"]}})
        assert not (tmp_path / "out").exists()


class TestSubjects:
    def test_names(self, saes, tmp_path):
        with pytest.raises(ValueError, match="not end in '\\+nonnegative', got 'a\\+nonnegative'"):
            subjects_of({"a+nonnegative": saes / "itda"})
        assert [s.name for s in subjects_of([saes])] == ["itda", "topk"]
        named = subjects_of({"a": saes / "itda"})
        assert [(s.name, s.architecture, s.signed) for s in named] == [("a", "itda", True)]
        twin = tmp_path / "itda"
        itda_lens.load(saes / "itda").nonnegative().save_model(twin)
        found = subjects_of([saes / "itda", twin])
        assert [s.name.endswith("_itda") for s in found] == [True, True]
        assert [s.signed for s in found] == [True, False]
        assert subjects_of(["release:layer/1"])[0].source == "release:layer/1"


class TestBaselines:
    def test_command(self, model_folder, texts, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        file, built, out = str(tmp_path / "texts.txt"), tmp_path / "itda", tmp_path / "out"
        options = dict(d_sae=40, k=4, context_size=16, max_tokens=1500, device="cpu", progress=False)
        itda_lens.build(str(model_folder), file, HOOK, **options)[HOOK].save_model(built)
        (tmp_path / "settings.json").write_text(json.dumps(SAELENS))
        command = f"bench {built} --out {out} --evals saelens --texts {file} --train-texts {file}"
        command += f" --baselines random,pca,topk --settings {tmp_path / 'settings.json'} --plot"
        with pytest.raises(SystemExit) as exit_:
            main([*command.split(), "--device", "cpu"])
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        for name in (f"random-40-k4-{HOOK}", f"pca-k4-{HOOK}", f"topk-40-k4-{HOOK}"):
            assert name in shown
            sae = SAE.load_from_disk(out / "baselines" / name)
            assert sae.cfg.metadata.hook_name == HOOK
            assert sae.cfg.d_sae == (D_IN if name.startswith("pca") else 40)
        assert (out / "pareto.png").exists()
        stamps = {f: f.stat().st_mtime_ns for f in (out / "baselines").rglob("*.json")}
        kinds = ["random", "pca", "topk"]
        found = build_baselines(
            [itda_lens.load(built)], kinds, out / "baselines", texts=file, model=None
        )
        assert len(found) == 3
        with pytest.raises(ValueError, match="is a baseline of other texts or settings"):
            build_baselines(
                [itda_lens.load(built)], ["pca"], out / "baselines", texts=file, model=None, seed=1
            )
        assert {f: f.stat().st_mtime_ns for f in stamps} == stamps


def result(name, evaluation, codes="signed", failure=None, **metrics) -> Result:
    file = None if failure else Path("x.json")
    return Result(name, evaluation, codes, metrics, file, failure)


class TestReports:
    def test_table(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        results = [
            result("a-k10", "saelens", L0=9.96, **{"explained variance": 0.5}),
            result("a-k10", "absorption", absorption=0.25),
            result("a-k10", "absorption", "nonnegative", absorption=0.5),
            result("b", "saelens", L0=20.0, **{"explained variance": 0.61234}),
            result("b", "absorption", failure="too few letters"),
        ]
        make_console().print(bench_table(results))
        shown = capsys.readouterr().out
        for expected in ("0.250 / 0.500", "0.612", "20.0", "9.960", "failed", "too few letters", "↓"):
            assert expected in shown

    def test_an_evaluation_that_failed_throughout_has_its_column(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        make_console().print(bench_table([result("a", "absorption", failure="too few letters")]))
        shown = capsys.readouterr().out
        assert "absorption ↓" in shown
        assert "failed" in shown

    def test_families(self, tmp_path):
        names = ["topk-k20-layer5", "task1", "k10_blocks.6", "k10"]
        assert [family_of(name) for name in names] == ["topk-layer5", "task1", "blocks.6", "k10"]

    def test_plot(self, tmp_path):
        results = [
            result(f"{kind}-k{k}", "saelens", L0=float(k), **{"explained variance": k / 100})
            for kind in ("a", "b")
            for k in (10, 20)
        ]
        assert pareto_plot(results, tmp_path / "plot.png").stat().st_size > 5000
        assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
        with pytest.raises(ValueError, match="needs results of 'saelens'"):
            pareto_plot(results[:0], tmp_path / "none.png")

    def test_undefined_figures(self, tmp_path):
        values = {"misc_metrics": {"frac_alive": -1}}
        (tmp_path / "x.json").write_text(json.dumps({"eval_result_metrics": values}))
        assert all(
            value != value for value in read_metrics(tmp_path / "x.json", EVALUATIONS["core"]).values()
        )
        assert read_metrics(tmp_path / "none.json", EVALUATIONS["mdl"]) == {}

    def test_damaged_result(self, tmp_path):
        (tmp_path / "x.json").write_text('{"eval_result_metrics": ')
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_metrics(tmp_path / "x.json", EVALUATIONS["core"])

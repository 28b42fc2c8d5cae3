"""Faults that a stranger met: each test failed before its fault was mended."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import itda_lens
from itda_lens.__main__ import main
from itda_lens.cli.report import _names
from itda_lens.control import load_edits
from itda_lens.records import Label
from itda_lens.reports.site import comparison_facts, site_folder
from itda_lens.sources import iterate_texts, language_model
from itda_lens.sources.hugging_face_models import text_layers

HOOK = "blocks.1.hook_resid_post"
SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=40,
    max_position_embeddings=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
TOKENS = torch.tensor([[0, 5, 6, 7], [0, 9, 8, 7]])
MASK = torch.ones_like(TOKENS, dtype=torch.bool)


@pytest.fixture(scope="module")
def saved(tiny_folder, texts, tmp_path_factory):
    """The folder of a dictionary of the tiny model."""
    lm = language_model(str(tiny_folder), loader="huggingface")
    itda = itda_lens.build(lm, texts, HOOK, d_sae=16, k=2, progress=False)[HOOK]
    folder = tmp_path_factory.mktemp("dictionaries") / "saved"
    itda.save_model(folder)
    return folder


def refused(capsys, *arguments):
    """The message of a command that is refused as bad input."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test: what can be known before must be told before."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("itda_lens.sources.language_model", load)
    monkeypatch.setattr("itda_lens.analysis.evaluate", load)
    monkeypatch.setattr("itda_lens.compare.activations_of", load)


@pytest.mark.usefixtures("no_model")
class TestOutputsAreLookedAtBeforeTheWork:
    @pytest.mark.parametrize("place", ["folder", "link to nowhere", "in a file"])
    def test_steer_and_erase(self, saved, tmp_path, capsys, place):
        out = tmp_path / "out"
        if place == "folder":
            out.mkdir()
        elif place == "link to nowhere":
            out.symlink_to(tmp_path / "gone" / "nowhere")
        else:
            out.write_text("mine")
            out = out / "below"
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("the cat sat\nthe dog ran\n")
        steer = ["steer", saved, "the cat", "--atoms", "1", "--add", "1"]
        assert f"--json {out}" in refused(capsys, *steer, "--json", out)
        erase = ["erase", saved, "--targets", prompts, "--retained", prompts]
        assert f"--out {out}" in refused(capsys, *erase, "--out", out)
        fine = tmp_path / "fine.json"
        assert f"--json {out}" in refused(capsys, *erase, "--out", fine, "--json", out)

    def test_compare(self, saved, tmp_path, capsys):
        command = [
            "compare",
            saved,
            saved.parent,
            "--measure",
            "cka",
            "--texts",
            "x",
            "--json",
            tmp_path,
        ]
        assert f"--json {tmp_path}: it is a folder" in refused(capsys, *command)

    def test_two_outputs_in_one_file(self, saved, tmp_path, capsys):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("the cat sat\nthe dog ran\n")
        (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
        command = ["erase", saved, "--targets", prompts, "--retained", prompts, "--out",
                   tmp_path / "x.json", "--json", tmp_path / "link.json"]  # fmt: skip
        assert "--out and --json must be different files" in refused(capsys, *command)

    def test_densities_beside_a_dictionary_of_the_package(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("texts.txt").write_text("the cat sat")
        command = ["eval", "demo", "--texts", "texts.txt", "--save-density"]
        assert "'demo' is no folder here" in refused(capsys, *command)

    def test_densities_where_nothing_can_be_written(self, saved, tmp_path, capsys, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("itda_lens.records.files.probe", full)
        before = sorted(saved.iterdir())
        with pytest.raises(SystemExit):
            main(["eval", str(saved), "--texts", str(saved / "cfg.json"), "--save-density"])
        assert "No space left" in capsys.readouterr().err
        assert sorted(saved.iterdir()) == before

    def test_report_of_one_folder_twice(self, saved, tmp_path, capsys):
        command = ["report", saved, saved, "--texts", "x", "--out", tmp_path / "site"]
        assert "folders must be different ones" in refused(capsys, *command)


def test_dictionaries_of_one_hook_are_told_apart_in_a_report(tmp_path):
    folders = [tmp_path / run / "dictionaries" / HOOK for run in ("first", "second")]
    assert _names(folders) == [f"first/dictionaries/{HOOK}", f"second/dictionaries/{HOOK}"]
    assert _names([*folders, tmp_path / "first"])[2].endswith("first")
    assert _names(folders[:1]) == [HOOK]


def test_a_site_replaces_no_mount_point_and_no_current_folder(tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="mount point"), site_folder("/proc"):
        raise AssertionError("the work began")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="current folder"), site_folder("."):
        raise AssertionError("the work began")


class TestFilesOfPrompts:
    def lines(self, tmp_path, data):
        from itda_lens.cli.control import _lines

        file = tmp_path / "prompts.txt"
        file.write_bytes(data)
        return _lines("--targets", file)

    def test_a_byte_order_mark_is_no_part_of_the_first(self, tmp_path):
        assert self.lines(tmp_path, b"\xef\xbb\xbfthe cat\r\na dog\r\n") == ["the cat", "a dog"]

    def test_other_encodings_are_refused_with_the_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"--targets .*prompts.txt is not UTF-8 text"):
            self.lines(tmp_path, "the cat\na dog".encode("utf-16"))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.jsonl", lambda file: next(iterate_texts(file))),
        ("cfg.json", lambda file: itda_lens.load(file.parent)),
        ("edits.json", load_edits),
        ("plan.json", lambda file: itda_lens.open_plan(file.parent)),
        ("comparison.json", comparison_facts),
    ],
)
def test_messages_do_not_hold_whole_files(tmp_path, name, read):
    file = tmp_path / name
    file.write_bytes(b"\xff\xfe" + b"long " * 100_000)
    (tmp_path / "sae_weights.safetensors").touch()
    with pytest.raises(ValueError, match=name) as error:
        read(file)
    assert len(str(error.value)) < 600
    assert "invalid start byte" in str(error.value)


def test_a_label_is_printed_harmlessly():
    label = Label(0, name="\x1b[31mname\u202e", role="\x1b]0;role\x07", token="\x1b[2Jé")
    assert str(label).isprintable()
    assert "é" in str(label)


class TestLayers:
    def test_one_module_at_several_places_is_refused(self, tokenizer):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).eval()
        model.model.layers[2] = model.model.layers[0]
        lm = language_model(model, tokenizer=tokenizer, name="shared")
        for hook in ("blocks.2.hook_resid_post", "blocks.0.hook_resid_post"):
            with pytest.raises(ValueError, match="are one module, which runs several times"):
                lm.check_hooks([hook])
        for hook in ("model.layers.2", "model.layers.2.mlp"):
            with pytest.raises(ValueError, match=r"'model.layers.2' and 'model.layers.0' are one"):
                lm.check_hooks([hook])
        lm.check_hooks(["model.layers.0", "model.layers.1.mlp"])

    def test_of_any_module(self):
        first = nn.Linear(8, 8)
        module = nn.Sequential(first, nn.Linear(8, 8), first)
        batches = [torch.randn(40, 8)]
        with pytest.raises(ValueError, match="'2' and '0' are one module"):
            itda_lens.build_module(module, "2", batches, d_sae=8, k=2, progress=False)
        assert set(itda_lens.build_module(module, "*", batches, d_sae=8, k=2, progress=False)) == {
            "0",
            "1",
        }

    @pytest.mark.parametrize("kind", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
    def test_an_unembedding_that_is_called_decoder(self, tokenizer, kind):
        config = hf.ModernBertConfig if "Masked" in kind else hf.ModernBertDecoderConfig
        model = getattr(hf, kind)(config(**SMALL)).eval()
        assert text_layers(model) == list(model.base_model.layers)
        lm = language_model(model, tokenizer=tokenizer, name=kind)
        found = lm.capture(TOKENS, MASK, [HOOK])[HOOK]
        with torch.no_grad():
            states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found, states[2])

    def test_a_model_that_gives_plain_tuples(self, tokenizer):
        model = hf.BertForMaskedLM(hf.BertConfig(**SMALL)).eval()
        lm = language_model(model, tokenizer=tokenizer, name="bert")
        expected = lm.logits(TOKENS, MASK)
        model.config.return_dict = False
        assert torch.equal(lm.logits(TOKENS, MASK), expected)
        assert model.config.return_dict is False
        with pytest.raises(ValueError, match="no head that predicts tokens"):
            language_model(model.bert, tokenizer=tokenizer, name="bert").logits(TOKENS, MASK)

    def test_a_model_of_several_parts(self, tokenizer):
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                      image_size=8, patch_size=4)  # fmt: skip
        clip = hf.CLIPModel(hf.CLIPConfig(text_config=SMALL, vision_config=vision)).eval()
        lm = language_model(clip, tokenizer=tokenizer, name="clip")
        with pytest.raises(ValueError, match="CLIPModel names no embedding of tokens"):
            lm.capture(TOKENS, MASK, ["text_model"])

"""Saved edits, their tables, and the commands that make and use them."""

import dataclasses
import io
import json
import re

import pytest
import torch
from rich.console import Console
from test_control import other_saes
from test_terminal import HOSTILE

import itda_lens
from itda_lens import Label, fit
from itda_lens.__main__ import BAD_INPUT
from itda_lens.control import (
    Add,
    Always,
    Clamp,
    Edit,
    Effect,
    Excess,
    FiresAbove,
    Interval,
    Masked,
    Positions,
    ProjectOut,
    Scale,
    Scored,
    Swap,
    Tokens,
    applied,
    load_edits,
    save_edits,
)
from itda_lens.reports import chosen_table, effects_table, save_effects, writings_table

COLUMNS = "160"
"""Width of the terminal in which `itda_command` runs."""

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def itda():
    torch.manual_seed(0)
    labels = [Label(i, token=f" word{i}") for i in range(200)]
    return fit(torch.randn(200, 32), d_sae=30, k=4, labels=labels, metadata={"hook_name": HOOK})


OPERATIONS = [
    Scale(-2.0), Clamp((1.0, 2.0)), Clamp(0.5, "norm"), Add(1.0, "typical", typical=(1.0, 2.0)),
    Swap([[1.0, 2.0], [3.0, 4.0]], [False, True]), ProjectOut(False),
]  # fmt: skip
GATES = [
    Always(), Positions([1, 2]), Tokens([4, 5]), FiresAbove((0.5, 1.0), -1, "input"),
    Excess(2.5, "token", whole=True), (Positions([3]), FiresAbove()),
]  # fmt: skip


def parts(edit):
    return {
        f.name: getattr(edit, f.name) for f in dataclasses.fields(edit) if f.name not in ("sae", "gate")
    }


class TestSaved:
    @pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__)
    @pytest.mark.parametrize("gate", GATES, ids=str)
    def test_comes_back_as_it_was(self, itda, tmp_path, operation, gate):
        edit = Edit(itda, [3, 7], operation, gate, replace=True, special=True, hook_name="elsewhere")
        (loaded,) = load_edits(save_edits(edit, tmp_path / "edit.json"), itda)
        assert parts(loaded) == parts(edit)
        assert loaded.gates == edit.gates
        assert loaded.sae is itda

    def test_is_readable_and_names_labels(self, itda, tmp_path):
        known = json.loads(save_edits(Edit(itda, [3]), tmp_path / "e.json").read_text())
        (record,) = known["edits"]
        assert record["labels"] == [str(itda.labels[3])]
        assert record["operation"] == {"name": "Scale", "factor": 0.0}

    def test_several_of_several_dictionaries(self, itda, tmp_path):
        other = other_saes(itda, "topk")
        edits = [Edit(itda, [1]), Edit(other, [2], Add(1.0)), Edit(itda, [3])]
        file = save_edits(edits, tmp_path / "edits.json")
        for given in ([itda, other], [other, itda]):
            loaded = load_edits(file, given)
            assert [edit.sae for edit in loaded] == [itda, other, itda]
            assert [edit.atoms for edit in loaded] == [(1,), (2,), (3,)]

    def test_from_the_folder_that_it_names(self, itda, tmp_path):
        itda.save_model(tmp_path / "dictionary")
        file = save_edits(Edit(itda, [1]), tmp_path / "edit.json", tmp_path / "dictionary")
        (loaded,) = load_edits(file)
        assert torch.equal(loaded.sae.W_dec, itda.W_dec)
        torch.manual_seed(5)
        moved = fit(torch.randn(200, 32), d_sae=30, k=4, metadata={"hook_name": HOOK})
        moved.save_model(tmp_path / "dictionary")
        with pytest.raises(ValueError, match="dictionary in .* has other atoms"):
            load_edits(file)

    def test_another_dictionary_or_another_coding(self, itda, tmp_path):
        file = save_edits(Edit(itda, [1]), tmp_path / "edit.json")
        copies = [itda_lens.load(itda.save_model(tmp_path / "d")[0].parent) for _ in range(3)]
        assert load_edits(file, copies[0])
        with torch.no_grad():
            copies[0].W_dec[3, 4] += 1e-7
        copies[1].cfg.threshold = 0.3
        copies[2].cfg.k = 3
        for other in copies:
            with pytest.raises(ValueError, match="edit.json: the edit was made with another dictionary"):
                load_edits(file, other)
        with pytest.raises(ValueError, match="names no folder of a dictionary: pass dictionaries="):
            load_edits(file)

    def test_parts_of_ones_own_are_refused(self, itda, tmp_path):
        @dataclasses.dataclass(frozen=True)
        class Mine:
            def change(self, rows):
                return rows.x * 0

        with pytest.raises(ValueError, match="operation must be one of Scale, .* to be saved, got Mine"):
            save_edits(Edit(itda, [1], Mine()), tmp_path / "edit.json")
        with pytest.raises(ValueError, match="gate must be one of .* got Masked"):
            save_edits(Edit(itda, [1], gate=Masked(lambda ids: ids > 0)), tmp_path / "edit.json")
        with pytest.raises(ValueError, match="folders must be one for each of 1 edits, got 2"):
            save_edits(Edit(itda, [1]), tmp_path / "edit.json", ["a", "b"])
        assert not (tmp_path / "edit.json").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda k: k.pop("format"), "damaged"),
            (lambda k: k.update(format=9), "format must be 1, got 9"),
            (lambda k: k.update(edits=[]), "it holds no edit"),
            (lambda k: k["edits"][0].pop("atoms"), "damaged"),
            (lambda k: k["edits"][0].update(atoms=[99]), "atoms must be between 0 and 29, got 99"),
            (lambda k: k["edits"][0]["operation"].update(name="eval"), "operation must be one of"),
            (lambda k: k["edits"][0]["operation"].update(power=2), "Scale has no field 'power'"),
            (lambda k: k["edits"][0]["operation"].update(factor="x"), "damaged.*factor"),
            (lambda k: k["edits"][0].update(gate=[]), "gate must hold at least one"),
        ],
    )
    def test_damaged_files(self, itda, tmp_path, change, message):
        file = save_edits(Edit(itda, [1]), tmp_path / "edit.json")
        known = json.loads(file.read_text())
        change(known)
        file.write_text(json.dumps(known))
        with pytest.raises(ValueError, match=message):
            load_edits(file, itda)
        file.write_bytes(b"\xff{")
        with pytest.raises(ValueError, match="no file of edits, or damaged"):
            load_edits(file, itda)
        with pytest.raises(FileNotFoundError):
            load_edits(tmp_path / "missing.json", itda)


def drawn(table):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(table)
    return console.file.getvalue()


class TestReports:
    FIGURES = {"probability": Interval(0.5, 0.25, 0.75), "KL": Interval(0.0, 0.0, 0.0)}  # noqa: RUF012

    def test_effects(self, tmp_path):
        text = drawn(effects_table([Effect("nothing", self.FIGURES), Effect("edit", self.FIGURES)]))
        assert text.count("0.500") == text.count("0.250…0.750") == 2
        assert "0.0000…" not in text
        file = save_effects([Effect("edit", self.FIGURES)], tmp_path / "e.json", atoms=[3])
        known = json.loads(file.read_text())
        assert known["atoms"] == [3]
        assert known["effects"][0]["figures"]["probability"] == dict(mean=0.5, low=0.25, high=0.75)

    @pytest.mark.parametrize("written", HOSTILE)
    def test_hostile_text_is_shown_literally(self, written):
        tables = [
            chosen_table([Scored(3, 1.0, Label(0, token=written, context=f"[[{written}]]"))]),
            writings_table({"without": written, "with": "x"}, "a prompt"),
            effects_table([Effect(written, self.FIGURES)], written),
        ]
        for table in tables:
            text = drawn(table)
            assert HOSTILE[written] in text or HOSTILE[written] in text.replace("\n", "")
            assert text.replace("\n", "").isprintable()


class TestCommands:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tiny_folder, texts, tmp_path_factory):
        made = itda_lens.build(
            str(tiny_folder), texts, HOOK, d_sae=30, k=3, loader="huggingface", device="cpu",
            progress=False,
        )  # fmt: skip
        out = tmp_path_factory.mktemp("control") / "dictionary"
        made[HOOK].save_model(out)
        return out

    @pytest.fixture
    def files(self, tmp_path):
        targets, retained = tmp_path / "targets.txt", tmp_path / "retained.txt"
        targets.write_text("the cat sat on a mat\ncat and dog ran\nthe small cat sat\na cat ran\n")
        retained.write_text("that log was big\nred and blue .\nsaid that it was big .\nin the log\n")
        return targets, retained

    def test_steer(self, itda_command, folder, tmp_path):
        out = tmp_path / "texts.json"
        options = ["--new-tokens", 5, "--json", out]
        code, text, _ = itda_command(
            "steer", folder, "the cat", "a dog sat", "--atoms", "1,2", "--add", 2, *options
        )
        assert code == 0
        assert "without" in text
        found = json.loads(out.read_text())
        assert [each["prompt"] for each in found] == ["the cat", "a dog sat"]
        assert all(each["changed"] > 0 for each in found)
        code, text, _ = itda_command("steer", folder, "the cat", "--atoms", "1", "--scale", 1, *options)
        (same,) = json.loads(out.read_text())
        assert (same["with"], same["changed"]) == (same["without"], 0)
        assert "0 of" in text

    def test_steer_by_label(self, itda_command, folder, tmp_path):
        token = itda_lens.load(folder).labels[0].token
        arguments = ["steer", folder, "the cat", "--label", token, "--scale", 0, "--new-tokens", 3]
        assert itda_command(*arguments)[0] == 0
        code, _, err = itda_command("steer", folder, "the cat", "--label", "zebra", "--scale", 0)
        assert code == BAD_INPUT
        assert "fits none of 30 labels" in err

    def test_erase_and_steer_by_what_it_saved(self, itda_command, folder, files, tmp_path):
        targets, retained = files
        out, figures = tmp_path / "edit.json", tmp_path / "figures.json"
        code, text, err = itda_command(
            "erase", folder, "--targets", targets, "--retained", retained, "--out", out, "--json",
            figures, "--scale", -2, "--top", 4,
        )  # fmt: skip
        assert code == 0, err
        for expected in ("came from", "probability", "KL", "random atoms", "difference in means"):
            assert expected in text
        (edit,) = load_edits(out)
        assert edit.operation == Scale(-2.0)
        assert isinstance(edit.gate, tuple | Excess)
        known = json.loads(figures.read_text())
        assert known["atoms"] == list(edit.atoms)
        assert [e["name"] for e in known["effects"]][:2] == ["nothing", "edit"]
        code, text, _ = itda_command("steer", folder, "the cat", "--edit", out, "--new-tokens", 3)
        assert code == 0
        assert re.search(r"\d+ of \d+ tokens were changed", text)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--scale", 0], "give one of --atoms, --label and --edit, got none"),
            (["--atoms", "1", "--label", "x", "--scale", 0], "got --atoms and --label"),
            (["--atoms", "1"], "give either --scale or --add"),
            (["--atoms", "1", "--add", 1, "--scale", 0], "give either --scale or --add"),
            (["--atoms", "1,x", "--scale", 0], "whole numbers with commas between, got '1,x'"),
            (["--atoms", "99", "--scale", 0], "atoms must be between 0 and 29, got 99"),
            (["--edit", "no.json", "--scale", 0], "leave out --scale and --add"),
            (["--edit", "no.json"], "no.json"),
            (["--atoms", "1", "--scale", 0, "--json", "no/where.json"], "there is no folder"),
        ],
    )
    def test_bad_input_of_steer(self, itda_command, folder, arguments, message):
        code, _, err = itda_command("steer", folder, "the cat", *arguments)
        assert code == BAD_INPUT
        assert message in err

    def test_bad_input_of_erase(self, itda_command, folder, files, tmp_path):
        targets, retained = files
        single, short = tmp_path / "single.txt", tmp_path / "short.txt"
        single.write_text("the cat sat\n")
        short.write_text("the cat\ncat\n")
        for change, message in (
            ({"--targets": "missing.txt"}, "--targets missing.txt: there is no such file"),
            ({"--targets": single}, "at least 2 prompts are needed, got 1"),
            ({"--targets": short}, "its last one is the answer, got 'cat'"),
            ({"--out": tmp_path / "no" / "edit.json"}, "there is no folder"),
            ({"--targets": retained}, "the contrast is empty"),
        ):
            options = {
                "--targets": targets,
                "--retained": retained,
                "--out": tmp_path / "e.json",
            } | change
            code, _, err = itda_command("erase", folder, *[a for pair in options.items() for a in pair])
            assert code == BAD_INPUT
            assert message in err, err
        assert not (tmp_path / "e.json").exists()


def test_a_loaded_edit_changes_the_model_as_the_saved_one(tiny, texts, tmp_path):
    made = itda_lens.build(tiny, texts, HOOK, d_sae=30, k=4, progress=False)[HOOK]
    edit = Edit(made, range(9), Scale(-1.0), Excess(0.001))
    tokens = torch.randint(4, 20, (3, 9))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad(), applied(tiny, edit) as (tally,):
        expected = tiny.logits(tokens, mask)
    assert tally.changed > 0
    with torch.no_grad(), applied(tiny, load_edits(save_edits(edit, tmp_path / "e.json"), made)):
        assert torch.equal(tiny.logits(tokens, mask), expected)

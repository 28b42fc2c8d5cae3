"""`itda report`, `find` and `--json`, run as a user runs them, on the tiny model."""

import json

import pytest
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

import itda_lens
from itda_lens import Label, Labels, build
from itda_lens.__main__ import BAD_INPUT
from itda_lens.analysis import evaluate, nearest
from itda_lens.samples import smollm2
from itda_lens.sources import language_model

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def text_file(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def folder(tiny_folder, text_file, tmp_path_factory):
    lm = language_model(str(tiny_folder), device="cpu")
    itda = build(lm, text_file, HOOK, d_sae=30, k=3, context_size=12, progress=False)[HOOK]
    itda.save_model(out := tmp_path_factory.mktemp("built") / HOOK)
    return out


class TestReport:
    def test_of_a_dictionary(self, itda_command, folder, text_file, tmp_path):
        arguments = (
            "report",
            folder,
            "-o",
            tmp_path / "site",
            "--text",
            "the cat sat",
            "--max-tokens",
            90,
        )
        code, out, _ = itda_command(*arguments)
        assert code == 0
        assert f"Open {tmp_path / 'site' / 'index.html'} in a browser." in out
        page = (tmp_path / "site" / "index.html").read_text()
        assert "which the dictionary was built from" in page
        assert "90 tokens" in page
        assert "the cat sat" in (tmp_path / "site" / "data" / "texts.js").read_text()
        code, _, err = itda_command(*arguments)
        assert code == BAD_INPUT
        assert "--overwrite" in err
        assert itda_command(*arguments, "--overwrite", "--texts", text_file)[0] == 0
        assert "built from" not in (tmp_path / "site" / "index.html").read_text()

    def test_of_another_sae_and_of_several(self, itda_command, folder, tmp_path):
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=5))
        itda = itda_lens.load(folder)
        sae.cfg.metadata = itda.cfg.metadata
        sae.save_model(tmp_path / "topk")
        code, _, err = itda_command(
            "report", folder, tmp_path / "topk", "-o", tmp_path / "site", "--max-tokens", 60
        )
        assert code == 0, err
        assert "2 dictionaries" in (tmp_path / "site" / "index.html").read_text()
        pages = sorted(path.name for path in (tmp_path / "site").iterdir() if path.is_dir())
        assert pages == [f"1-{HOOK}".replace("_", "-"), "2-topk", "static"]
        assert "texts.html" in (tmp_path / "site" / "2-topk" / "index.html").read_text()

    def test_refusals(self, itda_command, folder, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        for arguments, message in (
            (("-o", tmp_path), "holds something else than a site"),
            (("--compare", tmp_path / "none.json"), "none.json"),
            (("--compare", tmp_path / "thesis.txt"), "must be a file of figures"),
            (("--texts", "nowhere.txt"), "nowhere.txt"),
        ):
            code, _, err = itda_command("report", folder, *arguments)
            assert code == BAD_INPUT
            assert message in err


class TestFind:
    def test_by_a_word(self, itda_command, folder):
        labels = itda_lens.load(folder).labels
        expected = labels.search("Cat", token_only=True)
        assert expected == [i for i, label in enumerate(labels) if "cat" in label.token]
        code, out, _ = itda_command("find", folder, "Cat", "--token-only", "--json")
        assert code == 0
        assert [row["atom"] for row in json.loads(out)] == expected
        code, out, _ = itda_command("find", folder, "^(dog|mat)$", "--regex", "--token-only")
        assert out.count("« dog»") + out.count("«dog»") + out.count("«mat»") == len(
            [label for label in labels if label.token in ("dog", "mat")]
        )
        assert "No label has it." in itda_command("find", folder, "zebra")[1]

    def test_by_a_prompt(self, itda_command, folder, tiny):
        itda = itda_lens.load(folder)
        code, out, _ = itda_command("find", folder, "the cat sat", "--prompt", "--json", "--top", 3)
        (found,) = json.loads(out)
        assert found["token"] == "sat"
        expected = nearest(tiny, itda, "the cat sat", top=3)[-1]
        assert [match["atom"] for match in found["matches"]] == [m.atom for m in expected.matches]
        code, out, _ = itda_command("find", folder, "the cat sat", "--prompt", "--every-token")
        assert code == 0
        assert all(f"'{token}'" in out for token in ("the", "cat", "sat"))

    def test_nearest_by_hand(self, folder, tiny):
        itda = itda_lens.load(folder)
        tokens = tiny.tokenizer("the cat", add_special_tokens=False, return_tensors="pt")["input_ids"]
        import torch

        tokens = torch.cat([torch.tensor([[0]]), tokens], dim=1)
        x = tiny.capture(tokens, torch.ones_like(tokens).bool(), [HOOK])[HOOK][0, 1:]
        cosines = torch.nn.functional.cosine_similarity(
            (x - itda.b_dec.detach())[:, None], itda.W_dec.detach()[None], dim=-1
        )
        for token, own in zip(nearest(tiny, itda, "the cat", top=4), cosines, strict=True):
            best = own.topk(4)
            assert [match.atom for match in token.matches] == best.indices.tolist()
            assert [m.cosine for m in token.matches] == pytest.approx(best.values.tolist(), abs=1e-5)
            assert all(match.label == itda.labels[match.atom] for match in token.matches)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("(", "--regex"), "TEXT is no regular expression"),
            (("",), "query must hold a character"),
            (("a", "--prompt", "--regex"), "--prompt looks at activations"),
            (("a", "--every-token"), "--every-token goes with --prompt"),
            (("", "--prompt"), "at least one token that counts"),
        ],
    )
    def test_refusals(self, itda_command, folder, arguments, message):
        code, _, err = itda_command("find", folder, *arguments)
        assert code == BAD_INPUT
        assert message in err


class TestJson:
    def test_info(self, itda_command, folder):
        code, out, _ = itda_command("info", folder, "--json", "--labels", 2)
        assert code == 0
        (known,) = json.loads(out)
        assert known["hook"] == HOOK
        assert len(known["labels"]) == 2
        _, out, _ = itda_command("info", folder, "--labels", 0)
        assert len([line for line in out.splitlines() if line.startswith("│")]) <= 12
        assert "sha256" not in out
        assert "sha256" in itda_command("info", folder, "--all")[1]

    def test_decompose_and_eval(self, itda_command, folder, text_file, tiny):
        code, out, _ = itda_command("decompose", folder, "the cat sat", "--json", "--top", 2)
        assert code == 0
        known = json.loads(out)
        assert [token["token"] for token in known["tokens"]] == ["the", "cat", "sat"]
        assert all(len(token["components"]) <= 2 for token in known["tokens"])
        _, out, _ = itda_command("eval", folder, "--texts", text_file, "--json", "--max-tokens", 77)
        (figures,) = json.loads(out)
        assert figures["n_tokens"] == 77

    def test_compare(self, itda_command, folder, tmp_path):
        itda_lens.load(folder).prefix(20).save_model(tmp_path / "other")
        _, out, _ = itda_command("compare", folder, tmp_path / "other", "--json", "-")
        assert json.loads(out)["measure"] == "jaccard"


def test_evaluate_counts_exactly(folder, tiny, texts):
    """Of the first tokens alone: figures are those of a text that ends there."""
    itda = itda_lens.load(folder)
    (first,) = evaluate(tiny, itda, texts, max_tokens=50, batch_size=3, progress=False)
    (other,) = evaluate(tiny, itda, texts, max_tokens=50, batch_size=60, progress=False)
    assert first.n_tokens == other.n_tokens == 50
    assert first.fvu == pytest.approx(other.fvu)
    assert first.ce_loss == pytest.approx(other.ce_loss, rel=1e-5)


class TestLabelTables:
    LABELS = Labels([Label(1, 2, 3, (4, 7), "cat", "a [[cat]]"), Label(5, token="\ud800", name="seven")])

    def test_search(self):
        import re

        assert self.LABELS.search("A CAT") == [0]
        assert self.LABELS.search("seven") == [1]
        assert self.LABELS.search(re.compile("^a"), token_only=False) == [0]
        assert self.LABELS.search(re.compile("^a"), token_only=True) == []
        with pytest.raises(TypeError, match="query must be a string or a compiled pattern, got 3"):
            self.LABELS.search(3)

    def test_tables(self, tmp_path):
        import pandas

        table = self.LABELS.to_pandas()
        assert list(table["atom"]) == [0, 1]
        assert table["token"][0] == "cat"
        lines = self.LABELS.save_table(tmp_path / "labels.jsonl").read_text().splitlines()
        assert json.loads(lines[1])["token"] == "\ud800"
        again = pandas.read_parquet(self.LABELS.save_table(tmp_path / "labels.parquet"))
        assert list(again["position"]) == [3, 0]
        assert again["token"][1] == "\\ud800"
        with pytest.raises(ValueError, match=r"path must end in one of .jsonl, .parquet, got"):
            self.LABELS.save_table(tmp_path / "labels.xls")


class TestShipped:
    def test_it_is_small_and_complete(self):
        demo = itda_lens.load("demo")
        assert demo.cfg.metadata.model_name == smollm2.NAME
        assert len(demo.labels) == demo.cfg.d_sae == 768
        assert demo.labels.search("list")
        from itda_lens.sae.loading import SHIPPED

        assert sum(file.stat().st_size for file in SHIPPED["demo"].iterdir()) < 1_000_000

    def test_a_folder_of_that_name_comes_first(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        itda_lens.load(folder).save_model("demo")
        assert itda_lens.load("demo").cfg.d_sae == 30

    @pytest.mark.real
    def test_its_model_is_fetched(self, itda_command):
        code, out, err = itda_command("decompose", "demo", "The cat sat on the mat.", "--device", "cpu")
        assert code == 0, err
        assert "unlike the text" in " ".join(out.split())

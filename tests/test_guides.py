"""The guides (docs/add-*.md) are tested by doing what they say.

The code of each page is run as a module of its own, with the page's own tests. Then the new thing must
work through the library's public functions, and nothing of the library may have been changed for it.
"gpt2" stands for the user's model: here it is the tiny random one.
"""

import ast
import importlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SLOW
from rich.console import Console
from sae_lens import SAE
from test_terminal import HOSTILE

import itda_lens
from itda_lens import Label, build, fit
from itda_lens.dictionary import RULES
from itda_lens.records import Places
from itda_lens.sae import provenance_of
from itda_lens.sources import LIBRARIES, gathered, language_model
from itda_lens.training import build_from, recipe_of

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("add-*.md"))
HOOK = "blocks.1.hook_resid_post"


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def held_by_the_library() -> dict[str, object]:
    """The public names of all modules of the library; of tables, a copy of what is in them."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "itda_lens"
        for key, value in list(vars(module).items())
        if not key.startswith("_")
    }


@contextmanager
def unchanged_library(but: str | None) -> Iterator[None]:
    """Fails if the block changes anything in the library, except a table of the name `but`."""
    before = held_by_the_library()
    yield
    after = held_by_the_library()
    changed = {
        name
        for name, value in before.items()
        if name not in after
        or not (after[name] == value if isinstance(value, dict) else after[name] is value)
    }
    assert {name for name in changed if name.rpartition(".")[2] != but} == set()


@pytest.fixture(scope="module")
def guide(tiny_folder, tmp_path_factory):
    """A function that does what a guide says, once, and gives the module that its code makes."""
    done: dict[str, ModuleType] = {}
    libraries = dict(LIBRARIES)

    def do(name: str) -> ModuleType:
        if name not in done:
            file = tmp_path_factory.mktemp("guides") / f"{name.replace('-', '_')}.py"
            file.write_text(
                code_of(ROOT / "docs" / f"{name}.md").replace('"gpt2"', repr(str(tiny_folder)))
            )
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            torch.manual_seed(0)
            with unchanged_library(but="LIBRARIES" if name == "add-a-model" else None):
                spec.loader.exec_module(module)
            done[name] = module
        return done[name]

    yield do
    LIBRARIES.clear()
    LIBRARIES.update(libraries)


def own_tests(page: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", code_of(page), re.MULTILINE)


def test_slow_tests_exist():
    """A test that was renamed would come back into `make quick`."""
    for file, names in SLOW.items():
        text = (ROOT / "tests" / file).read_text()
        assert [name for name in sorted(names) if f"def {name}(" not in text] == [], file


class TestPages:
    @pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
    def test_the_code_runs(self, page, guide):
        assert guide(page.stem)

    @pytest.mark.parametrize(
        ("page", "test"), [(page.stem, test) for page in GUIDES for test in own_tests(page)]
    )
    def test_its_own_tests(self, page, test, guide):
        getattr(guide(page), test)()

    @pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
    def test_only_what_rooms_export_is_used(self, page):
        used = [
            (node.module, alias.name)
            for node in ast.walk(ast.parse(code_of(page)))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("itda_lens")
            for alias in node.names
        ]
        assert used
        for module, name in used:
            assert module.count(".") <= 1, module
            assert name in importlib.import_module(module).__all__, f"{module} does not export {name}"

    @pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
    def test_contributors_find_it(self, page):
        assert f"](docs/{page.name})" in (ROOT / "CONTRIBUTING.md").read_text()
        assert f"]({page.name})" in (ROOT / "docs" / "design.md").read_text()

    def test_a_changed_library_is_noticed(self, monkeypatch):
        with pytest.raises(AssertionError), unchanged_library(but=None):
            monkeypatch.setitem(RULES, "mine", RULES["best"])
        monkeypatch.undo()
        with pytest.raises(AssertionError), unchanged_library(but=None):
            monkeypatch.setattr(sys.modules["itda_lens.training.fit"], "build_from", None)


class TestRule:
    @pytest.fixture
    def rule(self, guide):
        return guide("add-a-rule").LongestRule(leave_out=3)

    def test_is_saved_loaded_and_recorded(self, rule, tmp_path):
        made = fit(torch.randn(400, 16), rule=rule, d_sae=40, k=4)
        made.save_model(tmp_path)
        for loaded in (itda_lens.load(tmp_path), SAE.load_from_disk(tmp_path)):
            assert torch.equal(loaded.W_dec, made.W_dec)
            assert loaded.labels == made.labels
            recorded = provenance_of(loaded).recipe
            assert recorded["rule"] == {"name": "LongestRule", "leave_out": 3}
            assert "preset" not in recorded

    def test_with_a_mean_l0(self, rule):
        x = torch.randn(6000, 16) + 1
        itda = fit(x[:3000], rule=rule, d_sae=50, k=12, l0=4)
        assert itda.cfg.threshold > 0
        assert itda.encode_sparse(x[3000:]).l0().double().mean() == pytest.approx(4, rel=0.05)

    def test_in_build(self, rule, tiny, texts):
        hooks = [HOOK, "blocks.1.attn.hook_z"]
        made = build(tiny, texts, hooks, rule=rule, d_sae=20, k=4, progress=False)
        assert list(made) == hooks
        for itda in made.values():
            norms = itda.W_dec.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
            assert all(f"[[{label.token}]]" in label.context for label in itda.labels)

    def test_by_name_after_one_line(self, rule, monkeypatch):
        monkeypatch.setitem(RULES, "longest", rule)
        x = torch.randn(400, 16)
        named, own = (fit(x, rule=which, d_sae=40, k=4) for which in ("longest", rule))
        assert torch.equal(named.W_dec, own.W_dec)
        assert provenance_of(named).recipe["preset"] == "longest"

    def test_bad_settings(self, guide):
        with pytest.raises(ValueError, match="leave_out must be at least 0, got -1"):
            guide("add-a-rule").LongestRule(leave_out=-1)
        with pytest.raises(ValueError, match="d_sae=40 atoms need more different activations than 1"):
            fit(torch.ones(400, 16), rule=guide("add-a-rule").LongestRule(), d_sae=40, k=4)


class TestSource:
    @pytest.fixture
    def source(self, guide):
        return guide("add-a-source").source

    @pytest.mark.parametrize(
        "settings",
        [dict(), dict(l0=4.0, k=12), dict(preset="paper"), dict(update=True, seed=5)],
        ids=str,
    )
    def test_is_fit_on_the_same_rows_bit_for_bit(self, source, settings):
        settings = dict(d_sae=50, k=5) | settings
        x = torch.cat([rows.values["patches"] for rows in source.rows()])
        labels = [Label(image, 0, patch, kind="image") for image in range(100) for patch in range(49)]
        made = build_from(source, recipe_of(**settings), progress=False)["patches"]
        batch_size = 64 * 49  # the paper's rule depends on the batches
        expected = fit(x, labels=labels, batch_size=batch_size, **settings)
        assert torch.equal(made.W_dec, expected.W_dec)
        assert torch.equal(made.b_dec, expected.b_dec)
        assert made.labels == expected.labels
        assert made.cfg.threshold == expected.cfg.threshold

    def test_goes_on_where_it_stopped(self, source):
        """Whoever stops after any number of rows gets the others, each once."""
        every = gathered(source)["patches"]
        for stopped in (1, 3000, 3136, 3137, 4899):
            rest = list(source.rows(skip=stopped))
            assert torch.equal(torch.cat([r.values["patches"] for r in rest]), every.values[stopped:])
            places = Places.joined([r.places for r in rest])
            assert (places.identity == every.labels.identity[stopped:]).all()

    def test_metadata(self, source):
        itda = build_from(source, recipe_of(d_sae=50, k=5), progress=False)["patches"]
        assert itda.cfg.metadata.model_name == "patch encoder"
        assert itda.cfg.metadata.hook_name == "patches"

    def test_rows_that_are_not_finite(self, guide):
        kind = guide("add-a-source").PatchSource
        images = torch.zeros(5, 3, 4)
        images[4, 1, 0] = torch.nan
        source = kind(lambda batch: batch, images, batch_size=2)
        with pytest.raises(ValueError, match="'patches', image 4, position 1"):
            build_from(source, recipe_of(d_sae=2, k=1), progress=False)
        with pytest.raises(ValueError, match="at least one image"):
            kind(lambda batch: batch, images[:0])


class TestEdit:
    @pytest.fixture(params=["bridge", "huggingface"])
    def model(self, request, tiny, tiny_folder):
        loader = "huggingface"
        return tiny if request.param == "bridge" else language_model(str(tiny_folder), loader=loader)

    def hooks(self, model):
        return [HOOK] if model.loader == "huggingface" else [HOOK, "blocks.1.attn.hook_z"]

    @torch.no_grad()
    def test_scale_1_keeps_every_bit_and_scale_0_does_not(self, model, guide, texts):
        scaled = guide("add-an-edit").Scaled
        tokens = torch.randint(4, 20, (3, 9))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        plain = model.logits(tokens, mask)
        for hook, itda in build(model, texts, self.hooks(model), d_sae=30, k=4, progress=False).items():
            with model.edited({hook: scaled(itda, range(30), 1.0)}):
                assert torch.equal(model.logits(tokens, mask), plain)
            with model.edited({hook: scaled(itda, range(30), 0.0)}):
                assert not torch.allclose(model.logits(tokens, mask), plain, atol=1e-4)
            assert torch.equal(model.logits(tokens, mask), plain)

    def test_in_generation_and_with_gradients(self, model, guide, texts):
        itda = build(model, texts, HOOK, d_sae=30, k=4, progress=False)[HOOK]
        tokens = torch.randint(4, 20, (1, 6))
        seen = []

        class Noted(guide("add-an-edit").Scaled):
            def __call__(self, x):
                seen.append(x.shape[1])
                return super().__call__(x)

        with torch.no_grad(), model.edited({HOOK: Noted(itda, range(30), 0.0)}):
            model.model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert seen[0] == 6
        assert len(seen) == 4
        with model.edited({HOOK: Noted(itda, [0, 1], 0.5)}):
            model.logits(tokens, torch.ones_like(tokens, dtype=torch.bool)).sum().backward()
        gradients = [p.grad for p in model.model.parameters() if p.grad is not None]
        model.model.zero_grad()
        assert any(gradient.abs().sum() > 0 for gradient in gradients)

    def test_bad_atoms(self, guide):
        page = guide("add-an-edit")
        with pytest.raises(ValueError, match="atoms must be between 0 and 11, got 12"):
            page.Scaled(page.itda, [0, 12], 0.0)


class TestReport:
    @pytest.mark.parametrize("written", HOSTILE)
    def test_hostile_text_is_shown_literally(self, guide, written):
        page = guide("add-a-report")
        labels = [Label(i, token=written) for i in range(50)]
        itda = fit(torch.randn(50, 8), d_sae=9, k=2, labels=labels)
        counts = page.token_counts(itda)
        console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
        console.print(page.token_table(counts, title=written))
        text = console.file.getvalue()
        assert text.count(HOSTILE[written]) == 2
        assert text.replace("\n", "").isprintable()

    def test_facts_are_plain_data(self, guide):
        page = guide("add-a-report")
        facts = json.loads(json.dumps([asdict(count) for count in page.counts]))
        assert [page.TokenCount(**fact) for fact in facts] == page.counts
        assert sum(fact["share"] for fact in facts) == pytest.approx(1)

    def test_labels_without_tokens(self, guide):
        with pytest.raises(ValueError, match="name no tokens"):
            guide("add-a-report").token_counts(fit(torch.randn(50, 8), d_sae=9, k=2))

"""Names of models and hook points, as the hosts and matplotlib take them."""

from dataclasses import dataclass
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from sae_lens.load_model import load_model

import itda_lens
from itda_lens import saebench
from itda_lens.compare import Comparison, LayerComparison
from itda_lens.records import Cutting, HookPoint
from itda_lens.reports import comparison_heatmap, pareto_plot
from itda_lens.reports.images import image_file, literal
from itda_lens.saebench.checks import _width_at, check_hooks
from itda_lens.saebench.evaluations import EVALUATIONS
from itda_lens.saebench.subjects import Subject
from itda_lens.sources import ModelSource, register_with_transformer_lens
from itda_lens.training import collect

LOADERS = {
    "bridge": "blocks.1.hook_resid_post",
    "hooked_transformer": "blocks.1.hook_resid_post",
    "huggingface": "blocks.1.hook_resid_post",
    "huggingface, of a module": "model.layers.1",
}


class TestTheClassThatSAELensLoadsAModelWith:
    @pytest.mark.parametrize("name", LOADERS)
    def test_gives_the_activations_that_the_dictionary_saw(self, name, tiny_folder, texts):
        hook, loader = LOADERS[name], name.split(",")[0]
        if loader == "hooked_transformer":
            register_with_transformer_lens(tiny_folder, tiny_folder.name)
        model = tiny_folder.name if loader == "hooked_transformer" else str(tiny_folder)
        options = dict(context_size=12, device="cpu", loader=loader, max_tokens=60)
        (itda,) = itda_lens.build(model, texts, hook, d_sae=8, k=2, progress=False, **options).values()
        metadata = itda.cfg.metadata
        register_with_transformer_lens(tiny_folder, metadata.model_name)
        where = str(tiny_folder) if "Auto" in metadata.model_class_name else metadata.model_name
        host = load_model(metadata.model_class_name, where, device="cpu")
        assert metadata.hook_name in host.hook_dict
        source = ModelSource(str(tiny_folder), texts[:1], hook, Cutting(12), loader="huggingface")
        (batch,) = source.tokenization.batches(texts[:1], 16)
        with torch.no_grad():
            _, cache = host.run_with_cache(batch.tokens)
        seen = collect(model, texts[:1], hook, progress=False, **options)[hook].values
        kept = cache[metadata.hook_name][batch.keep]
        assert torch.allclose(kept, seen, atol=1e-4)


class TestHookPointsOfABench:
    MODEL = SimpleNamespace(d_model=32, n_heads=4, d_head=6)

    @pytest.mark.parametrize(
        ("hook", "width"),
        [
            ("blocks.0.hook_resid_pre", 32), ("blocks.0.hook_resid_mid", 32),
            ("blocks.0.hook_resid_post", 32), ("blocks.0.hook_mlp_out", 32),
            ("blocks.0.hook_attn_out", 32), ("blocks.0.attn.hook_z", 24),
            ("blocks.0.mlp.hook_post", None), ("hook_embed", None), ("blocks.0.attn.hook_q", None),
        ],
    )  # fmt: skip
    def test_width(self, hook, width):
        assert _width_at(HookPoint.parse(hook), self.MODEL) == width

    def test_absorption_reads_after_layers_only(self):
        absorption = [EVALUATIONS["absorption"]]
        check_hooks(absorption, [Subject("a", "a", hook_name="blocks.10.hook_resid_post")])
        for hook in ("blocks.10.hook_resid_pre", "blocks.10.attn.hook_resid_post"):
            with pytest.raises(ValueError, match="absorption reads at"):
                check_hooks(absorption, [Subject("a", "a", hook_name=hook)])


@dataclass
class Drawn:
    """Texts that were drawn into an image."""

    texts: list[str]


@pytest.fixture
def drawn(monkeypatch):
    """Texts of the last figure that was saved, as a reader sees them."""
    seen = Drawn([])
    save = Figure.savefig

    def look(figure, *args, **options):
        save(figure, *args, **options)
        for artist in figure.findobj(matplotlib.text.Text):
            text, is_math = artist._preprocess_math(artist.get_text())
            assert not is_math or "mathdefault" in text, text  # a log axis writes its own formulas
            seen.texts.append(text.strip())

    monkeypatch.setattr(Figure, "savefig", look)
    return seen


class TestNamesInImages:
    NAMES = ("$x_1$ and $\\frac{$", "_hidden", "a\x1b[31m$", "cost \\$5 $", "a_b^c")

    def test_are_drawn_literally(self, drawn, tmp_path):
        with image_file(tmp_path / "names.png", 4, 3) as figure:
            for y, name in enumerate(self.NAMES):
                figure.text(0, y / 5, literal(name))
        shown = [name.replace("\x1b", "\\x1b") for name in self.NAMES]
        assert drawn.texts == shown
        assert matplotlib.image.imread(tmp_path / "names.png").shape[:2] == (390, 520)

    def test_of_a_heatmap(self, drawn, tmp_path):
        name = "$x_1$ and $\\frac{$"
        pair = LayerComparison(name, "_b", [name, "h"], ["h", "_g"], torch.eye(2), 1.0)
        comparison = Comparison("cka", None, [name, "_b"], None, [pair])
        comparison_heatmap(comparison, tmp_path / "h.png")
        assert drawn.texts.count(name) >= 2  # a model and a hook
        assert {"_b", "_g"} <= set(drawn.texts)

    def test_of_a_plot_over_l0(self, drawn, tmp_path):
        results = [
            saebench.Result(name, evaluation, "signed", metrics, tmp_path)
            for name in ("$x$-$y$", "_mine")
            for evaluation, metrics in (
                ("saelens", {"L0": 20.0, "explained variance": 0.8}),
                ("core", {"CE-loss score": 0.9}),
            )
        ]
        pareto_plot(results, tmp_path / "p.png")
        assert {"$x$-$y$", "mine", "CE-loss score"} <= set(drawn.texts)

    def test_an_image_appears_whole_or_not_at_all(self, tmp_path):
        with pytest.raises(KeyError), image_file(tmp_path / "a.png", 1, 1):
            raise KeyError("drawing")
        with pytest.raises(ValueError, match="nonsense"), image_file(tmp_path / "a.nonsense", 1, 1):
            pass
        assert list(tmp_path.iterdir()) == []

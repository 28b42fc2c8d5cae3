"""Any torch module as a source of activations: vision, text encoders, recommenders."""

import doctest
import importlib
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import itda_lens
from itda_lens import Label, build_module, fit
from itda_lens.records import Places
from itda_lens.sae import provenance_of
from itda_lens.sources import AnyModule, ModuleSource, gathered
from itda_lens.sources.modules import moved

OPTIONS = dict(d_sae=16, k=4, progress=False)


class Net(nn.Module):
    """Parts that are awkward to read: shared, in training mode, writing into their input, not called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=True)
        self.again = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x):
        x = self.act(self.drop(self.norm(self.first(x))))
        x = self.again(self.again(x))
        self.runs += 1
        return x


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def batches():
    return list(torch.randn(100, 6, generator=torch.Generator().manual_seed(2)).split(30))


def vit():
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return hf.ViTModel(config, add_pooling_layer=False)


def clip_text():
    torch.manual_seed(0)
    config = hf.CLIPTextConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=12, bos_token_id=48, eos_token_id=49,
    )  # fmt: skip
    return hf.CLIPTextModel(config)


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = nn.Embedding(200, 16), nn.Embedding(90, 16)
        self.user_tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
        self.item_tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))

    def forward(self, user, item):
        return (self.user_tower(self.users(user)) * self.item_tower(self.items(item))).sum(-1)


def case(kind):
    """Module, paths, inputs, and the options that go with them."""
    torch.manual_seed(3)
    if kind == "vit":
        images = DataLoader(TensorDataset(torch.rand(40, 3, 16, 16), torch.arange(40) % 3), 16)
        return vit(), ["layers.0", "layers.2.mlp"], images, dict(
            label=lambda number, batch, image, patch: None if patch == 0 else int(batch[1][image]),
            call=lambda model, batch: model(batch[0]), item="image",
        )  # fmt: skip
    if kind == "clip":
        ids = torch.randint(1, 48, (40, 12))
        mask = torch.arange(12) < torch.randint(3, 13, (40, 1))
        inputs = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(16), mask.split(16))]  # noqa: B905
        return clip_text(), "encoder.layers.*", inputs, dict(
            label=lambda number, batch, row, at: f"token {batch['input_ids'][row, at]}"
            if batch["attention_mask"][row, at] else None, item="caption",
        )  # fmt: skip
    if kind == "towers":
        pairs = TensorDataset(torch.arange(200), torch.arange(200) % 90)
        return TwoTowers(), ["user_tower.1", "user_tower", "item_tower"], DataLoader(pairs, 64), dict(
            label=lambda number, batch, row: f"user {batch[0][row]}", item="pair"
        )  # fmt: skip
    conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 12, 3, stride=2))
    return conv, ["2"], torch.rand(20, 1, 12, 12).split(8), dict(axis=1, item="image")


class TestSource:
    @pytest.mark.parametrize("kind", ["vit", "clip", "towers", "conv"])
    def test_dictionaries_are_those_of_fit_on_the_same_rows(self, kind):
        module, paths, inputs, options = case(kind)
        rows = gathered(ModuleSource(module, paths, inputs, **options))
        made = build_module(module, paths, inputs, **options, **OPTIONS)
        assert list(made) == list(rows)
        for path, (values, labels) in rows.items():
            expected = fit(values, labels=labels, **OPTIONS)
            assert torch.equal(made[path].W_dec, expected.W_dec)
            assert torch.equal(made[path].b_dec, expected.b_dec)
            assert made[path].labels == expected.labels
            assert made[path].cfg.metadata.hook_name == path
            assert provenance_of(made[path]).n_tokens == len(values)
            for atom, label in enumerate(made[path].labels):
                row = list(labels).index(label)
                exact = nn.functional.normalize(values[row] - made[path].b_dec, dim=-1)
                assert torch.allclose(made[path].W_dec[atom], exact, atol=1e-6)

    def test_rows_of_a_vision_transformer(self):
        module, paths, inputs, options = case("vit")
        rows = gathered(ModuleSource(module, paths, inputs, **options))
        output = module.eval()(inputs.dataset.tensors[0], output_hidden_states=True).hidden_states[1]
        values, labels = rows["layers.0"]
        assert torch.allclose(values, output[:, 1:].flatten(0, 1), atol=1e-6)
        assert len(values) == len(rows["layers.2.mlp"].values) == 40 * 4
        assert [str(labels[i]) for i in (0, 3, 4)] == [
            "image 0, position 1: 0", "image 0, position 4: 0", "image 1, position 1: 1",
        ]  # fmt: skip
        assert labels[159].key == (39, 0, 4)

    def test_rows_of_a_text_encoder(self):
        module, _, inputs, options = case("clip")
        source = ModuleSource(module, "encoder.layers.*", inputs, **options)
        assert source.hooks == [f"encoder.layers.{i}" for i in range(3)]
        values, labels = gathered(source)["encoder.layers.1"]
        states = module.eval()(**inputs[2], output_hidden_states=True).hidden_states[2]
        mask = inputs[2]["attention_mask"]
        n = int(mask.sum())
        assert torch.allclose(values[-n:], states[mask], atol=1e-6)
        ids = torch.cat([batch["input_ids"][batch["attention_mask"]] for batch in inputs])
        assert [label.name for label in labels] == [f"token {i}" for i in ids.tolist()]
        assert {label.kind for label in labels} == {"caption"}

    def test_channels_may_come_second(self):
        module, paths, inputs, options = case("conv")
        values, labels = gathered(ModuleSource(module, paths, inputs, **options))["2"]
        whole = module(torch.cat(inputs))
        assert torch.allclose(values, whole.permute(0, 2, 3, 1).reshape(-1, 12), atol=1e-6)
        assert labels[16 + 7].key == (1, 0, 7)

    @pytest.mark.parametrize("kind", ["vit", "clip", "towers"])
    @pytest.mark.parametrize("max_rows", [None, 137])
    def test_reading_goes_on_where_it_stopped(self, kind, max_rows):
        module, paths, inputs, options = case(kind)
        source = ModuleSource(module, paths, inputs, **options, max_rows=max_rows)
        every = gathered(source)
        n = len(next(iter(every.values())).values)
        assert n == (max_rows or n)
        for skip in (0, 1, 63, 64, 65, n - 1):
            rest = list(source.rows(skip))
            assert Places.joined([rows.places for rows in rest]) == every[source.hooks[0]].labels[skip:]
            for path, (values, _) in every.items():
                found = torch.cat([rows.values[path] for rows in rest])
                assert torch.equal(found, values[skip:])
        assert list(source.rows(n)) == []
        assert source.provenance(source.hooks[0]).max_tokens == max_rows

    def test_labels_of_ones_own(self, net, batches):
        def label(number, batch, i):
            return Label(row=7 * i, chunk=number, name="x", kind="thing") if i % 2 else None

        made = build_module(net, "again", batches, label, **OPTIONS)["again"]
        assert {str(label).split(",")[0].split(" ")[0] for label in made.labels} == {"thing"}
        assert all(label.row % 14 == 7 and label.chunk < 4 for label in made.labels)

    @pytest.mark.parametrize("name", [3, np.int32(3), torch.tensor(3), "3"])
    def test_names_may_be_numbers(self, net, batches, name):
        labels = gathered(ModuleSource(net, "again", batches, lambda *_: name))["again"].labels
        assert {label.name for label in labels} == {"3"}

    def test_an_iterator_is_read_once(self, net, batches):
        source = ModuleSource(net, "again", iter(batches))
        expected = gathered(ModuleSource(net, "again", batches))["again"].values
        assert torch.equal(gathered(source)["again"].values, expected)
        with pytest.raises(ValueError, match="inputs are an iterator, which can be read once"):
            gathered(source)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(paths="frist"), ValueError, "Net, which has none called 'frist'; near it are first"),
            (dict(paths=""), ValueError, "none called ''"),
            (dict(paths="layers.*"), ValueError, r"none called 'layers.0'"),
            (dict(paths=["first", "first"]), ValueError, "paths must be one or more different paths"),
            (dict(paths=[]), ValueError, "paths must be one or more different paths, got \\[\\]"),
            (dict(paths="unused"), ValueError, "'unused' exists but never fired"),
            (dict(inputs=[]), ValueError, "inputs gave no row that counts"),
            (dict(label=lambda *_: None), ValueError, "inputs gave no row .* label left out all"),
            (dict(inputs=torch.ones(100, 6)), ValueError, r"got a Tensor; pass x.split\(64\)"),
            (dict(inputs={"x": torch.ones(4, 6)}), ValueError, r"got a dict; pass \[batch\]"),
            (dict(inputs="x"), ValueError, "inputs must be batches"),
            (dict(inputs=DataLoader(torch.ones(9, 6), shuffle=True)), ValueError, "shuffle=False"),
            (dict(inputs=[(torch.ones(4, 6), 1)]), TypeError, r"Net .* \(a tuple of 2\).* pass call="),
            (dict(inputs=[{"a": torch.ones(4, 6)}]), TypeError, r"\(a dict with 'a'\).*pass call="),
            (dict(label=lambda number, batch: "x"), TypeError, "and 1 numbers for the row's index"),
            (
                dict(label=lambda *_: 2.5),
                TypeError,
                r"must return .*got 2.5 for \(0,\) of batch 0",
            ),
            (dict(label=lambda *_: True), TypeError, "label must return .*got True"),
            (dict(label=lambda n, b, i: Label(i) if i else "x"), TypeError, "a Label for each row"),
            (dict(axis=2), ValueError, r"axis must be a dimension .* got 2 for shape \(30, 8\)"),
            (dict(max_rows=0), ValueError, "max_rows must be at least 1"),
            (dict(max_rows=7), ValueError, "d_sae must be at most the number of activations"),
            (dict(module=SimpleNamespace()), TypeError, "module must be Module"),
            (dict(inputs=[torch.full((20, 6), torch.nan)]), ValueError, "at 'first', row 0"),
        ],
    )
    def test_bad_input_is_told(self, net, batches, change, error, message):
        arguments = dict(module=net, paths="first", inputs=batches) | change
        with pytest.raises(error, match=message):
            build_module(**arguments, **OPTIONS)
        assert net.training

    def test_paths_with_other_leading_dimensions(self):
        module, _, inputs, options = case("vit")
        with pytest.raises(ValueError, match=r"same leading dimensions.*'layers.0'.*build them one by"):
            gathered(ModuleSource(module, ["embeddings.patch_embeddings.projection", "layers.0"],
                                  inputs, call=options["call"]))  # fmt: skip
        embedding = nn.Sequential(nn.Flatten(0), nn.Linear(6, 3))
        with pytest.raises(ValueError, match=r"'1' gives torch.float32 of shape \(3,\)"):
            gathered(ModuleSource(embedding, "1", [torch.ones(1, 6)]))


class TestAnyModule:
    def test_nothing_stays_behind(self, net, batches):
        net.norm.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        modes = [module.training for module in net.modules()]
        AnyModule(net).capture(batches[0], ["first", "again"])
        assert net.runs == 0  # it stopped inside the pass
        with pytest.raises(ValueError, match="never fired"):
            AnyModule(net).capture(batches[0], "unused")
        assert [module.training for module in net.modules()] == modes
        assert not any(module._forward_hooks for module in net.modules())
        after = net.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_copies_of_the_first_activation(self, net, batches):
        net.eval()
        found = AnyModule(net).capture(batches[0], ["norm", "again"])
        with torch.no_grad():
            normed = net.norm(net.first(batches[0]))  # the activation after it writes into this
            assert torch.equal(found["norm"], normed)
            assert torch.equal(found["again"], net.again(normed.relu()))

    def test_edits(self, net, batches):
        net.eval()
        x = batches[0].clone().requires_grad_()
        plain = net(x)
        calls = []
        with AnyModule(net).edited({"again": lambda y: calls.append(1) or y}):
            assert torch.equal(net(x), plain)
        assert len(calls) == 2
        with AnyModule(net).edited({"first": lambda y: 0 * y}):
            net(x).sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()
        assert torch.equal(net(x), plain)
        with (
            pytest.raises(ValueError, match=r"must return a tensor of shape \(30, 8\), got \(30,\)"),
            AnyModule(net).edited({"first": lambda y: y[:, 0]}),
        ):
            net(x)
        with (
            pytest.raises(ValueError, match="'unused' exists but never fired"),
            AnyModule(net).edited({"unused": lambda y: y}),
        ):
            net(x)
        with pytest.raises(ValueError, match="near it are first"), AnyModule(net).edited({"frist": abs}):
            pass

    def test_a_dictionary_goes_into_its_module(self, tmp_path):
        module, paths, inputs, options = case("vit")
        made = build_module(module, paths, inputs, **options, d_sae=100, k=32, progress=False)
        made["layers.0"].save_model(tmp_path)
        itda = itda_lens.load(tmp_path)
        images = inputs.dataset.tensors[0]
        x = AnyModule(module).capture(images, itda.cfg.metadata.hook_name)["layers.0"]
        assert itda.encode(x).shape == (40, 5, 100)
        module.eval()
        with torch.no_grad():
            clean = module(images).last_hidden_state
            with AnyModule(module).edited({"layers.0": lambda y: itda(y)}):
                spliced = module(images).last_hidden_state
            with AnyModule(module).edited({"layers.0": torch.zeros_like}):
                zeroed = module(images).last_hidden_state
        assert 0 < (spliced - clean).norm() < 0.2 * (zeroed - clean).norm()

    def test_batches_move_to_the_device_of_the_module(self):
        Pair = namedtuple("Pair", "x y")
        batch = {"a": Pair(torch.ones(3), [torch.ones(3), "s"]), "b": (torch.ones(3), None)}
        there = moved(batch, torch.device("meta"))
        assert isinstance(there["a"], Pair)
        assert [there["a"].x.is_meta, there["a"].y[0].is_meta, there["b"][0].is_meta] == [True] * 3
        assert (there["a"].y[1], there["b"][1]) == ("s", None)
        encoding = hf.BatchEncoding({"input_ids": torch.ones(2, 3, dtype=torch.long)})
        assert AnyModule(clip_text()).capture(encoding, "encoder.layers.0")


def test_the_example_of_the_docstring():
    module = importlib.import_module("itda_lens.training.build_module")
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner()
    found = [runner.run(one) for one in finder.find(build_module, globs=vars(module).copy())]
    assert sum(one.attempted for one in found) > 3
    assert sum(one.failed for one in found) == 0

"""Activations that SAELens and vLLM keep, read as sources: SAELens's own classes write them here.

vLLM is not installed: its files are written in the layout of its `ExampleHiddenStatesConnector`.
"""

import warnings

import numpy as np
import pytest
import torch
from conftest import WORDS
from datasets import Dataset, load_from_disk
from sae_lens import ActivationsStore, CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.training.activations_store import _filter_buffer_acts
from safetensors.torch import save_file

from itda_lens import fit
from itda_lens.records import Places, Provenance
from itda_lens.sources import HiddenStatesSource, SAELensCache, SAELensStore, cache, gathered
from itda_lens.training import build_from, recipe_of

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # of SAELens's own

HOOK = "blocks.1.hook_resid_post"
CONTEXT = 16
QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def bridge(tiny):
    return tiny.model


@pytest.fixture(scope="module")
def token_rows(tokenizer) -> Dataset:
    """Contexts of token ids, each from the BOS token on."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 4 + len(WORDS), (20, CONTEXT), generator=generator)
    ids[:, 0] = tokenizer.bos_token_id
    ids[3, 7] = tokenizer.eos_token_id
    return Dataset.from_dict({"tokens": ids.tolist()})


def store_of(bridge, data, **options):
    data = data and data.with_format(None)  # a copy: SAELens sets the format of its data set
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SAELens: fewer samples than tokens
        return ActivationsStore(
            **dict(
                model=bridge, dataset=data, streaming=False, hook_name=HOOK, hook_head_index=None,
                context_size=CONTEXT, d_in=32, n_batches_in_buffer=2, total_training_tokens=320,
                store_batch_size_prompts=4, train_batch_size_tokens=8, prepend_bos=True,
                normalize_activations="none", device=torch.device("cpu"), dtype="float32",
            ) | options
        )  # fmt: skip


@pytest.fixture(scope="module")
def saelens_folder(bridge, token_rows, tmp_path_factory):
    """A folder that SAELens's runner wrote."""
    folder = tmp_path_factory.mktemp("saelens") / "cached"
    cfg = CacheActivationsRunnerConfig(
        dataset_path="none", model_name="tiny-random", model_batch_size=4, hook_name=HOOK, d_in=32,
        training_tokens=320, context_size=CONTEXT, new_cached_activations_path=str(folder),
        shuffle=False, device="cpu", streaming=False, buffer_size_gb=8.2e-6,  # a batch
    )  # fmt: skip
    from sae_lens import cache_activations_runner as module

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load_model", lambda **_: bridge)
    with patch.context() as inside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside.setattr(module, "load_model", lambda **_: bridge)
        CacheActivationsRunner(cfg, override_dataset=token_rows.with_format(None)).run()
    return folder


@pytest.fixture(scope="module")
def numbers(tiny, token_rows):
    """What the model gives for these contexts, [context, position, d_in]."""
    ids = torch.tensor(token_rows["tokens"][:])
    return ids, tiny.capture(ids, torch.ones_like(ids, dtype=torch.bool), [HOOK])[HOOK]


class TestSAELensCache:
    def test_every_row_of_the_folder(self, saelens_folder, numbers):
        source = SAELensCache(saelens_folder, keep_special_tokens=True, batch_size=3)
        ids, x = numbers
        everything = gathered(source)[HOOK]
        kept = torch.tensor(np.array(load_from_disk(str(saelens_folder)).with_format("numpy")[HOOK][:]))
        assert torch.equal(everything.values, kept.reshape(-1, 32))
        assert torch.allclose(everything.values, x.reshape(-1, 32), atol=1e-5)
        assert everything.labels.row.tolist() == [i for i in range(20) for _ in range(CONTEXT)]
        assert everything.labels.position.tolist() == list(range(CONTEXT)) * 20
        assert str(everything.labels[17]) == f"context 1, position 1: token {ids[1, 1]}"
        assert len(everything.values) == source.provenance(HOOK).n_tokens == 320

    def test_a_tokenizer_tells_texts_and_special_tokens(self, saelens_folder, tokenizer, numbers):
        ids, x = numbers
        found = gathered(SAELensCache(saelens_folder, HOOK, tokenizer=tokenizer))[HOOK]
        keep = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        assert torch.allclose(found.values, x[keep], atol=1e-5)
        for i in (0, 50, 299 - 1):
            label = found.labels[i]
            assert label.token == tokenizer.decode([ids[label.row, label.position]])
            assert f"[[{label.token}]]" in label.context
            assert label.kind == "context"

    def test_goes_on_and_gives_the_dictionary_of_its_rows(self, saelens_folder, tokenizer, tmp_path):
        source = SAELensCache(saelens_folder, tokenizer=tokenizer, batch_size=3,
                              provenance=Provenance(model_name="tiny", prepend_bos=True))  # fmt: skip
        rows = gathered(source)[HOOK]
        itda = fit(source, d_sae=16, k=3)
        one = fit(rows.values, labels=rows.labels, d_sae=16, k=3)
        assert torch.equal(itda.W_dec, one.W_dec)
        assert list(itda.labels) == list(one.labels)
        metadata = itda.cfg.metadata
        assert (metadata.model_name, metadata.hook_name) == ("tiny", HOOK)
        assert (metadata.context_size, metadata.prepend_bos) == (CONTEXT, True)
        for skip in (1, 44, 45, 200, len(rows.values)):
            rest = list(source.rows(skip))
            values = torch.cat([rows.values[:0], *(part.values[HOOK] for part in rest)])
            assert torch.equal(values, rows.values[skip:])
            assert Places.joined([part.places for part in rest]) == rows.labels[skip:]
        assert cache(source, tmp_path / "ours", **QUIET).n_rows == len(rows.values)

    def test_bad_folders(self, saelens_folder, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            SAELensCache(tmp_path / "missing")
        with pytest.raises(ValueError, match="is no cache of SAELens"):
            SAELensCache(tmp_path)
        with pytest.raises(ValueError, match=f"hook_name must be one of '{HOOK}', got 'x'"):
            SAELensCache(saelens_folder, "x")
        Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "texts"))
        with pytest.raises(ValueError, match="no column has activations of contexts"):
            SAELensCache(tmp_path / "texts")
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / ".tmp_shards").mkdir()
        with pytest.raises(ValueError, match="is not finished"):
            SAELensCache(tmp_path / "half")


class TestSAELensStore:
    @pytest.mark.parametrize("exclude", [None, [1, 5, 6]])
    @pytest.mark.parametrize("seqpos", [(None,), (2, -3)])
    def test_the_rows_that_saelens_trains_on(self, bridge, token_rows, exclude, seqpos):
        options = dict(
            exclude_special_tokens=None if exclude is None else torch.tensor(exclude),
            seqpos_slice=seqpos,
        )
        theirs, store = store_of(bridge, token_rows, **options), store_of(bridge, token_rows, **options)
        batches = [
            _filter_buffer_acts(
                theirs.get_raw_llm_batch(raise_on_epoch_end=True), theirs.exclude_special_tokens
            )
            for _ in range(5)
        ]
        found = gathered(SAELensStore(store, keep_special_tokens=True))[HOOK]
        assert torch.equal(found.values, torch.cat(batches))
        assert int(found.labels.position.min()) == (seqpos[0] or 0)

    def test_is_the_same_each_time_and_goes_on(self, bridge, token_rows, tokenizer):
        source = SAELensStore(store_of(bridge, token_rows), max_tokens=130)
        rows = gathered(source)[HOOK]
        assert len(rows.values) == 130 == source.provenance(HOOK).n_tokens
        assert not {0} & set(rows.labels.position.tolist())
        assert rows.labels[0].token in WORDS
        again = gathered(source)[HOOK]
        assert torch.equal(again.values, rows.values)
        for skip in (1, 59, 60, 129):
            rest = list(source.rows(skip))
            assert torch.equal(torch.cat([part.values[HOOK] for part in rest]), rows.values[skip:])
        itda = build_from(source, recipe_of(d_sae=16, k=3), **QUIET)[HOOK]
        one = fit(rows.values, labels=rows.labels, d_sae=16, k=3)
        assert torch.equal(itda.W_dec, one.W_dec)
        assert itda.cfg.metadata.context_size == CONTEXT
        assert itda.cfg.metadata.prepend_bos is True

    def test_of_a_cached_folder(self, bridge, saelens_folder):
        store = store_of(bridge, None, cached_activations_path=str(saelens_folder))
        ours = gathered(SAELensStore(store))[HOOK]
        folder = gathered(SAELensCache(saelens_folder, tokenizer=bridge.tokenizer))[HOOK]
        assert torch.equal(ours.values, folder.values)
        assert list(ours.labels) == list(folder.labels)
        half = store_of(bridge, None, cached_activations_path=str(saelens_folder), dtype="bfloat16")
        labels = gathered(SAELensStore(half))[HOOK].labels
        assert str(labels[0]) == "context 0, position 1"  # its ids were rounded

    def test_bad_arguments(self, bridge, token_rows):
        with pytest.raises(TypeError, match="store must be SAELens's ActivationsStore, got list"):
            SAELensStore([])
        with pytest.raises(ValueError, match="max_tokens must be at least 1"):
            SAELensStore(store_of(bridge, token_rows), max_tokens=0)
        small = store_of(bridge, token_rows.select(range(3)))
        with pytest.raises(ValueError, match="gave no token that counts: it has no full batch"):
            gathered(SAELensStore(small))


LAYERS = [1, 3]
HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


@pytest.fixture
def requests(tiny, token_rows, tmp_path):
    """A folder of requests in vLLM's layout, and the token ids of each by its file."""
    ids = {}
    for i, row in enumerate(token_rows["tokens"][:12]):
        row = row[: 4 + i]
        tokens = torch.tensor([row])
        found = tiny.capture(tokens, torch.ones_like(tokens, dtype=torch.bool), HOOKS)
        states = torch.stack([found[hook][0] for hook in HOOKS], dim=1).bfloat16()
        path = tmp_path / f"{i}.safetensors"
        save_file({"hidden_states": states, "token_ids": tokens[0]}, path)
        (tmp_path / f"{i}.safetensors.lock").touch()
        ids[str(path)] = row
    return tmp_path, ids


class TestHiddenStates:
    def test_rows_and_labels(self, requests, tiny, tokenizer):
        folder, ids = requests
        source = HiddenStatesSource(folder, layer_ids=LAYERS, requests=ids, tokenizer=tokenizer)
        assert source.hooks == HOOKS
        found = gathered(source)
        for hook in HOOKS:
            expected = []
            for row in ids.values():
                tokens = torch.tensor([row])
                x = tiny.capture(tokens, torch.ones_like(tokens, dtype=torch.bool), [hook])[hook][0]
                special = torch.tensor([t in tokenizer.all_special_ids for t in row])
                expected.append(x.bfloat16().float()[~special])
            assert torch.equal(found[hook].values, torch.cat(expected))
        label = found[HOOKS[0]].labels[-1]
        assert label.row == 11
        assert str(label) == f"{label.token!r} (request 11, position 14: 11)"
        assert label.token == tokenizer.decode([ids[str(folder / "11.safetensors")][14]])

    def test_goes_on_and_gives_the_dictionary_of_its_rows(self, requests, tmp_path):
        source = HiddenStatesSource(requests[0], hook_names=["a", "b"])
        every = gathered(source)
        built = build_from(source, recipe_of(d_sae=12, k=2), **QUIET)
        for hook in ("a", "b"):
            one = fit(every[hook].values, labels=every[hook].labels, d_sae=12, k=2)
            assert torch.equal(built[hook].W_dec, one.W_dec)
            assert list(built[hook].labels) == list(one.labels)
        n = len(every["a"].values)
        for skip in (1, 3, 30, n - 1):
            rest = torch.cat([part.values["b"] for part in source.rows(skip)])
            assert torch.equal(rest, every["b"].values[skip:])
        assert cache(source, tmp_path / "ours", **QUIET).n_rows == n

    def test_failed_requests_are_told(self, requests, caplog):
        folder, ids = requests
        row = next(iter(ids.values()))
        good = dict(hidden_states=torch.ones(len(row), 2, 32), token_ids=torch.tensor(row))
        (folder / "3.safetensors").unlink()  # its lock is still there
        data = (folder / "5.safetensors").read_bytes()
        (folder / "5.safetensors").write_bytes(data[: len(data) // 2])
        (folder / "6.safetensors").write_bytes(b"")
        save_file(good | dict(token_ids=good["token_ids"][1:]), folder / "7.safetensors")
        save_file(dict(hidden_states=good["hidden_states"]), folder / "8.safetensors")
        save_file(good, folder / "9.safetensors")
        message = (
            "requests in .* failed: 3: there is nothing but its lock: the write failed, or goes on; 5: "
        )
        with pytest.raises(ValueError, match=f"5 of 12 {message}") as told:
            HiddenStatesSource(folder, layer_ids=LAYERS)
        assert "7: 4 hidden states for 3 token ids" in str(told.value)
        assert str(told.value).count("it is damaged or was not written to its end") == 3
        with pytest.raises(ValueError, match="6 of 12 requests"):  # 9 has the tokens of 0
            HiddenStatesSource(folder, layer_ids=LAYERS, requests=ids)
        source = HiddenStatesSource(folder, layer_ids=LAYERS, skip_failed=True)
        assert "5 of 12 requests" in caplog.text
        assert len(set(gathered(source)[HOOKS[0]].labels.row.tolist())) == 7

    def test_bad_input(self, requests, tokenizer, tmp_path):
        folder, ids = requests
        for options, error, message in [
            (dict(), ValueError, "layer_ids or hook_names must name the layers"),
            (dict(layer_ids=[1], hook_names=["a"]), ValueError, "layer_ids or hook_names"),
            (dict(layer_ids=[1, -1]), ValueError, "layer_ids must be at least 0, got -1"),
            (dict(layer_ids=[1, 1]), ValueError, "one or more different ones"),
            (dict(layer_ids=[1, 2, 3]), ValueError, "the files hold 2 layers, but there are 3 names"),
            (
                dict(layer_ids=LAYERS, requests={"77": [1]}),
                ValueError,
                "1 of 1 requests .* 77: there",
            ),
            (dict(layer_ids=LAYERS, tokenizer=3), TypeError, "tokenizer"),
        ]:
            with pytest.raises(error, match=message):
                HiddenStatesSource(folder, **options)
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            HiddenStatesSource(tmp_path / "missing", layer_ids=LAYERS)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no request"):
            HiddenStatesSource(tmp_path / "empty", layer_ids=LAYERS)
        ids = torch.tensor([4, 5, 10**6])
        save_file(dict(hidden_states=torch.ones(3, 2, 32), token_ids=ids), folder / "12.safetensors")
        with pytest.raises(ValueError, match="token id 1000000 is outside of the tokenizer's"):
            HiddenStatesSource(folder, layer_ids=LAYERS, tokenizer=tokenizer)
        save_file(dict(hidden_states=torch.ones(3, 2, 16), token_ids=ids), folder / "12.safetensors")
        with pytest.raises(ValueError, match="must have the layers of one model, but 12.safetensors"):
            HiddenStatesSource(folder, layer_ids=LAYERS)

    def test_nan_is_told_with_its_place(self, requests):
        folder, _ = requests
        states = torch.ones(3, 2, 32)
        states[2, 1, 0] = torch.nan  # as vLLM writes for some hybrid models
        save_file(
            dict(hidden_states=states, token_ids=torch.tensor([0, 5, 6])), folder / "2.safetensors"
        )
        source = HiddenStatesSource(folder, layer_ids=LAYERS)
        with pytest.raises(ValueError, match=f"NaN .* at '{HOOKS[1]}', request 2, position 2"):
            gathered(source)

"""Models read through nnsight: in this process, and as a server would read them."""

import logging

import pytest
import torch

from itda_lens import build
from itda_lens.sources import ReadableModel, language_model
from itda_lens.sources.nnsight_models import MOST_WAIT, NNsightModel, retried

HOOKS = [
    "blocks.2.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre", "model.layers.0.mlp",
]  # fmt: skip
TOKENS = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 2]])
MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])


class RemoteError(Exception):
    """By its name, the error of a server."""


class Flaky:
    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture(scope="module")
def inner(tiny_folder):
    nnsight = pytest.importorskip("nnsight", reason="the extra nnsight is not installed")
    return nnsight.LanguageModel(str(tiny_folder), dispatch=True)


@pytest.fixture(scope="module")
def hugging(tiny_folder):
    return language_model(str(tiny_folder), loader="huggingface", device="cpu")


class TestRetried:
    @pytest.fixture(autouse=True)
    def pauses(self, monkeypatch):
        pauses = []
        monkeypatch.setattr("time.sleep", pauses.append)
        return pauses

    def errors(self):
        pydantic = pytest.importorskip("pydantic", reason="comes with nnsight")
        httpx = pytest.importorskip("httpx", reason="comes with nnsight")

        class Answer(pydantic.BaseModel):
            status: int

        try:
            Answer.model_validate_json('{"sta')
        except pydantic.ValidationError as error:
            half = error
        return [ConnectionResetError("reset"), TimeoutError(), RemoteError("busy"), half,
                httpx.ReadTimeout("slow")]  # fmt: skip

    def test_each_kind_of_failure(self, pauses, caplog):
        run = Flaky(*self.errors())
        with caplog.at_level(logging.WARNING):
            assert retried(run, tries=6, wait=1.0) == "done"
        assert run.calls == 6
        assert pauses == [1, 2, 4, 8, 16]
        assert "try 1 of 6 failed (ConnectionResetError: reset); next in 1 s" in caplog.text

    def test_pauses_are_bounded(self, pauses):
        run = Flaky(*[TimeoutError()] * 9)
        assert retried(run, tries=10, wait=1.0) == "done"
        assert max(pauses) == MOST_WAIT

    def test_gives_up(self):
        run = Flaky(*[TimeoutError("slow")] * 9)
        with pytest.raises(ConnectionError, match=r"gave up after 3 tries \(TimeoutError: slow\)"):
            retried(run, tries=3, wait=0)
        assert run.calls == 3

    @pytest.mark.parametrize("error", [ValueError("bad"), TypeError("bad"), KeyboardInterrupt()])
    def test_other_errors_are_told_at_once(self, error, pauses):
        run = Flaky(error)
        with pytest.raises(type(error)):
            retried(run, tries=6, wait=1.0)
        assert run.calls == 1
        assert pauses == []


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="model must be an nnsight.LanguageModel, got Linear"):
        NNsightModel(torch.nn.Linear(2, 2))


class TestModel:
    @pytest.mark.parametrize("remote", [False, "local"])
    def test_reads_as_hugging_face(self, inner, hugging, remote):
        lm = NNsightModel(inner, remote=remote)
        assert isinstance(lm, ReadableModel)
        found, expected = (one.capture(TOKENS, MASK, HOOKS) for one in (lm, hugging))
        assert list(found) == HOOKS
        for hook in HOOKS:
            assert torch.equal(found[hook], expected[hook])
            assert not found[hook].requires_grad
        assert torch.equal(lm.logits(TOKENS, MASK), hugging.logits(TOKENS, MASK))
        assert lm.max_context == hugging.max_context

    @pytest.mark.parametrize("remote", [False, "local"])
    def test_dictionaries_are_those_of_hugging_face(self, inner, hugging, texts, remote):
        options = dict(d_sae=16, k=4, progress=False)
        made = build(NNsightModel(inner, remote=remote), texts[:20], HOOKS[0], **options)[HOOKS[0]]
        expected = build(hugging, texts[:20], HOOKS[0], **options)[HOOKS[0]]
        assert torch.equal(made.W_dec, expected.W_dec)
        assert made.labels == expected.labels

    def test_bad_input(self, inner, monkeypatch):
        lm = NNsightModel(inner, remote="local", tries=2, wait=0)
        with pytest.raises(ValueError, match="has no hook 'model.layers.7'; near it are"):
            lm.capture(TOKENS, MASK, ["model.layers.7"])
        with pytest.raises(ValueError, match="cannot be edited here"):
            lm.logits(TOKENS, MASK, {HOOKS[0]: torch.zeros_like})
        with pytest.raises(ValueError, match="tries must be at least 1"):
            NNsightModel(inner, tries=0)

        def lost(*_, **__):
            raise ConnectionResetError("lost")

        monkeypatch.setattr(inner, "trace", lost)
        with pytest.raises(ConnectionError, match="gave up after 2 tries"):
            lm.capture(TOKENS, MASK, HOOKS[:1])

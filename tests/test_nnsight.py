"""Models read through nnsight: in this process, as a server would do it, and by a stand-in server."""

import gc
import logging

import pytest
import torch
from nnsight_server import served
from transformers import AutoTokenizer

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
def nnsight(tmp_path_factory):
    """nnsight without `save` on every object, which breaks classes of other packages (anyio's)."""
    settings = tmp_path_factory.mktemp("nnsight") / "config.yaml"
    settings.write_text("APP:\n  PYMOUNT: false\n  REMOTE_LOGGING: false\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNSIGHT_CONFIG", str(settings))
        return pytest.importorskip("nnsight", reason="the extra nnsight is not installed")


@pytest.fixture(scope="module")
def inner(nnsight, tiny_folder):
    return nnsight.TransformersModel(str(tiny_folder), task="text-generation", dispatch=True)


@pytest.fixture(scope="module")
def hugging(tiny_folder):
    return language_model(str(tiny_folder), loader="huggingface", device="cpu")


@pytest.fixture(scope="module")
def server(inner):
    with served(inner) as server:
        yield server


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

    def test_a_server_writes_no_commands_to_the_terminal(self, caplog):
        with pytest.raises(ConnectionError) as told:
            retried(Flaky(*[RemoteError("busy \x1b[2J")] * 2), tries=2, wait=0)
        assert "busy \\x1b[2J" in str(told.value)
        assert "busy \\x1b[2J" in caplog.text

    @pytest.mark.parametrize(
        "error", [ValueError("bad"), TypeError("bad"), FileNotFoundError("gone"), KeyboardInterrupt()]
    )
    def test_other_errors_are_told_at_once(self, error, pauses):
        run = Flaky(error)
        with pytest.raises(type(error)):
            retried(run, tries=6, wait=1.0)
        assert run.calls == 1
        assert pauses == []

    @pytest.mark.parametrize(("status", "calls"), [(404, 1), (422, 1), (429, 2), (500, 2), (503, 2)])
    def test_answers_that_another_try_may_change(self, pauses, status, calls):
        httpx = pytest.importorskip("httpx", reason="comes with nnsight")
        request = httpx.Request("POST", "http://127.0.0.1/request")
        answer = httpx.Response(status, request=request)
        run = Flaky(httpx.HTTPStatusError("no", request=request, response=answer))
        try:
            retried(run, tries=2, wait=1.0)
        except httpx.HTTPStatusError:
            assert calls == 1
        assert run.calls == calls


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="model must be an nnsight.TransformersModel, got Linear"):
        NNsightModel(torch.nn.Linear(2, 2))


def test_other_classes_are_left_alone(inner):
    assert not hasattr(object(), "save")


def test_models_without_a_tokenizer_are_refused(inner, monkeypatch):
    monkeypatch.setattr(inner, "tokenizer", None)
    with pytest.raises(TypeError, match="model must be a language model of nnsight, got one without"):
        NNsightModel(inner)


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


FAULTS = [
    "no websocket", "no answer", "no session", "busy", "half an answer", "the answer breaks off",
    "hangs up", "drops", "job fails", "the result breaks off", "half a result",
]  # fmt: skip


# websocket-client leaves a socket to Python's garbage collector when the server closes the connection.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
class TestServer:
    """The client holds no weights here; the server does."""

    @pytest.fixture
    def client(self, nnsight, server, tiny_folder, monkeypatch):
        from nnsight.modeling import huggingface

        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.host)
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a-key")
        # Else nnsight asks the Hub how the model's name is spelled.
        monkeypatch.setitem(huggingface._ID_CACHE, str(tiny_folder), "someone/tiny")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        server.reset()
        # Without weights, nnsight 0.8.1 with transformers 5.23 does not find the tokenizer by itself.
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        yield nnsight.TransformersModel(str(tiny_folder), task="text-generation", tokenizer=tokenizer)
        if {"no session", "hangs up"} & set(server.failed):
            gc.collect()  # while the mark of this class holds

    @pytest.mark.parametrize("by_websocket", [False, True])
    def test_reads_as_hugging_face(self, client, server, hugging, by_websocket):
        server.by_websocket = by_websocket
        lm = NNsightModel(client, remote=True, tries=1)
        assert all(weight.is_meta for weight in client._module.parameters())
        found, expected = (one.capture(TOKENS, MASK, HOOKS) for one in (lm, hugging))
        for hook in HOOKS:
            assert torch.equal(found[hook], expected[hook])
        assert torch.equal(lm.logits(TOKENS, MASK), hugging.logits(TOKENS, MASK))
        assert server.done == 2
        assert all("someone/tiny" in key for key in server.model_keys)

    def test_a_server_sends_no_more_than_was_asked_for(self, client, server):
        tokens = torch.arange(512).reshape(8, 64) % 10
        lm = NNsightModel(client, remote=True, tries=1)
        x = lm.capture(tokens, torch.ones_like(tokens, dtype=torch.bool), HOOKS[:1])[HOOKS[0]]
        assert server.sent < 1.2 * x.nbytes

    @pytest.mark.parametrize("fault", FAULTS)
    def test_each_failure_is_tried_again(self, client, server, hugging, fault, caplog):
        server.faults = [fault] * 2
        lm = NNsightModel(client, remote=True, tries=3, wait=0)
        with caplog.at_level(logging.WARNING):
            found = lm.capture(TOKENS, MASK, HOOKS)
        assert torch.equal(found[HOOKS[0]], hugging.capture(TOKENS, MASK, HOOKS)[HOOKS[0]])
        assert server.failed == [fault] * 2
        assert server.done == 1
        assert caplog.text.count("try 2 of 3 failed") == 1

    @pytest.mark.parametrize("fault", ["busy", "drops"])
    def test_gives_up(self, client, server, fault):
        server.faults = [fault] * 9
        with pytest.raises(ConnectionError, match="gave up after 2 tries"):
            NNsightModel(client, remote=True, tries=2, wait=0).capture(TOKENS, MASK, HOOKS)
        assert server.failed == [fault] * 2

    def test_a_refusal_is_told_at_once(self, client, server):
        server.faults = ["wrong key"] * 2
        with pytest.raises(Exception, match="no such key") as told:
            NNsightModel(client, remote=True, wait=0).capture(TOKENS, MASK, HOOKS)
        assert type(told.value).__name__ == "RemoteError"
        assert server.failed == ["wrong key"]

    def test_nobody_listens(self, client, nnsight, monkeypatch):
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:1")
        with pytest.raises(ConnectionError, match=r"gave up after 2 tries \(ConnectionRefusedError"):
            NNsightModel(client, remote=True, tries=2, wait=0).capture(TOKENS, MASK, HOOKS)

    def test_failures_lose_nothing(self, client, server, hugging, texts):
        server.faults = list(FAULTS)
        options = dict(d_sae=16, k=4, batch_size=4, progress=False)
        lm = NNsightModel(client, remote=True, tries=len(FAULTS) + 1, wait=0)
        made = build(lm, texts[:20], HOOKS[0], **options)[HOOKS[0]]
        expected = build(hugging, texts[:20], HOOKS[0], **options)[HOOKS[0]]
        assert torch.equal(made.W_dec, expected.W_dec)
        assert made.labels == expected.labels
        assert server.failed == FAULTS

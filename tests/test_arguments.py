"""Every argument of every public function: nonsense is told at once, by the argument's name."""

import dataclasses
import inspect
import signal
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import itda_lens
from itda_lens import analysis, architectures, compare, control, fit, sources, training
from itda_lens.compare import Moments
from itda_lens.records import Cutting, Places, TokenFilter, check_fields, checked
from itda_lens.sources import (
    ArraySource,
    Chats,
    ChatSource,
    ModelSource,
    ModuleSource,
    language_model,
)

NAN, INF = float("nan"), float("inf")
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

WHOLE = ["3", 2.5, True, NAN, [3], 1j, torch.tensor(3), -1]
POSITIVE = [*WHOLE, 0]
REAL = ["0.3", True, [0.3], 1j, NAN, INF, -0.1]
SWITCH = ["no", "yes", 1, 0.0, [True]]
NAME = ["nonsense", 3, True, b"mp", ["mp"]]
STRING = [3, True, b"x", ["x"], object()]
ROWS = [
    None, "x", 3, [[1.0]], X.numpy(), X.long(), X + 1j, X > 0, X[0], X[None], X.to_sparse(), X[:0],
    X / 0, X.log(),
]  # fmt: skip
ANY_ROWS = [
    None, "x", 3, True, b"x", {"a"}, {"a": X}, X.long(), X.long().numpy(), X + 1j, X > 0, X[None],
    X.to_sparse(),
    X[:0], X / 0, X.log(), [], [3], [X.long()], ["x"], iter([]), "missing.npy", Path("missing.parquet"),
    object(),
]  # fmt: skip
DICTIONARIES = [None, 3, "x", object(), [], [3], torch.nn.Linear(2, 2), {"a": 3}]
MAPPING = [3, "x", [1], True]
LABELS = [3, "x", ["x"] * 40, [(0, 0)] * 40, [(0, 0, 0)], [(0.5, 0, 0)] * 40, [None] * 40]
TEXTS = [None, 3, [], [3], {"a": ["b"]}, {"a"}, "", "missing.txt", "two words", Path("missing"), b"x"]
MODEL = [None, 3, object(), torch.nn.Linear(2, 2), "./no-such-model", ["x"]]

NONSENSE = {
    **dict.fromkeys(("k", "batch_size", "epochs", "n_anchors", "d_sae", "context_size"), POSITIVE),
    **dict.fromkeys(("n_examples", "n_quantiles", "top"), POSITIVE),
    "usual": [3, "x", [], ["x"], [1], [0.5, 0.1], [NAN, 1.0], True],
    **dict.fromkeys(("max_tokens", "n_rows", "max_rows", "shard_rows"), POSITIVE),
    "seed": WHOLE,
    **dict.fromkeys(
        ("l0", "rtol", "loss_threshold", "least_cosine", "learning_rate", "keep", "spare"), REAL
    ),
    **dict.fromkeys(
        ("signed", "update", "progress", "keep_special_tokens", "prepend_bos", "centred", "final_norm"),
        SWITCH,
    ),
    "per_head": SWITCH,
    **dict.fromkeys(("preset", "method", "loader", "match", "measure", "architecture", "kind"), NAME),
    "rule": [*NAME, object()],
    **dict.fromkeys(
        ("text_field", "split", "hook_name", "model_name", "name", "source", "item", "hook"), STRING
    ),
    "device": [3, True, b"x", ["x"], "nonsense"],
    "dtype": ["float31", 3, True, ["x"]],
    "tokenizer": [3, True, ["x"], object(), "./no-such-tokenizer"],
    **dict.fromkeys(("activations", "x", "y", "anchors"), ROWS),
    "activations of any form": ANY_ROWS,
    **{key: ["", 3, True, b"x", ["x"], object()] for key in ("item", "column")},
    "shard_bytes": POSITIVE,
    **{key: [None, 3, "x", X, [X]] for key in ("activations_a", "activations_b")},
    **{key: [None, 3, "x", [], [3], X, X[0].long(), X[0] * NAN] for key in ("usage_a", "usage_b")},
    **dict.fromkeys(("dictionaries", "itdas", "sae"), DICTIONARIES),
    "metadata": MAPPING,
    "labels": LABELS,
    "texts": TEXTS,
    "model": MODEL,
    "hook_names": [None, 3, [], [3], "nowhere", {"a": 1}, ["a", "a"]],
    "module": [None, 3, object(), "x", torch.nn.Linear],
    "paths": [None, 3, [], [3], "nowhere", "*.nowhere", {"a": 1}, ["0", "0"], [""]],
    "inputs": [None, 3, "x", {"x": X}, [], [{"a": X}], [(X, X)], X, X.numpy(), [X[0]], [X * NAN]],
    "label": [3, "x", lambda: 1, lambda *_: 2.5, lambda *_: None],
    "call": [3, "x", lambda module, batch: None],
    "axis": ["0", 0.5, True, 2, -3],
    "models": [None, 3, "x", {}, {"a": 3}, {"a": []}, [3]],
    "kinds": [None, 3, ["nonsense"], [3]],
    **{key: [None, 3, True, ["x"], b"x"] for key in ("folder", "path_or_repo")},
    "text": [None, 3, ["x"], b"x", "", "a \ud800"],
    "recipe": [None, 3, "best", {}],
    "source of rows": [None, 3, X],
    "moments": [None, 3, X],
    "similarity": [None, 3, [[1.0]], X.long(), X[0], X / 0 * 0, X],
    "cutting": [None, 3, {}, "x"],
    "lm": [None, 3, object(), "x"],
    "another lm": [3, object(), "x"],
    "functions": [None, 3, "x"],
    "lists": [None, 3, object()],
    "provenance": [3, {}, "x"],
    "revision": [3, True, b"x", ["x"], "main"],
    "token ids": [3, "x", [], [99_999], [-1], [0.5]],
    "b_dec": [3, "x", X, X[0].long(), X[0] * NAN, X[0, :1]],
    "tokens": [3, "x", {}, ["user"]],
    "chats": [None, 3, [], [3], ["x"], "missing.jsonl", {"messages": []}, b"x"],
    **dict.fromkeys(("count", "top", "new_tokens"), POSITIVE),
    **dict.fromkeys(("random_draws", "new_tokens of effects"), WHOLE),
    "atom": [*WHOLE, 8],
    **dict.fromkeys(("temperature", "confidence", "margin", "threshold", "coverage"), REAL),
    **{key: ["0.3", True, 1j, NAN, INF] for key in ("factor", "gamma", "amount", "value")},
    **dict.fromkeys(("gated", "whole", "replace"), SWITCH),
    **dict.fromkeys(("by", "tier", "unit"), NAME),
    **{key: [None, 3, "x", [], [3], {"a": 1}] for key in ("edit", "edits")},
    **{key: [None, 3, "", "x", [], [3], {"a": "b"}] for key in ("targets", "retained", "words")},
    "prompts": [None, 3, "", "x", [], [3], {"a": "b"}],
    "prompt": [None, 3, ["x"], b"x"],
    "atoms": [None, 3, "x", [], ["a"], [8], [-1], [1, 1], [1.5], [True]],
    "typical": [3, "x", ["a"]],
    "concept": [3, [3], object()],
    "label match": [None, 3, ["x"], b"x", "no such token"],
    "vector": [None, 3, "x", [1.0], X, X[0] * 0, X[0] * NAN],
    "mean": [3, "x", [1.0], X],
    "path": [None, 3, True, ["x"], b"x"],
    "folders": [3, True, [3], ["a", "b"]],
}
"""Values that no argument of that name takes. A family of its own is chosen by `SPECIAL`."""

SPECIAL = {
    **{(f, "activations"): "activations of any form"
       for f in ("fit", "ArraySource", "as_source", "evaluate_rows")},
    ("cache", "source"): "source of rows",
    ("cache", "dtype"): "kind",
    ("gathered", "source"): "source of rows",
    ("build_from", "source"): "source of rows",
    ("unembedding", "tokens"): "token ids",
    ("examples_from", "source"): "source of rows",
    ("examples_from", "lm"): "another lm",
    ("plan_from", "source"): "source of rows",
    ("open_plan", "source"): "source of rows",
    ("compare", "activations"): "activations_a",
    ("activation_similarity", "a"): "activations_a",
    ("activation_similarity", "b"): "activations_a",
    ("similarity_matrix", "a"): "lists",
    ("similarity_matrix", "b"): "lists",
    ("similarity_matrix", "measure"): "functions",
    ("diff_models", "a"): "model",
    ("diff_models", "b"): "model",
    ("labelled", "match"): "label match",
    ("effects", "new_tokens"): "new_tokens of effects",
    **{(f, side): "dictionaries" for side in "ab"
       for f in ("jaccard", "weighted_jaccard", "diff", "check_diffable", "union")},
}  # fmt: skip

ALLOWED = {
    ("as_source", "activations", str(X[:0])): "it has no rows, which is told when it is read",
    **{(f, "labels", str(["x"] * 40)): "names of rows" for f in ("fit", "ArraySource", "as_source")},
    ("*", "tokenizer", "./no-such-tokenizer"): "a wrapped model brings its own tokenizer",
    ("activations_of", "model", None): "the dictionaries name it",
    ("hook_list", "hook_names", "nowhere"): "it does not look at a model",
    ("direction", "hook_name", "nowhere"): "it does not look at a model",
    ("effects", "retained", ()): "then nothing is measured on other texts",
    ("load_edits", "dictionaries", ()): "the file names their folders",
    ("hook_list", "hook_names", "3"): "a layer",
    ("hook_list", "hook_names", "[3]"): "a layer",
    ("iterate_texts", "texts", ()): "an empty list is one; whoever needs a text says so",
    **{
        ("recorded_settings", "model", one): "only whether it is given counts" for one in map(str, MODEL)
    },
}
"""Nonsense that is taken, and why. Values that are equal to no other go by their name."""

ALSO_CALLED = {
    "a": "models|dictionar|activations", "b": "models|dictionar|activations",
    "hook_name": "hook", "hook_names": "hook", "chats": "conversation", "call": "hook",
    "inputs": "row 0|batch|activations",
}  # fmt: skip


@contextmanager
def within(seconds: float):
    """Raise TimeoutError in what takes longer: a function that hangs must not hang the tests."""

    def late(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def calls(tiny, tiny_folder, texts, tmp_path_factory):
    """A call of each public function that works: its arguments by name."""
    options = dict(d_sae=8, k=2, progress=False)
    a, b = (itda_lens.build(tiny, texts, HOOK, seed=s, **options)[HOOK] for s in (0, 1))
    x = training.collect(tiny, texts, HOOK, progress=False)[HOOK]
    folder = tmp_path_factory.mktemp("saved")
    a.save_model(folder / "a")
    rows = X.double()
    own = dict(model=tiny, texts=texts)
    used = torch.ones(8)
    moments = Moments.of(rows, rows)
    both = dict(models={"a": [a], "b": [b]})
    named = dict(tokenizer=None, loader="bridge", device=None)
    read = dict(text_field="text", split="train", **named, batch_size=4, max_tokens=64)
    cut = dict(context_size=32, prepend_bos=None, keep_special_tokens=False, tokens=None)
    heads = dict(per_head=False)
    atoms = dict(
        d_sae=8, k=2, preset="best", rule=None, seed=0, method=None, signed=True, loss_threshold=None,
        l0=None, update=False, least_cosine=None, rtol=1e-3,
    )  # fmt: skip
    module = dict(
        module=torch.nn.Sequential(torch.nn.Linear(6, 8)), paths="0", inputs=[X], label=None, call=None,
        item="row", axis=-1, max_rows=None, name=None,
    )  # fmt: skip
    planned = training.plan(tiny, texts, HOOK, folder=folder / "planned", d_sae=8, k=2)
    trained = dict(activations=X, k=2, d_sae=8, seed=0, metadata=None)
    quiet = dict(progress=False)
    chatty = language_model(str(tiny_folder), device="cpu")
    chatty.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    chats = [[{"role": "user", "content": "the cat sat"}]] * 3
    edit = control.Edit(a, [1], gate=control.Excess(0.0))
    saved = control.save_edits(edit, folder / "edit.json")
    prompted = dict(model=tiny, sae=a, targets=texts[:6], retained=[texts[7]])
    often = int(a.encode_sparse(x.values).indices[:, 0].bincount().argmax())
    return {
        "build": own | dict(hook_names=HOOK, model_name=None, folder=None) | atoms | cut | read | heads
        | quiet,
        "plan": own | dict(hook_names=HOOK, model_name=None, shard_rows=50, spare=1.0)
        | dict(folder=folder / "plan") | atoms | cut | read | heads,
        "plan_from": dict(
            source=ArraySource(X), recipe=training.recipe_of(d_sae=8, k=2), folder=folder / "plan2",
            shard_rows=20, spare=1.0,
        ),
        "open_plan": dict(folder=planned.folder, model=None, source=None, rule=None),
        "collect": own | dict(hook_names=HOOK) | cut | read | heads | quiet,
        "ModelSource": own
        | dict(hook_names=HOOK, cutting=Cutting(), tokens=None, model_name=None)
        | read
        | heads,
        "ChatSource": dict(
            model=chatty, chats=chats, hook_names=HOOK, context_size=None, tokens=None, batch_size=4,
            max_tokens=64, model_name=None, **named, **heads,
        ),
        "fit": dict(activations=X, labels=None, item=None, column=None, batch_size=16, metadata=None)
        | atoms | quiet,
        "ArraySource": dict(activations=X, labels=None, item=None, batch_size=16),
        "as_source": dict(activations=X, labels=None, item=None, column=None, batch_size=16),
        "cache": dict(
            source=ArraySource(X), folder=folder / "cache", dtype="exact", shard_bytes=2**20,
            progress=False,
        ),
        "evaluate_rows": dict(dictionaries=itda_lens.fit(X, d_sae=8, k=2), activations=X, column=None)
        | dict(batch_size=16) | quiet,
        "build_module": module | atoms | quiet,
        "ModuleSource": module,
        "recipe_of": atoms,
        "load": dict(path_or_repo=folder / "a", device="cpu", dtype=None, revision=None),
        "union": dict(a=a, b=b, k=None, method=None, signed=None, b_dec=None),
        "unembedding": dict(model=tiny, tokens=None, final_norm=True, **named),
        "jaccard": dict(a=a, b=b, match="auto"),
        "evaluate": own | dict(dictionaries=a, tokens=None) | read | quiet,
        "decompose": dict(model=tiny, sae=a, text="the cat", usual=None, **named),
        "nearest": dict(model=tiny, sae=a, text="the cat", top=3, **named),
        "examples": own | dict(sae=a, n_examples=2, n_quantiles=2, seed=0) | read | quiet,
        "examples_from": dict(
            source=ModelSource(tiny, texts, HOOK), sae=a, lm=None, n_examples=2, n_quantiles=2, seed=0,
            progress=False,
        ),
        "logit_weights": dict(lm=tiny, hook=HOOK),
        "baseline": trained | dict(kind="pca", method="ols", labels=None, epochs=1),
        "build_baselines": own | dict(
            itdas=[a], kinds=["pca"], folder=folder / "b", max_tokens=64, epochs=1, seed=0,
            batch_size=4, text_field="text", split="train", device=None, progress=False,
        ),
        "principal_components": dict(activations=X, k=2, metadata=None),
        "random_atoms": trained | dict(method="ols", labels=None),
        "save_inference": dict(sae=a, folder=folder / "c"),
        "train_sae": trained | dict(architecture="topk", epochs=1, learning_rate=1e-3, batch_size=8),
        "activation_similarity": dict(a=[x], b=[x], measure="cka", match="position"),
        "activations_of": own | dict(itdas=[a]) | read | quiet,
        "recorded_settings": dict(itdas=[a], model="a model"),
        "compare": both | dict(measure="cka", match="auto", activations={"a": [x], "b": [x]}),
        "check_comparable": both | dict(measure="jaccard", match="auto"),
        "check_diffable": dict(a=a, b=b, match="auto"),
        "diff": dict(a=a, b=b, activations_a=x, activations_b=x, match="auto"),
        "diff_models": dict(a=tiny, b=tiny, texts=texts, hook_name=HOOK, seed=0, context_size=32)
        | options | read,
        "layer_matching_accuracy": dict(similarity=torch.eye(3)),
        "linear_cka": dict(moments=moments),
        "linear_regression_r2": dict(moments=moments),
        "svcca": dict(moments=moments, keep=0.9),
        "relative_representation": dict(x=rows, anchors=rows[:5], centred=False),
        "relative_similarity": dict(x=rows, y=rows, n_anchors=4, seed=0, centred=False),
        "similarity_matrix": dict(a=[1, 2], b=[3], measure=lambda u, v: u * v),
        "usage": dict(sae=a, x=x.values, batch_size=8),
        "weighted_jaccard": dict(a=a, b=b, usage_a=used, usage_b=used, match="auto"),
        "iterate_texts": dict(texts=texts, text_field="text", split="train"),
        "check_activations": dict(activations=X),
        "hook_list": dict(hook_names=[HOOK]),
        "gathered": dict(source=ArraySource(X), progress=False),
        "language_model": dict(model=tiny, name=None, dtype=torch.float32, source=None, **named),
        "tokenization_for": dict(lm=tiny, cutting=Cutting(), tokens=None),
        "build_from": dict(
            source=ArraySource(X), recipe=training.recipe_of(d_sae=8, k=2), metadata=None, progress=False
        ),
        "applied": dict(model=tiny, edits=edit, **named),
        "contrast": prompted | dict(by="difference", count=4, top=4, **named),
        "direction": dict(vector=X[0], hook_name=HOOK, mean=None),
        "effects": dict(
            model=tiny, edits=edit, prompts=[control.Prompt("the cat", " sat")], retained=["a dog ran"],
            new_tokens=1, concept=["cat"], temperature=0.0, random_draws=0, confidence=0.9, seed=0,
            batch_size=2, progress=False, **named,
        ),
        "exemplar_ablation": dict(sae=a, atoms=[1], centred=False),
        "gate_scores": dict(model=tiny, edit=edit, texts=["the cat sat"], batch_size=2, **named),
        "interpret_then_deactivate": prompted | dict(
            factor=0.0, top=8, count=8, by="sets", gated=False, coverage=1.0, whole=False,
            replace=False, **named
        ),
        "labelled": dict(sae=a, match=a.labels[0].token),
        "load_edits": dict(path=saved, dictionaries=a),
        "opening_at": dict(
            model=tiny, edit=control.Edit(a, range(8)), targets=["the cat sat"], margin=0.9,
            coverage=1.0, **named
        ),
        "output_scores": dict(
            model=tiny, sae=a, atoms=[1], words=["cat"], prompts=["the"], amount=0.1, **named
        ),
        "pole": dict(sae=a, atom=1, value=0.5, unit="norm"),
        "save_edits": dict(edits=edit, path=folder / "e.json", folders=()),
        "swapped": dict(model=tiny, sae=a, atoms=[1], prompt="the cat", **named),
        "tiered": dict(
            sae=a, atoms=[1], amount=0.5, tier="token", unit="norm", typical=None, threshold=0.0
        ),
        "typical_coefficients": dict(model=tiny, sae=a, atoms=[often], texts=texts, **named),
        "unlearn": prompted | dict(gamma=0.0, by="difference", count=4, **named),
        "written": dict(lm=tiny, prompts=[[0, 5]], new_tokens=1, temperature=0.0, seed=0),
        "check_enough": dict(recipe=training.recipe_of(d_sae=8, k=2), n_rows=40),
    }  # fmt: skip


FACES = [itda_lens, analysis, architectures, compare, control, sources, training]
FUNCTIONS = {
    name: function
    for face in FACES
    for name in face.__all__
    if inspect.isfunction(function := getattr(face, name))
} | {
    "ModelSource": ModelSource,
    "ArraySource": ArraySource,
    "ChatSource": ChatSource,
    "ModuleSource": ModuleSource,
}

NOT_WALKED = {
    "by_head": "for rows that a source has read",
    "heads_at": "for models and hooks that were looked at before",
    "text_or_chat_source": "build and collect, which it serves, are walked",
    "chat_context_size": "tests/test_chats.py",
    "special_ids": "of a tokenizer that was checked before",
    "describe_texts": "for metadata: called once the texts were looked at",
    "names_data_set": "a question, with an answer for everything",
    "hook_is_per_head": "the old name of a property of HookPoint",
    "unknown_hook": "makes an error message, for model libraries",
    "register_with_transformer_lens": "changes TransformerLens for the whole process",
    "output_folder": "tests/test_training.py",
    "save_all": "tests/test_training.py",
}


def called(name: str, arguments: dict[str, object]) -> None:
    result = FUNCTIONS[name](**arguments)
    if name == "iterate_texts":
        list(result)
    if name == "as_source":  # rows that are not in memory are checked when they are read
        list(result.rows())
    if name == "applied":
        with result:
            pass
    if name == "ModuleSource":
        list(result.rows())


def test_every_public_function_is_walked(calls):
    assert set(FUNCTIONS) == set(calls) | set(NOT_WALKED)
    for name, arguments in calls.items():
        missing = set(inspect.signature(FUNCTIONS[name]).parameters) - set(arguments)
        assert missing <= {"provenance", "more", "settings"}, name


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - set(NOT_WALKED)))
def test_nonsense_is_told_by_the_name_of_the_argument(name, calls, tmp_path):
    with within(60):
        called(name, calls[name])
    wrong = []
    for argument, good in calls[name].items():
        allowed_none = good is None
        for value in NONSENSE[SPECIAL.get((name, argument), argument)]:
            if (value is None and allowed_none) or is_allowed(name, argument, value):
                continue
            # Baselines that are there already are not built again, and little is looked at.
            fresh = {"folder": tmp_path / str(len(list(tmp_path.iterdir())))}
            more = fresh if name in ("build_baselines", "plan", "plan_from") else {}
            given = f"{argument}={value!r}"[:80]
            try:
                with within(5):
                    called(name, calls[name] | more | {argument: value})
            except (TypeError, ValueError, FileNotFoundError) as error:
                text = str(error)
                if argument not in text and not any(
                    word in text for word in ALSO_CALLED.get(argument, "\0").split("|")
                ):
                    wrong.append(f"{given}: {type(error).__name__} without its name: {text[:150]}")
            except Exception as error:
                wrong.append(f"{given}: from the inside: {error!r:.150}")
            else:
                wrong.append(f"{given}: accepted")
    assert not wrong, "\n".join(wrong)


def is_allowed(name, argument, value) -> bool:
    names = [value] if isinstance(value, str | None) else []
    names += [()] if isinstance(value, list) and not value else [str(value)]
    return any((function, argument, own) in ALLOWED for function in (name, "*") for own in names)


FIELDS = {
    Cutting: dict(
        context_size=[1, 2.5, "9", True, None], prepend_bos=["no", 1], keep_special_tokens=SWITCH
    ),
    training.Recipe: dict(
        d_sae=POSITIVE, coding=[3, None, "mp"], l0=REAL, seed=WHOLE, preset=[3, True],
        rule=[3, None, "best"],
    ),
    TokenFilter: dict(
        roles=[3, "user", [], [3]], kinds=[3, "word", [], ["words"]], only=[3, "(", ["x"]],
        drop=[3, "[", b"x"],
    ),
    Chats: dict(
        conversations=[None, 3, {}, [{"role": "user", "content": "a"}]], special_tokens=NAME,
        special_share=[*REAL, 0, 1], template_options=[*MAPPING, {"a": object()}], field=STRING,
        split=STRING,
    ),
}  # fmt: skip
GOOD = {
    Cutting: dict,
    training.Recipe: lambda: vars(training.recipe_of(d_sae=8, k=2)),
    TokenFilter: dict,
    Chats: lambda: dict(conversations=[]),
}
"""Arguments with which each can be made."""


@pytest.mark.parametrize("kind", FIELDS)
def test_nonsense_in_a_field_is_told_by_the_name_of_the_field(kind):
    good = GOOD[kind]()
    assert set(FIELDS[kind]) == {field.name for field in dataclasses.fields(kind)}
    for field, values in FIELDS[kind].items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=field):
                kind(**(good | {field: value}))


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = 1
    name: Literal["first", "random"] = "first"

    def __post_init__(self) -> None:
        check_fields(self)


def test_fields_of_ones_own():
    made = Settings(size=np.int16(3))
    assert type(made.size) is int
    with pytest.raises(ValueError, match="name must be one of .'first', 'random'., got 'last'"):
        Settings(name="last")
    with pytest.raises(TypeError, match="size must be a whole number, got '3'"):
        Settings(size="3")


class TestWhatIsWelcome:
    def test_numbers_and_booleans_of_numpy(self):
        own = dict(d_sae=8, k=2, seed=1, l0=1.5, update=True, least_cosine=0.5, rtol=0.01, batch_size=16)
        theirs = {
            name: np.bool_(value) if value is True else np.array(value)[()]
            for name, value in own.items()
        }
        assert all(isinstance(value, np.generic) for value in theirs.values())
        one, other = fit(X, **own), fit(X, **theirs)
        assert torch.equal(one.W_dec, other.W_dec)
        assert one.cfg.to_dict() == other.cfg.to_dict()

    def test_a_device_of_torch(self, tiny_folder, tmp_path):
        device = torch.device("cpu")
        assert language_model(str(tiny_folder), device=device).device == device
        fit(X, d_sae=8, k=2).save_model(tmp_path)
        assert itda_lens.load(tmp_path, device=device).W_dec.device == device

    def test_what_build_returns(self, calls):
        a, b = (calls["jaccard"][side] for side in "ab")
        alike = itda_lens.jaccard(a, b)
        assert itda_lens.jaccard({"x": a}, {"x": b}) == itda_lens.jaccard([a], (b,)) == alike
        assert itda_lens.jaccard({"x": a}.values(), b) == alike


class TestChecked:
    def test_what_a_function_returns_and_is(self):
        @checked
        def add(a: int, /, b: float = 2.0, *more: int, scale: bool = False, **others: int) -> float:
            """Adds."""
            return a + b

        assert add(1) == add(np.int64(1), b=2) == 3
        assert add.__doc__ == "Adds."
        assert list(inspect.signature(add).parameters) == ["a", "b", "more", "scale", "others"]
        with pytest.raises(TypeError, match=r"add\(\): missing a required argument: 'a'"):
            add()

    def test_every_item_of_a_list_is_looked_at(self):
        @checked
        def join(names: Sequence[str]) -> str:
            return "".join(names)

        for at in (0, 500, 999):
            names: list = ["x"] * 1000
            names[at] = 3
            with pytest.raises(TypeError, match=rf"names\[{at}\] must be a string, got 3"):
                join(names)

    def test_values_are_shortened(self):
        with pytest.raises(TypeError, match="k must be a whole number, got") as caught:
            fit(X, d_sae=8, k="3" * 10**6)
        assert len(str(caught.value)) < 200

    def test_a_million_labels_are_not_made(self):
        labels = Places.numbered(0, len(X))

        def fail(_):
            raise AssertionError("a label was made")

        labels.__class__ = type(
            "Watched", (Places,), {"__iter__": fail, "__getitem__": Places.__getitem__}
        )
        assert len(fit(X, d_sae=8, k=2, labels=labels).labels) == 8

"""Models side by side, and model diffing, on tiny models; the commands that do it."""

import json
from functools import partial

import pytest
import torch
from scipy import stats

import itda_lens
from itda_lens.compare import (
    Moments,
    activation_similarity,
    activations_of,
    compare,
    diff,
    diff_models,
    jaccard,
    linear_cka,
    linear_regression_r2,
    relative_similarity,
    svcca,
    usage,
    weighted_jaccard,
)
from itda_lens.compare.discovery import false_discovery_rates
from itda_lens.reports import comparison_heatmap, save_comparison
from itda_lens.sources import language_model
from itda_lens.training import Activations, save_all

HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(3)]
OPTIONS = dict(d_sae=60, k=4, context_size=16, progress=False)


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory):
    """A model of other random weights and of another width."""
    from tests.conftest import save_random_llama

    return save_random_llama(tmp_path_factory.mktemp("m") / "other-random", tokenizer, hidden_size=40)


@pytest.fixture(scope="module")
def models(tiny, other, texts):
    return {
        "tiny": list(itda_lens.build(tiny, texts, HOOKS, **OPTIONS).values()),
        "other": list(itda_lens.build(str(other), texts, HOOKS[:2], device="cpu", **OPTIONS).values()),
    }


@pytest.fixture(scope="module")
def activations(models, texts):
    return {
        name: activations_of(itdas, texts, device="cpu", progress=False)
        for name, itdas in models.items()
    }


def test_activations_are_those_of_the_build(models, activations, tiny, texts):
    for itda, own in zip(models["tiny"], activations["tiny"], strict=True):
        rows = {label.key: row for row, label in enumerate(own.labels)}
        atoms = own.values[[rows[label.key] for label in itda.labels]] - itda.b_dec
        cosines = torch.cosine_similarity(atoms, itda.W_dec)
        assert cosines.min() > 0.9999
    some = activations_of(models["tiny"][:1], texts, tiny, max_tokens=50, progress=False)
    assert torch.equal(some[0].values, activations["tiny"][0].values[:50])


def test_labels_layer_by_layer_and_united(models, activations):
    found = compare(models)
    assert (found.measure, found.match, found.names) == ("jaccard", "position", ["tiny", "other"])
    assert found.similarity[0, 1] == pytest.approx(jaccard(models["tiny"], models["other"]))
    assert torch.equal(found.similarity.diagonal(), torch.ones(2, dtype=torch.float64))
    there, back = found.layers
    assert (there.a, there.b, back.a, back.b) == ("tiny", "other", "other", "tiny")
    assert torch.equal(there.similarity, back.similarity.T)
    assert there.hooks_a == HOOKS
    assert there.similarity[2, 1] == pytest.approx(jaccard(models["tiny"][2], models["other"][1]))
    assert there.accuracy is None, "three layers against two"
    weighted = compare(models, "weighted", activations=activations)
    used = {
        name: [usage(itda, x.values) for itda, x in zip(models[name], activations[name], strict=True)]
        for name in models
    }
    assert weighted.similarity[0, 1] == pytest.approx(
        weighted_jaccard(models["tiny"], models["other"], used["tiny"], used["other"])
    )
    assert weighted.layers[0].similarity[1, 0] == pytest.approx(
        weighted_jaccard(models["tiny"][1], models["other"][0], used["tiny"][1], used["other"][0])
    )


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("cka", lambda x, y: linear_cka(Moments.of(x, y))),
        ("svcca", lambda x, y: svcca(Moments.of(x, y))),
        ("regression", lambda x, y: linear_regression_r2(Moments.of(x, y))),
        ("relative", relative_similarity),
        ("relative-centred", lambda x, y: relative_similarity(x, y, centred=True)),
    ],
)
def test_activations_layer_by_layer(models, activations, measure, expected):
    found = compare(models, measure, activations=activations)
    assert found.similarity is None
    for pair in found.layers:
        for i, x in enumerate(activations[pair.a]):
            for j, y in enumerate(activations[pair.b]):
                value = expected(x.values, y.values)
                assert pair.similarity[i, j].item() == pytest.approx(value, abs=1e-9)


def test_one_model_alone(models):
    (own,) = compare({"tiny": models["tiny"]}).layers
    assert own.accuracy is None
    assert torch.equal(own.similarity, own.similarity.T)


def test_only_tokens_of_both_are_compared(models, activations):
    """A side that read less, in another order, gives what both have."""
    order = torch.randperm(200)
    labels = activations["other"][0].labels
    part = [
        x._replace(values=x.values[order], labels=[labels[i] for i in order])
        for x in activations["other"]
    ]
    found = compare(models, "cka", activations=activations | {"other": part})
    x, y = activations["tiny"][1].values[:200], activations["other"][0].values[:200]
    assert found.layers[0].similarity[1, 0].item() == pytest.approx(
        linear_cka(Moments.of(x, y)), abs=1e-9
    )


def test_files(models, activations, tmp_path):
    found = compare(models)
    saved = json.loads(save_comparison(found, tmp_path / "figures.json").read_text())
    assert saved["models"] == ["tiny", "other"]
    assert saved["layers"][0]["similarity"] == found.layers[0].similarity.tolist()
    drawn = comparison_heatmap(found, tmp_path / "layers.png").read_bytes()
    single = compare(
        {name: own[:1] for name, own in models.items()},
        "cka",
        activations={n: x[:1] for n, x in activations.items()},
    )
    assert comparison_heatmap(single, tmp_path / "layers.png").read_bytes() != drawn
    assert drawn.startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"figures.json", "layers.png"}


def test_refuses_what_cannot_be_compared(models, activations, tiny, texts):
    labels = activations["tiny"][0].labels
    with pytest.raises(ValueError, match="measure must be one of"):
        compare(models, "taste")
    with pytest.raises(ValueError, match="two dictionaries or more"):
        compare({"tiny": models["tiny"][:1]})
    with pytest.raises(ValueError, match="'other' has none"):
        compare(models | {"other": []})
    with pytest.raises(
        ValueError, match="needs activations at each hook point of 'tiny': expected 3, got 0"
    ):
        compare(models, "cka")
    swapped = {"tiny": activations["other"] + activations["other"][:1], "other": activations["other"]}
    with pytest.raises(ValueError, match="activations of 'tiny' have widths"):
        compare(models, "cka", activations=swapped)
    with pytest.raises(ValueError, match="'overlap' cannot be used with measure='weighted'"):
        compare(models, "weighted", "overlap", activations)
    apart = [x._replace(values=x.values[:9], labels=x.labels[:9]) for x in activations["tiny"]]
    rest = [x._replace(values=x.values[9:20], labels=x.labels[9:20]) for x in activations["other"]]
    with pytest.raises(ValueError, match="must have tokens in common"):
        compare(models, "cka", activations={"tiny": apart, "other": rest})
    reversed_labels = [activations["tiny"][0], activations["tiny"][1]._replace(labels=labels[::-1])]
    with pytest.raises(ValueError, match="'tiny' must be of the same tokens at every layer"):
        compare(
            models, "cka", activations=activations | {"tiny": [*reversed_labels, reversed_labels[0]]}
        )
    with pytest.raises(ValueError, match="measure must be one of"):
        activation_similarity(activations["tiny"], activations["tiny"], "jaccard", "position")
    with pytest.raises(ValueError, match="match must be 'position' or 'span'"):
        activation_similarity(activations["tiny"], activations["tiny"], "cka", "auto")
    with pytest.raises(ValueError, match="must agree in model"):
        activations_of([models["tiny"][0], models["other"][0]], texts)
    with pytest.raises(ValueError, match="names no hook_name"):
        activations_of([itda_lens.fit(torch.randn(9, 4), d_sae=3, k=1)], texts)
    with pytest.raises(ValueError, match="got none"):
        activations_of([], texts)


# diffing


def planted(seed=0, n=8000, d=24, share=0.05, strength=1.0):
    """Activations of a base model; and of one that drifted, and adds directions to some tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    features = torch.nn.functional.normalize(draw(d, d), dim=1)
    base = draw(n, d) * (torch.rand(n, d, generator=generator) < 0.15) @ features + 0.02 * draw(n, d)
    tuned = base @ (torch.eye(d) + 0.01 * draw(d, d)) + 0.005 * draw(n, d)
    new = torch.rand(n, generator=generator) < share
    tuned[new] += strength * draw(int(new.sum()), 4) @ draw(4, d)
    return base, tuned, new


def differences(base, tuned, **options):
    """Dictionaries of the first half of the tokens, held against each other on the second."""
    labels, half = [itda_lens.Label(i) for i in range(len(base))], len(base) // 2
    (a, x), (b, y) = (
        (
            itda_lens.fit(side[:half], d_sae=120, k=3, labels=labels[:half], progress=False),
            Activations(side[half:], labels[half:]),
        )
        for side in (base, tuned)
    )
    return diff(a, b, x, y, **options)


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_what_was_planted_comes_first(strength):
    base, tuned, new = planted(strength=strength)
    found = differences(base, tuned)
    listed = [d for d in found if d.q <= 0.1]
    assert listed
    assert all(new[label.row] for d in found[:3] for label in d.examples)
    assert [len(d.examples) for d in found] == [min(3, d.tokens) for d in found]
    assert sum(new[d.label.row].item() for d in listed) >= 0.6 * len(listed)
    assert [d.excess for d in found] == sorted((d.excess for d in found), reverse=True)
    assert [d.q for d in found] == sorted(d.q for d in found)
    assert all(d.tokens > 0 for d in found)


def test_without_planting_there_is_no_list():
    """Drift alone: of 480 atoms of four pairs of models, one at most stands out."""
    found = [planted(seed, strength=0.0) for seed in range(4)]
    listed = [d for base, tuned, _ in found for d in differences(base, tuned) if d.q <= 0.1]
    assert len(listed) <= 1


def test_false_discovery_rates():
    """Of what Student's t with 5 degrees of freedom scatters none is found; of what lies beyond, all."""
    null = torch.from_numpy(stats.t.ppf((torch.arange(1000).numpy() + 0.5) / 1000, 5)) * 0.01 + 3
    assert false_discovery_rates(null).min() > 0.4
    mixed = torch.cat([null, torch.full((30,), 3.2)])
    rates = false_discovery_rates(mixed)
    assert (rates[-30:] < 0.05).all()
    assert (rates[:-31] > 0.05).all()
    # Neither origin nor scale matter.
    torch.testing.assert_close(false_discovery_rates(5 * mixed - 9), rates, rtol=1e-6, atol=1e-9)


def test_no_null_no_discovery():
    """Few scores, or half of them equal, say nothing of how scores scatter."""
    assert (false_discovery_rates(torch.ones(99)) == 1).all()
    assert (false_discovery_rates(torch.cat([torch.zeros(60), torch.full((9,), 1e-17)])) == 1).all()
    assert (false_discovery_rates(torch.tensor([5.0, 2, 1, 0])) == 1).all()


@pytest.mark.parametrize("n", [30, 100, 1000])
def test_false_discoveries_of_a_normal_null_are_rare(n):
    """At a rate of 10 %, at most one draw in ten of nothing but noise lists anything."""
    draws = [false_discovery_rates(torch.randn(n, dtype=torch.float64)).min() for _ in range(100)]
    assert sum(smallest <= 0.1 for smallest in draws) <= 10


def test_diffing_models(tiny, tiny_folder, texts):
    """A model against itself, of a stream of texts: no excess, every label in both."""
    again = language_model(str(tiny_folder), device="cpu")
    found = diff_models(tiny, again, iter(texts), HOOKS[1], max_tokens=500, **OPTIONS)
    assert len(found) > 20
    assert all(d.excess == 0 and d.shared and d.q == 1 and d.tokens >= 10 for d in found)


def test_diffing_models_that_differ(tiny, tiny_folder, texts):
    """The second model's block was changed: the first one's dictionary explains it worse."""
    changed = language_model(str(tiny_folder), device="cpu", loader="huggingface")
    with torch.no_grad():
        changed.model.model.layers[1].mlp.down_proj.weight.mul_(30)
    found = diff_models(tiny, changed, texts, HOOKS[1], **OPTIONS)
    assert found[0].excess > 0.05
    with pytest.raises(ValueError, match="d_sae=60 atoms cannot be chosen among max_tokens=50"):
        diff_models(tiny, changed, texts, HOOKS[1], max_tokens=50, **OPTIONS)
    with pytest.raises(ValueError, match="k must be between"):
        diff_models(tiny, changed, texts, HOOKS[1], **OPTIONS | {"k": 0})


def test_diffing_in_other_precisions_and_views():
    """Half precision is not taken for a difference; nor the non-negative view."""
    base, tuned, _ = planted(strength=0.5)
    base, tuned = base + 30, tuned + 30
    labels = [itda_lens.Label(i) for i in range(len(base))]
    a, b = (itda_lens.fit(x, d_sae=120, k=3, labels=labels, progress=False) for x in (base, tuned))
    sides = Activations(base, labels), Activations(tuned, labels)
    expected = {d.atom: d.excess for d in diff(a, b, *sides)}
    half = {d.atom: d.excess for d in diff(a.to(dtype=torch.bfloat16), b, *sides)}
    # The atoms themselves were rounded, which explains less of both models alike.
    assert max(abs(half[atom] - excess) for atom, excess in expected.items()) < 0.05
    view = diff(a.to(dtype=torch.float32), b.nonnegative(), *sides)
    assert {d.atom % 120 for d in view} <= set(range(120))
    assert max(d.excess for d in view) > 0.1


def test_diffing_at_heads(tiny, texts):
    """A dictionary of heads, reshaped, is held against another like any."""
    hook = "blocks.1.attn.hook_z"
    options = dict(d_sae=60, k=4, context_size=16, progress=False)
    itda = itda_lens.build(tiny, texts, hook, **options)[hook]
    (x,) = activations_of([itda], texts, tiny, progress=False)
    assert all(d.excess == 0 and d.shared for d in diff(itda, itda, x, x))
    assert usage(itda, x.values).sum() == pytest.approx(1)


def test_special_tokens_have_no_partner():
    base, tuned, _ = planted()
    special = [itda_lens.Label(i, chars=(0, 0), token="") for i in range(len(base))]
    plain = [itda_lens.Label(i, chars=(0, 3), token="cat") for i in range(len(base))]
    a = itda_lens.fit(base, d_sae=120, k=3, labels=special, progress=False)
    b = itda_lens.fit(tuned, d_sae=120, k=3, labels=special[:1] + plain[1:], progress=False)
    with pytest.raises(ValueError, match="must have tokens in common"):
        diff(a, b, Activations(base, special), Activations(tuned, special), "span")
    found = diff(a, b, Activations(base, plain), Activations(tuned, plain), "span")
    assert not any(d.shared for d in found)


def test_diffing_refuses(models, activations, caplog):
    one, other = (activations[name][0] for name in ("tiny", "other"))
    with pytest.raises(ValueError, match="must share a space.* 32 and 40"):
        diff(models["tiny"][0], models["other"][0], one, other)
    with pytest.raises(ValueError, match="diffed at one hook point"):
        diff(models["tiny"][0], models["tiny"][1], one, one)
    with pytest.raises(ValueError, match="'overlap' cannot be used"):
        diff(models["tiny"][0], models["tiny"][0], one, one, "overlap")
    base, _, _ = planted()
    differences(base[:, :8] @ torch.randn(8, 24), base[:, :8] @ torch.randn(8, 24))
    assert "do not seem to share a space" in caplog.text
    caplog.clear()
    noise = torch.randn(4000, 24)
    differences(noise, noise + 0.01 * torch.randn_like(noise))
    assert "share a space" not in caplog.text, "as much is left of the first model's own"


# command line


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("dictionaries")
    for name, itdas in models.items():
        save_all({itda.cfg.metadata.hook_name: itda for itda in itdas}, root / name)
    return root


@pytest.fixture
def compare_command(capsys, monkeypatch, folders, texts, tmp_path):
    from itda_lens.__main__ import main

    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def run(*arguments):
        places = [
            str(a).replace("DICTS", str(folders)).replace("HERE", str(tmp_path)) for a in arguments
        ]
        with pytest.raises(SystemExit) as exit_:
            main(["compare", *places])
        shown = capsys.readouterr()
        return exit_.value.code, shown.out, " ".join(shown.err.split())

    return run


def test_command(compare_command, models, tmp_path):
    files = ("--json", "HERE/figures.json", "--heatmap", "HERE/layers.png")
    code, out, _ = compare_command("DICTS/tiny", "DICTS/other", *files)
    assert code == 0
    assert f"{jaccard(models['tiny'], models['other']):.3f}" in out
    assert "most similar" in out
    assert HOOKS[2] in out
    assert json.loads((tmp_path / "figures.json").read_text())["layers"][0]["hooks_a"] == HOOKS
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_command_of_one_model(compare_command, models):
    code, out, _ = compare_command("DICTS/tiny")
    assert code == 0
    assert "most similar of the others" in out
    first = [jaccard(models["tiny"][0], other) for other in models["tiny"][1:]]
    assert f"{max(first):.3f}" in out


def test_command_with_activations(compare_command):
    code, out, _ = compare_command(
        "DICTS/tiny", "DICTS/other", "--measure", "cka", "--texts", "HERE/texts.jsonl"
    )
    assert code == 0
    assert "most similar" in out


def test_command_diff(compare_command, folders, tmp_path):
    one = f"DICTS/tiny/{HOOKS[0]}"
    code, _, err = compare_command(one, f"{one}/", "--diff", "--texts", "HERE/texts.jsonl")
    assert code == 2
    assert "folders must be different" in err
    (folders / "again").mkdir(exist_ok=True)
    itda_lens.load(folders / "tiny" / HOOKS[0]).save_model(folders / "again" / HOOKS[0])
    code, out, _ = compare_command(
        one, f"DICTS/again/{HOOKS[0]}", "--diff", "--texts", "HERE/texts.jsonl", "--top", 3,
        "--json", "HERE/atoms.json",
    )  # fmt: skip
    assert code == 0
    saved = json.loads((tmp_path / "atoms.json").read_text())
    assert saved[0].keys() == {"atom", "label", "excess", "q", "shared", "tokens", "examples"}
    for expected in ("excess", "both", "0 of", "came from"):
        assert expected in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DICTS/tiny", "DICTS/none"], "no folder"),
        (["DICTS/tiny", "DICTS/tiny"], "folders must be different"),
        ([f"DICTS/tiny/{HOOKS[0]}"], "two dictionaries or more"),
        (["DICTS/tiny", "DICTS/other", "--measure", "luck"], "'luck' is not one of"),
        (["DICTS/tiny", "DICTS/other", "--measure", "cka"], "--measure cka looks at activations"),
        (["DICTS/tiny", "DICTS/other", "--diff"], "--diff takes the dictionaries of one hook point"),
        (["DICTS/tiny", "DICTS/other", "--match", "luck"], "'luck' is not one of"),
        (["DICTS/tiny", "DICTS/other", "--json", "HERE/none/figures.json"], "there is no folder"),
        (
            [f"DICTS/tiny/{HOOKS[0]}", f"DICTS/other/{HOOKS[0]}", "--diff", "--heatmap", "HERE/x.png"],
            "goes with neither --measure nor --heatmap",
        ),
        (
            [
                f"DICTS/tiny/{HOOKS[0]}",
                f"DICTS/other/{HOOKS[0]}",
                "--diff",
                "--texts",
                "HERE/texts.jsonl",
            ],
            "must share a space",
        ),
    ],
)
def test_bad_input_is_one_clear_line(compare_command, arguments, message):
    code, _, err = compare_command(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err

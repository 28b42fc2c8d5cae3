"""The site, opened from disk in a headless browser: no network, no errors, every text harmless."""

import copy
import json
import os
import shutil
import time
from contextlib import suppress

import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from itda_lens import Label, build, fit
from itda_lens.analysis import decompose, examples, examples_from
from itda_lens.compare import compare
from itda_lens.records.files import temporary_folder
from itda_lens.reports import (
    SiteFacts,
    comparison_facts,
    save_comparison,
    save_site,
    site_facts,
    site_folder,
)
from itda_lens.sources import ArraySource

HOOK = "blocks.1.hook_resid_post"
HOSTILE = [
    "<script>window.harmed = 1</script>",
    '"><img src=x onerror="window.harmed = 2">',
    "</td></script><!--",
    "\u202eright to left\u202c",
    "\ud800 a lone surrogate",
    "{{ 7 * 7 }}{% raw %}",
    "`${window.harmed = 3}`",
    "\x1b[31m\u2028\x00",
]


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium. Where ITDA_NEEDS_BROWSER is set (.ci/run sets it), there must be one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None and not os.environ.get("ITDA_NEEDS_BROWSER"):
        pytest.skip("no Chromium on this machine: install it to test the site")
    assert path is not None, "ITDA_NEEDS_BROWSER is set, but there is no Chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Open a page of a site; complaints of the browser and requests elsewhere fail the test."""
    complaints, pages = [], []

    def open_page(url, width=1280, height=800):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if not request.url.startswith(("file://", "data:"))
                else None
            ),
        )
        pages.append(page)
        page.goto(url)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints


@pytest.fixture(scope="module")
def itda(tiny, texts):
    return build(tiny, texts[:40], HOOK, d_sae=40, k=4, context_size=12, progress=False)[HOOK]


@pytest.fixture(scope="module")
def facts(itda, tiny, texts, tmp_path_factory):
    found = examples(tiny, itda, texts[40:], n_examples=3, progress=False)
    decomposed = [decompose(tiny, itda, text) for text in ("the cat sat on the mat .", "a dog ran")]
    file = save_comparison(
        compare({"first": [itda], "second": [itda.prefix(20)]}),
        tmp_path_factory.mktemp("figures") / "alike.json",
    )
    return site_facts(
        itda, found, name="tiny", texts=decomposed, comparisons=[comparison_facts(file)],
        read_from="twenty texts",
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(facts, tmp_path_factory):
    return save_site(facts, tmp_path_factory.mktemp("sites") / "site").resolve().as_uri()


def playwright_error():
    from playwright.sync_api import Error

    return Error


def until(page, condition):
    """Wait for a condition in JavaScript; the pages' own policy forbids playwright's way of doing so."""
    end = time.monotonic() + 10
    while True:
        with suppress(playwright_error()):  # a page that is left at this moment cannot be asked
            if page.evaluate(condition):
                return
        assert time.monotonic() < end, condition
        page.wait_for_timeout(10)


def atoms_shown(page):
    page.wait_for_selector("#atoms tbody tr[data-atom]")
    return [int(row.get_attribute("data-atom")) for row in page.query_selector_all("tr[data-atom]")]


class TestTable:
    def test_search(self, opened, site, itda):
        page = opened(site)
        assert len(atoms_shown(page)) > 5
        page.keyboard.press("/")
        page.keyboard.type("CAT")
        matching = [i for i, label in enumerate(itda.labels) if "cat" in "".join(label.quoted()).lower()]
        until(page, f"document.querySelector('#count').textContent.startsWith('{len(matching)} of')")
        shown = atoms_shown(page)
        assert shown == matching[: len(shown)]
        page.check("#token-only")
        tokens = [i for i, label in enumerate(itda.labels) if "cat" in label.token]
        until(page, f"document.querySelector('#count').textContent.startsWith('{len(tokens)} of')")
        assert atoms_shown(page) == tokens
        page.fill("#search", "/^(dog|mat)$/")
        until(page, "!document.querySelector('#count').textContent.startsWith('40')")
        expected = [i for i, label in enumerate(itda.labels) if label.token in ("dog", "mat")]
        assert atoms_shown(page) == expected
        page.fill("#search", "/(/")
        page.wait_for_selector("#search[aria-invalid]")
        page.fill("#search", "no such words")
        page.wait_for_selector("text=No atom matches.")

    def test_sort_by_every_column(self, opened, site, facts):
        page = opened(site, height=1900)
        for key in ("density", "energy", "mean_size", "negative", "f1"):
            values = facts.table[key]
            for sign in (-1, 1):
                page.click(f"th.c-{key} button")
                page.wait_for_selector(
                    f"th.c-{key}[aria-sort={'descending' if sign < 0 else 'ascending'}]"
                )
                known = sorted(range(40), key=lambda i: (values[i] is None, sign * (values[i] or 0), i))
                assert atoms_shown(page) == known
        page.click("th.c-label button")
        tokens = [facts.table["token"][i].lower() for i in atoms_shown(page)]
        assert tokens == sorted(tokens)
        page.click("th.c-atom button")
        assert atoms_shown(page) == list(range(40))

    def test_a_reader_who_comes_back_finds_the_search(self, opened, site):
        page = opened(site)
        page.fill("#search", "cat")
        page.click("th.c-energy button")
        until(page, "location.hash.includes('q=cat')")
        found = atoms_shown(page)
        page.click(f"tr[data-atom='{found[0]}'] a")
        page.wait_for_selector("h1")
        page.go_back()
        assert atoms_shown(page) == found
        assert page.input_value("#search") == "cat"

    def test_keyboard(self, opened, site):
        page = opened(site)
        atoms_shown(page)
        page.focus("#search")
        page.keyboard.press("ArrowDown")
        for _ in range(3):
            page.keyboard.press("ArrowDown")
        assert page.get_attribute("tr.active", "data-atom") == "3"
        page.keyboard.press("End")
        assert page.get_attribute("tr.active", "data-atom") == "39"
        page.keyboard.press("Enter")
        until(page, "location.hash === '#atom=39'")
        page.wait_for_selector("h1")
        page.keyboard.press("ArrowLeft")
        until(page, "document.title.startsWith('Atom 38')")

    def test_65_536_atoms(self, opened, facts, tmp_path):
        """The page holds a screenful of rows, and a search takes less than a second."""
        n = 65_536
        table = {key: [f"{key} {i}" for i in range(n)] for key in ("before", "token", "after")}
        table |= {key: [i * 7919 % n / n for i in range(n)] for key in ("density", "energy", "f1")}
        table |= {"mean_size": [float(i) for i in range(n)], "negative": None}
        large = SiteFacts("large", {**facts.about, "atoms": n}, table, examples=[])
        page = opened(save_site(large, tmp_path / "large").resolve().as_uri())
        assert len(atoms_shown(page)) < 100
        assert page.query_selector("th.c-negative") is None
        begin = time.perf_counter()
        page.fill("#search", "token 4242")
        until(page, "document.querySelector('#count').textContent.startsWith('11 of 65,536')")
        page.click("th.c-density button")
        page.wait_for_selector("th.c-density[aria-sort]")
        assert time.perf_counter() - begin < 2
        page.fill("#search", "")
        until(page, "document.querySelector('#count').textContent === '65,536 atoms'")
        page.focus("#scroller")
        page.keyboard.press("End")
        assert page.get_attribute("tr.active", "data-atom") == str(table["density"].index(0.0))
        assert len(atoms_shown(page)) < 100


class TestAtom:
    def test_what_it_shows(self, opened, site, facts):
        page = opened(site.replace("index.html", "atom.html#atom=7"))
        page.wait_for_selector("h1")
        own = next(atom for atom in facts.atoms() if atom["atom"] == 7)
        assert page.inner_text("h1 mark") == own["label"]["quote"][1]
        text = page.inner_text("main")
        for heading in ("Where it fires most", "Coefficients", "Next tokens", "Nearest directions"):
            assert heading in text
        contexts = page.query_selector_all(".panel:first-child .contexts li")
        assert len(contexts) == len(own["top"])
        assert contexts[0].query_selector("mark").inner_text() == own["top"][0][1].strip()
        bars = [float(bar.get_attribute("height")) for bar in page.query_selector_all("rect")]
        assert [bar > 0 for bar in bars] == [count > 0 for count in own["histogram"]]
        nearest = page.query_selector("section:has(h2:text('Nearest directions')) td a")
        assert nearest.get_attribute("href") == f"atom.html#atom={own['nearest'][0][0]}"
        nearest.click()
        until(page, f"document.title.startsWith('Atom {own['nearest'][0][0]} ')")

    @pytest.mark.parametrize("asked", ["40", "-1", "x", "1e1", "99999999999"])
    def test_no_such_atom(self, opened, site, asked):
        page = opened(site.replace("index.html", f"atom.html#atom={asked}"))
        page.wait_for_selector("text=No such atom")
        page.evaluate("location.hash = 'atom=3'")
        until(page, "document.title.startsWith('Atom 3 ')")


class TestTexts:
    def test_click_a_token(self, opened, site, facts):
        page = opened(site.replace("index.html", "texts.html"))
        page.wait_for_selector("#tokens button")
        tokens = facts.texts[0]["tokens"]
        assert [b.inner_text() for b in page.query_selector_all("#tokens button")] == [
            token["token"] for token in tokens
        ]
        page.click("#tokens button:nth-of-type(2)")
        parts = page.query_selector_all(".parts li")
        assert len(parts) == len(tokens[1]["atoms"])
        for part, (atom, coefficient, _) in zip(parts, tokens[1]["atoms"], strict=True):
            assert part.query_selector("a").inner_text() == str(atom)
            assert (part.query_selector(".not") is not None) == (coefficient < 0)
            assert part.query_selector("mark").inner_text() == facts.table["token"][atom]
        assert f"{100 * tokens[1]['explained']:.1f}% of the activation" in page.inner_text("#token")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#token mark") == tokens[2]["token"]
        page.select_option("#text", "1")
        assert page.inner_text("#token mark") == facts.texts[1]["tokens"][0]["token"]
        assert any(coefficient < 0 for token in tokens for _, coefficient, _ in token["atoms"])

    def test_comparison(self, opened, site):
        page = opened(site.replace("index.html", "compare.html"))
        page.wait_for_selector(".heat")
        assert page.inner_text(".heat tbody tr:first-child td:first-of-type") == "1.000"
        assert "first" in page.inner_text(".heat")


class TestWidths:
    @pytest.mark.parametrize("name", ["index", "atom", "texts", "compare"])
    def test_nothing_sticks_out(self, opened, site, name):
        page = opened(site.replace("index", name))
        page.wait_for_selector("tr[data-atom], .tiles, #tokens button, .heat")
        for width in (1280, 390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width

    def test_light_and_dark(self, opened, site):
        page = opened(site)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            back, ink = page.evaluate(
                "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
                ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
            )
            assert (back < ink) == (scheme == "dark")

    def test_the_button_turns_to_dark_and_it_stays(self, opened, site):
        page = opened(site)
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.goto(site.replace("index", "texts"))
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.fixture(scope="module")
def hostile_site(tmp_path_factory):
    """Labels, names, texts and comparisons that hold markup, marks of direction and half characters."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    marked = [HOSTILE[i % len(HOSTILE)] for i in range(64)]
    labels = [
        Label(i, token=text, context=f"{text}[[{text}]]{text}", chars=(len(text), 2 * len(text)))
        for i, text in enumerate(marked)
    ]
    itda = fit(x, d_sae=16, k=3, labels=labels, progress=False)
    itda.cfg.metadata.model_name = HOSTILE[0]
    found = examples_from(ArraySource(x, labels), itda, progress=False)
    parts = decompose_rows(itda, x[:8], marked[:8])
    folder = tmp_path_factory.mktemp("hostile")
    difference = dict(
        atom=3, excess=0.5, q=0.01, tokens=20, shared=True, label=vars(labels[0]),
        examples=[vars(labels[1])],
    )  # fmt: skip
    (folder / "diff.json").write_text(json.dumps([difference]))
    facts = site_facts(
        itda, found, name=HOSTILE[1], texts=[parts], read_from=HOSTILE[2],
        comparisons=[comparison_facts(folder / "diff.json")],
    )  # fmt: skip
    return save_site(facts, folder / "site").resolve().as_uri()


class TestHostileText:
    @pytest.mark.parametrize("name", ["index", "atom", "texts", "compare"])
    def test_it_is_shown_and_does_nothing(self, opened, hostile_site, name):
        page = opened(hostile_site.replace("index", name))
        page.wait_for_selector("tr[data-atom], .tiles, #tokens button, .panel mark")
        page.wait_for_timeout(50)
        assert page.evaluate("window.harmed") is None
        assert not page.query_selector_all("img")
        text = page.inner_text("main")
        assert "\u202e" not in text
        assert "\x1b" not in text
        assert name != "index" or "<script>window.harmed = 1</script>" in text
        if name == "texts":  # which has all of them as tokens
            assert "<script>window.harmed = 1</script>" in text
            assert r"\u202eright to left\u202c" in text
            assert r"\ud800 a lone surrogate" in text
            assert "{{ 7 * 7 }}" in text
        assert "49" not in page.title()

    def test_data_files_are_ascii_without_markup(self, hostile_site):
        from pathlib import Path
        from urllib.parse import unquote, urlparse

        folder = Path(unquote(urlparse(hostile_site).path)).parent
        for file in folder.glob("data/*.js"):
            assert b"<" not in file.read_bytes()
            assert file.read_bytes().isascii()


def decompose_rows(itda, x, tokens):
    """A decomposition as `decompose` gives it, of rows that no model made."""
    from itda_lens.analysis import Component, Decomposition, TokenDecomposition

    codes = itda.encode_sparse(x)
    found = [
        TokenDecomposition(
            i, token,
            [Component(a, c, None, 1 / 3) for a, c in zip(ids.tolist(), values.tolist(), strict=True)],
            0.5, 0.99,
        )
        for i, (token, ids, values) in enumerate(zip(tokens, *codes, strict=True))
    ]  # fmt: skip
    return Decomposition(found, "nowhere", "".join(tokens))


class TestOtherDictionaries:
    def test_without_labels(self, opened, itda, tiny, texts, tmp_path):
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=5))
        sae.cfg.metadata = copy.deepcopy(itda.cfg.metadata)
        found = examples(tiny, sae, texts[40:], n_examples=2, progress=False)
        facts = site_facts(sae, found, texts=[decompose(tiny, sae, "the cat")])
        page = opened(save_site(facts, tmp_path / "site").resolve().as_uri())
        assert "They carry no labels" in page.inner_text("main")
        assert page.inner_text("th.c-label") == "fires most at"
        assert page.query_selector("th.c-f1") is None
        first = next(atom for atom in found if atom.top)
        page.goto(page.url.split("#")[0].replace("index", "atom") + f"#atom={first.atom}")
        page.wait_for_selector("text=has no label")
        assert page.inner_text("h1 mark") == first.top[0].label.token

    def test_several(self, opened, facts, tmp_path):
        others = [SiteFacts(name, facts.about, facts.table, facts.examples) for name in ("a/b", "a b")]
        page = opened(save_site(others, tmp_path / "site").resolve().as_uri())
        page.click("text=a/b")
        assert len(atoms_shown(page)) > 5
        assert page.query_selector("nav a:text('Texts')") is None
        page.click(".brand")
        page.wait_for_selector("text=This site is about 2 dictionaries")


class TestFolder:
    def test_refusals(self, facts, tmp_path):
        save_site(facts, tmp_path / "site")
        with pytest.raises(FileExistsError, match="pass overwrite=True"):
            save_site(facts, tmp_path / "site")
        (tmp_path / "site" / "data" / "atoms-0.js").write_text("old")
        save_site(facts, tmp_path / "site", overwrite=True)
        assert (tmp_path / "site" / "data" / "atoms-0.js").read_text() != "old"
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="holds something else than a site"):
            save_site(facts, tmp_path / "mine", overwrite=True)
        with pytest.raises(FileExistsError, match="is no folder"):
            save_site(facts, tmp_path / "mine" / "thesis.txt", overwrite=True)
        for wrong in ([], [facts, facts]):
            with pytest.raises(ValueError, match="facts must be one or more of different names"):
                save_site(wrong, tmp_path / "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "site"]

    @pytest.mark.parametrize("there", [False, True])
    def test_whole_or_not_at_all(self, facts, tmp_path, there):
        if there:
            save_site(facts, tmp_path / "site")

        def interrupted():
            with site_folder(tmp_path / "site", overwrite=True) as new:
                (new / "index.html").write_text("half of it")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        found = [path.name for path in tmp_path.iterdir()]
        assert found == (["site"] if there else [])
        if there:
            assert "half of it" not in (tmp_path / "site" / "index.html").read_text()

    def test_a_site_that_a_killed_run_had_moved_away_is_back(self, facts, tmp_path):
        page = save_site(facts, tmp_path / "site")
        with temporary_folder(tmp_path.resolve(), "site") as work:
            page.parent.rename(work / "old")
        with pytest.raises(FileExistsError, match="pass overwrite=True"):
            save_site(facts, tmp_path / "site")
        assert page.exists()
        assert [path.name for path in tmp_path.iterdir()] == ["site"]

    def test_an_empty_folder_will_do(self, facts, tmp_path):
        assert save_site(facts, tmp_path).read_text().startswith("<!doctype html>")

    def test_same_facts_same_bytes(self, facts, tmp_path):
        a, b = (save_site(facts, tmp_path / name).parent for name in "ab")
        files = [file.relative_to(a) for file in a.rglob("*") if file.is_file()]
        assert len(files) > 8
        assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


class TestFacts:
    def test_another_dictionary(self, itda, facts):
        with pytest.raises(ValueError, match="about the sae's 20 atoms, got 40"):
            site_facts(itda.prefix(20), facts.examples)

    @pytest.mark.parametrize("content", ["", "{}", "[1]", "3", '{"layers": [3], "similarity": null}'])
    def test_no_comparison(self, tmp_path, content):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match="path must be a file of figures .*x.json is none"):
            comparison_facts(tmp_path / "x.json")

    def test_a_missing_comparison(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            comparison_facts(tmp_path / "none.json")

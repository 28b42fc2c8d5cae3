"""The examples in README.md and docs/ run as they stand, and the notebook too.

"gpt2" stands for the user's model: here it is SmolLM2, which goes by its name on the hub where a page
needs a model of chats. book.txt is a part of Python's reference. The guides (docs/add-*.md) run in
tests/test_guides.py, which needs no real model.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from itda_lens.samples import reference_prose, smollm2

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = {page for page in PAGES if page.match("docs/add-*.md")}


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


EXAMPLES = [page for page in PAGES if examples(page) and page not in GUIDES]


def test_there_are_examples():
    assert sum(len(examples(page)) for page in EXAMPLES) >= 5


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda p: p.name)
def test_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = smollm2.fetch(progress=False)
    smollm2.register(folder)
    Path("book.txt").write_text("\n".join(reference_prose()[0])[:60_000])
    namespace: dict[str, object] = {}
    for example in examples(page):
        code = re.sub(r'"(gpt2|HuggingFaceTB/SmolLM2-135M-Instruct)"', repr(str(folder)), example)
        exec(compile(code, str(page), "exec"), namespace)
    assert "itda_lens" in namespace


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target

"""The documentation builds as a site, with every warning an error: see `validation` in mkdocs.yml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `mkdocs build --strict` of the project in `root` did, with its site in `site`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    # Material announces its successor on every start; that is no warning about our pages.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_the_site_builds_without_a_warning(tmp_path):
    result = build(ROOT, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file(), page.name


@pytest.mark.parametrize(
    "line",
    [
        "[a file outside docs](../README.md)",
        "[a page that is not there](nowhere.md)",
        "[a heading that is not there](quality.md#nowhere)",
    ],
)
def test_a_bad_link_fails_the_build(line, tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(f"\n{line}\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    assert "index.md" in result.stderr


def test_a_page_missing_from_the_navigation_fails_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    assert "forgotten.md" in result.stderr

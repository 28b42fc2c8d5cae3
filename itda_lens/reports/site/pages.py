"""From facts to a folder of pages, which open from disk: no server, no network, no framework."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from itda_lens.records import checked
from itda_lens.records.files import dead_folders, probe, temporary_folder
from itda_lens.reports.site.facts import SiteFacts
from itda_lens.training.output import replaceable

SHARD = 256
"""Atoms in one file of data: a page of one atom reads one such file."""

MARK = "itda-site.json"
"""The file by which a folder is recognised as a site that may be replaced."""


@checked
def save_site(
    facts: SiteFacts | Sequence[SiteFacts], folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a site about one dictionary or several: open `index.html` in a browser.

    The pages read their data from files beside them, and nothing else. The folder appears whole or not
    at all.

    Args:
        facts: from `site_facts`; several must have different names.
        folder: where to write it; it may be an empty folder.
        overwrite: whether a site that is there may be replaced.

    Returns:
        Path of `index.html`.

    Raises:
        FileExistsError: the folder has something in it and `overwrite` is False, or holds anything but a
            site.
        ValueError: `facts` is empty, or two have one name.
        OSError: the folder cannot be written.
    """
    several = _several(facts)
    with site_folder(folder, overwrite) as new:
        write_site(several, new)
    return Path(folder) / "index.html"


@contextmanager
def site_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `folder` to write a site into, which becomes `folder` when the block ends well.

    Entered before the work begins, so that a folder that cannot be replaced is told at once.

    Raises:
        FileExistsError, OSError: as `save_site`.
    """
    target = replaceable(Path(folder))
    for dead in dead_folders(target.parent, target.name):  # of runs that were killed
        if (dead / "old").exists() and not target.exists():
            (dead / "old").rename(target)
        shutil.rmtree(dead, ignore_errors=True)
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as work:
        try:
            new, old = work / "new", work / "old"
            new.mkdir()
            probe(new)
            yield new
            (new / MARK).write_text(json.dumps({"made by": "itda-lens"}) + "\n")
            _check_target(target, overwrite)  # somebody else may have been faster
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is no folder; choose another place")
    inside = [found.name for found in target.iterdir()]
    if not inside:
        return
    if MARK not in inside:
        raise FileExistsError(f"{target} holds something else than a site; choose another place")
    if not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True (--overwrite) to replace the site")


def write_site(facts: SiteFacts | Sequence[SiteFacts], folder: Path) -> None:
    """Write the pages into a folder that is there and empty, such as `site_folder` gives.

    Raises:
        ValueError: `facts` is empty, or two have one name.
        OSError: a file cannot be written.
    """
    several = _several(facts)
    shutil.copytree(_resource("static"), folder / "static")
    if len(several) == 1:
        _write_dictionary(several[0], folder, ".", several)
        return
    folders = [f"{i}-{_slug(facts.name)}" for i, facts in enumerate(several, start=1)]
    for facts, own in zip(several, folders, strict=True):
        (folder / own).mkdir()
        _write_dictionary(facts, folder / own, "..", several)
    page = _template("list.html").render(
        page="list", title="Dictionaries", root=".", several=True,
        dictionaries=list(zip(several, folders, strict=True)),
    )  # fmt: skip
    (folder / "index.html").write_text(page, encoding="utf-8")


def _several(facts: SiteFacts | Sequence[SiteFacts]) -> list[SiteFacts]:
    several = [facts] if isinstance(facts, SiteFacts) else list(facts)
    names = [own.name for own in several]
    if not several or len(set(names)) != len(names):
        raise ValueError(f"facts must be one or more of different names, got {names}")
    return several


def _write_dictionary(facts: SiteFacts, folder: Path, root: str, several: Sequence[SiteFacts]) -> None:
    data = folder / "data"
    data.mkdir()
    about = {**facts.about, "name": facts.name, "shard": SHARD}
    _write_data(data / "about.js", "about", about)
    _write_data(data / "table.js", "table", facts.table)
    _write_data(data / "texts.js", "texts", facts.texts)
    _write_data(data / "comparisons.js", "comparisons", facts.comparisons)
    atoms = facts.atoms()
    for number in itertools.count():
        shard = list(itertools.islice(atoms, SHARD))
        if not shard:
            break
        _write_data(data / f"atoms-{number}.js", f"atoms-{number}", shard)
    pages = {"index": "Atoms", "atom": "Atom", "texts": "Texts", "compare": "Comparison"}
    shown = {"texts": bool(facts.texts), "compare": bool(facts.comparisons)}
    for page, title in pages.items():
        if shown.get(page, True):
            text = _template(f"{page}.html").render(
                page=page, title=title, root=root, name=facts.name, about=facts.about, shown=shown,
                several=len(several) > 1,
            )  # fmt: skip
            (folder / f"{page}.html").write_text(text, encoding="utf-8")


def _write_data(file: Path, name: str, value: Any) -> None:
    """A script that hands its data over: pages from disk may not read other files in any other way.

    JSON in ASCII is a JavaScript expression. "<" is escaped in case somebody puts it into a page.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    file.write_text(f"itda.receive({json.dumps(name)},{text});\n", encoding="ascii")


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_resource("templates")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment.get_template(name)


def _resource(name: str) -> str:
    return str(files("itda_lens.reports.site") / name)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:80] or "dictionary"

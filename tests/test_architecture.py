"""Imports run one way: docs/design.md's table of rooms, enforced."""

import ast
from pathlib import Path

import pytest

import itda_lens

PACKAGE = Path(itda_lens.__file__).parent

# Top first. A room may import rooms of later lines only.
ROOMS = [
    {"cli", "demo"},
    {"reports"},
    {"saebench"},
    {"compare", "analysis", "control"},
    {"architectures"},
    {"training"},
    {"samples"},
    {"sources"},
    {"sae"},
    {"dictionary"},
    {"pursuit"},
    {"records"},
    {"terminal"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
HOSTS = {"sae_lens", "transformer_lens", "transformers", "datasets"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names.add(node.module or "")
            if node.module == "itda_lens":
                names |= {f"itda_lens.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "itda_lens" and len(parts) > 1 and parts[1] != room:
            assert LEVEL[parts[1]] > LEVEL[room], f"{room} imports {parts[1]}"
        if room in ("records", "pursuit", "dictionary"):
            assert parts[0] not in HOSTS, f"{room} knows of {parts[0]}"


def test_every_room_is_known():
    assert {room_of(path) for path in MODULES} <= set(LEVEL)

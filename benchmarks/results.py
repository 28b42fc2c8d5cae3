"""Figures of a benchmark that are kept, so that it can be stopped and go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Results:
    """Figures by setting, kept in a file of JSON lines, `results.jsonl` in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "results.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, setting: dict[str, Any]) -> dict[str, Any] | None:
        """The row of this setting, if there is one."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in setting.items()):
                return row
        return None

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def once(self, setting: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this setting: the one in the file, or else the result of `compute`."""
        return self.find(setting) or self.add(setting | compute())

"""Edits as JSON: readable, and bound to the dictionary that they were made with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sae_lens import SAE

from itda_lens.control.edit import Edit
from itda_lens.control.gates import GATES
from itda_lens.control.operations import OPERATIONS
from itda_lens.control.running import several
from itda_lens.records import checked, replacing
from itda_lens.records.files import said
from itda_lens.sae import labels_of, load
from itda_lens.sae.saved import digests

FORMAT = 1
"""Number of the form of the file."""

CODING = ("architecture", "k", "method", "signed", "rtol", "threshold", "mirrored")
"""Settings of a dictionary that codes depend on, beside its weights."""


def dictionary_digest(sae: SAE[Any]) -> str:
    """A digest of a dictionary's weights and of the settings that its codes depend on."""
    config = sae.cfg.to_dict()
    settings = {name: config[name] for name in CODING if name in config}
    known = {"weights": digests(sae.state_dict()), "settings": settings}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@checked
def save_edits(
    edits: Edit | Sequence[Edit], path: str | Path, folders: str | Path | Sequence[str | Path] = ()
) -> Path:
    """Write edits to a JSON file.

    The file names the atoms with their labels, the operation, the gates, and a digest of the dictionary.

    Args:
        edits: one or several; of several, in the order in which they are applied.
        path: the file. If it exists, it is replaced.
        folders: where the dictionary of each edit is saved, so that `load_edits` finds it.

    Raises:
        ValueError: an operation or a gate is not one of the library's, or is `Masked`, which holds a
            function; or there is another number of folders.
        OSError: the file cannot be written.
    """
    own = several(edits)
    places = [folders] if isinstance(folders, str | Path) else list(folders)
    if places and len(places) != len(own):
        raise ValueError(f"folders must be one for each of {len(own)} edits, got {len(places)}")
    records = [_record(edit, places[i] if places else None) for i, edit in enumerate(own)]
    text = json.dumps({"format": FORMAT, "edits": records}, indent=1, ensure_ascii=False)
    target = Path(path)
    with replacing(target) as (temporary,):
        temporary.write_text(text + "\n", encoding="utf-8")
    return target


@checked
def load_edits(path: str | Path, dictionaries: SAE[Any] | Sequence[SAE[Any]] = ()) -> list[Edit]:
    """Read edits that `save_edits` wrote.

    Args:
        path: the file.
        dictionaries: those that the edits were made with, in any order; default: they are loaded from
            the folders that the file names. Give an SAE that is no ITDA here.

    Raises:
        FileNotFoundError: the file or a folder is missing.
        ValueError: the file is damaged, or a dictionary is another one than the edit was made with:
            other atoms, or other settings of its codes.
    """
    given = [dictionaries] if isinstance(dictionaries, SAE) else list(dictionaries)
    by_digest = {dictionary_digest(sae): sae for sae in given}
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        if known["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {known['format']!r}")
        records = list(known["edits"])
        if not records:
            raise ValueError("it holds no edit")
        found = []
        for record in records:
            sae = by_digest.get(record["dictionary"])
            if sae is None:
                sae = _from_folder(record, given)
                by_digest[record["dictionary"]] = sae
            found.append(_edit(record, sae))
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of edits, or damaged: {said(error):.120}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def _record(edit: Edit, folder: str | Path | None) -> dict[str, Any]:
    labels = labels_of(edit.sae)
    record: dict[str, Any] = {
        "dictionary": dictionary_digest(edit.sae),
        "folder": None if folder is None else str(Path(folder).absolute()),
        "hook_name": edit.hook,
        "atoms": list(edit.atoms),
        "labels": None if labels is None else [str(labels[atom]) for atom in edit.atoms],
        "operation": _named("operation", edit.operation, OPERATIONS),
        "gate": [_named("gate", gate, GATES) for gate in edit.gates],
        "replace": edit.replace,
        "special": edit.special,
    }
    return record


def _named(name: str, part: Any, known: Mapping[str, type]) -> dict[str, Any]:
    kind = type(part).__name__
    if known.get(kind) is not type(part):
        raise ValueError(f"{name} must be one of {', '.join(known)} to be saved, got {kind}")
    return {"name": kind, **asdict(part)}


def _from_folder(record: Mapping[str, Any], given: Sequence[SAE[Any]]) -> SAE[Any]:
    if given:
        raise ValueError(
            "the edit was made with another dictionary, or with other settings of its codes, than any "
            f"of the {len(given)} given"
        )
    if record["folder"] is None:
        raise ValueError("the file names no folder of a dictionary: pass dictionaries=")
    sae = load(record["folder"])
    if dictionary_digest(sae) != record["dictionary"]:
        raise ValueError(
            f"the dictionary in {record['folder']} has other atoms, or other settings of its codes, "
            "than when the edit was saved"
        )
    return sae


def _edit(record: Mapping[str, Any], sae: SAE[Any]) -> Edit:
    return Edit(
        sae,
        record["atoms"],
        _made("operation", record["operation"], OPERATIONS),
        tuple(_made("gate", gate, GATES) for gate in record["gate"]),
        replace=record["replace"],
        special=record["special"],
        hook_name=record["hook_name"],
    )


def _made(name: str, record: Mapping[str, Any], known: Mapping[str, type]) -> Any:
    settings = dict(record)
    kind = known.get(settings.pop("name"))
    if kind is None:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {record['name']!r}")
    unknown = set(settings) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {min(unknown)!r}")
    return kind(**settings)

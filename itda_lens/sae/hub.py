"""Dictionaries on the Hugging Face hub: uploads in SAELens's layout, with a card, and downloads.

A repository holds a folder for each dictionary, with the files that `ITDA.save_model` writes. So
`SAE.from_pretrained(repo, folder)` finds them too, once `itda_lens` is imported.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jaxtyping import Float
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from torch import Tensor

from itda_lens.records import Labels, checked
from itda_lens.sae.card import MARK, Entry, card
from itda_lens.sae.itda import ITDA, LABELS_KEY
from itda_lens.sae.sparsity import save_sparsity

Exposed = Literal["full", "places", "none"]
"""How much of the labels travels: everything; places without text; or nothing."""

LABELS_EXPOSED_KEY = "itda_labels_exposed"
"""The entry of an uploaded dictionary's metadata that says how much of its labels it holds."""

FIGURES_KEY = "itda_figures"
"""The entry of an uploaded dictionary's metadata with the figures that its card shows."""

_README = "README.md"
_PART = re.compile(r"\w[\w.-]*")


@checked
def push(
    dictionaries: Mapping[str, ITDA],
    repo: str,
    *,
    labels: Exposed = "full",
    private: bool = False,
    figures: Mapping[str, Mapping[str, float]] | None = None,
    densities: Mapping[str, Float[Tensor, " d_sae"]] | None = None,
    token: str | None = None,
) -> str:
    """Upload dictionaries to one repository, in one commit; it is made if it does not exist.

    Absolute paths of this machine, such as the folder of the texts, are cut down to their last part.
    The card is written anew, for all dictionaries of the repository, unless somebody has put another
    one in its place.

    Args:
        dictionaries: by the name of their folder in the repository, such as the hook name. A folder of
            that name is replaced.
        repo: "org/name".
        labels: "full" uploads labels as they are, quotations of texts included. "places" leaves out
            tokens, quotations and names, and keeps the numbers of texts and tokens. "none" leaves out
            all labels.
        private: make the repository a private one.
        figures: for each dictionary, figures by name for the card, such as FVU and L0 on held-out text.
        densities: for each dictionary, the share of tokens at which each atom fires (`save_sparsity`).
        token: of the hub; default: the one that you are logged in with.

    Returns:
        The address of the commit.

    Raises:
        ValueError: there is no dictionary; `repo`, a folder's name or an entry of `figures` or
            `densities` is not one; or the repository is public and `private` is set.
        OSError: the hub refuses, or cannot be reached.
    """
    check_repo(repo)
    if not dictionaries:
        raise ValueError("dictionaries must hold at least one, got none")
    for name in dictionaries:
        if not all(_PART.fullmatch(part) for part in name.split("/")):
            raise ValueError(f"dictionaries must go by names of folders such as 'a/b', got {name!r}")
    for argument, given in (("figures", figures), ("densities", densities)):
        for name in given or {}:
            if name not in dictionaries:
                raise ValueError(f"{argument} must be of the dictionaries that are pushed, got {name!r}")
    api = huggingface_hub.HfApi(token=token)
    with _told(repo, "pushed to"), tempfile.TemporaryDirectory() as temporary:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ValueError(f"private must be False for {repo}, which is public already")
        there = api.list_repo_files(repo)
        operations: list[Any] = []
        for name, itda in dictionaries.items():
            folder = Path(temporary) / name
            sent = exposed(itda, labels)
            if figures and figures.get(name):
                sent.cfg.metadata[FIGURES_KEY] = dict(figures[name])
            sent.save_model(folder)
            files = [SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME]
            if densities and name in densities:
                save_sparsity(folder, densities[name])
                files.append(SPARSITY_FILENAME)
            elif f"{name}/{SPARSITY_FILENAME}" in there:  # of the weights that were there before
                old = huggingface_hub.CommitOperationDelete(f"{name}/{SPARSITY_FILENAME}")
                operations.append(old)
            operations += [_added(f"{name}/{file}", folder / file) for file in files]
        others = _others(repo, there, dictionaries, Path(temporary) / "others", token)
        if others is not None:
            own = {
                name: json.loads((Path(temporary) / name / SAE_CFG_FILENAME).read_text())
                for name in dictionaries
            }
            entries = [_entry(name, config) for name, config in sorted((others | own).items())]
            readme = Path(temporary) / _README
            readme.write_text(card(repo, entries), encoding="utf-8")
            operations.append(_added(_README, readme))
        message = f"Push {', '.join(dictionaries)} with itda-lens"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


def fetched(name: str, revision: str | None) -> Path:
    """The local folder of a dictionary on the hub, with its files, all of one commit.

    Args:
        name: "org/name/folder", or "org/name" of a repository that holds one dictionary.
        revision: a branch, tag or commit; default: the main branch.

    Raises:
        FileNotFoundError: there is no such repository, revision or dictionary.
        ValueError: the repository holds several, which the message names.
        OSError: the hub cannot be reached.
    """
    repo, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    with _told(name, "loaded from"):
        try:
            if not inside:
                configs = _downloaded(repo, revision, f"*{SAE_CFG_FILENAME}")
                inside = _only(name, configs)
            files = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
            folder = _downloaded(repo, revision, *(str(PurePosixPath(inside, file)) for file in files))
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            reason = str(error).strip().split("\n")[0]
            raise FileNotFoundError(f"no dictionary {name!r} on the hub: {reason}") from error
    found = folder / inside
    for file in files:
        if not (found / file).is_file():
            raise FileNotFoundError(f"no dictionary {name!r} on the hub: no {file} in {found}")
    return found


def exposed(itda: ITDA, labels: Exposed) -> ITDA:
    """A copy for others: with these labels, and without absolute paths of this machine."""
    kept = None
    if itda.cfg.metadata[LABELS_KEY] is None:
        labels = "none"
    elif labels == "full":
        kept = itda.labels
    elif labels == "places":
        kept = Labels([replace(one, token=None, context=None, name=None) for one in itda.labels])
    made = itda.with_atoms(itda.W_dec.detach(), kept)
    metadata = made.cfg.metadata
    if kept is None:
        vars(metadata).pop(LABELS_KEY, None)
    for key, value in list(metadata.items()):
        if key != LABELS_KEY:
            metadata[key] = without_paths(value)
    metadata[LABELS_EXPOSED_KEY] = labels
    return made


def without_paths(value: Any) -> Any:
    """Plain data in which each absolute path, of any system, is cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            path = kind(value.removeprefix("file://"))
            if path.is_absolute() or value.startswith("~"):
                return path.name or "/"
    return value


def check_repo(repo: str) -> None:
    """Refuse a name that is not one of a repository.

    Raises:
        ValueError: it is not of the form "org/name".
    """
    parts = repo.split("/")
    if len(parts) != 2 or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(f"repo must be of the form 'org/name', got {repo!r}")


@contextmanager
def _told(name: str, done: str) -> Iterator[None]:
    """Errors of the hub in one line, which says what could not be done."""
    try:
        yield
    except HfHubHTTPError as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{name} cannot be {done} the hub: {reason}") from error


def _downloaded(repo: str, revision: str | None, *patterns: str) -> Path:
    found = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
    return Path(found)


def _only(name: str, folder: Path) -> str:
    configs = sorted(folder.rglob(SAE_CFG_FILENAME))
    names = [config.parent.relative_to(folder).as_posix() for config in configs]
    if not names:
        raise FileNotFoundError(f"no dictionary {name!r} on the hub: the repository holds none")
    if len(names) > 1:
        choices = ", ".join(f"{name}/{inside}" for inside in names)
        raise ValueError(f"path_or_repo must name one dictionary; {name} holds {choices}")
    return names[0]


def _others(
    repo: str, there: list[str], pushed: Mapping[str, ITDA], folder: Path, token: str | None
) -> dict[str, Any] | None:
    """The configurations of the repository's other dictionaries; None if its card is somebody's own."""
    if _README in there:
        readme = huggingface_hub.hf_hub_download(repo, _README, token=token)
        if MARK not in Path(readme).read_text(encoding="utf-8"):
            return None
    found = {}
    for file in there:
        name, _, last = file.rpartition("/")
        if last == SAE_CFG_FILENAME and name and name not in pushed:
            config = huggingface_hub.hf_hub_download(repo, file, token=token)
            found[name] = json.loads(Path(config).read_text())
    return found


def _entry(name: str, config: Mapping[str, Any]) -> Entry:
    metadata = config.get("metadata") or {}
    return Entry(name, config, metadata.get(LABELS_EXPOSED_KEY), metadata.get(FIGURES_KEY) or {})


def _added(path: str, file: Path) -> huggingface_hub.CommitOperationAdd:
    return huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file))

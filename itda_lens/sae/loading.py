"""Loading a dictionary from a folder or a Hugging Face repository; errors say what is wrong."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError

from itda_lens.records import HookPoint, checked
from itda_lens.sae.itda import ITDA


@checked
def load(path_or_repo: str | Path, device: str | torch.device = "cpu", dtype: str | None = None) -> ITDA:
    """Load an ITDA.

    Args:
        path_or_repo: a folder with `cfg.json` and `sae_weights.safetensors`; or, where no such folder
            exists, `org/name/folder/of/the/dictionary` on the Hugging Face hub (the only case in
            which the network is used).
        device: where to put it.
        dtype: as which SAELens dtype name ("float32", "bfloat16", ...); default: as it was saved, and
            float32 from the hub.

    Raises:
        FileNotFoundError: no such folder or repository, or files are missing from it.
        ValueError: the config or the weights are damaged, do not fit each other, or are not an ITDA's.
    """
    device = str(device)
    folder = Path(path_or_repo)
    if not folder.exists():
        parts = str(path_or_repo).split("/")
        if isinstance(path_or_repo, str) and len(parts) >= 3 and all(parts):
            release, sae_id = "/".join(parts[:2]), "/".join(parts[2:])
            try:
                sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype or "float32")
            except (EntryNotFoundError, RepositoryNotFoundError) as error:
                reason = str(error).strip().split("\n")[0]
                raise FileNotFoundError(
                    f"no dictionary {path_or_repo!r} on the hub: {reason}"
                ) from error
            return _checked(sae, path_or_repo)
        raise FileNotFoundError(
            f"no folder {str(path_or_repo)!r} (a dictionary on the hub is named org/name/folder)"
        )
    _check_files(folder)
    try:
        return _checked(SAE.load_from_disk(folder, device=device, dtype=dtype), folder)
    except SafetensorError as error:
        raise ValueError(f"{folder / SAE_WEIGHTS_FILENAME} is truncated or damaged: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / SAE_CFG_FILENAME} is not a complete config: {error!r}") from error


def dictionaries_in(folder: Path) -> list[Path]:
    """The folder itself if it holds a dictionary, else those of its subfolders that do, by layer."""
    if (folder / SAE_CFG_FILENAME).exists():
        return [folder]
    found = (config.parent for config in folder.glob(f"*/{SAE_CFG_FILENAME}"))
    return sorted(found, key=lambda inside: HookPoint.parse(inside.name).sort_key)


def is_dictionary(folder: Path) -> bool:
    """Whether the folder holds an ITDA and nothing else."""
    names = {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME}
    if not folder.is_dir() or {file.name for file in folder.iterdir()} - {SPARSITY_FILENAME} != names:
        return False
    try:
        return json.loads((folder / SAE_CFG_FILENAME).read_text())["architecture"] == "itda"
    except (ValueError, KeyError, TypeError):
        return False


def _check_files(folder: Path) -> None:
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (folder / name).is_file():
            inside = dictionaries_in(folder) if folder.is_dir() else []
            hint = f"; it holds dictionaries: {', '.join(str(f) for f in inside)}" if inside else ""
            raise FileNotFoundError(f"no {name} in {folder}{hint}")
    try:
        config = json.loads((folder / SAE_CFG_FILENAME).read_text())
        architecture = config["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SAE_CFG_FILENAME} is truncated or damaged: {error!r}") from error
    if architecture != "itda":
        raise ValueError(f"{folder} holds a {architecture!r} SAE, not an ITDA; load it with SAELens")


def _checked(sae: object, source: object) -> ITDA:
    if not isinstance(sae, ITDA):
        raise ValueError(f"{source} holds a {type(sae).__name__}, not an ITDA")
    return sae

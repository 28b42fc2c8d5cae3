"""Models in local folders, under names that TransformerLens's HookedTransformer can load."""

from pathlib import Path


def register_with_transformer_lens(folder: Path, name: str) -> None:
    """Let `HookedTransformer.from_pretrained(name)` load the model in `folder`; idempotent.

    TransformerLens loads models of its own list only, and takes the architecture of a folder from the
    folder's config unless the path holds "llama" or "gemma".
    """
    from transformer_lens import supported_models

    path = str(folder)
    if path not in supported_models.OFFICIAL_MODEL_NAMES:
        supported_models.OFFICIAL_MODEL_NAMES.append(path)
    names = supported_models.MODEL_ALIASES.setdefault(path, [])
    if name not in names:
        names.append(name)

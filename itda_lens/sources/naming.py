"""Names by which SAELens and TransformerLens load a model."""

from pathlib import Path

from itda_lens.records import HookPoint
from itda_lens.sources.hugging_face_models import SIDES
from itda_lens.sources.readable import Loader


def saelens_class(loader: Loader, hook: str) -> str:
    """The class, among those that SAELens loads models with, whose models have this hook point.

    SAELens loads no TransformerBridge: HookedTransformer has the hook points that both know. In a
    Hugging Face model SAELens reads modules only, so that "blocks.N.hook_resid_post", which stands for
    the output of a layer here, needs HookedTransformer too.
    """
    stands_for_layer = hook.startswith("blocks.") and HookPoint.parse(hook).kind in SIDES
    is_module = loader == "huggingface" and not stands_for_layer
    return "AutoModelForCausalLM" if is_module else "HookedTransformer"


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

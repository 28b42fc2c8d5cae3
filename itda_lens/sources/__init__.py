"""Where activations come from: models and texts, and the tokens between them; arrays."""

from itda_lens.records import HookPoint
from itda_lens.sources.array_source import ArraySource, check_activations
from itda_lens.sources.contexts import Context, ContextBatch, Tokenization
from itda_lens.sources.direct_path import logit_weights
from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.hooks import Site, unknown_hook
from itda_lens.sources.hugging_face_models import HuggingFaceModel
from itda_lens.sources.model_source import ModelSource, hook_list, tokenization_for
from itda_lens.sources.models import LIBRARIES, language_model
from itda_lens.sources.naming import register_with_transformer_lens
from itda_lens.sources.readable import Loader, ReadableModel, Replace
from itda_lens.sources.source import (
    Activations,
    ActivationSource,
    Listed,
    Listing,
    Rows,
    gathered,
)
from itda_lens.sources.texts import describe_texts, iterate_texts, names_data_set
from itda_lens.sources.transformer_lens_models import TransformerLensModel

LanguageModel = ReadableModel
"""The earlier name of `ReadableModel`."""


def hook_is_per_head(hook_name: str) -> bool:
    """Whether SAELens flattens heads at this hook point; see `HookPoint.reshape_activations`."""
    return HookPoint.parse(hook_name).reshape_activations == "hook_z"


__all__ = [
    "LIBRARIES",
    "ActivationSource",
    "Activations",
    "ArraySource",
    "Context",
    "ContextBatch",
    "HookPoint",
    "HookedModel",
    "HuggingFaceModel",
    "LanguageModel",
    "Listed",
    "Listing",
    "Loader",
    "ModelSource",
    "ReadableModel",
    "Replace",
    "Rows",
    "Site",
    "Tokenization",
    "TransformerLensModel",
    "check_activations",
    "describe_texts",
    "gathered",
    "hook_is_per_head",
    "hook_list",
    "iterate_texts",
    "language_model",
    "logit_weights",
    "names_data_set",
    "register_with_transformer_lens",
    "tokenization_for",
    "unknown_hook",
]

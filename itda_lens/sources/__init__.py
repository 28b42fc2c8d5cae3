"""Where activations come from: models and texts, and the tokens between them; arrays."""

from itda_lens.records import HookPoint
from itda_lens.sources._as_source import as_source
from itda_lens.sources.array_source import ArraySource
from itda_lens.sources.batch_source import BatchSource
from itda_lens.sources.caches import CachedSource, cache
from itda_lens.sources.chat_source import (
    ChatReading,
    ChatSource,
    chat_context_size,
    text_or_chat_source,
)
from itda_lens.sources.chat_templates import ChatTemplate, RenderedChat
from itda_lens.sources.chats import Chats, SpecialTokens
from itda_lens.sources.contexts import Context, ContextBatch, Tokenization, special_ids
from itda_lens.sources.direct_path import logit_weights
from itda_lens.sources.hidden_states import HiddenStatesSource
from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.hooks import Site, unknown_hook
from itda_lens.sources.hugging_face_models import HuggingFaceModel
from itda_lens.sources.model_source import ModelSource, by_head, heads_at, hook_list, tokenization_for
from itda_lens.sources.models import LIBRARIES, language_model
from itda_lens.sources.module_source import ModuleSource
from itda_lens.sources.modules import AnyModule
from itda_lens.sources.naming import register_with_transformer_lens
from itda_lens.sources.nnsight_models import NNsightModel
from itda_lens.sources.passes import Pass, Watch
from itda_lens.sources.readable import Loader, ReadableModel, Replace
from itda_lens.sources.row_tensors import check_activations
from itda_lens.sources.saelens_sources import SAELensCache, SAELensStore
from itda_lens.sources.source import (
    Activations,
    ActivationSource,
    Listed,
    Listing,
    Rows,
    gathered,
)
from itda_lens.sources.texts import Ids, describe_texts, iterate_texts, names_data_set
from itda_lens.sources.transformer_lens_models import TransformerLensModel
from itda_lens.sources.unembedding import Vectors, unembedding

LanguageModel = ReadableModel
"""The earlier name of `ReadableModel`."""


def hook_is_per_head(hook_name: str) -> bool:
    """Whether SAELens flattens heads at this hook point; see `HookPoint.reshape_activations`."""
    return HookPoint.parse(hook_name).reshape_activations == "hook_z"


__all__ = [
    "LIBRARIES",
    "ActivationSource",
    "Activations",
    "AnyModule",
    "ArraySource",
    "BatchSource",
    "CachedSource",
    "ChatReading",
    "ChatSource",
    "ChatTemplate",
    "Chats",
    "Context",
    "ContextBatch",
    "HiddenStatesSource",
    "HookPoint",
    "HookedModel",
    "HuggingFaceModel",
    "Ids",
    "LanguageModel",
    "Listed",
    "Listing",
    "Loader",
    "ModelSource",
    "ModuleSource",
    "NNsightModel",
    "Pass",
    "ReadableModel",
    "RenderedChat",
    "Replace",
    "Rows",
    "SAELensCache",
    "SAELensStore",
    "Site",
    "SpecialTokens",
    "Tokenization",
    "TransformerLensModel",
    "Vectors",
    "Watch",
    "as_source",
    "by_head",
    "cache",
    "chat_context_size",
    "check_activations",
    "describe_texts",
    "gathered",
    "heads_at",
    "hook_is_per_head",
    "hook_list",
    "iterate_texts",
    "language_model",
    "logit_weights",
    "names_data_set",
    "register_with_transformer_lens",
    "special_ids",
    "text_or_chat_source",
    "tokenization_for",
    "unembedding",
    "unknown_hook",
]

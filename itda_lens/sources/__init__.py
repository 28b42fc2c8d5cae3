"""Where activations come from: models and texts, and the tokens between them; arrays."""

from itda_lens.sources.array_source import ArraySource
from itda_lens.sources.contexts import Context, ContextBatch, Tokenization
from itda_lens.sources.hooks import LanguageModel, Loader, hook_is_per_head
from itda_lens.sources.model_source import ModelSource, hook_list, tokenization_for
from itda_lens.sources.models import language_model
from itda_lens.sources.naming import register_with_transformer_lens
from itda_lens.sources.source import Activations, ActivationSource, Rows, gathered
from itda_lens.sources.texts import describe_texts, iterate_texts, names_data_set

__all__ = [
    "ActivationSource",
    "Activations",
    "ArraySource",
    "Context",
    "ContextBatch",
    "LanguageModel",
    "Loader",
    "ModelSource",
    "Rows",
    "Tokenization",
    "describe_texts",
    "gathered",
    "hook_is_per_head",
    "hook_list",
    "iterate_texts",
    "language_model",
    "names_data_set",
    "register_with_transformer_lens",
    "tokenization_for",
]

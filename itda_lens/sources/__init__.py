"""Where activations come from: models, texts, and the tokens between them."""

from itda_lens.sources.contexts import Context, ContextBatch, Tokenization
from itda_lens.sources.hooks import LanguageModel, Loader, hook_is_per_head
from itda_lens.sources.models import language_model
from itda_lens.sources.naming import register_with_transformer_lens
from itda_lens.sources.texts import describe_texts, iterate_texts, names_data_set

__all__ = [
    "Context",
    "ContextBatch",
    "LanguageModel",
    "Loader",
    "Tokenization",
    "describe_texts",
    "hook_is_per_head",
    "iterate_texts",
    "language_model",
    "names_data_set",
    "register_with_transformer_lens",
]

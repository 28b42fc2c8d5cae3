"""Models of TransformerLens: TransformerBridge, HookedTransformer, and SAELens's classes of both."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.hooks import Site, unknown_hook
from itda_lens.sources.hugging_face_models import max_positions
from itda_lens.sources.readable import Loader


class TransformerLensModel(HookedModel):
    """Hook points go by TransformerLens's names, aliases included."""

    @classmethod
    def loader_of(cls, model: Any) -> Loader | None:
        # A model of a library that nobody has imported does not exist, and the import takes seconds.
        kinds: dict[Loader, tuple[str, str]] = {
            "bridge": ("transformer_lens.model_bridge", "TransformerBridge"),
            "hooked_transformer": ("transformer_lens", "HookedTransformer"),
        }
        for loader, (module, name) in kinds.items():
            kind = getattr(sys.modules.get(module), name, None)
            if kind is not None and isinstance(model, kind):
                return loader
        return None

    @classmethod
    def load(
        cls, name: str, loader: Loader, tokenizer: Any, device: str | None, dtype: torch.dtype
    ) -> nn.Module:
        with _reloadable(tokenizer) as copy:
            options: dict[str, Any] = dict(device=device, dtype=dtype, tokenizer=copy)
            if loader == "bridge":
                from transformer_lens.model_bridge import TransformerBridge

                model: Any = TransformerBridge.boot_transformers(name, **options)
            else:
                from transformer_lens import HookedTransformer

                model = HookedTransformer.from_pretrained_no_processing(name, **options)
        if tokenizer is not None:
            model.tokenizer.name_or_path = getattr(tokenizer, "name_or_path", None) or ""
        return model

    @staticmethod
    def described(model: Any) -> tuple[str | None, Any]:
        return model.cfg.model_name, model.tokenizer

    @property
    def max_context(self) -> int | None:
        original = self._original
        known = None if original is None else max_positions(original)
        return known or getattr(self.model.cfg, "n_ctx", None)

    @property
    def _original(self) -> nn.Module | None:
        """The Hugging Face model inside a bridge."""
        return self.model.original_model if self.loader == "bridge" else None

    def _embedding(self) -> nn.Module | None:
        if self._original is not None:
            return self._original.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        return self.model.embed

    def _ends(self) -> Sequence[nn.Module]:
        # HookedTransformer.generate calls `forward` itself, which fires no hook of the whole model.
        return [self.model, self._original if self._original is not None else self.model.unembed]

    def _readers(self) -> Sequence[nn.Module]:
        return [self.model] if self._original is None else [self.model, self._original]

    def _blocks(self) -> Sequence[nn.Module]:
        # HookedTransformer.generate calls `forward` itself, and only blocks then see the cache.
        return [] if self._original is not None else list(self.model.blocks)[:1]

    def _run(self, tokens: Tensor, attention_mask: Tensor) -> Any:
        return self.model(tokens, attention_mask=attention_mask.long(), return_type="logits")

    def _logits_of(self, output: Any) -> Tensor | None:
        return output if isinstance(output, Tensor) else None

    def _site(self, hook: str) -> Site:
        points: dict[str, nn.Module] = self.model.hook_dict
        if hook in points:
            return _site_of(points[hook])
        # SAETransformerBridge leaves aliases out of hook_dict, but knows them.
        resolve = getattr(self.model, "_resolve_hook_name", lambda alias: alias)
        known = getattr(self.model, "hook_aliases", {}).get(hook, resolve(hook))
        for actual in [known] if isinstance(known, str) else known:
            if actual in points:
                return _site_of(points[actual])
        dictionaries = list(getattr(self.model, "acts_to_saes", {}))
        if dictionaries:
            raise ValueError(
                f"the model has no hook {hook!r} while dictionaries are attached to the model at "
                f"{', '.join(dictionaries)}; detach them first (reset_saes())"
            )
        raise unknown_hook(hook, points)


@contextmanager
def _reloadable(tokenizer: Any) -> Iterator[Any]:
    """A copy of a tokenizer that can be loaded again within the block, from the place that it names.

    TransformerLens loads a tokenizer again to let it prepend BOS. One that was made in memory names no
    place, and others may name one that is gone. It also sets special tokens that are missing, which
    should not change the caller's object.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        yield tokenizer
        return
    with TemporaryDirectory(prefix="itda-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield type(tokenizer).from_pretrained(folder)


def _site_of(point: nn.Module) -> Site:
    # A bridge converts for TransformerLens's own hooks, such as queries from [batch, head, seq, width].
    return Site(point, "output", getattr(point, "hook_conversion", None))

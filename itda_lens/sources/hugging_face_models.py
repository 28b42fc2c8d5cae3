"""Models of Hugging Face's transformers."""

import inspect
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from itda_lens.records import HookPoint
from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.hooks import Site, check_own_place, unknown_hook
from itda_lens.sources.readable import Loader

SIDES = {"hook_resid_pre": "input", "hook_resid_post": "output"}

HOOK_Z = "attn.hook_z"
"""The kind of the hook point where heads stand side by side, before the output projection."""

KINDS = (*SIDES, HOOK_Z)
"""Kinds of TransformerLens's hook points that are found in Hugging Face models, under "blocks.N."."""

PROJECTIONS = frozenset({"o_proj", "c_proj", "out_proj", "dense", "out_lin", "wo", "o"})
"""Names, in lower case, that models give the output projection of their attention."""

ATTENTION = re.compile("attn|attention", re.IGNORECASE)
OTHER_ATTENTION = re.compile("cross|enc_?dec|encoder|linear_?attn|linearattention", re.IGNORECASE)
"""Names and classes of attention; and of its kinds that look at another text, or have no heads to
compare with those of self-attention."""


class HuggingFaceModel(HookedModel):
    """Hook points are names of modules (their output). Three names are TransformerLens's:
    `blocks.N.hook_resid_pre` and `blocks.N.hook_resid_post` stand for the N-th layer's input and output,
    `blocks.N.attn.hook_z` for the input of its attention's output projection, split by heads.

    In a model with an encoder and a decoder, tokens go through the encoder alone.
    """

    @classmethod
    def loader_of(cls, model: Any) -> Loader | None:
        kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
        return "huggingface" if kind is not None and isinstance(model, kind) else None

    @classmethod
    def load(
        cls, name: str, loader: Loader, tokenizer: Any, device: str | None, dtype: torch.dtype
    ) -> nn.Module:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @staticmethod
    def described(model: Any) -> tuple[str | None, Any]:
        return model.name_or_path, None

    @property
    def max_context(self) -> int | None:
        return max_positions(self.model)

    def _embedding(self) -> nn.Module | None:
        try:
            return self.model.get_input_embeddings()
        except NotImplementedError as error:  # of a model of several parts, such as CLIP
            raise ValueError(
                f"{type(self.model).__name__} names no embedding of tokens; pass the part of it that "
                "reads text, such as model.text_model"
            ) from error

    @property
    def _reader(self) -> Any:
        """The part of the model that reads the tokens."""
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model

    def _ends(self) -> Sequence[nn.Module]:
        return [self.model, self.model.base_model, self._reader]

    def _run(self, tokens: Tensor, attention_mask: Tensor) -> Any:
        reader = self._reader
        # Encoders know no cache, and those of some versions refuse the argument.
        caches = "use_cache" in inspect.signature(reader.forward).parameters
        options: dict[str, Any] = {"use_cache": False} if caches else {}
        if getattr(self.model.config, "return_dict", True) is False:
            options["return_dict"] = True  # a plain tuple does not say which of its parts are logits
        return reader(input_ids=tokens, attention_mask=attention_mask.long(), **options)

    def _logits_of(self, output: Any) -> Tensor | None:
        return getattr(output, "logits", None)

    def _site(self, hook: str) -> Site:
        if hook:
            with suppress(AttributeError):
                module = self.model.get_submodule(hook)
                check_own_place(self.model, hook)
                return Site(module, "output")
        point = HookPoint.parse(hook)
        if hook.startswith("blocks.") and point.layer is not None and point.kind in SIDES:
            layers = text_layers(self.model)
            if point.layer < len(layers):
                return Site(layers[point.layer], SIDES[point.kind])  # pyright: ignore
        if hook.startswith("blocks.") and point.layer is not None and point.kind == HOOK_Z:
            layers = text_layers(self.model)
            if point.layer < len(layers):
                where = f"layer {point.layer} of {type(self.model).__name__}"
                projection = output_projection(layers[point.layer], where)
                return Site(projection, "input", SplitHeads(self._config_heads()))
        raise unknown_hook(hook, self._known_hooks())

    def _config_heads(self) -> int:
        config = self.model.config.get_text_config(decoder=True)
        n_heads = getattr(config, "num_attention_heads", None)
        if not isinstance(n_heads, int) or n_heads < 1:
            raise ValueError(
                f"the configuration of {type(self.model).__name__} gives no number of heads, so that "
                f"{HOOK_Z!r} cannot be split; use the name of a module"
            )
        return n_heads

    def _known_hooks(self) -> list[str]:
        try:
            n_layers = len(text_layers(self.model))
        except ValueError:
            n_layers = 0
        of_layers = [f"blocks.{layer}.{kind}" for layer in range(n_layers) for kind in KINDS]
        return of_layers + [name for name, _ in self.model.named_modules() if name]


@dataclass(frozen=True)
class SplitHeads:
    """Heads that stand side by side in a row, shown as TransformerLens has them: [.., head, width]."""

    n_heads: int

    def convert(self, activation: Tensor) -> Tensor:
        if activation.shape[-1] % self.n_heads:
            raise ValueError(
                f"a row of {activation.shape[-1]} numbers cannot be split into {self.n_heads} heads; "
                "use the name of a module"
            )
        return activation.unflatten(-1, (self.n_heads, -1))

    def revert(self, activation: Tensor) -> Tensor:
        return activation.flatten(-2)


def output_projection(layer: nn.Module, where: str) -> nn.Module:
    """The module that takes the outputs of a layer's heads, side by side.

    It is the one module with a name of `PROJECTIONS` inside of the layer's self-attention, which is told
    by name or class.

    Args:
        layer: a layer of a language model.
        where: the layer in words, for messages.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = []
    for path in dict(layer.named_modules()):
        *parents, name = path.split(".")
        above = [".".join(parents[: i + 1]) for i in range(len(parents))]
        said = [*parents, *(type(layer.get_submodule(parent)).__name__ for parent in above)]
        if (
            name.lower() in PROJECTIONS
            and any(map(ATTENTION.search, said))
            and not any(map(OTHER_ATTENTION.search, said))
        ):
            found.append(path)
    if len(found) == 1:
        return layer.get_submodule(found[0])
    which = f"several of its modules could be it ({', '.join(found)})" if found else "it has none"
    raise ValueError(
        f"{HOOK_Z!r} is the input of the output projection of self-attention, but in {where} {which}; "
        "use the name of a module"
    )


def text_layers(model: Any) -> list[nn.Module]:
    """The layers that text passes through, in order.

    They are a list of modules in the part of the model that handles text (`get_decoder`: of a model that
    sees images too, its language model). The model's class names their class as one that may not be
    split between devices (`_no_split_modules`), or their number is the one in the configuration.

    Raises:
        ValueError: the model has an encoder and a decoder, or its lists leave a choice, or none.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} has layers in an encoder and in a decoder: 'blocks.N' could be either; use the "
            "name of a module, such as 'encoder.block.0' or 'model.encoder.layers.0'"
        )
    # ModernBERT calls its unembedding "decoder", and `get_decoder` gives that.
    lists = _outermost_lists(model.get_decoder()) or _outermost_lists(model.base_model)
    whole = set(model._no_split_modules or ())
    by_class = {path: own for path, own in lists.items() if {type(m).__name__ for m in own} <= whole}
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    by_number = {path: own for path, own in lists.items() if len(own) == n_layers}
    for candidates in (by_class, by_number):
        if len(candidates) > 1:
            candidates = {path: own for path, own in candidates.items() if len(own) == n_layers}
        if len(candidates) == 1:
            layers = list(*candidates.values())
            if len(set(layers)) < len(layers):
                raise ValueError(
                    f"layers of {name} are one module, which runs several times: 'blocks.N' cannot tell "
                    "them apart; use the name of a module, of which the first activation is read"
                )
            return layers
    raise ValueError(
        f"it is not clear which modules of {name} are its {n_layers} layers, that is 'blocks.N'"
        + (f" (its lists are {', '.join(lists)})" if lists else "")
        + "; use the name of a module"
    )


def _outermost_lists(part: nn.Module, path: str = "") -> dict[str, nn.ModuleList]:
    """Lists of modules that are not inside others, by their names."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in part.named_children():
        name = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            if len(child):
                found[name] = child
        else:
            found |= _outermost_lists(child, name)
    return found


def max_positions(model: Any) -> int | None:
    """The most tokens of text that a model has positions for; None if its configuration does not say.

    RoBERTa and its relatives count positions from the padding token's id + 1 on, but their configuration
    gives all rows of the table of positions.
    """
    if not hasattr(model.config, "get_text_config"):
        return None
    config = model.config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "max_target_positions"):
        rows = getattr(config, field, None)
        if isinstance(rows, int) and rows > 0:
            break
    else:
        return None
    for name, table in model.named_modules():
        if (
            isinstance(table, nn.Embedding)
            and "position" in name.rsplit(".", 1)[-1]
            and table.padding_idx is not None
            and table.num_embeddings == rows
        ):
            return rows - table.padding_idx - 1
    return rows

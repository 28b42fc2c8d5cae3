"""Language models of several libraries behind one face: run tokens, read or replace a hook point.

TransformerLens's hook points and Hugging Face's layers are both `torch.nn.Module`s that a forward pass
calls, so one mechanism serves all: a forward hook on the module that a name stands for.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Loader = Literal["bridge", "hooked_transformer", "huggingface"]

Replace = Callable[[Float[Tensor, "batch seq *width"]], Float[Tensor, "batch seq *width"]]


class _StopForwardError(Exception):
    """Every hook that was asked for has fired; the rest of the forward pass is not needed."""


class LanguageModel:
    """A causal language model whose hook points can be read and replaced.

    Hook points of a HookedTransformer or TransformerBridge go by TransformerLens's names, aliases
    included. On a Hugging Face model they are names of modules (their output), and
    `blocks.N.hook_resid_pre` and `blocks.N.hook_resid_post` stand for the N-th layer's input and output.

    Attributes:
        model: the wrapped model; it is not modified.
        tokenizer: its tokenizer.
        name: what metadata calls it.
        loader: what kind of model it is.
        source: the folder or hub name that it can be loaded from again; None if not known.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, name: str, loader: Loader, source: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.loader: Loader = loader
        self.source = source

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_context(self) -> int | None:
        """The most tokens that the model was made for; None if it does not say."""
        if self.loader == "huggingface":
            return getattr(self.model.config, "max_position_embeddings", None)
        return getattr(self.model.cfg, "n_ctx", None)

    def capture(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        hook_names: list[str],
    ) -> dict[str, Float[Tensor, "batch seq width"]]:  # fmt: skip
        """Activations at `hook_names`, head dimensions flattened, from a forward pass that stops as
        soon as all of them have fired.

        Raises:
            ValueError: a hook does not exist, did not fire, or gives no [batch, seq, ...].
        """
        captured: dict[str, Tensor] = {}

        def read(name: str) -> Replace:
            def keep(activation: Tensor) -> Tensor:
                captured[name] = activation.detach()
                if len(captured) == len(set(hook_names)):
                    raise _StopForwardError
                return activation

            return keep

        with self._hooks({name: read(name) for name in hook_names}), suppress(_StopForwardError):
            self._forward(tokens, attention_mask)
        self._check_fired(hook_names, captured)
        for name, activation in captured.items():
            if activation.ndim < 3 or activation.shape[:2] != tokens.shape:
                raise ValueError(
                    f"hook {name!r} gives {tuple(activation.shape)}, not one activation for each of the "
                    f"{tuple(tokens.shape)} tokens"
                )
        return {
            name: rearrange(captured[name], "batch seq ... -> batch seq (...)") for name in hook_names
        }

    def logits(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        replace: Mapping[str, Replace] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:  # fmt: skip
        """Logits, with what passes through the hook points in `replace` put through their functions.

        Raises:
            ValueError: a hook does not exist or did not fire.
        """
        fired: dict[str, bool] = {}

        def counted(name: str, function: Replace) -> Replace:
            def run(activation: Tensor) -> Tensor:
                fired[name] = True
                return function(activation)

            return run

        hooks = {name: counted(name, function) for name, function in (replace or {}).items()}
        with self._hooks(hooks):
            logits = self._forward(tokens, attention_mask)
        self._check_fired(list(hooks), fired)
        return logits

    def check_hooks(self, hook_names: list[str]) -> None:
        """Raise ValueError, naming near matches, unless all of `hook_names` exist."""
        for name in hook_names:
            self._resolve(name)

    @torch.no_grad()
    def _forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = tokens.to(self.device)
        mask = attention_mask.to(self.device).long()
        if self.loader == "huggingface":
            return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return self.model(tokens, attention_mask=mask, return_type="logits")

    @contextmanager
    def _hooks(self, functions: Mapping[str, Replace]) -> Iterator[None]:
        training = self.model.training
        handles = []
        try:
            for name, function in functions.items():
                module, place = self._resolve(name)
                if place == "input":
                    handles.append(
                        module.register_forward_pre_hook(_on_input(function), with_kwargs=True)
                    )
                else:
                    handles.append(module.register_forward_hook(_on_output(function)))
            if training:
                self.model.eval()
            yield
        finally:
            for handle in handles:
                handle.remove()
            if training:
                self.model.train()

    def _resolve(self, name: str) -> tuple[nn.Module, Literal["input", "output"]]:
        """The module that `name` stands for, and which side of it."""
        if self.loader == "huggingface":
            return self._resolve_huggingface(name)
        points: dict[str, nn.Module] = self.model.hook_dict  # pyright: ignore[reportAssignmentType]
        if name in points:
            return points[name], "output"
        # SAETransformerBridge leaves aliases out of hook_dict, but knows them.
        resolve = getattr(self.model, "_resolve_hook_name", lambda alias: alias)
        known = getattr(self.model, "hook_aliases", {}).get(name, resolve(name))
        for actual in [known] if isinstance(known, str) else known:
            if actual in points:
                return points[actual], "output"
        attached = list(getattr(self.model, "acts_to_saes", {}))
        if attached:
            raise ValueError(
                f"the model has no hook {name!r} while dictionaries are attached to the model at "
                f"{', '.join(attached)}; detach them first (reset_saes())"
            )
        raise _unknown_hook(name, points)

    def _resolve_huggingface(self, name: str) -> tuple[nn.Module, Literal["input", "output"]]:
        modules = dict(self.model.named_modules())
        modules.pop("", None)
        if name in modules:
            return modules[name], "output"
        layers = _decoder_layers(self.model)
        known = {}
        for index, layer in enumerate(layers):
            known[f"blocks.{index}.hook_resid_pre"] = (layer, "input")
            known[f"blocks.{index}.hook_resid_post"] = (layer, "output")
        if name in known:
            return known[name]
        raise _unknown_hook(name, [*known, *modules])

    @staticmethod
    def _check_fired(hook_names: list[str], fired: Mapping[str, object]) -> None:
        silent = [name for name in hook_names if name not in fired]
        if silent:
            raise ValueError(
                f"hook {silent[0]!r} exists but never fired during a forward pass; nothing can be read "
                "or replaced there"
            )


def hook_is_per_head(hook_name: str) -> bool:
    """Whether TransformerLens gives [batch, seq, head, d_head] at this hook point."""
    return hook_name.endswith("hook_z")


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The one list of as many modules as the config says that the model has layers."""
    n_layers = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    return []


def _unknown_hook(name: str, known: Any) -> ValueError:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if not near:  # a name of another layer's scheme: offer the same kind of names
        last = re.split(r"[._]", name)[-1]
        near = [other for other in known if last in other][:4] or known[:4]
    return ValueError(f"the model has no hook {name!r}; near it are {', '.join(near)}")


def _on_output(function: Replace) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (function(output[0]), *output[1:])
        return output  # not an activation: the hook counts as not fired

    return hook


def _on_input(function: Replace) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

    return hook

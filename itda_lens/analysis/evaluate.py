"""How well dictionaries reconstruct a model's activations, and what that does to the model."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.analysis.meter import CodeMeter
from itda_lens.dictionary import RunningFVU
from itda_lens.records import TokenFilter, agreed_cutting, at_least, checked
from itda_lens.sae import check_codable, hook_name_of, provenance_of
from itda_lens.sources import (
    ChatReading,
    Chats,
    ContextBatch,
    LanguageModel,
    Loader,
    Tokenization,
    chat_context_size,
    iterate_texts,
    language_model,
    tokenization_for,
)


@dataclass(frozen=True)
class Evaluation:
    """Figures of one dictionary or SAE on given texts, over the tokens that count.

    Attributes:
        hook_name: where the dictionary was attached.
        d_sae: atoms.
        k: most nonzeros per code; None for an SAE that has no such limit.
        n_tokens: tokens that counted (not position 0, special tokens or padding; of `Chats`, special
            tokens too unless they say otherwise).
        l0: mean nonzeros per code.
        fvu: sum |x - xhat|^2 / sum |x - mean x|^2.
        alive_fraction: share of atoms with a nonzero coefficient somewhere.
        ce_loss: next-token loss of the model, nats per token.
        ce_loss_spliced: this loss with reconstructions in the place of activations, at the tokens that
            count.
        ce_loss_zero: this loss with all activations at the hook point set to zero.
        ce_loss_score: (ce_loss_zero - ce_loss_spliced) / (ce_loss_zero - ce_loss), as SAEBench defines
            it; 1 is perfect, 0 no better than zeros.
        kl: KL(model || spliced model), nats per token.
        feature_density: share of the tokens at which each atom has a nonzero coefficient, [d_sae], on
            the CPU. `sae.save_sparsity` writes it.
        fvu_content, fvu_form: of chats, the FVU on the contents of messages, and on the tokens of the
            template's form. Each is measured against its own mean, and NaN where no such token counted.
            Position 0 is in neither: it draws attention whatever token is there, and its activation can
            be a hundred times longer than all others. None for texts.
        n_form: of chats, how many tokens `fvu_form` is measured on. None for texts.
    """

    hook_name: str
    d_sae: int
    k: int | None
    n_tokens: int
    l0: float
    fvu: float
    alive_fraction: float
    ce_loss: float
    ce_loss_spliced: float
    ce_loss_zero: float
    ce_loss_score: float
    kl: float
    feature_density: Float[Tensor, " d_sae"] = field(repr=False, compare=False)
    fvu_content: float | None = None
    fvu_form: float | None = None
    n_form: int | None = None


@checked
def evaluate(
    model: Any,
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    texts: str | Path | Iterable[str] | Chats,
    *,
    tokens: TokenFilter | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate dictionaries and SAEs, each at its own hook point, on the same texts.

    Contexts are cut as when the dictionaries were built. Conversations (`Chats`) are read by the model's
    chat template, one by one, whatever the dictionaries were built from; of those that were built from
    chats, their context size holds. As in SAELens, positions that do not count keep
    their activation when a reconstruction is spliced in, and every position is zeroed for the zero
    ablation; losses are means over the predictions made at the tokens that count.

    Args:
        model: as in `build`; the `dictionaries` must belong to it.
        dictionaries: ITDAs or other SAEs of SAELens (as they are used, not as they are trained; see
            `sae.ARCHITECTURES`), with hook_name, context_size and prepend_bos in their metadata, the
            latter two the same for all (for chats: the context size, of those built from chats).
        texts: as in `build`: texts or `Chats`.
        tokens: more conditions on the tokens that count.
        max_tokens: stop after the batch that reaches this number of tokens; default: all of the texts.
        batch_size, text_field, split, tokenizer, loader, device, progress: as in `build`.

    Raises:
        ValueError: there are no dictionaries or no tokens; a dictionary cannot be measured (a
            transcoder, an SAE in training); dictionaries need different contexts; a hook does not exist,
            never fires, or has another width than its dictionary.
    """
    saes = [dictionaries] if isinstance(dictionaries, SAE) else list(dictionaries)
    if not saes:
        raise ValueError("dictionaries must be one or more, got none")
    at_least(1, batch_size=batch_size, max_tokens=max_tokens)
    check_codable(saes)
    # Looked at before the model is loaded, so that missing texts are told at once.
    if isinstance(texts, Chats):
        _ = texts.roles
        stream: Iterator[str] = iter(())
    else:
        stream = iterate_texts(texts, text_field=text_field, split=split)
        stream = itertools.chain(list(itertools.islice(stream, 1)), stream)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    if isinstance(texts, Chats):
        reading = chat_reading_of(saes, lm, texts, tokens)
        stream, tokenization = reading.rendered(), reading.tokenization
    else:
        tokenization = tokenization_of(saes, lm, tokens)
    hooks = sorted({hook_name_of(sae) for sae in saes})
    lm.check_hooks(hooks)

    meters = [_Meter(sae) for sae in saes]
    n_tokens = 0
    with (
        torch.no_grad(),
        tqdm(
            total=max_tokens, unit="tok", unit_scale=True, desc="evaluating", disable=not progress
        ) as bar,
    ):
        for batch in tokenization.batches(stream, batch_size):
            n = int(batch.keep.sum())
            if n == 0:
                continue
            baseline = _predictions(lm, batch, {})
            for hook in hooks:
                zeroed = _predictions(lm, batch, {hook: torch.zeros_like})
                for meter in meters:
                    if meter.hook == hook:
                        meter.update(lm, batch, baseline, zeroed)
            n_tokens += n
            bar.update(n)
            if max_tokens is not None and n_tokens >= max_tokens:
                break
    if n_tokens == 0:
        raise ValueError("texts gave no token that counts: all were masked, or the texts are empty")
    return [meter.result() for meter in meters]


def tokenization_of(
    saes: Sequence[SAE[Any]], lm: LanguageModel, tokens: TokenFilter | None = None
) -> Tokenization:
    """How the contexts that `saes` were built from were cut.

    Raises:
        ValueError: they were cut in different ways, or longer than the model's contexts.
    """
    return tokenization_for(lm, agreed_cutting([provenance_of(sae) for sae in saes]), tokens)


def chat_reading_of(
    saes: Sequence[SAE[Any]], lm: LanguageModel, chats: Chats, tokens: TokenFilter | None = None
) -> ChatReading:
    """How a model reads chats for `saes`.

    Raises:
        ValueError: as `ChatReading`; or two of `saes` were built from chats of different context sizes.
    """
    size = chat_context_size([provenance_of(sae) for sae in saes])
    return ChatReading(lm, chats, context_size=size, tokens=tokens)


class _Predictions:
    """Losses and log-probabilities of one forward pass, where its predictions count."""

    def __init__(self, logits: Float[Tensor, "batch seq vocab"], batch: ContextBatch) -> None:
        keep = batch.keep.to(logits.device)
        self.log_probs = logits[keep].float().log_softmax(dim=-1)
        # A prediction needs a next token; the last of a context has none.
        followed = batch.attention_mask.roll(-1, dims=1).clone()
        followed[:, -1] = False
        self._followed: Bool[Tensor, " n"] = followed.to(logits.device)[keep]
        self._next: Int[Tensor, " n"] = batch.tokens.roll(-1, dims=1).to(logits.device)[keep]

    def loss(self) -> tuple[float, int]:
        """Sum of the next-token losses, and how many there are."""
        chosen = self.log_probs[self._followed].gather(-1, self._next[self._followed, None])
        return -chosen.double().sum().item(), len(chosen)

    def kl_to(self, other: "_Predictions") -> float:
        """Sum of KL(self || other)."""
        p = self.log_probs.exp()
        # A token of probability 0 (a logit of -inf, for tokens that a model may not give) adds nothing.
        divergence = torch.where(p > 0, p * (self.log_probs - other.log_probs), 0.0)
        return divergence.sum(dim=-1).double().sum().item()


def _predictions(
    lm: LanguageModel, batch: ContextBatch, edits: dict[str, Callable[[Tensor], Tensor]]
) -> _Predictions:
    return _Predictions(lm.logits(batch.tokens, batch.attention_mask, edits), batch)


class _Meter:
    """Running figures of one dictionary."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._sae = sae
        self.hook = hook_name_of(sae)
        self._codes = CodeMeter(sae)
        self._parts: dict[str, RunningFVU] = {}
        self._kl = 0.0
        self._losses = {"base": 0.0, "spliced": 0.0, "zero": 0.0}
        self._n_losses = 0

    def update(
        self, lm: LanguageModel, batch: ContextBatch, baseline: _Predictions, zeroed: _Predictions
    ) -> None:
        spliced = _predictions(lm, batch, {self.hook: self._splice(batch)})
        for name, predictions in (("base", baseline), ("spliced", spliced), ("zero", zeroed)):
            loss, n = predictions.loss()
            self._losses[name] += loss
        self._n_losses += n
        self._kl += baseline.kl_to(spliced)

    def _splice(self, batch: ContextBatch):
        def splice(activation: Tensor) -> Tensor:
            keep = batch.keep.to(activation.device)
            flat = activation.flatten(2)
            if flat.shape[-1] != self._sae.cfg.d_in:
                raise ValueError(
                    f"the model gives activations of width {flat.shape[-1]} at {self.hook!r}, but the "
                    f"dictionary has d_in={self._sae.cfg.d_in}: it belongs to another model or hook"
                )
            x = flat[keep]
            reconstruction = self._codes.update(x)
            for name, part in _parts_of(batch, keep):
                self._parts.setdefault(name, RunningFVU()).update(x[part], reconstruction[part])
            out = flat.clone()
            out[keep] = reconstruction.to(out.dtype)
            return out.reshape(activation.shape)

        return splice

    def result(self) -> Evaluation:
        n_losses = max(1, self._n_losses)
        base, spliced, zero = (self._losses[name] / n_losses for name in ("base", "spliced", "zero"))
        gap = zero - base
        return Evaluation(
            hook_name=self.hook,
            n_tokens=self._codes.n,
            ce_loss=base,
            ce_loss_spliced=spliced,
            ce_loss_zero=zero,
            ce_loss_score=(zero - spliced) / gap if gap != 0 else float("nan"),
            kl=self._kl / self._codes.n,
            fvu_content=self._parts["content"].value() if self._parts else None,
            fvu_form=self._parts["form"].value() if self._parts else None,
            n_form=self._parts["form"].n if self._parts else None,
            **self._codes.figures(),
        )


def _parts_of(
    batch: ContextBatch, keep: Bool[Tensor, "batch seq"]
) -> Iterator[tuple[str, Bool[Tensor, " n"]]]:
    """Which of the tokens that count are content, and which are form. Position 0 is neither.

    Texts have none of the two.
    """
    if all(context.tags is None for context in batch.contexts):
        return
    special = batch.special().to(keep.device)
    later = torch.ones_like(special)
    later[:, 0] = False
    for name, part in (("content", ~special), ("form", special)):
        yield name, (part & later)[keep]

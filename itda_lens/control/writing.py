"""Generation of text, by whichever library runs the model."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from itda_lens.records import at_least, checked
from itda_lens.sources import ReadableModel


@checked
@torch.no_grad()
def written(
    lm: ReadableModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of prompts, with a key-value cache where the model has one.

    Args:
        lm: the model, edited or not.
        prompts: token ids.
        new_tokens: the most tokens to write; a text also ends where the model ends it.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws; torch's global random state is as before afterwards.

    Raises:
        ValueError: a prompt has no tokens, or a number is out of range.
    """
    at_least(1, new_tokens=new_tokens)
    at_least(0, temperature=temperature, seed=seed)
    if not math.isfinite(temperature):
        raise ValueError(f"temperature must be finite, got {temperature}")
    if not prompts or not all(len(ids) for ids in prompts):
        raise ValueError("prompts must be at least one, and each hold at least one token")
    model: Any = getattr(lm, "model", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if lm.loader == "huggingface" and hasattr(model, "generate"):
            return _by_hugging_face(lm, prompts, new_tokens, temperature)
        return [_one(lm, ids, new_tokens, temperature) for ids in prompts]


def _by_hugging_face(
    lm: Any, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float
) -> list[list[int]]:
    from transformers import GenerationConfig

    tokenizer = lm.tokenizer
    eos = tokenizer.eos_token_id
    pad = next((i for i in (tokenizer.pad_token_id, eos) if i is not None), 0)
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):  # padding on the left: all continue at the same column
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    sampled = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}
    config = GenerationConfig(
        max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=eos, **{"do_sample": False} | sampled
    )
    found = lm.model.generate(
        tokens.to(lm.device), attention_mask=mask.to(lm.device), generation_config=config
    )
    return [_ended(row[width:].tolist(), eos) for row in found.cpu()]


def _one(lm: Any, ids: Sequence[int], new_tokens: int, temperature: float) -> list[int]:
    """One continuation: by TransformerLens's `generate`, else by a forward pass for each token."""
    tokens = torch.tensor([list(ids)], device=lm.device)
    eos = lm.tokenizer.eos_token_id
    if lm.loader in ("bridge", "hooked_transformer") and hasattr(getattr(lm, "model", None), "generate"):
        options: dict[str, Any] = dict(verbose=False, return_type="tokens", stop_at_eos=False)
        options |= dict(do_sample=bool(temperature), temperature=temperature or 1.0)
        found = lm.model.generate(tokens, max_new_tokens=new_tokens, **options)
        return _ended(found[0, len(ids) :].tolist(), eos)
    for _ in range(new_tokens):
        logits = lm.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1]
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
        else:
            chosen = logits.argmax()[None]
        tokens = torch.cat([tokens, chosen[None]], dim=1)
        if int(chosen) == eos:
            break
    return _ended(tokens[0, len(ids) :].tolist(), eos)


def _ended(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids

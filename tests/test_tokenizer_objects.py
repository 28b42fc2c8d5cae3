"""Tokenizers that are objects: whatever place they name, or none, each loader takes them."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import WORDS, word_tokenizer
from transformers import AutoTokenizer

from itda_lens.sources import language_model
from itda_lens.sources.naming import register_with_transformer_lens
from itda_lens.training import collect

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["the cat sat on the mat"]


def named(value: str | None):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.name_or_path = value
    return tokenizer


def without(*names: str):
    tokenizer = word_tokenizer(WORDS)
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


TOKENIZERS = {
    "made in memory": lambda folder: word_tokenizer(WORDS),
    "named None": lambda folder: named(None),
    "named a folder that is gone": lambda folder: named("/nowhere/x"),
    "named what no hub has": lambda folder: named("org/not-there"),
    "loaded": lambda folder: AutoTokenizer.from_pretrained(str(folder)),
    "a string": str,
    "a path": Path,
    "without padding": lambda folder: without("pad_token"),
    "without an end": lambda folder: without("eos_token"),
    "without BOS": lambda folder: without("bos_token"),
    "without any": lambda folder: without("bos_token", "eos_token", "pad_token"),
}


@pytest.fixture(scope="module")
def bare(tiny_folder, tmp_path_factory):
    """The tiny model without its tokenizer's files, under a name that HookedTransformer knows."""
    folder = tmp_path_factory.mktemp("models") / "bare-random"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        if "token" not in file.name:
            (folder / file.name).symlink_to(file)
    register_with_transformer_lens(folder, "bare-random")
    return folder


@pytest.mark.parametrize("loader", ["bridge", "hooked_transformer", "huggingface"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_each_loader_takes_each_tokenizer(bare, tiny_folder, tiny, loader, kind):
    tokenizer = TOKENIZERS[kind](tiny_folder)
    special = dict(getattr(tokenizer, "special_tokens_map", {}))
    lm = language_model(str(bare), tokenizer=tokenizer, loader=loader, device="cpu")
    found = collect(lm, TEXTS, HOOK, progress=False)[HOOK].values
    own = copy.copy(tiny)
    if not isinstance(tokenizer, str | Path):
        assert lm.tokenizer is tokenizer
        assert tokenizer.special_tokens_map == special  # the caller's object is as it was
        own.tokenizer = tokenizer
    wanted = collect(own, TEXTS, HOOK, progress=False)[HOOK].values
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    if loader != "huggingface":  # a name of a folder that is gone would be looked for
        place = getattr(tokenizer, "name_or_path", None) or ""
        assert lm.model.tokenizer.name_or_path == (str(tiny_folder) if kind.startswith("a ") else place)

"""Small language models of several seeds, trained on real text and cached, for `compare`.

    python benchmarks/small_models.py FOLDER [--architectures small large] [--seeds 0 1 2 3]

They learn from the docstrings of Python's standard library, which is on every machine. The language
reference, which dictionaries are built from, is text of the same kind that they never saw. A model is a
Hugging Face folder that appears whole or not at all. A model that is there is not trained again.
"""

import argparse
import ast
import functools
import json
import math
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT, BATCH = 128, 16
EPOCHS = 5
LEARNING_RATE, WARM_UP = 2e-3, 100
HELD_OUT_EVERY = 20
"""One module in this number is kept to measure the loss on."""

CHECKPOINTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
"""Shares of a training run after which a model is kept, if asked for; its end is always."""


@dataclass(frozen=True)
class Architecture:
    """A Llama of `layers` layers and width `d_model`, over `vocabulary` byte-pair tokens."""

    layers: int
    d_model: int
    heads: int
    vocabulary: int = 2048


ARCHITECTURES = {
    "small": Architecture(layers=6, d_model=128, heads=4),
    "large": Architecture(layers=8, d_model=160, heads=5),
}


@functools.cache
def docstrings() -> list[str]:
    """The docstrings of each module of the standard library, a text a module; repeated ones once."""
    texts, seen = [], set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # some of Python's own tests are no Python, on purpose
            continue
        found = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 80 and doc not in seen:
                    seen.add(doc)
                    found.append(doc)
        if found:
            texts.append("\n\n".join(found))
    return texts


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts to learn from, and held out."""
    held_out = texts[::HELD_OUT_EVERY]
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], held_out


def make_tokenizer(vocabulary: int, texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, trained on `texts`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def contexts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts behind one another, cut into contexts that begin with BOS: [n, CONTEXT]."""
    ids = [
        i
        for text in texts
        for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    ]
    step = CONTEXT - 1
    rows = torch.tensor(ids[: len(ids) // step * step]).reshape(-1, step)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)


def batches(data: Tensor, seed: int, epochs: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from data[torch.randperm(len(data), generator=generator)].split(BATCH)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, data: Tensor) -> float:
    losses = [model(input_ids=rows, labels=rows).loss.item() for rows in data.split(BATCH)[:-1]]
    return sum(losses) / len(losses)


def learn(
    model: LlamaForCausalLM, data: Tensor, seed: int, epochs: int, rate: float = LEARNING_RATE
) -> Iterator[tuple[float, float]]:
    """Train in place: AdamW, warm-up, cosine to zero. Yields (share done, loss of the last batch)."""
    steps = epochs * math.ceil(len(data) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    for step, rows in enumerate(tqdm(batches(data, seed, epochs), total=steps, desc="training")):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield (step + 1) / steps, loss.item()


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, figures: dict
) -> None:
    """A Hugging Face folder, whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "training.json").write_text(json.dumps(figures, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def trained(
    cache: Path, name: str, seed: int, *, epochs: int = EPOCHS, checkpoints: bool = False
) -> Path:
    """The folder of a trained model; trained first if it is not there.

    With `checkpoints`, folders beside it named by the share of the training, as `small-0@0.05`.
    """
    folder = cache / f"{name}-{seed}"
    kept = [cache / f"{name}-{seed}@{share}" for share in (CHECKPOINTS if checkpoints else ())]
    if all(path.exists() for path in (folder, *kept)):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[name]
    train, held_out = split(docstrings())
    tokenizer = make_tokenizer(architecture.vocabulary, train)
    data, test = contexts(tokenizer, train), contexts(tokenizer, held_out)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=architecture.vocabulary,
            hidden_size=architecture.d_model,
            intermediate_size=architecture.d_model * 8 // 3 // 8 * 8,
            num_hidden_layers=architecture.layers,
            num_attention_heads=architecture.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    start, curve, due = time.perf_counter(), [], list(CHECKPOINTS if checkpoints else ())
    due_now = 0.0
    losses: list[float] = []
    steps = learn(model, data, seed, epochs)
    while True:
        while due and due_now >= due[0]:
            share = due.pop(0)
            save(
                model,
                tokenizer,
                cache / f"{name}-{seed}@{share}",
                {"held_out_loss": held_out_loss(model, test)},
            )
        try:
            due_now, loss = next(steps)
        except StopIteration:
            break
        losses.append(loss)
        if len(losses) == 100:
            curve.append((round(due_now, 4), round(sum(losses) / 100, 4)))
            losses = []
    figures = {
        "tokens": data.numel() * epochs,
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
        "train_loss": curve,
        "held_out_loss": held_out_loss(model, test),
    }
    save(model, tokenizer, folder, figures)
    print(
        f"{folder}: held-out loss {figures['held_out_loss']:.3f}, {figures['seconds']:.0f} s", flush=True
    )
    return folder


def opened(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=["small", "large"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    for name in options.architectures:
        for seed in options.seeds:
            trained(
                options.folder,
                name,
                seed,
                epochs=options.epochs,
                checkpoints=(name, seed) == ("small", 0),
            )


if __name__ == "__main__":
    main()

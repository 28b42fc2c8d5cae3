"""Dictionaries for chats: from plain text, from chats in blocks, from chats one by one (docs/chats.md).

    python benchmarks/chats.py OUT [--layer 10] [--d-sae 1024] [--k 20] [--tokens 30000] [--seeds 0 1 2]

SmolLM2-135M-Instruct. All dictionaries have equal numbers of atoms, chosen from equal numbers of tokens.
All are measured on the same conversations, each read alone, about modules that no conversation of the
build is about.

Conversations are made from the docstrings of Python's standard library (`conversations`). A user asks
for the use of a function or class, and the assistant answers with its docstring. Then the user asks how
it is called, and the assistant answers with its signature. Plain text is the articles of Python's
reference that `itda demo` builds from.

Every figure is kept in OUT/results.jsonl, and one that is there is not computed again.
"""

import argparse
import importlib
import inspect
import random
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from results import Results

from itda_lens import ITDA, Chats, fit
from itda_lens.architectures import random_atoms
from itda_lens.dictionary import RunningFVU
from itda_lens.sae import coded
from itda_lens.samples import reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import ChatTemplate, LanguageModel, language_model
from itda_lens.training import Activations, collect

MODULES = """
    abc argparse array ast asyncio base64 bisect calendar cmath cmd code codecs collections colorsys
    concurrent.futures configparser contextlib copy csv ctypes dataclasses datetime dbm decimal
    difflib dis doctest email.message enum errno fileinput fnmatch fractions ftplib functools gc
    getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http.client http.cookies
    imaplib inspect io itertools keyword linecache locale logging lzma mailbox math mimetypes mmap
    multiprocessing netrc numbers operator optparse os pathlib pickle pickletools pkgutil platform
    plistlib poplib pprint profile queue quopri random re reprlib runpy sched secrets selectors
    shelve shlex shutil smtplib socket socketserver sqlite3 ssl statistics string struct subprocess
    symtable sysconfig tarfile tempfile textwrap threading timeit tkinter token tokenize trace
    traceback tracemalloc types typing unittest urllib.parse urllib.request uuid
""".split()
HELD_OUT = (
    "json ipaddress zipfile bz2 warnings weakref wave xml.etree.ElementTree zoneinfo turtle".split()
)
"""Modules that conversations are made from, and those that are kept for measuring."""

BLOCK = 512
"""Tokens of a block of plain text, or of chats that are joined and cut."""

QUESTIONS = [
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name} to me, please.",
    "When would I use {name}?",
    "I found {name} in somebody's Python code. What is it?",
]
FOLLOW_UPS = ["How do I call it?", "And which arguments does it take?", "Thanks. What is its signature?"]


def conversations(
    modules: Sequence[str], without: list[list[dict[str, str]]] | None = None
) -> list[list[dict[str, str]]]:
    """Conversations about everything with a docstring in these modules, in an order drawn once.

    Answers that stand in `without` are left out: modules import from one another.
    """
    known = {message["content"] for messages in without or () for message in messages}
    found: dict[str, list[dict[str, str]]] = {}
    drawn = random.Random(0)
    for module_name in modules:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # parts of the library that a system leaves out
            print(f"{module_name} cannot be imported and is left out", file=sys.stderr)
            continue
        for name, member in sorted(vars(module).items()):
            text = inspect.getdoc(member) if callable(member) else None
            if (
                name.startswith("_")
                or not text
                or text in found
                or text[:1500] in known
                or len(text) < 40
            ):
                continue
            question = drawn.choice(QUESTIONS).format(name=f"{module_name}.{name}")
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text[:1500]},
            ]
            try:
                signature = f"{name}{inspect.signature(member)}"
            except (ValueError, TypeError):  # written in C, without a signature
                signature = ""
            if signature and len(signature) < 400 and " at 0x" not in signature:
                messages.append({"role": "user", "content": drawn.choice(FOLLOW_UPS)})
                messages.append({"role": "assistant", "content": signature})
            found[text] = messages
    made = list(found.values())
    drawn.shuffle(made)
    return made


def sources(lm: LanguageModel, chats: list[list[dict[str, str]]]) -> dict[str, dict[str, Any]]:
    """What each dictionary is built from: arguments of `collect` by name."""
    template = ChatTemplate(lm.tokenizer)
    joined = "".join(template.rendered(messages) for messages in chats)
    blocks = dict(context_size=BLOCK, keep_special_tokens=True)
    return {
        "plain text in blocks": dict(texts=["\n".join(reference_prose()[0])], **blocks),
        "chats in blocks": dict(texts=[joined], **blocks),
        "chats one by one": dict(texts=Chats(chats)),
        "chats one by one, form capped": dict(texts=Chats(chats, "cap")),
        "chats one by one, form excluded": dict(texts=Chats(chats, "exclude")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--held-out-tokens", type=int, default=6_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    results = Results(options.out)
    lm = language_model(load())
    hook = f"blocks.{options.layer}.hook_resid_post"
    train = conversations(MODULES)
    held_out = conversations(HELD_OUT, without=train)
    print(f"{len(train):,} conversations to build from, {len(held_out):,} held out", flush=True)
    atoms = dict(d_sae=options.d_sae, k=options.k)
    size = dict(layer=options.layer, **atoms, tokens=options.tokens)

    test = collect(lm, Chats(held_out), hook, max_tokens=options.held_out_tokens)[hook]
    for name, source in sources(lm, train).items():
        for kind, seed in product(KINDS, options.seeds):
            setting = dict(source=name, kind=kind, seed=seed, **size)
            if results.find(setting) is None:
                x = activations(name, lm, hook, options.tokens, source)
                results.add(setting | figures(KINDS[kind](x, seed=seed, **atoms), test))
    print(table([row for row in results.rows if all(row[key] == size[key] for key in size)]))


_held: dict[str, Activations] = {}


def activations(
    name: str, lm: LanguageModel, hook: str, tokens: int, source: dict[str, Any]
) -> Activations:
    """The activations of a source; those of the last one are held."""
    if name not in _held:
        _held.clear()
        _held[name] = collect(lm, hook_names=hook, max_tokens=tokens, **source)[hook]
    return _held[name]


def chosen(x: Activations, **options: Any) -> ITDA:
    return fit(x.values, labels=x.labels, **options)


def drawn(x: Activations, **options: Any) -> ITDA:
    return random_atoms(x.values, labels=list(x.labels), **options)


KINDS: dict[str, Callable[..., ITDA]] = {"ITDA": chosen, "random activations": drawn}


@torch.no_grad()
def figures(itda: ITDA, test: Activations) -> dict[str, Any]:
    """FVU on all held-out tokens; and without position 0, on contents and on the template's form."""
    special = torch.tensor([tag.special for tag in test.labels.tags])
    later = torch.from_numpy(test.labels.position > 0)
    parts = {"fvu": torch.ones_like(later), "content": later & ~special, "form": later & special}
    found: dict[str, Any] = {"n": len(special), "n_form": int(parts["form"].sum())}
    for name, mask in parts.items():
        meter = RunningFVU()
        for part in coded(itda, test.values[mask]):
            meter.update(part.x, part.reconstruction)
        found[name] = meter.value()
    of_form = [label.special or label.token in ("<|im_start|>", "<|im_end|>") for label in itda.labels]
    return found | {"form_atoms": sum(of_form) / len(of_form)}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the least and the most."""
    first = rows[0]
    lines = [
        f"{first['n']:,} held-out tokens, {first['n_form']:,} of them form",
        "| built from | atoms | FVU, all | FVU, contents | FVU, form | atoms of form |",
        "|---|---|---|---|---|---|",
    ]
    for source, kind in dict.fromkeys((row["source"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["source"], row["kind"]) == (source, kind)]
        cells = [_range([row[key] for row in own]) for key in ("fvu", "content", "form")]
        share = sum(row["form_atoms"] for row in own) / len(own)
        lines.append(f"| {source} | {kind} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()

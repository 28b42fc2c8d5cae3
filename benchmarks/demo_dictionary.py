"""Make the dictionary that ships with the package: `itda_lens.load("demo")`.

    python benchmarks/demo_dictionary.py

It builds 768 atoms at layer 10 of SmolLM2 from Python's language reference (four minutes on one core),
rounds them to float16, and writes them to itda_lens/sae/shipped/demo. The model's folder on this machine
is left out of the record, so that `itda decompose demo` fetches the model.
"""

from dataclasses import replace
from pathlib import Path

import torch

import itda_lens
from itda_lens.sae import provenance_of
from itda_lens.samples import reference_prose, smollm2
from itda_lens.sources import language_model

HOOK, ATOMS, K = "blocks.10.hook_resid_post", 768, 20
FOLDER = Path(itda_lens.__file__).parent / "sae" / "shipped" / "demo"
MOST_BYTES = 1_000_000


def main() -> None:
    model = language_model(smollm2.fetch(), device="cpu")
    texts, _ = reference_prose()
    itda = itda_lens.build(model, texts, HOOK, d_sae=ATOMS, k=K)[HOOK].to(torch.float16)
    replace(provenance_of(itda), model=None).into(itda.cfg.metadata)
    itda.save_model(FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    if size > MOST_BYTES:
        raise ValueError(f"{FOLDER} must take at most {MOST_BYTES:,} bytes, but takes {size:,}")
    print(f"{FOLDER}: {size:,} bytes")


if __name__ == "__main__":
    main()

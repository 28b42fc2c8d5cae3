"""Reconstruction over L0 and width, against what one would train instead: the tables of docs/quality.md.

    python benchmarks/pareto.py OUT [--layers 10] [--d-sae 1024] [--l0 10 20 40 80] [--kinds itda topk]

Text: the Python language reference on SmolLM2, as in `itda demo`; the last eight of the articles to
build from are a validation split, to calibrate thresholds on; the held-out articles are measured.
Every figure is kept in OUT/results.jsonl, and one that is there is not computed again: stop it when you
like. Nothing else should run meanwhile, or the seconds mean nothing.
"""

import argparse
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import Results
from sae_lens import SAE
from torch import Tensor

from itda_lens import ITDA, fit
from itda_lens.demo.prose import HELD_OUT, reference_prose
from itda_lens.demo.smollm2 import load
from itda_lens.dictionary import RunningFVU
from itda_lens.saebench import principal_components, random_atoms, save_inference, train_sae
from itda_lens.sources import LanguageModel, language_model
from itda_lens.training import Activations, collect

KINDS = {
    "itda": "ITDA",
    "itda-l0": "ITDA, mean L0",
    "prefix": "ITDA, first half of one twice as wide",
    "updated": "ITDA updated",
    "updated-l0": "ITDA updated, mean L0",
    "paper": "ITDA, preset paper",
    "random": "random activations",
    "pca": "principal components",
    "topk": "TopK SAE",
    "batchtopk": "BatchTopK SAE",
    "matryoshka": "Matryoshka BatchTopK SAE",
    "matching_pursuit": "SAELens's MatchingPursuitSAE, trained",
}

TRAINED = ("topk", "batchtopk", "matryoshka", "matching_pursuit")

ROWS = 1024
"""Activations encoded at once."""


def k_for(l0: int) -> int:
    """Most nonzeros of a code with a mean of `l0`."""
    return 3 * l0 if l0 <= 40 else 2 * l0


def make(kind: str, x: Activations, d_sae: int, l0: int, seed: int) -> ITDA:
    common: dict[str, Any] = dict(d_sae=d_sae, seed=seed, labels=x.labels)
    if kind == "prefix":
        return fit(x.values, k=l0, **common | {"d_sae": 2 * d_sae}).prefix(d_sae)
    if kind in ("itda", "updated"):
        return fit(x.values, k=l0, update=kind == "updated", **common)
    if kind in ("itda-l0", "updated-l0"):
        return fit(x.values, k=k_for(l0), l0=l0, update=kind == "updated-l0", **common)
    if kind == "paper":
        return fit(x.values, k=l0, preset="paper", **common)
    if kind == "random":
        return random_atoms(x.values, k=l0, **common)
    return principal_components(x.values, k=l0)


def at_equal_l0(sae: SAE[Any], kind: str, l0: int, x: Tensor) -> None:
    """Calibrate what has a threshold on the validation split: other text takes other numbers."""
    if isinstance(sae, ITDA) and sae.cfg.l0 is not None:
        sae.calibrate(x, l0)
    elif hasattr(sae, "threshold"):
        threshold: Tensor = sae.threshold  # pyright: ignore[reportAssignmentType]
        threshold.data.zero_()
        codes = torch.cat([sae.encode(rows) for rows in x.split(ROWS)])
        threshold.data.fill_(codes.flatten().topk(l0 * len(x)).values[-1])


def measure(sae: SAE[Any], x: Activations) -> dict[str, float]:
    """FVU and L0, and for labelled dictionaries how often labels name the token that atoms fire on."""
    meter, nonzeros, energy, labelled, shuffled = RunningFVU(), 0, 0.0, 0.0, 0.0
    own = sae.labels if isinstance(sae, ITDA) and sae.cfg.metadata["itda_labels"] else None
    names = [label.token for label in own] if own is not None else []
    number = {token: i for i, token in enumerate({*names, *(label.token for label in x.labels)})}
    device = x.values.device
    of_atom = torch.tensor([number[name] for name in names], device=device)
    of_row = torch.tensor([number[label.token] for label in x.labels], device=device)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(x.values), ROWS):
        rows = x.values[start : start + ROWS]
        if isinstance(sae, ITDA):
            codes = sae.encode_sparse(rows)
            meter.update(rows, sae.decode_sparse(codes))
            nonzeros += int(codes.l0().sum())
            if own is not None:
                weight = codes.values.square()
                here = of_row[start : start + ROWS, None]
                energy += weight.sum().item()
                labelled += weight[of_atom[codes.indices] == here].sum().item()
                shuffled += weight[of_atom[order][codes.indices] == here].sum().item()
        else:
            dense = sae.encode(rows)
            meter.update(rows, sae.decode(dense))
            nonzeros += int((dense != 0).sum())
    found = {"fvu": meter.value(), "l0": nonzeros / len(x.values)}
    if own is not None:
        cosines = torch.tensor([label.cosine for label in own])
        found |= {"labelled": labelled / energy, "shuffled": shuffled / energy}
        found |= {"cosine": cosines.median().item(), "cosine_5": cosines.quantile(0.05).item()}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; FVU as a multiple of the TopK SAE's at the same setting, seconds likewise."""
    lines = [
        "| dictionary | L0 | FVU | by TopK's | seconds | by TopK's | token | shuffled | cosine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rival = next((row for row in rows if row["kind"] == "topk"), None)
    for row in rows:
        ratios = ("", "")
        if rival is not None:
            share = row["seconds"] / rival["seconds"]
            ratios = (f"{row['fvu'] / rival['fvu']:.2f}", f"{share:.1%}")
        labels = ("", "", "")
        if "labelled" in row:
            cosine = f"{row['cosine']:.3f} ({row['cosine_5']:.3f})"
            labels = (f"{row['labelled']:.3f}", f"{row['shuffled']:.3f}", cosine)
        lines.append(
            f"| {KINDS[row['kind']]} | {row['l0']:.1f} | {row['fvu']:.4f} | {ratios[0]} "
            f"| {row['seconds']:.1f} | {ratios[1]} | {' | '.join(labels)} |"
        )
    return "\n".join(lines)


class Splits(NamedTuple):
    """Activations at one hook point: to build from, to calibrate thresholds on, to measure on."""

    train: Activations
    validation: Tensor
    test: Activations


def split(lm: LanguageModel, layer: int, max_tokens: int) -> Splits:
    hook = f"blocks.{layer}.hook_resid_post"
    texts, held_out = reference_prose()
    validation = collect(lm, texts[-HELD_OUT:], [hook])[hook].values
    drawn = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
    return Splits(
        collect(lm, texts[:-HELD_OUT], [hook], max_tokens=max_tokens)[hook],
        validation[drawn[:4096]],
        collect(lm, held_out, [hook])[hook],
    )


def trained(setting: dict[str, Any], x: Activations, out: Path) -> tuple[SAE[Any], float]:
    """The SAE of this setting as it is used, kept in OUT/trained, and the seconds of its training."""
    folder = out / "trained"
    name = "-".join(str(value) for value in setting.values())

    def train() -> dict[str, Any]:
        start = time.perf_counter()
        with torch.enable_grad():
            sae = train_sae(
                x.values, architecture=setting["kind"], d_sae=setting["d_sae"], k=setting["target"],
                epochs=setting["epochs"], seed=setting["seed"],
            )  # fmt: skip
        seconds = time.perf_counter() - start
        save_inference(sae, folder / name)
        return {"seconds": seconds}

    seconds = Results(folder).once(setting, train)["seconds"]
    return SAE.load_from_disk(folder / name, device=str(x.values.device)), seconds


def run(setting: dict[str, Any], data: Splits, out: Path) -> dict[str, float]:
    """Build or train one dictionary, calibrate it, measure it."""
    kind, l0 = setting["kind"], setting["target"]
    if kind in TRAINED:
        sae, seconds = trained(setting, data.train, out)
    else:
        start = time.perf_counter()
        sae = make(kind, data.train, setting["d_sae"], l0, setting["seed"])
        seconds = time.perf_counter() - start
    at_equal_l0(sae, kind, l0, data.validation)
    return {"seconds": seconds} | measure(sae, data.test)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[10])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[1024])
    parser.add_argument("--l0", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=80_000, help="activations to build from, at most")
    parser.add_argument("--epochs", type=int, default=8, help="of the trained SAEs")
    options = parser.parse_args()

    results = Results(options.out)
    lm = language_model(load())
    for layer in options.layers:
        data = split(lm, layer, options.tokens)
        for d_sae, l0, seed in product(options.d_sae, options.l0, options.seeds):
            shown = []
            for kind in options.kinds:
                setting = dict(layer=layer, d_sae=d_sae, target=l0, kind=kind, seed=seed)
                setting |= dict(tokens=len(data.train.values))
                setting |= dict(epochs=options.epochs if kind in TRAINED else None)
                shown.append(results.once(setting, partial(run, setting, data, options.out)))
                print(shown[-1], flush=True)
            print(
                f"\nlayer {layer}, {d_sae} atoms, L0 {l0}, seed {seed}\n\n{table(shown)}\n", flush=True
            )


if __name__ == "__main__":
    main()

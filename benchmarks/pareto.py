"""Reconstruction over L0 and width, against what one would train instead: the tables of docs/quality.md.

    python benchmarks/pareto.py OUT [--layers 10] [--d-sae 1024] [--l0 10 20 40 80] [--kinds itda topk]

Text: the Python language reference on SmolLM2, as in `itda demo`; the last eight of the articles to
build from are a validation split, to calibrate thresholds on; the held-out articles are measured.
Every figure is kept in OUT/results.jsonl, and one that is there is not computed again: stop it when you
like. Nothing else should run meanwhile, or the seconds mean nothing.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measures import ROWS
from results import Results
from sae_lens import SAE
from torch import Tensor

from itda_lens import ITDA, fit
from itda_lens.analysis import evaluate
from itda_lens.architectures import baseline, save_inference, train_sae
from itda_lens.dictionary import RunningFVU
from itda_lens.sae import coded, labels_of
from itda_lens.samples import HELD_OUT, reference_prose
from itda_lens.samples.smollm2 import load
from itda_lens.sources import LanguageModel, language_model
from itda_lens.training import Activations, collect

KINDS = {
    "itda": "ITDA",
    "itda-omp": "ITDA, encoder OMP",
    "itda-omp-l0": "ITDA, encoder OMP, mean L0",
    "itda-l0": "ITDA, mean L0",
    "prefix": "ITDA, first half of one twice as wide",
    "updated": "ITDA updated",
    "updated-l0": "ITDA updated, mean L0",
    "near-l0": "ITDA updated, cosines of 0.99, mean L0",
    "thorough": "ITDA, preset thorough",
    "thorough-l0": "ITDA, preset thorough, mean L0",
    "thorough-near-l0": "ITDA, preset thorough, updated, cosines of 0.99, mean L0",
    "thorough-updated-l0": "ITDA, preset thorough, updated, mean L0",
    "paper": "ITDA, preset paper",
    "random": "random activations",
    "pca": "principal components",
    "topk": "TopK SAE",
    "batchtopk": "BatchTopK SAE",
    "matryoshka": "Matryoshka BatchTopK SAE",
    "matching_pursuit": "SAELens's MatchingPursuitSAE, trained",
}

FITTED: dict[str, dict[str, Any]] = {
    "itda": dict(),
    "itda-omp": dict(method="omp"),
    "updated": dict(update=True),
    "near": dict(update=True, least_cosine=0.99),
    "thorough": dict(preset="thorough"),
    "thorough-near": dict(preset="thorough", update=True, least_cosine=0.99),
    "thorough-updated": dict(preset="thorough", update=True),
    "paper": dict(preset="paper"),
}
"""Arguments of `fit`; "-l0" behind such a kind asks for a mean L0."""

TRAINED = ("topk", "batchtopk", "matryoshka", "matching_pursuit")

TRAINING = ("layer", "d_sae", "target", "kind", "seed", "tokens", "epochs")
"""Entries of a setting that decide about training."""


def k_for(l0: int) -> int:
    """Most nonzeros of a code with a mean of `l0`."""
    return 3 * l0 if l0 <= 40 else 2 * l0


def make(kind: str, x: Activations, d_sae: int, l0: int, seed: int) -> SAE[Any]:
    common: dict[str, Any] = dict(d_sae=d_sae, seed=seed, labels=x.labels)
    if kind == "prefix":
        return fit(x.values, k=l0, **common | {"d_sae": 2 * d_sae}).prefix(d_sae)
    if kind in FITTED:
        return fit(x.values, k=l0, **FITTED[kind], **common)
    if kind.removesuffix("-l0") in FITTED:
        return fit(x.values, k=k_for(l0), l0=l0, **FITTED[kind.removesuffix("-l0")], **common)
    return baseline(kind, x.values, k=l0, **common)  # pyright: ignore


def at_equal_l0(sae: SAE[Any], kind: str, l0: int, x: Tensor) -> None:
    """Calibrate a threshold, if there is one, on the validation split: other text takes other
    numbers."""
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
    own = labels_of(sae)
    names = [label.token for label in own] if own is not None else []
    number = {token: i for i, token in enumerate({*names, *(label.token for label in x.labels)})}
    device = x.values.device
    of_atom = torch.tensor([number[name] for name in names], device=device)
    of_row = torch.tensor([number[label.token] for label in x.labels], device=device)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    for part, tokens in zip(coded(sae, x.values, ROWS), of_row.split(ROWS), strict=True):
        codes = part.codes
        meter.update(part.x, part.reconstruction)
        nonzeros += int(codes.l0().sum())
        if own is not None:
            weight, here = codes.values.square(), tokens[:, None]
            energy += weight.sum().item()
            labelled += weight[of_atom[codes.indices] == here].sum().item()
            shuffled += weight[of_atom[order][codes.indices] == here].sum().item()
    found = {"fvu": meter.value(), "l0": nonzeros / len(x.values)}
    if own is not None:
        cosines = torch.tensor([label.cosine for label in own])
        found |= {"labelled": labelled / energy, "shuffled": shuffled / energy}
        found |= {"cosine": cosines.median().item(), "cosine_5": cosines.quantile(0.05).item()}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; FVU and seconds also as multiples of those of the TopK SAE of most epochs."""
    lines = [
        "| dictionary | epochs | L0 | FVU | by TopK's | CE-loss score | seconds | by TopK's | token "
        "| shuffled | cosine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    trained_longest = sorted(rows, key=lambda row: -(row["epochs"] or 0))
    rival = next((row for row in trained_longest if row["kind"] == "topk"), None)
    for row in rows:
        ratios = ("", "")
        if rival is not None:
            share = row["seconds"] / rival["seconds"]
            ratios = (f"{row['fvu'] / rival['fvu']:.2f}", f"{share:.1%}")
        labels = ("", "", "")
        if "labelled" in row:
            cosine = f"{row['cosine']:.3f} ({row['cosine_5']:.3f})"
            labels = (f"{row['labelled']:.3f}", f"{row['shuffled']:.3f}", cosine)
        cells = [KINDS[row["kind"]], str(row["epochs"] or ""), f"{row['l0']:.1f}", f"{row['fvu']:.4f}"]
        cells += [ratios[0], f"{row['ce_loss_score']:.4f}", f"{row['seconds']:.1f}", ratios[1], *labels]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Splits(NamedTuple):
    """Activations at one hook point: to build from, to calibrate thresholds on, to measure on."""

    hook: str
    train: Activations
    validation: Tensor
    test: Activations


def split(lm: LanguageModel, layer: int, max_tokens: int) -> Splits:
    hook = f"blocks.{layer}.hook_resid_post"
    texts, held_out = reference_prose()
    validation = collect(lm, texts[-HELD_OUT:], [hook])[hook].values
    drawn = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
    return Splits(
        hook,
        collect(lm, texts[:-HELD_OUT], [hook], max_tokens=max_tokens)[hook],
        validation[drawn[:4096]],
        collect(lm, held_out, [hook])[hook],
    )


def trained(setting: dict[str, Any], x: Activations, out: Path) -> tuple[SAE[Any], float]:
    """The SAE of this setting as it is used, kept in OUT/trained, and the seconds of its training."""
    folder = out / "trained"
    setting = {name: setting[name] for name in TRAINING}
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


def obtain(setting: dict[str, Any], data: Splits, out: Path) -> tuple[SAE[Any], float]:
    """Build or train one dictionary, and calibrate it; the seconds are of the former."""
    kind, l0 = setting["kind"], setting["target"]
    if kind in TRAINED:
        sae, seconds = trained(setting, data.train, out)
    else:
        start = time.perf_counter()
        sae = make(kind, data.train, setting["d_sae"], l0, setting["seed"])
        seconds = time.perf_counter() - start
    at_equal_l0(sae, kind, l0, data.validation)
    return sae, seconds


def splice(lm: LanguageModel, sae: SAE[Any], hook: str, max_tokens: int) -> float:
    """CE-loss score on the first held-out tokens."""
    sae.cfg.metadata.hook_name = hook
    (found,) = evaluate(lm, [sae], reference_prose()[1], max_tokens=max_tokens, progress=False)
    return found.ce_loss_score


def figures(setting: dict[str, Any], lm: LanguageModel, data: Splits, out: Path) -> dict[str, Any]:
    """The figures of one setting."""
    sae, seconds = obtain(setting, data, out)
    score = splice(lm, sae, data.hook, setting["ce_tokens"])
    return {"seconds": seconds, "ce_loss_score": score} | measure(sae, data.test)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[10])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[1024])
    parser.add_argument("--l0", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[80_000], help="to build from, at most")
    parser.add_argument("--epochs", type=int, nargs="+", default=[8], help="of the trained SAEs")
    parser.add_argument("--ce-tokens", type=int, default=4096, help="spliced into the model")
    options = parser.parse_args()

    results = Results(options.out)
    lm = language_model(load())
    for layer, tokens in product(options.layers, options.tokens):
        data = split(lm, layer, tokens)
        for d_sae, l0, seed in product(options.d_sae, options.l0, options.seeds):
            common = dict(layer=layer, d_sae=d_sae, target=l0, ce_tokens=options.ce_tokens)
            settings = [
                common | dict(kind=kind, seed=seed, tokens=len(data.train.values), epochs=epochs)
                for kind in options.kinds
                for epochs in (options.epochs if kind in TRAINED else [None])
            ]
            rows = [
                results.once(setting, lambda s=setting, d=data: figures(s, lm, d, options.out))
                for setting in settings
            ]
            title = f"layer {layer}, {d_sae} atoms, L0 {l0}, seed {seed}, {settings[0]['tokens']} tokens"
            print(f"\n{title}\n\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()

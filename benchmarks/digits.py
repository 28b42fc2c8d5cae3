"""Do the names of atoms predict the class of an image? The tables of docs/modules.md.

    python benchmarks/digits.py [--seeds 0 1 2 3 4] [--atoms 20 50 100 200] [--k 8]

A small network learns scikit-learn's digits (8 x 8 pixels, ten classes). Its hidden layer gets a
dictionary of training images, whose atoms are named by their classes. An image that is held out is
given the class whose atoms have the largest sum of coefficients in its code ("sum"), or the class of
the atom with the largest coefficient ("top"). Beside it stand activations drawn at random in equal
number, coded in the same way, and the atoms with their names shuffled.
"""

import argparse
from statistics import mean, stdev

import torch
from measures import fvu_and_l0
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from itda_lens import ITDA, build_module
from itda_lens.architectures import random_atoms
from itda_lens.sources import AnyModule, ModuleSource, gathered

HIDDEN = "3"
"""Path of the layer: what follows the second ReLU."""

TRAINED_ON = 1200


def digits() -> tuple[Tensor, Tensor]:
    """Images as rows of 64 pixels between 0 and 1, in an order drawn once, and their classes."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def network(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net


def accuracy(itda: ITDA, names: list[str], x: Tensor, y: Tensor) -> tuple[float, float]:
    """Share of images whose class the names of their atoms tell: by sum, and by the largest."""
    classes = torch.tensor([int(name) for name in names])
    codes = itda.encode_sparse(x)
    sums = torch.zeros(len(x), 10).scatter_add_(1, classes[codes.indices], codes.values)
    top = classes[codes.indices.gather(1, codes.values.argmax(dim=1, keepdim=True))[:, 0]]
    return (sums.argmax(dim=1) == y).float().mean().item(), (top == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--atoms", type=int, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--k", type=int, default=8)
    options = parser.parse_args()
    x, y = digits()
    train, test = slice(0, TRAINED_ON), slice(TRAINED_ON, None)
    figures: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    own = []
    for seed in options.seeds:
        net = network(x[train], y[train], seed)
        own.append((net(x[test]).argmax(dim=1) == y[test]).float().mean().item())
        images = DataLoader(TensorDataset(x[train], y[train]), batch_size=256)
        how = dict(
            label=lambda number, batch, image: int(batch[1][image]),
            call=lambda net, batch: net(batch[0]),
            item="image",
        )
        rows, places = gathered(ModuleSource(net, HIDDEN, images, **how))[HIDDEN]
        held_out = AnyModule(net).capture(x[test], HIDDEN)[HIDDEN]
        for d_sae in options.atoms:
            made = build_module(
                net, HIDDEN, images, **how, d_sae=d_sae, k=options.k, seed=seed, progress=False
            )
            drawn = random_atoms(rows, d_sae=d_sae, k=options.k, labels=places, seed=seed)
            for kind, itda in (("ITDA", made[HIDDEN]), ("random activations", drawn)):
                names = [label.name or "" for label in itda.labels]
                order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed)).tolist()
                shuffled = accuracy(itda, [names[i] for i in order], held_out, y[test])
                figures.setdefault((d_sae, kind), []).append(
                    (*accuracy(itda, names, held_out, y[test]), shuffled[0],
                     fvu_and_l0(itda, held_out)[0])
                )  # fmt: skip
    print(f"held-out images: {len(y[test])}; k = {options.k}; seeds {options.seeds}")
    print(f"accuracy of the network itself: {100 * mean(own):.1f} %\n")
    print("| atoms | dictionary | accuracy by sum, % | by top atom, % | names shuffled, % | FVU |")
    print("|---|---|---|---|---|---|")
    for (d_sae, kind), rows in figures.items():
        columns = list(zip(*rows, strict=True))
        cells = [f"{100 * mean(c):.1f} ± {100 * _spread(c):.1f}" for c in columns[:3]]
        cells.append(f"{mean(columns[3]):.4f} ± {_spread(columns[3]):.4f}")
        print(f"| {d_sae} | {kind} | {' | '.join(cells)} |")


def _spread(values: tuple[float, ...]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()

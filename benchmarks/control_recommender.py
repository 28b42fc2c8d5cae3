"""A small sequential recommender with known categories, for `control.py recsae`.

Items belong to categories. A user stays in a category for a while, then moves to another one. A GRU
learns to tell the next item; an ITDA is fitted to the state before its prediction. Removing the atoms of
a category should lower the rate at which its items are recommended, and no other rate.
"""

import torch
from torch import Tensor, nn

import itda_lens
from itda_lens.sae import moved, sparse_codes

CATEGORIES, ITEMS, WIDTH, LENGTH, STAY = 8, 25, 64, 20, 0.85


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Items [count, LENGTH] and their categories."""
    category = torch.randint(CATEGORIES, (count, 1), generator=generator)
    columns = [category]
    for _ in range(LENGTH - 1):
        move = torch.rand(count, 1, generator=generator) > STAY
        other = torch.randint(CATEGORIES, (count, 1), generator=generator)
        columns.append(torch.where(move, other, columns[-1]))
    categories = torch.cat(columns, dim=1)
    # Within a category some items are liked more than others.
    popular = (torch.rand(categories.shape, generator=generator) ** 2 * ITEMS).long()
    return categories * ITEMS + popular, categories


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CATEGORIES * ITEMS, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CATEGORIES * ITEMS)

    def states(self, items: Tensor) -> Tensor:
        return self.gru(self.embed(items))[0]


def trained(items: Tensor, seed: int) -> Recommender:
    torch.manual_seed(seed)
    model = Recommender()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        for part in items[torch.randperm(len(items))].split(128):
            logits = model.head(model.states(part[:, :-1]))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def rates(logits: Tensor) -> Tensor:
    """Share of the ten best items that belong to each category."""
    best = logits.topk(10, dim=-1).indices // ITEMS
    return torch.stack([(best == c).double().mean() for c in range(CATEGORIES)])


@torch.no_grad()
def measured(seed: int, d_sae: int = 256, k: int = 8, count: int = 16) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    items, categories = sequences(2000, generator)
    with torch.enable_grad():
        model = trained(items, seed)
    x, now = model.states(items).flatten(0, 1), categories.flatten()
    sae = itda_lens.fit(x[:20_000], d_sae=d_sae, k=k)
    fresh, fresh_categories = sequences(400, generator)
    y, truth = model.states(fresh).flatten(0, 1), fresh_categories.flatten()
    code = sparse_codes(sae, x[-10_000:]).to_dense(d_sae).abs()
    means = torch.stack([code[now[-10_000:] == c].mean(dim=0) for c in range(CATEGORIES)])
    contrast = means - (means.sum(dim=0) - means) / (CATEGORIES - 1)
    before, own, other, null = rates(model.head(y)), [], [], []
    plain_hits = (model.head(y).argmax(dim=-1) // ITEMS == truth).double().mean()
    codes = sparse_codes(sae, y).to_dense(d_sae)
    for category in range(CATEGORIES):
        atoms = contrast[category].topk(count).indices
        random = torch.randperm(d_sae, generator=generator)[:count]
        changes = []
        for chosen in (atoms, random):
            change = moved(sae, y, -codes[:, chosen], chosen.tolist())
            changes.append(change)
        # Random atoms with changes as long as the edit's, token by token.
        lengths = changes[0].norm(dim=1, keepdim=True)
        unit = torch.nn.functional.normalize(sae.W_dec[random].sum(dim=0), dim=0)
        unit = unit if unit @ changes[0].mean(dim=0) >= 0 else -unit
        after, control = (rates(model.head(y + c)) for c in (changes[0], lengths * unit))
        left = torch.arange(CATEGORIES) != category
        own.append((after[category] / before[category]).item())
        other.append((after[left] / before[left]).mean().item())
        null.append((control[category] / before[category]).item())
    n = CATEGORIES
    return dict(
        category_hits=plain_hits.item(),
        own=sum(own) / n, worst_own=max(own), other=sum(other) / n, random_own=sum(null) / n,
        fvu=((y - sae(y)).square().sum() / (y - y.mean(dim=0)).square().sum()).item(),
    )  # fmt: skip

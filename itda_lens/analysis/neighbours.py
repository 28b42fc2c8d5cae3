"""Atoms that belong together: by direction, by use, and by the tokens that they promote."""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

CHUNK_NUMBERS = 2**24
"""Most numbers of one block of cosines, logits or counts: 64 MB in float32."""


def nearest_atoms(
    atoms: Float[Tensor, "d_sae d_in"], n: int, bar: tqdm
) -> tuple[Int[np.ndarray, "d_sae n"], Float[np.ndarray, "d_sae n"]]:
    """For each atom, the others of largest absolute cosine, and the signed cosines."""
    unit = torch.nn.functional.normalize(atoms.float(), dim=-1)
    n = min(n, len(unit) - 1)
    found, cosines = [], []
    for start, part in _blocks(unit, len(unit)):
        likeness = part @ unit.T
        own = torch.arange(len(part), device=part.device)
        size = likeness.abs()
        size[own, start + own] = -1
        best = size.topk(n, dim=-1).indices
        found.append(best.numpy())
        cosines.append(likeness.gather(-1, best).numpy())
        bar.update(len(part))
    return np.concatenate(found), np.concatenate(cosines)


def changed_logits(
    atoms: Float[Tensor, "d_sae d_in"], weights: Float[Tensor, "d_in vocab"], n: int, bar: tqdm
) -> tuple[Int[np.ndarray, "d_sae 2n"], Float[np.ndarray, "d_sae 2n"]]:
    """The tokens that each atom promotes most and, after these, those that it suppresses most.

    Returns:
        Their ids, and the changes of their logits for a coefficient of 1, less the mean over all tokens.
        The first n fall from the highest, the others rise from the lowest.
    """
    ids, changes = [], []
    n = min(n, weights.shape[1])
    centred = weights - weights.mean(dim=1, keepdim=True)
    for _, part in _blocks(atoms.float(), weights.shape[1]):
        logits = part @ centred
        highest, lowest = logits.topk(n, dim=-1), logits.topk(n, dim=-1, largest=False)
        ids.append(torch.cat([highest.indices, lowest.indices], dim=-1).numpy())
        changes.append(torch.cat([highest.values, lowest.values], dim=-1).numpy())
        bar.update(len(part))
    return np.concatenate(ids), np.concatenate(changes)


def firing_together(
    atoms: Int[np.ndarray, "tokens k"],
    values: Float[np.ndarray, "tokens k"],
    d_sae: int,
    n: int,
    bar: tqdm,
) -> tuple[Int[np.ndarray, "d_sae n"], Int[np.ndarray, "d_sae n"], Int[np.ndarray, " d_sae"]]:
    """For each atom, those that have a nonzero coefficient at the same tokens more often than by chance.

    They are ranked by the phi coefficient: the correlation of firing with firing over the tokens.

    Returns:
        The other atoms, -1 where there are fewer than n that fire together with it more often than by
        chance; the tokens at which both fire; and the tokens at which each atom fires.
    """
    token, slot = np.nonzero(values)
    fires = sparse.csr_matrix(
        (np.ones(len(token), dtype=np.float32), (token, atoms[token, slot])),
        shape=(len(atoms), d_sae),
    )
    count = np.asarray(fires.sum(axis=0)).ravel()
    tokens = max(1, len(atoms))
    spread = np.sqrt(count * (1 - count / tokens))
    others = np.full((d_sae, n), -1, dtype=np.int64)
    together = np.zeros((d_sae, n), dtype=np.int64)
    step = max(1, CHUNK_NUMBERS // d_sae)
    by_atom = fires.T.tocsr()
    for start in range(0, d_sae, step):
        stop = min(d_sae, start + step)
        both = (by_atom[start:stop] @ fires).tocoo()
        atom, other, n_both = both.row + start, both.col, both.data
        above = n_both - count[atom] * count[other] / tokens
        phi = above / np.maximum(spread[atom] * spread[other], 1e-12)
        real = (above > 0) & (atom != other)
        atom, other, n_both, phi = (part[real] for part in (atom, other, n_both, phi))
        order = np.lexsort((other, -phi, atom))
        atom, other, n_both = atom[order], other[order], n_both[order]
        place = np.arange(len(atom)) - np.searchsorted(atom, atom)
        first = place < n
        others[atom[first], place[first]] = other[first]
        together[atom[first], place[first]] = n_both[first]
        bar.update(stop - start)
    return others, together, count.astype(np.int64)


def _blocks(rows: Float[Tensor, "n d"], columns: int):
    step = max(1, CHUNK_NUMBERS // max(1, columns))
    for start in range(0, len(rows), step):
        yield start, rows[start : start + step]

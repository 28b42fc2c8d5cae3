"""Tables of the rows of a Gram matrix: all of them, or those that fit into memory."""

import os
import threading
import weakref

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from itda_lens.pursuit.fixed_point import fixed_point

_tables: "weakref.WeakSet[GramRows | WholeGram]" = weakref.WeakSet()


def _after_fork() -> None:
    for table in _tables:
        table.lock = threading.Lock()  # a thread that the child does not have may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class GramRows:
    """Rows of the Gram matrix of `atoms` in fixed point, computed when a pursuit first needs them.

    Rows are kept within a budget. Once it is full, the rows that were not used for longest make room. A
    row costs one product with all atoms. Real activations use some atoms much more than others, so most
    rows are used again once they are there. Codes do not depend on which rows are kept. One pursuit, of
    any number of threads, uses a table at a time (`lock`).

    Attributes:
        shape: shape of the whole matrix.
        rows: int16 [capacity, n]; memory is taken as rows are filled.
        slots: int64 [n], where each atom's row is; -1 if nowhere.
        used: int64 [capacity], the last turn in which a row was used; 0 for an empty one.
        turn: the current turn. Rows used in it stay.
    """

    dtype = torch.int16

    def __init__(self, atoms: Float[Tensor, "n d"], budget_bytes: int) -> None:
        n = len(atoms)
        capacity = min(n, budget_bytes // (n * self.dtype.itemsize))
        self.shape = torch.Size((n, n))
        with torch.inference_mode(False):  # what is made in inference mode must serve later passes
            self.rows = torch.empty(capacity, n, dtype=self.dtype, device="cpu")
            self.slots = torch.full((n,), -1, dtype=torch.long, device="cpu")
            self.used = torch.zeros(capacity, dtype=torch.long, device="cpu")
            self._atom_of = torch.full((capacity,), -1, dtype=torch.long, device="cpu")
        self.turn = 0
        self.lock = threading.Lock()
        _tables.add(self)
        self._atoms, self._budget_bytes = atoms.detach().float(), budget_bytes

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[type["GramRows"], tuple[Tensor, int]]:
        return type(self), (self._atoms, self._budget_bytes)  # a copy begins empty, with its own lock

    def add(self, atoms: Int[Tensor, " m"]) -> None:
        """Compute the rows of these atoms; those used in this turn must leave room for them."""
        where = self.used.argsort(stable=True)[: len(atoms)]
        replaced = self._atom_of[where]
        # An interrupt at any point leaves rows unused, never a row under the wrong atom.
        self.slots[replaced[replaced >= 0]] = -1
        self._atom_of[where] = -1
        self.used[where] = 0
        fixed_point(self._atoms[atoms], self._atoms, self.rows, where)
        self._atom_of[where] = atoms
        self.used[where] = self.turn
        self.slots[atoms] = where


class WholeGram:
    """A whole Gram matrix, in the form of `GramRows`."""

    def __init__(self, gram: Int16[Tensor, "n n"]) -> None:
        n, pitch = len(gram), gram.stride(0)
        # Rows without gaps, which the kernels want: of the larger matrix if this is a corner of one.
        if gram.stride(1) == 1 and pitch >= n and gram.storage_offset() == 0:
            self.rows = gram.as_strided((n, pitch), (pitch, 1))
        else:
            self.rows = gram.contiguous()
        self.slots = torch.arange(n, device="cpu")
        self.used = torch.zeros(n, dtype=torch.long, device="cpu")
        self.turn = 0
        self.lock = threading.Lock()
        _tables.add(self)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, atoms: Int[Tensor, " m"]) -> None:
        assert not len(atoms), "every row is there"

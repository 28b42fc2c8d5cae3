"""Atoms made ready for a pursuit, and activations coded with them: checks, chunks, dtypes, gradients."""

from dataclasses import replace

import torch
from einops import pack, unpack
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from itda_lens.pursuit import compiled, gpu
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.coding import DEFAULT_RTOL, Coding, Method
from itda_lens.pursuit.finite import check_rows
from itda_lens.pursuit.gram import GramMatrix, gram_dtype, gram_matrix, leave_out
from itda_lens.pursuit.gram_rows import GramRows
from itda_lens.pursuit.methods import PURSUITS
from itda_lens.pursuit.precision import at_least_float32, check_floats, full_precision
from itda_lens.pursuit.scales import at_ordinary_size
from itda_lens.pursuit.transforms import beneath, differentiated, rowwise, with_derivative

ROWS_PER_CHUNK = {"compiled": 1024, "gram": 64, "gemm": 1024}
"""Rows worked on at once on a CPU. With a Gram matrix in torch, they are few enough for their
correlations to stay in cache. Otherwise they are enough for the matrix product to run at full speed."""

CUDA_ROWS_PER_CHUNK = 4096
"""Rows worked on at once on a GPU: enough to fill it. The number bounds the memory for correlations."""


class PreparedAtoms:
    """A dictionary together with a coding, and the Gram matrix that serves them best.

    Attributes:
        atoms: rows of unit norm.
        coding: the settings of the pursuit.
        gram: the result of `gram_matrix` for them. Its form decides how fast codes are found. It also
            decides the last bits of codes that torch's forms find.
    """

    atoms: Float[Tensor, "n d"]
    coding: Coding
    gram: GramMatrix | None

    def __init__(
        self, atoms: Float[Tensor, "n d"], coding: Coding, budget_bytes: int | None = None
    ) -> None:
        """Compute the Gram matrix of the atoms.

        Args:
            atoms: rows of unit norm.
            budget_bytes: memory for the Gram matrix; see `gram_matrix` for this and for the default.

        Raises:
            ValueError: `atoms` is not a matrix, or has fewer rows than `coding.k`.
            TypeError: `atoms` is no dense tensor of a floating dtype.
        """
        _check_atoms(atoms, coding)
        gram = gram_matrix(atoms, budget_bytes, method=coding.method, signed=coding.signed)
        self._hold(atoms, coding, gram, budget_bytes)

    @classmethod
    def with_gram(cls, atoms: Float[Tensor, "n d"], coding: Coding, gram: GramMatrix | None) -> Self:
        """Prepare atoms whose Gram matrix is known already; None selects torch's GEMM form.

        Raises:
            ValueError: as the class, or `gram` does not fit the atoms or does not serve the coding.
            TypeError: as the class.
        """
        _check_atoms(atoms, coding)
        prepared = cls.__new__(cls)
        prepared._hold(atoms, coding, gram, None)
        return prepared

    def _hold(
        self, atoms: Tensor, coding: Coding, gram: GramMatrix | None, budget_bytes: int | None
    ) -> None:
        _check_gram(atoms, coding, gram)
        self.atoms, self.coding, self.gram = atoms, coding, gram
        self._budget_bytes = budget_bytes

    def __len__(self) -> int:
        """The number of atoms."""
        return len(self.atoms)

    def with_coding(self, coding: Coding) -> "PreparedAtoms":
        """The atoms with another coding; the Gram matrix is computed again only for another pursuit.

        Raises:
            ValueError: there are fewer atoms than `coding.k`.
        """
        if (coding.method, coding.signed) != (self.coding.method, self.coding.signed):
            return PreparedAtoms(self.atoms, coding, self._budget_bytes)
        return self._with(self.atoms, coding, self.gram)

    def keeping(self, indices: Int[Tensor, " m"]) -> "PreparedAtoms":
        """Some of the atoms, in the order of `indices`, with their part of the Gram matrix.

        If `coding.k` is more than the number of atoms kept, it becomes that number. If the Gram matrix
        was too large for its budget, that of the kept atoms is tried again.

        Raises:
            ValueError: `indices` is empty.
        """
        atoms, coding = self.atoms[indices], self._coding_for(len(indices))
        if isinstance(self.gram, Tensor):
            return self._with(atoms, coding, self.gram[indices][:, indices])
        return PreparedAtoms(atoms, coding, self._budget_bytes)

    def without(self, start: int, stop: int, budget_bytes: int | None = None) -> "PreparedAtoms":
        """All atoms but those from `start` to before `stop`, as `keeping` would give them.

        Args:
            budget_bytes: for a Gram matrix that has to be computed; default: as for these atoms.

        Raises:
            ValueError: no atom is left.
        """
        atoms = torch.cat([self.atoms[:start], self.atoms[stop:]])
        coding = self._coding_for(len(atoms))
        if isinstance(self.gram, Tensor):
            return self._with(atoms, coding, leave_out(self.gram, start, stop))
        budget_bytes = self._budget_bytes if budget_bytes is None else budget_bytes
        return PreparedAtoms(atoms, coding, budget_bytes)

    def _coding_for(self, n_atoms: int) -> Coding:
        return replace(self.coding, k=min(self.coding.k, n_atoms))

    def _with(self, atoms: Tensor, coding: Coding, gram: GramMatrix | None) -> "PreparedAtoms":
        prepared = PreparedAtoms.with_gram(atoms, coding, gram)
        prepared._budget_bytes = self._budget_bytes
        return prepared

    def encode(self, x: Float[Tensor, "*batch d"]) -> SparseCodes:
        """Sparse codes of `x`, as the function `encode` gives them.

        Raises:
            ValueError: `x` has another width or device than the atoms, or holds NaN or infinity.
            TypeError: `x` is no dense tensor of a floating dtype.
        """
        _check_x(x, self.atoms, self.gram)
        dtype = torch.promote_types(at_least_float32(x.dtype), self.atoms.dtype)
        rows, batch = pack([x], "* d")
        rows, atoms, gram = rows.to(dtype), self.atoms.to(dtype), self.gram
        if isinstance(gram, Tensor) and gram.is_floating_point():
            gram = beneath(lambda plain: plain.to(dtype), gram)
        with full_precision(x.device):
            chunks = [
                _encode_chunk(chunk, atoms, gram, self.coding)
                for chunk in rows.split(_chunk_rows(rows, gram))
                if len(chunk)
            ]
        if not chunks:
            empty = rows.new_zeros(*x.shape[:-1], self.coding.k)
            return SparseCodes(empty.long(), empty)
        indices, values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return SparseCodes(*unpack(indices, batch, "* k"), *unpack(values, batch, "* k"))


def encode(
    x: Float[Tensor, "*batch d"],
    atoms: Float[Tensor, "n d"],
    k: int,
    *,
    method: Method = "mp",
    signed: bool = True,
    rtol: float = DEFAULT_RTOL,
    threshold: float = 0.0,
    gram: GramMatrix | None = None,
) -> SparseCodes:
    """Sparse codes of `x` over unit-norm `atoms`, at most `k` nonzeros a row, in one call.

    Each row depends on itself alone. Ties go to the atom of lowest index. Two equal atoms never share a
    code under "omp" and "ols" and need not under "mp", and the lower index wins where their correlations
    are equal bit for bit. Inputs in bf16 and fp16 are coded in float32, and their codes are float32.
    Autocast and the settings that allow TF32 or bfloat16 in products of float32 change nothing; a
    backward pass follows the settings that hold when it runs.

    Codes are differentiable in `x` and `atoms`, given the support, in backward and forward mode and as
    often as asked for. Their values are the same bits whether derivatives are asked for or not.
    Derivatives by the atoms are those of coefficients on atoms of any norm. `torch.func.vmap` may map
    over `x` and not over `atoms`.

    Args:
        x: activations, centred by the caller if at all; 1-D to n-D, dense, of float16, bfloat16, float32
            or float64.
        atoms: dictionary, rows of unit norm.
        k, method, signed, rtol, threshold: fields of `Coding`.
        gram: `gram_matrix(atoms, method=method, signed=signed)`. A matrix in int16 selects the compiled
            forms. On a CPU their result for a row does not depend, bit for bit, on the rows beside it or
            on how many rows of the Gram matrix fit into memory. A matrix in floating point selects
            torch's Gram form, and None its GEMM form. The last bits of their results depend on the rows
            beside a row.

    Raises:
        ValueError: shapes do not fit, a setting is out of range, the pursuit is not for `signed`, or x
            holds NaN or infinity.
        TypeError: x or atoms are no dense tensors of a floating dtype.

    See also:
        `PreparedAtoms`, which computes and keeps the Gram matrix.
    """
    coding = Coding(k, method, signed, rtol, threshold)
    return PreparedAtoms.with_gram(atoms, coding, gram).encode(x)


def _encode_chunk(
    x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], gram: GramMatrix | None, coding: Coding
) -> SparseCodes:
    """Search without derivatives; then, where some may be wanted, add those of the coefficients."""
    pursuit = PURSUITS[coding.method]

    def search(x: Tensor, atoms: Tensor) -> tuple[Tensor, ...]:
        return at_ordinary_size(
            lambda rows, threshold: _search(rows, atoms, gram, replace(coding, threshold=threshold)),
            x,
            coding.threshold,
        )

    picks, coefficients = rowwise(search, x, shared=atoms)
    if differentiated(x, atoms):
        coefficients = with_derivative(coefficients, pursuit.replay(x, atoms, picks))
    return _merge(picks, coefficients)


def _search(
    x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], gram: GramMatrix | None, coding: Coding
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Picks and coefficients, in the form that the Gram matrix selects."""
    pursuit = PURSUITS[coding.method]
    settings = (coding.k, coding.signed, coding.rtol, coding.threshold)
    if gram is None or gram.dtype.is_floating_point:
        return pursuit.search(x, atoms, gram, *settings)
    if gpu.serves(x.device):
        assert pursuit.on_gpu is not None
        return pursuit.on_gpu(x, atoms, gram, *settings)
    return compiled.search(x, atoms, gram, coding)


def _merge(picks: Int[Tensor, "b k"], coefficients: Float[Tensor, "b k"]) -> SparseCodes:
    """Add up the coefficients of repeated picks and move the used slots to the front."""
    same = picks[:, :, None] == picks[:, None, :]
    first = same.byte().argmax(dim=-1)  # for each slot, the first slot that picked its atom
    values = torch.zeros_like(coefficients).scatter_add(-1, first, coefficients)
    values = values.masked_fill(picks < 0, 0)
    order = (values == 0).byte().argsort(dim=-1, stable=True)
    values = values.gather(-1, order)
    indices = picks.gather(-1, order).masked_fill(values == 0, 0)
    return SparseCodes(indices, values)


def _chunk_rows(rows: Tensor, gram: GramMatrix | None) -> int:
    if rows.device.type != "cpu":
        return CUDA_ROWS_PER_CHUNK
    if gram is None:
        return ROWS_PER_CHUNK["gemm"]
    return ROWS_PER_CHUNK["compiled" if gram.dtype == torch.int16 else "gram"]


def _check_atoms(atoms: Tensor, coding: Coding) -> None:
    check_floats("atoms", atoms)
    if atoms.ndim != 2:
        raise ValueError(f"atoms must have shape [n, d], got {tuple(atoms.shape)}")
    coding.check_atoms(len(atoms))


def _check_gram(atoms: Tensor, coding: Coding, gram: GramMatrix | None) -> None:
    if gram is None:
        return
    n, d = atoms.shape
    if gram.shape != (n, n):
        raise ValueError(f"gram must have shape {(n, n)}, got {tuple(gram.shape)}")
    if isinstance(gram, GramRows) and gpu.serves(atoms.device):
        raise ValueError("gram must be a tensor on a GPU, got GramRows; pass gram_matrix(atoms)")
    serves = gram.dtype.is_floating_point or gram.dtype == gram_dtype(
        atoms, coding.method, coding.signed
    )
    if not serves:
        raise ValueError(
            f"gram in {gram.dtype} does not serve method={coding.method!r}, signed={coding.signed} on "
            f"{atoms.device.type}; pass gram_matrix(atoms, method=method, signed=signed)"
        )
    needed = PURSUITS[coding.method].most_held(coding.k, n, d)
    if isinstance(gram, GramRows) and len(gram) < needed:
        raise ValueError(
            f"gram must have room for at least {needed} rows at k={coding.k}, got {len(gram)}; "
            "give gram_matrix a larger budget"
        )


def _check_x(x: Tensor, atoms: Tensor, gram: GramMatrix | None) -> None:
    check_floats("x", x)
    d = atoms.shape[1]
    if x.ndim < 1 or x.shape[-1] != d:
        raise ValueError(f"x must have {d} numbers per row like the atoms, got {tuple(x.shape)}")
    for name, other in (("atoms", atoms), ("gram", gram)):
        if isinstance(other, Tensor) and other.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {other.device}")
    rowwise(_checked_rows, x.reshape(-1, d), shared=atoms)


def _checked_rows(x: Tensor, atoms: Tensor) -> tuple[Tensor, ...]:
    check_rows("x", x)
    return (x.new_empty(len(x), 0),)

"""The thin face to SAELens."""

from itda_lens.sae.assembly import assemble
from itda_lens.sae.codes import (
    ARCHITECTURES,
    Coded,
    check_codable,
    coded,
    moved,
    reconstructed,
    sparse_codes,
)
from itda_lens.sae.from_atoms import from_atoms
from itda_lens.sae.hub import push
from itda_lens.sae.itda import ITDA, LABELS_KEY, ITDAConfig
from itda_lens.sae.labelled import labels_of
from itda_lens.sae.loading import dictionaries_in, is_dictionary, load
from itda_lens.sae.provenance import hook_name_of, provenance_of
from itda_lens.sae.registration import register
from itda_lens.sae.sparsity import load_sparsity, save_sparsity
from itda_lens.sae.union import union

__all__ = [
    "ARCHITECTURES",
    "ITDA",
    "LABELS_KEY",
    "Coded",
    "ITDAConfig",
    "assemble",
    "check_codable",
    "coded",
    "dictionaries_in",
    "from_atoms",
    "hook_name_of",
    "is_dictionary",
    "labels_of",
    "load",
    "load_sparsity",
    "moved",
    "provenance_of",
    "push",
    "reconstructed",
    "register",
    "save_sparsity",
    "sparse_codes",
    "union",
]

register()  # the last line, since importing SAELens can lead here before the rest is defined

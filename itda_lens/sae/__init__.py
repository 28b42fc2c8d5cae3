"""The thin face to SAELens."""

from itda_lens.sae.assembly import assemble
from itda_lens.sae.codes import (
    ARCHITECTURES,
    Coded,
    check_codable,
    coded,
    reconstructed,
    sparse_codes,
)
from itda_lens.sae.files import replacing
from itda_lens.sae.itda import ITDA, LABELS_KEY, ITDAConfig
from itda_lens.sae.labelled import labels_of
from itda_lens.sae.loading import dictionaries_in, is_dictionary, load
from itda_lens.sae.registration import register
from itda_lens.sae.sparsity import load_sparsity, save_sparsity

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
    "is_dictionary",
    "labels_of",
    "load",
    "load_sparsity",
    "reconstructed",
    "register",
    "replacing",
    "save_sparsity",
    "sparse_codes",
]

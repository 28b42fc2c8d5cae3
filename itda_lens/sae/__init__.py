"""The thin face to SAELens."""

from itda_lens.sae.assembly import assemble
from itda_lens.sae.itda import ITDA, LABELS_KEY, ITDAConfig
from itda_lens.sae.loading import dictionaries_in, is_dictionary, load
from itda_lens.sae.provenance import hook_name_of, provenance_of
from itda_lens.sae.registration import register
from itda_lens.sae.sparsity import load_sparsity, save_sparsity

__all__ = [
    "ITDA",
    "LABELS_KEY",
    "ITDAConfig",
    "assemble",
    "dictionaries_in",
    "hook_name_of",
    "is_dictionary",
    "load",
    "load_sparsity",
    "provenance_of",
    "register",
    "save_sparsity",
]

register()  # the last line, since importing SAELens can lead here before the rest is defined

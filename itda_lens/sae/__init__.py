"""The thin face to SAELens."""

from itda_lens.sae.itda import ITDA, LABELS_KEY, ITDAConfig
from itda_lens.sae.loading import dictionaries_in, load
from itda_lens.sae.registration import register

__all__ = ["ITDA", "LABELS_KEY", "ITDAConfig", "dictionaries_in", "load", "register"]

"""A small real model and real prose, for the demo, the tests and the benchmarks."""

from itda_lens.samples import smollm2
from itda_lens.samples.prose import HELD_OUT, reference_prose

__all__ = ["HELD_OUT", "reference_prose", "smollm2"]

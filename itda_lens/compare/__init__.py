"""Similarity of dictionaries, of different models too, by where their atoms came from."""

from itda_lens.compare.jaccard import jaccard

__all__ = ["jaccard"]

"""Hashes that are the same on every machine and in every process."""

import hashlib

import numpy as np
from jaxtyping import UInt64


def mix64(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Numbers that look random: each bit of the input flips half of the bits of the output.

    A one-to-one map of 64 bits, the output function of SplitMix64 (Steele, Lea & Flood, 2014).
    """
    z = np.asarray(values, dtype=np.uint64)
    if z.ndim == 0:  # numpy warns of an overflow of single numbers, which is meant here
        return mix64(z[None])[0]
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def text_digest(text: str) -> int:
    """64 bits that tell texts apart, lone surrogates included."""
    data = text.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

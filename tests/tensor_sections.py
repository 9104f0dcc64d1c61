"""Sections of floats for tensor codecs to quantize."""

import numpy as np

from kvstore.codecs.elements import ELEMENTS
from kvstore.layout import DType

KINDS = ["normal", "offset", "magnitudes", "tiny", "largest", "zeros", "equal"]


def words_of(floats, dtype):
    """`floats` as host form has them; those of bfloat16 are cut off."""
    if dtype is DType.BFLOAT16:
        return (np.asarray(floats, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return np.asarray(floats).astype("<f2" if dtype is DType.FLOAT16 else "<f4").tobytes()


def floats_of(host, dtype):
    if dtype is DType.BFLOAT16:
        return (np.frombuffer(host, "<u2").astype("<u4") << 16).view("<f4").astype(float)
    return np.frombuffer(host, "<f2" if dtype is DType.FLOAT16 else "<f4").astype(float)


def section(form, seed=0, kind="normal"):
    """A section in host form, of floats that are hard in one way or another."""
    random = np.random.default_rng(seed)
    dtype = form.layout.dtype
    count = form.section_bytes // dtype.itemsize
    largest = ELEMENTS[dtype].largest
    floats = random.standard_normal(count).astype("<f4")
    if kind == "offset":
        floats = floats + random.choice([-300, 0, 17], count // 3 + 1).repeat(3)[:count]
    elif kind == "magnitudes":
        exponents = random.uniform(np.log2(largest) - 60, np.log2(largest) - 1, count)
        floats = np.sign(floats) * 2.0**exponents
    elif kind == "tiny":
        floats = floats * (2.0**-20 if dtype is DType.FLOAT16 else 2.0**-130)
    elif kind == "largest":
        floats = random.choice([-largest, largest, 0.0, -0.0], count)
    elif kind == "zeros":
        floats = random.choice([-0.0, 0.0], count)
    elif kind == "equal":
        floats = np.full(count, -floats[0])
    return words_of(floats, dtype)

"""Chunks of floats that tensor codecs round, and stores' calls with them."""

import numpy as np
from samples import PATIENCE_S, namespace_of

from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm, DType, KVLayout

LAYOUT = KVLayout(
    layers=4,
    kv_heads=2,
    head_dim=16,
    dtype=DType.FLOAT32,
    page_form="nhd",
    page_tokens=4,
    chunk_tokens=16,
)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)


class Numbers:
    """Sections of floats up to 4, or what a test puts in their place; source and sink."""

    def __init__(self, chunks=2):
        random = np.random.default_rng(4)
        self.saved = random.uniform(-4, 4, (chunks, LAYOUT.layers, FORM.section_bytes // 4)).astype("<f4")
        self.loaded = np.full_like(self.saved, np.nan)

    def gather(self, index, sections):
        for layer, section in enumerate(sections):
            section[:] = self.saved[index, layer].tobytes()

    def scatter(self, layer, indices, sections):
        for index, section in zip(indices, sections, strict=True):
            self.loaded[index, layer] = np.frombuffer(section, "<f4")

    def off(self):
        """The largest error of each chunk and layer."""
        with np.errstate(invalid="ignore"):
            return np.abs(self.saved - self.loaded).max(2)


def chain_of(fidelity, chunks=2):
    namespace = namespace_of(LAYOUT, fidelity=fidelity)
    return PrefixChain.of(namespace, range(chunks * LAYOUT.chunk_tokens))


def save(store, numbers, chain):
    outcomes = store.save(chain, range(len(chain)), numbers, until=Durability.REMOTE).wait(PATIENCE_S)
    assert set(outcomes.values()) == {SaveOutcome.STORED}


def load(store, numbers, chain):
    return store.load(chain, range(len(chain)), numbers).wait(PATIENCE_S)

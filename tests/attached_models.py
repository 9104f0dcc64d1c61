"""A model attached to a store over shared objects, and what tests do with it."""

from __future__ import annotations

import pickle
from contextlib import contextmanager

import torch
from tiny_models import VOCABULARY
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstore.backends.memory import MemoryBackend
from kvstore.engine_adapters.transformers import attach
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.settings import load_settings
from kvstore.store import KVStore

CHUNK = 8
NEW = 12
# A second thread costs these models more than it saves, the more so where others use the cores.
torch.set_num_threads(1)


def settings_of(**changes):
    ours = {
        "bucket": "memory://",
        "prefix": "",
        "chunk_tokens": CHUNK,
        "memory_bytes": "4MiB",
        # Where the cores are taken by others, a second may pass before a thread has its turn.
        "lookup_timeout_s": 30,
        "load_timeout_s": 30,
    }
    return load_settings(**{**ours, **changes})


@contextmanager
def attached(model, objects, *, backend=None, weights_revision=None, **settings):
    """The model attached to a store of its own, with nothing in memory, over shared objects."""
    layout = observe_geometry(model).layout(CHUNK)
    backend = backend or MemoryBackend(objects)
    with (
        KVStore.open(layout, settings=settings_of(**settings), backend=backend) as store,
        attach(model, store, weights_revision=weights_revision) as attachment,
    ):
        yield attachment


def prompt(tokens=61, rows=1, seed=1) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **options):
    """Sequences, logits and cache of a greedy generate()."""
    plain = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(ids, **{**plain, **options})


def fill(model, objects, ids, *, weights_revision=None, **options):
    with attached(model, objects, weights_revision=weights_revision) as attachment:
        generate(model, ids, **options)
        return attachment.last


def chunks_in(objects) -> set[str]:
    """Names of chunks, without what else a store writes down."""
    return {name for name in objects if name.startswith("v1/") and not name.endswith("namespace.json")}


def same_bits(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Relay:
    """A PageSink before another."""

    def __init__(self, inner, before):
        self.inner = inner
        self.before = before

    def scatter(self, layer, indices, sections):
        self.inner.scatter(layer, indices, self.before(layer, indices, sections) or sections)


def intercept(store, before, monkeypatch):
    """`before(layer, indices, sections)` sees all that the store's loads deliver, and may replace it."""
    load = store.load
    monkeypatch.setattr(
        store, "load", lambda chain, span, sink, **options: load(chain, span, Relay(sink, before), **options)
    )


class Streamer:
    """Keeps what generate() hands out."""

    def __init__(self):
        self.puts = []
        self.ended = 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1

    def check(self, sequence):
        assert [token for put in self.puts for token in put] == sequence.flatten().tolist()
        assert len(self.puts[0]) > 1
        assert self.ended == 1


def usable(model, cache) -> bool:
    """Whether a returned cache is plain, can be pickled, and continues like any other."""
    tokens = cache.get_seq_length()
    copied = pickle.loads(pickle.dumps(cache))
    ids = prompt(tokens + 3)
    # Any three tokens do: what came before them is in the cache.
    out = model(ids[:, -3:], past_key_values=copied)
    return (
        type(cache) is DynamicCache
        and {type(layer) for layer in cache.layers} == {DynamicLayer}
        and bool(out.logits.isfinite().all())
        and copied.get_seq_length() == tokens + 3
    )

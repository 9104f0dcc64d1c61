"""What Python itself costs for each section of a load: a section is one layer of one chunk.

512 chunks of 80 layers are loaded by a new store from a backend that answers at once with bytes
it has ready, into a sink that does nothing. A section is 64 bytes, so I/O, checksums and copies
cost next to nothing, and nothing is subtracted: the figure is all CPU time of the process, over
all its threads, from the call of `load` to its result, divided by the sections. Keys are hashed
before.

At such sizes one read takes a whole chunk. Where sections are large a chunk takes several reads;
what each costs is bounded by the second case, chunks of one layer: a read a section.

JSON: machine, chunks, layers, sections, us_per_section, wall_us_per_section,
us_per_section_from_memory (the same chunks again, from the memory tier), and
us_per_chunk_of_one_layer (the second case). Medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.report import Timing, machine, print_result, say, timed
from kvstore import DType, Durability, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.arena import whole_pages
from kvstore.backends.contract import ABSENT, Absent, ReadResult
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.layout import ChunkForm

DEADLINE_S = 300.0


class PreparedBackend(MemoryBackend):
    """Objects of another store, read without any of the checks a backend owes its callers."""

    def __init__(self, objects: dict[str, StoredObject]) -> None:
        super().__init__(objects)
        self._prepared = {
            name: (found.data, ReadResult(len(found.data), len(found.data), found.etag))
            for name, found in objects.items()
        }

    async def read_into(
        self,
        name: str,
        offset: int,
        out: memoryview,
        *,
        if_match: str | None = None,  # noqa: ARG002 objects here never change
    ) -> ReadResult | Literal[Absent.ABSENT]:
        if name not in self._prepared:
            return ABSENT
        data, whole = self._prepared[name]
        length = min(len(out), len(data) - offset)
        out[:length] = data[offset : offset + length]
        return whole if length == len(data) else ReadResult(length, len(data), whole.etag)


class NoPages:
    """Pages that take nothing and hold random bytes."""

    def gather(self, index: int, sections: Sequence[memoryview]) -> None:  # noqa: ARG002
        for section in sections:
            section[:] = os.urandom(len(section))

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> None:
        """Leave the sections where they are."""


@dataclass
class Case:
    """Chunks of `layers` layers, saved once and loaded by a new store each round."""

    chunks: int
    layers: int
    cold: list[Timing] = field(default_factory=list)
    from_memory: list[Timing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._layout = KVLayout(
            layers=self.layers,
            kv_heads=1,
            head_dim=4,
            dtype=DType.UINT8,
            page_form="mla",
            page_tokens=16,
            chunk_tokens=16,
        )
        form = ChunkForm(self._layout, self._layout.whole)
        memory_bytes = (self.chunks + 1) * whole_pages(form.raw_bytes)
        # The upload queue takes at most three quarters of memory.
        room_bytes = 2 * memory_bytes
        self._settings = load_settings(
            codec="none", memory_bytes=room_bytes, upload_queue_bytes=room_bytes, prefix="overhead"
        )
        objects: dict[str, StoredObject] = {}
        with self._open(MemoryBackend(objects)) as store:
            self._chain = self._chain_of(store)
            saved = store.save(self._chain, range(self.chunks), NoPages(), until=Durability.REMOTE)
            outcomes = saved.wait(DEADLINE_S)
        if set(outcomes.values()) != {"stored"}:
            raise SystemExit(f"the chunks were not stored: {set(outcomes.values())}")
        self._backend = PreparedBackend(objects)

    @property
    def sections(self) -> int:
        return self.chunks * self.layers

    def run(self) -> None:
        with self._open(self._backend) as store:
            store.wait_connected(DEADLINE_S)
            self.cold.append(self._load(store))
            self.from_memory.append(self._load(store))

    def _load(self, store: KVStore) -> Timing:
        with timed() as timing:
            result = store.load(self._chain, range(self.chunks), NoPages(), timeout_s=DEADLINE_S).wait()
        if result.chunks != self.chunks:
            raise SystemExit(f"the load failed: {result.failures}")
        return timing()

    def _open(self, backend: MemoryBackend) -> KVStore:
        return KVStore.open(self._layout, settings=self._settings, backend=backend)

    def _chain_of(self, store: KVStore) -> PrefixChain:
        namespace = Namespace("overhead", "r1", self._layout, "none")
        return store.chain(namespace, range(self.chunks * self._layout.chunk_tokens))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=overhead", description=__doc__)
    add_number(parser, "--chunks", 512, "chunks in a load")
    add_number(parser, "--layers", 80, "layers, and so sections, of a chunk")
    add_rounds(parser, 5)
    options = parser.parse_args(arguments)
    layers = Case(options.chunks, options.layers)
    single = Case(4 * options.chunks, 1)
    for round_ in range(options.rounds + 1):
        for case in (layers, single):
            case.run()
        us = 1e6 * layers.cold[-1].cpu_s / layers.sections
        say(f"round {round_} of {options.rounds}: {us:.1f} us a section" if round_ else "warmed up")
    print_result(
        {
            "machine": machine(),
            "chunks": options.chunks,
            "layers": options.layers,
            "sections": layers.sections,
            "us_per_section": _us([each.cpu_s for each in layers.cold], layers.sections),
            "wall_us_per_section": _us([each.wall_s for each in layers.cold], layers.sections),
            "us_per_section_from_memory": _us([each.cpu_s for each in layers.from_memory], layers.sections),
            "us_per_chunk_of_one_layer": _us([each.cpu_s for each in single.cold], single.sections),
        }
    )


def _us(seconds: Sequence[float], count: int) -> float:
    """Median of all but the first, which warms up; microseconds for each of `count`."""
    return round(1e6 * statistics.median(seconds[1:]) / count, 2)


if __name__ == "__main__":
    main()

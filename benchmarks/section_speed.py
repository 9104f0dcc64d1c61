"""How fast a codec is, one thread, one section after the other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.report import timed
from kvstore.codecs.contract import Decoder
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.layout import ChunkForm

_ROUNDS = 5


class HostSection(NamedTuple):
    """A section in host form, its layer, and how many chunks stand before its own."""

    host: bytes
    layer: int
    depth: int


def section_speed(name: str, form: ChunkForm, sections: Sequence[HostSection]) -> dict[str, float | None]:
    """encode_gbps and decode_gbps of a codec: host bytes per CPU second, medians over rounds.

    None where nothing is encoded.
    """
    codecs = SectionCodecs(name, form)
    if not codecs.names:
        return {"encode_gbps": None, "decode_gbps": None}
    readers = [codecs.decoder(one) for one in codecs.names]
    out, back = (memoryview(bytearray(form.section_bytes)) for _ in range(2))
    encode_s, decode_s = [], []
    for _ in range(_ROUNDS):
        stored: list[tuple[Decoder, bytes]] = []
        spent_s = 0.0
        for section in sections:
            with timed() as timing:
                done = codecs.encode(
                    memoryview(section.host), out[:-1], layer=section.layer, depth=section.depth
                )
            spent_s += timing().cpu_s
            if done.codec is not None:
                stored.append((readers[done.codec], bytes(out[: done.stored_bytes])))
        encode_s.append(spent_s)
        spent_s = 0.0
        for reader, data in stored:
            with timed() as timing:
                reader.decode(memoryview(data), back)
            spent_s += timing().cpu_s
        decode_s.append(spent_s)

    def gbps(count: int, rounds_s: Sequence[float]) -> float | None:
        return round(count * form.section_bytes / statistics.median(rounds_s) / 1e9, 3) if count else None

    return {"encode_gbps": gbps(len(sections), encode_s), "decode_gbps": gbps(len(stored), decode_s)}

"""What a codec makes of sections, one thread, one section after the other: bytes, errors, CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvstore.codecs.contract import Decoder
from kvstore.codecs.elements import ELEMENTS, Elements
from kvstore.codecs.section_codecs import EncodedSection, SectionCodecs
from kvstore.layout import ChunkForm

_ROUNDS = 5


class HostSection(NamedTuple):
    """A section in host form, its layer, and how many chunks stand before its own."""

    host: bytes
    layer: int
    depth: int


class StoredSection(NamedTuple):
    """What a codec wrote of a section, and what decodes it; None: the section is stored as it is."""

    reader: Decoder | None
    data: bytes


class Candidate(Protocol):
    """What is measured: see SectionCodecs."""

    @property
    def names(self) -> Sequence[str]: ...
    def encode(self, host: memoryview, out: memoryview, *, layer: int, depth: int) -> EncodedSection: ...
    def decoder(self, name: str) -> Decoder: ...


class SectionTrial:
    """One codec's bytes, errors and CPU seconds on sections of one form, over rounds.

    stored  what the last round wrote, by section
    exact   whether every section has come back bit by bit so far
    """

    def __init__(self, codecs: Candidate, form: ChunkForm, sections: Sequence[HostSection]) -> None:
        self.stored: Sequence[StoredSection] = ()
        self.exact = True
        self._codecs = codecs
        self._readers = [codecs.decoder(one) for one in codecs.names]
        self._elements = ELEMENTS.get(form.layout.dtype)
        self._section_bytes = form.section_bytes
        self._sections = sections
        self._encode_s: list[float] = []
        self._decode_s: list[float] = []
        self._max_error = 0.0

    def round(self) -> None:
        """Encode, then decode, every section once."""
        out, back = (memoryview(bytearray(self._section_bytes)) for _ in range(2))
        stored, spent_s = [], 0.0
        for section in self._sections:
            host, begin_s = memoryview(section.host), time.thread_time()
            done = self._codecs.encode(host, out[:-1], layer=section.layer, depth=section.depth)
            spent_s += time.thread_time() - begin_s
            if done.codec is None:
                stored.append(StoredSection(None, section.host))
            else:
                stored.append(StoredSection(self._readers[done.codec], bytes(out[: done.stored_bytes])))
        self._encode_s.append(spent_s)
        spent_s = 0.0
        for section, (reader, data) in zip(self._sections, stored, strict=True):
            if reader is not None:
                begin_s = time.thread_time()
                reader.decode(memoryview(data), back)
                spent_s += time.thread_time() - begin_s
                self._compare(section.host, back)
        self._decode_s.append(spent_s)
        self.stored = stored

    def row(self) -> dict[str, float | None]:
        """Figures, medians over the rounds; None where nothing is encoded.

        ratio                                     host bytes over stored ones, without headers and padding
        encode_gbps, decode_gbps                  host bytes per CPU second of the thread
        encode_cpu_s_per_gb, decode_cpu_s_per_gb  the same, the other way round
        max_error                                 the largest difference of two elements
        """
        encoded = [one for one in self.stored if one.reader is not None]
        stored_bytes = sum(len(one.data) for one in self.stored)
        return {
            "ratio": round(len(self.stored) * self._section_bytes / stored_bytes, 4),
            **self._speed("encode", len(self.stored) if self._readers else 0, self._encode_s),
            **self._speed("decode", len(encoded), self._decode_s),
            "max_error": self._max_error,
        }

    def _speed(self, work: str, count: int, rounds_s: Sequence[float]) -> dict[str, float | None]:
        cpu_s, host_gb = statistics.median(rounds_s), count * self._section_bytes / 1e9
        return {
            f"{work}_gbps": round(host_gb / cpu_s, 3) if count else None,
            f"{work}_cpu_s_per_gb": round(cpu_s / host_gb, 3) if count else None,
        }

    def _compare(self, host: bytes, back: memoryview) -> None:
        if back == host:
            return
        self.exact = False
        if self._elements is not None:
            self._max_error = max(_largest_difference(host, back, self._elements), self._max_error)


def section_speed(name: str, form: ChunkForm, sections: Sequence[HostSection]) -> dict[str, float | None]:
    """encode_gbps and decode_gbps of a codec, as SectionTrial measures them."""
    trial = SectionTrial(SectionCodecs(name, form), form, sections)
    for _ in range(_ROUNDS):
        trial.round()
    row = trial.row()
    return {field: row[field] for field in ("encode_gbps", "decode_gbps")}


def _largest_difference(host: bytes, back: memoryview, elements: Elements) -> float:
    ours, theirs = (np.frombuffer(one, elements.word) for one in (host, back))
    # Numbers alone: NaN that came back bit by bit would hide all others.
    differ = np.flatnonzero(ours.view(f"u{ours.itemsize}") != theirs.view(f"u{ours.itemsize}"))
    exact, rounded = (np.empty(len(differ), np.float32) for _ in range(2))
    elements.load(ours[differ], exact)
    elements.load(theirs[differ], rounded)
    return float(np.abs(rounded - exact).max())

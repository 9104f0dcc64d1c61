"""Byte planes of floats: signs and exponents apart from mantissas, each plane encoded where that pays.

Lossless, and blind to what the bits mean: NaN payloads, -0 and subnormals come back as they were.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.contract import ByteCodec
from kvstore.errors import MissError, MissReason

ITEM_BYTES = (1, 2, 4)
_Words = NDArray[Any]
# By item size: the exchanges that transpose a square of bytes held in words, as distance in bits and
# mask of the lower part. The words that take part are `bits / 8` apart.
_EXCHANGES: dict[int, tuple[tuple[int, int], ...]] = {
    1: (),
    2: ((8, 0x00FF),),
    4: ((16, 0x0000FFFF), (8, 0x00FF00FF)),
}
# Words of one lane that are transposed at a time: enough to make calls cheap, few enough for the caches.
_TILE_WORDS = 1 << 17
_SAMPLE_BYTES = 4096
# Bits per byte of a plane, by its sample, above which encoding it is not tried.
_RANDOM_BITS = 7.6
# Decoding a plane that shrinks by less than 1 / 2**this costs more time than its bytes do.
_GAIN_LOG = 5


class _Scratch(threading.local):
    """Planes on their way, of the largest section that this thread has seen."""

    memory: bytearray = bytearray()

    def take(self, length: int) -> memoryview:
        """`length` bytes, valid until the thread asks again."""
        if len(self.memory) < length:
            self.memory = bytearray(length)
        return memoryview(self.memory)[:length]


class PlanesCodec:
    """One byte codec for the planes of floats of `item_bytes` bytes; docs/format.md has the bytes.

    inner     encodes planes
    thorough  try every plane; otherwise those whose sampled bytes look random are stored as they are
    """

    def __init__(self, inner: ByteCodec, item_bytes: int, *, thorough: bool) -> None:
        self.name = f"planes{item_bytes}+{inner.name}"
        self._inner = inner
        self._item_bytes = item_bytes
        self._thorough = thorough
        self._table = struct.Struct(f"<{item_bytes}I")
        self._word = np.dtype(f"<u{item_bytes}")
        self._scratch = _Scratch()

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        """See ByteCodec.encode."""
        plane_bytes, tail_bytes = self._split(len(host))
        stop = len(out) - tail_bytes
        if not plane_bytes or stop < self._table.size:
            return None
        lengths, start = [], self._table.size
        for plane in self._planes_of(host, plane_bytes):
            length = self._encode_plane(plane, out[start:stop])
            if length is None:
                return None
            lengths.append(length)
            start += length
        self._table.pack_into(out, 0, *lengths)
        out[start : start + tail_bytes] = host[len(host) - tail_bytes :]
        return start + tail_bytes

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        plane_bytes, tail_bytes = self._split(len(out))
        lengths = self._lengths(stored, plane_bytes, tail_bytes)
        tail_at = len(stored) - tail_bytes
        pieces = self._pieces(out, plane_bytes)
        # What is encoded comes out in scratch memory, but a single plane is the section itself.
        room = pieces if len(pieces) == 1 else self._pieces(self._scratch.take(len(out)), plane_bytes)
        planes, start = [], self._table.size
        for length, place in zip(lengths, room, strict=True):
            plane = stored[start : start + length]
            start += length
            if length != plane_bytes:
                self._inner.decode(plane, place)
                plane = place
            planes.append(plane)
        self._transpose(planes, pieces)
        out[len(out) - tail_bytes :] = stored[tail_at:]

    def _split(self, host_bytes: int) -> tuple[int, int]:
        """Bytes of each plane, and bytes behind the last whole square, which no plane holds."""
        words = host_bytes // self._item_bytes**2
        plane_bytes = words * self._item_bytes
        return plane_bytes, host_bytes - plane_bytes * self._item_bytes

    def _pieces(self, whole: memoryview, length: int) -> list[memoryview]:
        return [whole[i * length : (i + 1) * length] for i in range(self._item_bytes)]

    def _planes_of(self, host: memoryview, plane_bytes: int) -> Sequence[memoryview]:
        lanes = self._pieces(host, plane_bytes)
        if len(lanes) == 1:
            return lanes
        planes = self._pieces(self._scratch.take(len(host)), plane_bytes)
        self._transpose(lanes, planes)
        return planes

    def _encode_plane(self, plane: memoryview, room: memoryview) -> int | None:
        """Bytes written to `room`; None if the plane does not fit, not even as it is."""
        if self._thorough or not _looks_random(plane):
            enough = len(plane) - (len(plane) >> _GAIN_LOG) - 1
            length = self._inner.encode(plane, room[:enough])
            if length is not None:
                return length
        if len(room) < len(plane):
            return None
        room[: len(plane)] = plane
        return len(plane)

    def _lengths(self, stored: memoryview, plane_bytes: int, tail_bytes: int) -> Sequence[int]:
        """Stored bytes of each plane. Raises MissError unless they add up to `stored`."""
        if len(stored) < self._table.size + tail_bytes:
            raise _bad(f"{len(stored)} bytes are too few")
        lengths = self._table.unpack_from(stored)
        if max(lengths) > plane_bytes or (plane_bytes and not min(lengths)):
            raise _bad(f"planes of {lengths} bytes where {plane_bytes} are due")
        if sum(lengths) != len(stored) - self._table.size - tail_bytes:
            raise _bad(f"planes of {lengths} bytes in {len(stored)}")
        return lengths

    def _transpose(self, source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
        """Lanes to planes, or back: byte i of word j goes to byte j of word i. It is its own inverse."""
        if len(source) == 1:
            if source[0] is not target[0]:
                target[0][:] = source[0]
            return
        inputs = [np.frombuffer(piece, self._word) for piece in source]
        outputs = [np.frombuffer(piece, self._word) for piece in target]
        spare = np.empty(min(_TILE_WORDS, len(inputs[0])), self._word)
        for start in range(0, len(inputs[0]), _TILE_WORDS):
            tile = slice(start, start + _TILE_WORDS)
            _transpose_tile([words[tile] for words in inputs], [words[tile] for words in outputs], spare)


def _transpose_tile(source: Sequence[_Words], target: Sequence[_Words], spare: _Words) -> None:
    changed = spare[: len(source[0])]
    for bits, mask in _EXCHANGES[len(source)]:
        distance = bits // 8
        for low in range(len(source)):
            if low & distance:
                continue
            high = low + distance
            # The upper part of the one and the lower part of the other change places.
            np.right_shift(source[low], bits, out=changed)
            np.bitwise_xor(changed, source[high], out=changed)
            np.bitwise_and(changed, mask, out=changed)
            np.bitwise_xor(source[high], changed, out=target[high])
            np.left_shift(changed, bits, out=changed)
            np.bitwise_xor(source[low], changed, out=target[low])
        source = target


def _looks_random(plane: memoryview) -> bool:
    """Whether a sample of the plane's bytes has nearly 8 bits of entropy each."""
    if len(plane) <= _SAMPLE_BYTES:
        return False
    # An odd distance, so that every lane is in the sample.
    sample = np.frombuffer(plane, np.uint8)[:: len(plane) // _SAMPLE_BYTES | 1]
    counts = np.bincount(sample)
    counts = counts[counts > 0]
    bits = np.log2(len(sample)) - (counts * np.log2(counts)).sum() / len(sample)
    return bool(bits > _RANDOM_BITS)


def _bad(what: str) -> MissError:
    return MissError(MissReason.BAD_ENCODING, f"planes: {what}")

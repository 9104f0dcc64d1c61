"""Byte planes of floats: signs and exponents apart from mantissas, each plane encoded where that pays.

Lossless, and blind to what the bits mean: NaN payloads, -0 and subnormals come back as they were.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.contract import ByteCodec
from kvstore.codecs.scratch import Scratch
from kvstore.errors import MissError, MissReason

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
# Runs below this would make many calls of little work each.
_RUN_BYTES_MIN = 64
# Rows repeat if one in so many does.
_ROWS_MIN = 16
_SAMPLE_BYTES = 4096
# Bits per byte of a plane, by its sample, above which encoding it is not tried.
_RANDOM_BITS = 7.6
# Decoding a plane that shrinks by less than 1 / 2**this costs more time than its bytes do.
_GAIN_LOG = 5


class PlanesCodec:
    """Codes for the planes of floats of `item_bytes` bytes; docs/format.md has the bytes.

    inner      encodes planes; planes whose sampled bytes look random are not tried
    searching  encodes planes of sections whose rows repeat, and is tried on each of them. It writes
               what `inner` can decode
    row_bytes  bytes of one token in a row, which repeat where tokens do; 0 where nobody knows
    """

    def __init__(
        self, inner: ByteCodec, item_bytes: int, *, searching: ByteCodec | None = None, row_bytes: int = 0
    ) -> None:
        self.name = f"planes{item_bytes}+{inner.name}"
        self._inner = inner
        self._searching = inner if searching is None else searching
        self._item_bytes = item_bytes
        # Only rows of whole squares line up with planes.
        rows_fit = row_bytes >= _RUN_BYTES_MIN * item_bytes and row_bytes % item_bytes**2 == 0
        self._row_bytes = row_bytes if rows_fit else 0
        self._table = struct.Struct(f"<{item_bytes + 1}I")
        self._scratch = Scratch()

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        """See ByteCodec.encode."""
        repeats = _rows_repeat(host, self._row_bytes)
        shape = _Shape.of(len(host), self._item_bytes, self._row_bytes if repeats else 0)
        stop = len(out) - shape.tail_bytes
        if not shape.plane_bytes or stop < self._table.size:
            return None
        lengths, start = [], self._table.size
        for plane in self._planes_of(host, shape):
            length = self._encode_plane(plane, out[start:stop], repeats=repeats)
            if length is None:
                return None
            lengths.append(length)
            start += length
        self._table.pack_into(out, 0, shape.run, *lengths)
        out[start : start + shape.tail_bytes] = host[len(host) - shape.tail_bytes :]
        return start + shape.tail_bytes

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        shape, lengths = self._read_table(stored, len(out))
        pieces = shape.pieces(out)
        # In one turn a plane has a lane's place, and each word of the one is made of the same of the other.
        room = pieces if shape.in_place else shape.pieces(self._scratch.take(len(out)))
        planes, start = [], self._table.size
        for length, place in zip(lengths, room, strict=True):
            plane = stored[start : start + length]
            start += length
            if length != shape.plane_bytes:
                self._inner.decode(plane, place)
                plane = place
            planes.append(plane)
        if len(planes) > 1:
            shape.transpose(shape.planes(planes), shape.lanes(out))
        elif planes[0] is not pieces[0]:
            pieces[0][:] = planes[0]
        out[len(out) - shape.tail_bytes :] = stored[start:]

    def _planes_of(self, host: memoryview, shape: _Shape) -> Sequence[memoryview]:
        if self._item_bytes == 1:
            return shape.pieces(host)
        planes = shape.pieces(self._scratch.take(len(host)))
        shape.transpose(shape.lanes(host), shape.planes(planes))
        return planes

    def _encode_plane(self, plane: memoryview, room: memoryview, *, repeats: bool) -> int | None:
        """Bytes written to `room`; None if the plane does not fit, not even as it is."""
        if repeats or not _looks_random(plane):
            enough = len(plane) - (len(plane) >> _GAIN_LOG) - 1
            length = (self._searching if repeats else self._inner).encode(plane, room[:enough])
            if length is not None:
                return length
        if len(room) < len(plane):
            return None
        room[: len(plane)] = plane
        return len(plane)

    def _read_table(self, stored: memoryview, host_bytes: int) -> tuple[_Shape, Sequence[int]]:
        """How planes lie, and the stored bytes of each. Raises MissError unless all adds up."""
        if len(stored) < self._table.size:
            raise _bad(f"{len(stored)} bytes are too few")
        run, *lengths = self._table.unpack_from(stored)
        words = host_bytes // self._item_bytes**2
        if not 0 < run <= words or (run != words and run * self._item_bytes < _RUN_BYTES_MIN):
            raise _bad(f"runs of {run} in a lane of {words}")
        shape = _Shape(host_bytes, self._item_bytes, run)
        if not 0 < min(lengths) <= max(lengths) <= shape.plane_bytes:
            raise _bad(f"planes of {lengths} bytes where {shape.plane_bytes} are due")
        if sum(lengths) != len(stored) - self._table.size - shape.tail_bytes:
            raise _bad(f"planes of {lengths} bytes in {len(stored)}")
        return shape, lengths


@dataclass(frozen=True)
class _Shape:
    """How a section's words of `item_bytes` bytes are dealt to as many lanes, and lie in planes.

    run  words that go to one lane before the next lane has its turn: all of them, or, where rows
         repeat, so many that a row is a whole number of turns, and repeats in the planes too
    """

    host_bytes: int
    item_bytes: int
    run: int

    @classmethod
    def of(cls, host_bytes: int, item_bytes: int, row_bytes: int) -> _Shape:
        """For rows that repeat, or with 0 for others."""
        return cls(host_bytes, item_bytes, (row_bytes or host_bytes) // item_bytes**2)

    @cached_property
    def plane_bytes(self) -> int:
        """Bytes of one plane: of whole turns."""
        run_bytes = self.run * self.item_bytes
        return run_bytes * (self.host_bytes // (run_bytes * self.item_bytes)) if run_bytes else 0

    @cached_property
    def tail_bytes(self) -> int:
        """Bytes behind the last whole turn, which no plane holds."""
        return self.host_bytes - self.plane_bytes * self.item_bytes

    @property
    def in_place(self) -> bool:
        """Whether planes, each in its piece, can be transposed to lanes where they lie."""
        return self.item_bytes == 1 or self.run == self.host_bytes // self.item_bytes**2

    def pieces(self, memory: memoryview) -> list[memoryview]:
        """Room for each plane."""
        return [memory[i * self.plane_bytes : (i + 1) * self.plane_bytes] for i in range(self.item_bytes)]

    def lanes(self, host: memoryview) -> list[_Words]:
        """The words of each lane."""
        words = np.frombuffer(host[: self.plane_bytes * self.item_bytes], self._word)
        dealt = words.reshape(-1, self.item_bytes, self.run)
        return [self._flat(dealt[:, lane]) for lane in range(self.item_bytes)]

    def planes(self, pieces: Sequence[memoryview]) -> list[_Words]:
        """The words of each plane, in the shape of lanes."""
        return [self._flat(np.frombuffer(piece, self._word).reshape(-1, self.run)) for piece in pieces]

    def transpose(self, source: Sequence[_Words], target: Sequence[_Words]) -> None:
        """Lanes to planes, or back: byte i of word j goes to byte j of word i. It is its own inverse."""
        step = max(1, _TILE_WORDS // math.prod(source[0].shape[1:]))
        spare = np.empty_like(source[0][:step])
        for start in range(0, len(source[0]), step):
            tile = slice(start, start + step)
            _transpose_tile([words[tile] for words in source], [words[tile] for words in target], spare)

    @staticmethod
    def _flat(turns: _Words) -> _Words:
        """One turn as its words, which numpy is quicker with; several as they are."""
        return turns[0] if len(turns) == 1 else turns

    @property
    def _word(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.item_bytes}")


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


def _rows_repeat(host: memoryview, row_bytes: int) -> bool:
    """Whether many rows begin as another does: values of the first layer depend on the token alone."""
    rows = len(host) // row_bytes if row_bytes else 0
    if rows < _ROWS_MIN:
        return False
    starts = np.frombuffer(host[: rows * row_bytes], np.uint8).reshape(rows, row_bytes)[:, :8]
    distinct = len(np.unique(np.ascontiguousarray(starts).view(np.uint64)))
    return rows - distinct > rows // _ROWS_MIN


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

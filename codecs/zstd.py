"""Zstandard (RFC 8878) by the zstandard package."""

from __future__ import annotations

import threading

import zstandard

from kvstore.errors import MisconfiguredError, MissError, MissReason

LEVEL_DEFAULT = 1
# Window of the largest frame a decoder accepts: bounds its memory whatever the data claims.
WINDOW_BYTES_MAX = 1 << 27


class _Contexts(threading.local):
    """A (de)compressor belongs to one thread at a time and is costly to make."""

    compressor: zstandard.ZstdCompressor | None = None
    decompressor: zstandard.ZstdDecompressor | None = None


class ZstdCodec:
    """One zstd frame per section. Contexts are reused per thread; both calls release the GIL."""

    name = "zstd"

    def __init__(self, level: int | None = None) -> None:
        self._level = LEVEL_DEFAULT if level is None else level
        if not 1 <= self._level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise MisconfiguredError(
                f"codec zstd:{self._level}: the level is a number from 1 to {zstandard.MAX_COMPRESSION_LEVEL}"
            )
        self._threads = _Contexts()

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        """See ByteCodec.encode."""
        with self._compressor().stream_reader(host, size=len(host)) as reader:
            written = _fill(reader, out)
            fits = written < len(out) or not reader.read(1)
        return written if fits else None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        try:
            with self._decompressor().stream_reader(stored) as reader:
                written = _fill(reader, out)
                surplus = reader.read(1)
        except zstandard.ZstdError as error:
            raise MissError(MissReason.BAD_ENCODING, f"zstd: {error}") from None
        if written != len(out) or surplus:
            raise MissError(
                MissReason.BAD_ENCODING, f"zstd: decodes to another length than the {len(out)} bytes due"
            )

    def _compressor(self) -> zstandard.ZstdCompressor:
        if self._threads.compressor is None:
            self._threads.compressor = zstandard.ZstdCompressor(level=self._level)
        return self._threads.compressor

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if self._threads.decompressor is None:
            self._threads.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        return self._threads.decompressor


def _fill(reader: zstandard.ZstdCompressionReader | zstandard.ZstdDecompressionReader, out: memoryview) -> int:
    done = 0
    while done < len(out):
        step = reader.readinto(out[done:])
        if not step:
            break
        done += step
    return done

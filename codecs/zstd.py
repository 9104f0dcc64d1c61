"""Zstandard (RFC 8878) by the zstandard package."""

from __future__ import annotations

import threading

import zstandard

from kvstore.codecs.contract import CodecFamily
from kvstore.errors import MisconfiguredError, MissError, MissReason

LEVEL_DEFAULT = 1
_WINDOW_BYTES_MIN = 1 << 10
# A block has its own Huffman codes, and is no larger than this, nor than the window.
_BLOCK_LOG = 17


class _Contexts(threading.local):
    """A (de)compressor belongs to one thread at a time and is costly to make.

    window_bytes  the largest window that `decompressor` accepts
    """

    compressor: zstandard.ZstdCompressor | None = None
    decompressor: zstandard.ZstdDecompressor | None = None
    window_bytes: int = 0


class ZstdCodec:
    """One zstd frame per section. Contexts are reused per thread; both calls release the GIL."""

    name = "zstd"
    _parameters: zstandard.ZstdCompressionParameters | None = None

    def __init__(self, level: int | None = None) -> None:
        self._level = LEVEL_DEFAULT if level is None else level
        if not 1 <= self._level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise MisconfiguredError(
                f"codec zstd:{self._level}: the level is a number from 1 to {zstandard.MAX_COMPRESSION_LEVEL}"
            )
        self._threads = _Contexts()

    @classmethod
    def entropy_only(cls) -> ZstdCodec:
        """Huffman codes and hardly any search for repeats: for planes of floats, which have none to find.

        The frames are those of any other level, and a third of their time to write.
        """
        codec = cls()
        # The shortest search that zstd offers: its smallest hash table, its longest minimal match. Levels
        # below 0 search less still, but leave out the Huffman codes.
        codec._parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=_BLOCK_LOG,
            hash_log=zstandard.HASHLOG_MIN,
            chain_log=zstandard.CHAINLOG_MIN,
            search_log=zstandard.SEARCHLOG_MIN,
            min_match=zstandard.MINMATCH_MAX,
            target_length=0,
        )
        return codec

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        """See ByteCodec.encode."""
        if not host or not out:
            return None
        with self._compressor().stream_reader(host, size=len(host)) as reader:
            written = _fill(reader, out)
            fits = written < len(out) or not reader.read(1)
        return written if fits else None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        try:
            with self._decompressor(len(out)).stream_reader(stored) as reader:
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
            self._threads.compressor = (
                zstandard.ZstdCompressor(level=self._level)
                if self._parameters is None
                else zstandard.ZstdCompressor(compression_params=self._parameters)
            )
        return self._threads.compressor

    def _decompressor(self, host_bytes: int) -> zstandard.ZstdDecompressor:
        # No honest frame has a larger window than what it decodes to; a decoder allocates one as
        # large as the frame claims.
        window_bytes = max(_WINDOW_BYTES_MIN, 1 << (host_bytes - 1).bit_length())
        if self._threads.decompressor is None or self._threads.window_bytes != window_bytes:
            self._threads.decompressor = zstandard.ZstdDecompressor(max_window_size=window_bytes)
            self._threads.window_bytes = window_bytes
        return self._threads.decompressor


def _fill(
    reader: zstandard.ZstdCompressionReader | zstandard.ZstdDecompressionReader, out: memoryview
) -> int:
    done = 0
    while done < len(out):
        step = reader.readinto(out[done:])
        if not step:
            break
        done += step
    return done


ZSTD = CodecFamily(
    "zstd",
    ZstdCodec,
    "general purpose",
    takes=f"LEVEL 1 to {zstandard.MAX_COMPRESSION_LEVEL}, default {LEVEL_DEFAULT}",
    bare=ZstdCodec.entropy_only,
)

"""LZ4 blocks by the lz4 package: nearly free to decode, for KV that repeats itself."""

from __future__ import annotations

import lz4.block

from kvstore.codecs.contract import CodecFamily
from kvstore.errors import MissError, MissReason

_HOST_BYTES_MAX = 0x7E000000


class Lz4Codec:
    """One raw LZ4 block per section. Both calls release the GIL."""

    name = "lz4"

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        """See ByteCodec.encode."""
        if not host or len(host) > _HOST_BYTES_MAX:
            return None
        block = lz4.block.compress(host, store_size=False)
        if len(block) > len(out):
            return None
        out[: len(block)] = block
        return len(block)

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        if len(out) > _HOST_BYTES_MAX:
            raise MissError(MissReason.BAD_ENCODING, f"lz4: no block decodes to {len(out)} bytes")
        try:
            # A block says nothing of its size: memory is taken for what is due, and no more.
            host = lz4.block.decompress(stored, uncompressed_size=len(out))
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise MissError(MissReason.BAD_ENCODING, f"lz4: {error}") from None
        if len(host) != len(out):
            raise MissError(
                MissReason.BAD_ENCODING, f"lz4: decodes to another length than the {len(out)} bytes due"
            )
        out[:] = host


LZ4 = CodecFamily("lz4", lambda _: Lz4Codec(), "fast to decode; helps only where bytes repeat")

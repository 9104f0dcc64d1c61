"""A tensor codec whose output a byte codec shrinks further."""

from __future__ import annotations

from kvstore.codecs.contract import ByteCodec, TensorCodec
from kvstore.codecs.scratch import Scratch
from kvstore.errors import MissError, MissReason

# The tensor codec's first bytes, how many tokens are lossless: by them a reader knows how long the rest is.
_FRONT_BYTES = 4
_scratch = Scratch()


class EncodedTensorCodec:
    """What `tensor` writes: its first four bytes as they are, then the rest encoded by `inner`."""

    def __init__(self, tensor: TensorCodec, inner: ByteCodec) -> None:
        self.name = f"{tensor.name}+{inner.name}"
        self._tensor = tensor
        self._inner = inner

    def encode(self, quantized: memoryview, out: memoryview) -> int | None:
        """Encode what `tensor` wrote; see ByteCodec.encode."""
        if len(out) < _FRONT_BYTES:
            return None
        length = self._inner.encode(quantized[_FRONT_BYTES:], out[_FRONT_BYTES:])
        out[:_FRONT_BYTES] = quantized[:_FRONT_BYTES]
        return None if length is None else _FRONT_BYTES + length

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        quantized = _scratch.take(self._quantized_bytes(stored))
        self.unpack(stored, quantized)
        self._tensor.decode(quantized, out)

    def unpack(self, stored: memoryview, out: memoryview) -> memoryview:
        """Fill the start of `out` with what `tensor` wrote, and return it.

        Raises MissError(BAD_ENCODING) as `decode` does, and if it is longer than `out`.
        """
        quantized = out[: self._quantized_bytes(stored)]
        quantized[:_FRONT_BYTES] = stored[:_FRONT_BYTES]
        self._inner.decode(stored[_FRONT_BYTES:], quantized[_FRONT_BYTES:])
        return quantized

    def _quantized_bytes(self, stored: memoryview) -> int:
        if len(stored) <= _FRONT_BYTES:
            raise MissError(MissReason.BAD_ENCODING, f"{self.name}: {len(stored)} bytes are too few")
        return self._tensor.stored_bytes(int.from_bytes(stored[:_FRONT_BYTES], "little"))

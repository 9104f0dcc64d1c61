"""Which codec each section of a chunk is stored with, by a store's settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.codecs.contract import ByteCodec, Decoder, TensorCodec
from kvstore.codecs.registry import (
    LOSSLESS,
    PLANES,
    RAW,
    decoder,
    parse_codec,
    split_codec,
    tensor_codec,
    tensor_name,
)
from kvstore.codecs.scratch import Scratch
from kvstore.codecs.tensor_bytes import EncodedTensorCodec
from kvstore.codecs.tensor_families import SINK_TOKENS
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.layout import ChunkForm

_LAYERS = re.compile(r"-?[0-9]{1,4}(,-?[0-9]{1,4})*\Z")


class EncodedSection(NamedTuple):
    """How a section was encoded.

    codec         its codec's index in `names`; None: it is to be stored as it is
    stored_bytes  bytes written
    unquantized   whether it is lossless though a tensor codec was due: for NaN, infinities, or very
                  large numbers
    """

    codec: int | None
    stored_bytes: int
    unquantized: bool = False


class SectionCodecs:
    """Encodes and decodes sections of one form as one setting says. For any number of threads.

    text             a codec string
    lossless_layers  what KVSTORE_LOSSLESS_LAYERS says, such as `0,-1`; of no effect on lossless codecs
    keep_quantized   whether `decode` leaves what the tensor codec wrote to whoever takes the section
    names            the codecs that sections may have, as headers name them
    fidelity         for namespaces: `lossless`, or the tensor codec and what it leaves alone
    tensor           the tensor codec; None: every bit is kept

    Raises MisconfiguredError for a codec that is unknown or not for this form, and for layers that are
    not there.
    """

    def __init__(
        self, text: str, form: ChunkForm, lossless_layers: str = "", *, keep_quantized: bool = False
    ) -> None:
        parts = split_codec(text)
        self._form = form
        self._scratch = Scratch()
        self._tensor_name = parts.tensor
        self.tensor = None if parts.tensor is None else _tensor_codec(text, parts.tensor, form)
        self._keep_quantized = keep_quantized
        self._packed: EncodedTensorCodec | None = None
        self._lossless = self._lossless_codec(parts.bytes_)
        names = [] if self._lossless is None else [self._lossless.name]
        self.fidelity = LOSSLESS
        self._layers: frozenset[int] = frozenset()
        if self.tensor is not None:
            names.insert(0, self.tensor.name)
            if parts.bytes_ != RAW:
                self._packed = EncodedTensorCodec(self.tensor, _byte_codec(parts.bytes_))
                names.insert(1, self._packed.name)
            self._layers = frozenset(_layer_indices(lossless_layers, form.layers))
            self.fidelity = _fidelity(self.tensor.name, sorted(self._layers))
        self.names: Sequence[str] = tuple(names)

    def encode(self, host: memoryview, out: memoryview, *, layer: int, depth: int) -> EncodedSection:
        """Encode the section of a layer of a chunk into the start of `out`.

        out    shorter than the section: what does not fit is stored as it is
        depth  chunks before this one in its prefix; attention sinks are in the first
        """
        sinks = self.lossless_tokens(layer, depth)
        if self.tensor is None or sinks is None or self.tensor.stored_bytes(sinks) > len(out):
            return self._encode_lossless(host, out)
        room = out if self._packed is None else self._scratch.take(self.tensor.stored_bytes(sinks))
        length = self.tensor.encode(host, room, sinks)
        if length is None:
            return self._encode_lossless(host, out)._replace(unquantized=True)
        section = self.pack(room[:length], out)
        if section.codec == 0 and self._packed is not None:
            out[:length] = room[:length]
        return section

    def pack(self, quantized: memoryview, out: memoryview) -> EncodedSection:
        """Encode what the tensor codec wrote into the start of `out`.

        Its index 0: it is to be stored as it is, and nothing of use is in `out`.
        """
        packed_bytes = None
        if self._packed is not None:
            packed_bytes = self._packed.encode(quantized, out[: len(quantized) - 1])
        return EncodedSection(0, len(quantized)) if packed_bytes is None else EncodedSection(1, packed_bytes)

    def lossless_tokens(self, layer: int, depth: int) -> int | None:
        """How many tokens at the front of a section keep every bit; None: all of them."""
        sinks = 0 if depth else SINK_TOKENS
        quantized = self.tensor is not None and layer not in self._layers
        return sinks if quantized and sinks < self._form.layout.chunk_tokens else None

    def decode(self, name: str, stored: memoryview, host: memoryview, *, layer: int, depth: int) -> int:
        """Decode a section whose header says `name` into `host`; returns how many bytes of it are filled.

        All, with host form, but where quantized ones are kept: then fewer, with what the tensor codec wrote.
        Raises MissError as `decoder` and its codec do, and BAD_ENCODING for one with other lossless tokens
        than `fidelity` says.
        """
        codec = self.decoder(name)
        quantized = tensor_name(name) is not None
        told = int.from_bytes(stored[:4], "little")
        if quantized and told != self.lossless_tokens(layer, depth):
            raise MissError(
                MissReason.BAD_ENCODING,
                f"{told} lossless tokens in layer {layer}: all is {self.fidelity!r}",
            )
        if not self._keep_quantized or self.tensor is None or not quantized:
            codec.decode(stored, host)
            return len(host)
        # One byte less, as a quantized section is known by its length.
        room = host[: len(host) - 1]
        if isinstance(codec, EncodedTensorCodec):
            kept = codec.unpack(stored, room)
        else:
            kept = room[: len(stored)]
            kept[:] = stored[: len(kept)]
        self.tensor.check(kept)
        return len(kept)

    def decoder(self, name: str) -> Decoder:
        """The codec that decodes sections whose header says `name`.

        Raises MissError(UNKNOWN_CODEC), and BAD_HEADER for a tensor codec that `fidelity` does not name:
        no namespace of that fidelity may hold such a section.
        """
        if tensor_name(name) not in (None, self._tensor_name):
            raise MissError(
                MissReason.BAD_HEADER, f"has a section of codec {name[:40]!r} where all is {self.fidelity!r}"
            )
        return decoder(name, self._form)

    def _encode_lossless(self, host: memoryview, out: memoryview) -> EncodedSection:
        length = None if self._lossless is None else self._lossless.encode(host, out)
        return EncodedSection(None, 0) if length is None else EncodedSection(len(self.names) - 1, length)

    def _lossless_codec(self, text: str) -> ByteCodec | None:
        """What encodes sections of which every bit is kept. Behind a tensor codec they are floats."""
        if self._tensor_name is not None and text != RAW:
            text = f"{PLANES}+{text}"
        return parse_codec(text, self._form.layout.dtype.itemsize, self._form.row_bytes)


def check_lossless_layers(text: str) -> None:
    """Raises ValueError unless `text` is empty or whole numbers with commas between them."""
    if text and not _LAYERS.match(text):
        raise ValueError("is not whole numbers with commas between them")


def _tensor_codec(text: str, full_name: str, form: ChunkForm) -> TensorCodec:
    try:
        return tensor_codec(full_name, form)
    except MisconfiguredError as error:
        raise MisconfiguredError(f"KVSTORE_CODEC={text}: {error}") from None


def _byte_codec(text: str) -> ByteCodec:
    # What is quantized has no more repeats to find than planes have.
    codec = parse_codec(text, bare=True)
    assert codec is not None
    return codec


def _layer_indices(text: str, layers: int) -> set[int]:
    check_lossless_layers(text)
    named = [int(number) for number in text.split(",")] if text else []
    for layer in named:
        if not -layers <= layer < layers:
            raise MisconfiguredError(
                f"KVSTORE_LOSSLESS_LAYERS={text!r} names layer {layer} of {layers}; it takes numbers from "
                f"0 to {layers - 1}, or from -1 (the last) to {-layers}"
            )
    return {layer % layers for layer in named}


def _fidelity(tensor: str, layers: Sequence[int]) -> str:
    """All that decides which bits a reader gets."""
    lossless = f" lossless_layers={','.join(map(str, layers))}" if layers else ""
    return f"{tensor} lossless_tokens={SINK_TOKENS}{lossless}"

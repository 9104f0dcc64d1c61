"""Pages of floats, and what tensor codecs make of them, for page copiers to quantize and dequantize."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import assume
from hypothesis import strategies as st
from kernel_cases import Case, after_scatter, make_planes
from tensor_sections import KINDS, section, words_of

from kvstore.codecs.elements import ELEMENTS
from kvstore.codecs.tensors import QuantizedCodec, make_tensor_codec
from kvstore.layout import ChunkForm, DType, KVLayout, Shard

NAMES = ["int8", "int4:32", "int4:64", "fp8"]
DTYPES = [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32]
# What a codec declines, where it is not in a lossless token.
SPOILT = ["nan", "inf", "-inf", "too large", "signaling nan"]
SIGNALING = {DType.BFLOAT16: b"\x81\x7f", DType.FLOAT16: b"\x01\x7c", DType.FLOAT32: b"\x01\x00\x80\x7f"}


def codec_of(name: str, form: ChunkForm) -> QuantizedCodec:
    family, _, group = name.partition(":")
    return make_tensor_codec(family, int(group) if group else None, form)


@dataclass
class Chunk:
    """What one chunk holds: floats of a kind, or such and in one place what a codec declines."""

    kind: str
    seed: int
    first: int

    def host(self, form: ChunkForm) -> bytes:
        dtype = form.layout.dtype
        spoilt = self.kind.removesuffix(" in front")
        if spoilt not in SPOILT:
            return section(form, self.seed, self.kind)
        host = section(form, self.seed)
        # The first element of a section is one of its first token, in any page form.
        at = 0 if spoilt != self.kind else self.seed % (len(host) // dtype.itemsize) * dtype.itemsize
        if spoilt == "signaling nan":
            bad = SIGNALING[dtype]
        else:
            bad = words_of(
                [1.25 * ELEMENTS[dtype].largest if spoilt == "too large" else float(spoilt)], dtype
            )
        return host[:at] + bad + host[at + dtype.itemsize :]


@dataclass
class QuantizedCase:
    """Layers of pages, and chunks in them; all layers of a case lie alike."""

    name: str
    form: ChunkForm
    layers: list[list[Chunk]]
    page_ids: list[list[int]]
    axes: list[int]
    apart: bool

    @property
    def codec(self) -> QuantizedCodec:
        return codec_of(self.name, self.form)

    @property
    def firsts(self) -> list[int]:
        return [chunk.first for chunk in self.layers[0]]

    def pages(self, device: str, *, filled: bool) -> list[Case]:
        """Pages of each layer on `device`, with the chunks in them or random bytes."""
        cases = []
        for number, chunks in enumerate(self.layers):
            num_pages = 2 + max(max(ids) for ids in self.page_ids)
            made = make_planes(self.form, num_pages, self.axes, apart=self.apart, seed=number)
            case = Case(self.form, *made, self.page_ids)
            if filled:
                hosts = [chunk.host(self.form) for chunk in chunks]
                case = replace(case, storage=after_scatter(case, hosts))
            cases.append(case.on(device))
        return cases

    def encoded(self, chunk: Chunk) -> bytes:
        """What the codec makes of a chunk; its host form where it declines."""
        host, out = chunk.host(self.form), bytearray(2 * self.form.section_bytes)
        length = self.codec.encode(memoryview(host), memoryview(out), chunk.first)
        return host if length is None or length >= len(host) else bytes(out[:length])

    def decoded(self, stored: bytes) -> bytes:
        if len(stored) == self.form.section_bytes:
            return stored
        out = bytearray(self.form.section_bytes)
        self.codec.decode(memoryview(stored), memoryview(out))
        return bytes(out)


@st.composite
def forms(draw) -> ChunkForm:
    page_tokens = draw(st.sampled_from([1, 3, 8, 16]))
    kv_heads = draw(st.integers(1, 3))
    start = draw(st.integers(0, kv_heads - 1))
    layout = KVLayout(
        layers=2,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([5, 8, 33, 40, 64])),
        value_dim=draw(st.sampled_from([None, 7, 16, 34])),
        dtype=draw(st.sampled_from(DTYPES)),
        page_form=draw(st.sampled_from(["nhd", "hnd"])),
        page_tokens=page_tokens,
        # Runs of 32 and 64 tokens end within pages and before the chunk does.
        chunk_tokens=page_tokens * draw(st.integers(16 // page_tokens, 72 // page_tokens)),
    )
    return ChunkForm(layout, Shard(start, draw(st.integers(start + 1, kv_heads))))


@st.composite
def cases(draw) -> QuantizedCase:
    form, name = draw(forms()), draw(st.sampled_from(NAMES))
    assume(codec_of(name, form).stored_bytes(0) < form.section_bytes)
    chunks, pages = draw(st.integers(1, 3)), form.layout.pages
    table = draw(st.permutations(range(chunks * pages + draw(st.integers(0, 3)))))
    firsts = [draw(st.sampled_from([0, 1, 3, 4, 33])) % (form.layout.chunk_tokens + 1) for _ in range(chunks)]
    kind, seed = st.sampled_from([*KINDS, *SPOILT, "signaling nan in front"]), st.integers(0, 2**32 - 1)
    return QuantizedCase(
        name,
        form,
        [[Chunk(draw(kind), draw(seed), first) for first in firsts] for _ in range(draw(st.integers(1, 2)))],
        [list(table[at * pages : (at + 1) * pages]) for at in range(chunks)],
        list(draw(st.permutations(range(4)))),
        draw(st.booleans()),
    )


def case_of(
    name="int8", dtype=DType.BFLOAT16, page_form="nhd", kinds=("normal", "offset"), first=4, **changes
):
    """One layer with a chunk of each kind."""
    layout = KVLayout(2, 2, 40, dtype, page_form, page_tokens=8, chunk_tokens=40, value_dim=34)
    layout = replace(layout, **changes)
    chunks = [Chunk(kind, 7 + number, first) for number, kind in enumerate(kinds)]
    ids = [[number, *range(10 + number, 160, 10)][: layout.pages] for number in range(len(chunks))]
    return QuantizedCase(name, ChunkForm(layout, layout.whole), [chunks], ids, [0, 1, 2, 3], apart=True)

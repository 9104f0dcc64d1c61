"""How the KV cache of one model lies in memory: `KVLayout`, `Shard`, and the byte map `ChunkForm`.

Everything here is arithmetic on frozen values: no I/O, no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from kvstore.errors import MisconfiguredError

SECTION_ALIGN_MAX = 4096
PREAMBLE_BYTES = 32
HEADER_FIXED_BYTES_MAX = 1024
HEADER_SECTION_BYTES_MAX = 32
LAYERS_MAX = 4096
SECTION_BYTES_MAX = (1 << 32) - 1
CHUNK_TOKENS_MAX = 1 << 20
OPAQUE = "opaque:"


class DType(StrEnum):
    """Element types a KV cache may have; values are the names torch and numpy use."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    UINT8 = "uint8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {DType.FLOAT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2}.get(self, 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """The kv-head range [start, stop) one tensor-parallel rank holds. Its text form names objects."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise MisconfiguredError(f"shard {self.start}-{self.stop}: needs 0 <= start < stop")

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"

    @property
    def heads(self) -> int:
        """How many kv heads the shard holds."""
        return self.stop - self.start


@dataclass(frozen=True)
class KVLayout:
    """Geometry of a model's KV cache, equal for every engine that shares a namespace.

    kv_heads     of the whole model, over all tensor-parallel ranks; 1 for `mla`
    head_dim     elements of one key head; for `mla` the whole latent of one token
    value_dim    elements of one value head where it differs from head_dim; None: the same
    page_form    `nhd` (token, head, dim), `hnd` (head, token, dim), `mla` (token, latent), or
                 `opaque:<engine tag>` (a page is copied whole and never interpreted)
    page_tokens  tokens of one engine page; chunk_tokens is a whole number of pages
    page_bytes   `opaque` only: bytes of one page of one layer of one shard
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    page_form: str
    page_tokens: int
    chunk_tokens: int = 256
    value_dim: int | None = None
    page_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "value_dim", "page_tokens", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MisconfiguredError(f"layout {name}={value}: needs a number of 1 or more")
        if self.layers > LAYERS_MAX:
            raise MisconfiguredError(f"layout layers={self.layers}: the format takes at most {LAYERS_MAX}")
        if self.chunk_tokens > CHUNK_TOKENS_MAX:
            raise MisconfiguredError(
                f"layout chunk_tokens={self.chunk_tokens}: the format takes at most {CHUNK_TOKENS_MAX}"
            )
        if self.chunk_tokens % self.page_tokens:
            raise MisconfiguredError(
                f"layout chunk_tokens={self.chunk_tokens} is not a whole number of pages of "
                f"{self.page_tokens} tokens; set KVSTORE_CHUNK_TOKENS to a multiple of {self.page_tokens}"
            )
        if self.page_form not in ("nhd", "hnd", "mla") and not self.is_opaque:
            raise MisconfiguredError(
                f"layout page_form={self.page_form!r}: needs nhd, hnd, mla or opaque:<engine tag>"
            )
        if self.is_opaque != (self.page_bytes is not None and self.page_bytes > 0):
            raise MisconfiguredError(
                f"layout page_bytes={self.page_bytes}: needed for opaque pages and only for them, "
                f"page_form is {self.page_form!r}"
            )
        if self.page_form == "mla" and (self.kv_heads != 1 or self.value_dim is not None):
            raise MisconfiguredError("layout page_form=mla: has one latent, so kv_heads=1 and no value_dim")

    @property
    def is_opaque(self) -> bool:
        """Whether pages are copied whole and never interpreted."""
        return self.page_form.startswith(OPAQUE) and len(self.page_form) > len(OPAQUE)

    @property
    def pages(self) -> int:
        """Engine pages in one chunk."""
        return self.chunk_tokens // self.page_tokens

    @property
    def whole(self) -> Shard:
        """The shard of an engine that runs on one rank."""
        return Shard(0, self.kv_heads)

    def token_bytes(self, shard: Shard) -> tuple[int, ...]:
        """Bytes one token of one layer takes in each plane (K, then V; one plane for mla and opaque)."""
        if self.is_opaque:
            raise MisconfiguredError("opaque pages have no bytes per token")
        if self.page_form == "mla":
            return (self.head_dim * self.dtype.itemsize,)
        dims = (self.head_dim, self.head_dim if self.value_dim is None else self.value_dim)
        return tuple(shard.heads * dim * self.dtype.itemsize for dim in dims)

    def page_plane_bytes(self, shard: Shard) -> tuple[int, ...]:
        """Bytes of one page of one layer in each plane."""
        if self.page_bytes is not None:
            return (self.page_bytes,)
        return tuple(bytes_ * self.page_tokens for bytes_ in self.token_bytes(shard))

    def describe(self) -> dict[str, str | int]:
        """Every field that decides whether bytes are interchangeable, in plain words.

        page_tokens is left out where the bytes of a chunk do not depend on it, so that engines
        with different page sizes share one namespace.
        """
        fields: dict[str, str | int] = {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype),
            "page_form": self.page_form,
            "chunk_tokens": self.chunk_tokens,
        }
        if self.value_dim is not None and self.value_dim != self.head_dim:
            fields["value_dim"] = self.value_dim
        if self.page_form == "hnd" or self.is_opaque:
            fields["page_tokens"] = self.page_tokens
        if self.page_bytes is not None:
            fields["page_bytes"] = self.page_bytes
        return fields


@dataclass(frozen=True)
class ChunkForm:
    """Where every byte of one chunk lies, for one layout and shard.

    A section (one layer) is its planes one after the other, a plane its pages in token order.
    In host form section i starts at `i * stride`; the raw stored form is `header_bytes` of
    header, then exactly the host form, so a raw object is sent from, and received into, one slot.
    """

    layout: KVLayout
    shard: Shard

    def __post_init__(self) -> None:
        if self.shard.stop > self.layout.kv_heads:
            raise MisconfiguredError(
                f"shard {self.shard} reaches past the layout's {self.layout.kv_heads} kv heads"
            )
        if self.section_bytes > SECTION_BYTES_MAX:
            raise MisconfiguredError(
                f"one layer of a chunk takes {self.section_bytes} bytes, the format at most "
                f"{SECTION_BYTES_MAX}; set KVSTORE_CHUNK_TOKENS below {self.layout.chunk_tokens}"
            )

    @property
    def layers(self) -> int:
        """Sections in a chunk."""
        return self.layout.layers

    @cached_property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes of each plane of one section."""
        return tuple(self.layout.pages * bytes_ for bytes_ in self.layout.page_plane_bytes(self.shard))

    @cached_property
    def section_bytes(self) -> int:
        """Host bytes of one section, without padding."""
        return sum(self.plane_bytes)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that one token has in a row, in every plane and page; 0 for opaque pages.

        Where values depend on the token alone, as in a model's first layer, rows repeat as tokens do.
        """
        if self.layout.is_opaque:
            return 0
        rows = self.layout.token_bytes(self.shard)
        return math.gcd(*rows) // (self.shard.heads if self.layout.page_form == "hnd" else 1)

    @cached_property
    def align(self) -> int:
        """Section starts are multiples of this: 4096, or less where that would waste over 1%."""
        return min(SECTION_ALIGN_MAX, 1 << max(0, (self.section_bytes // 100).bit_length() - 1))

    @cached_property
    def stride(self) -> int:
        """Bytes from one section's start to the next in host form."""
        return self.padded(self.section_bytes)

    @cached_property
    def host_bytes(self) -> int:
        """Bytes of the host form, padding included."""
        return self.layers * self.stride

    @cached_property
    def header_bytes(self) -> int:
        """Bytes before the first section of a stored object, the same for every codec."""
        return stored_header_bytes(self.layers)

    @cached_property
    def raw_bytes(self) -> int:
        """Bytes of a stored object whose sections are not encoded; no stored object is larger."""
        return self.header_bytes + self.host_bytes

    def padded(self, length: int) -> int:
        """`length` rounded up to the section alignment."""
        return -(-length // self.align) * self.align


def stored_header_bytes(layers: int) -> int:
    """Bytes a stored object spends on preamble and header: a function of the layer count alone,

    so that a reader knows where sections start before it has read anything.
    """
    needed = PREAMBLE_BYTES + HEADER_FIXED_BYTES_MAX + layers * HEADER_SECTION_BYTES_MAX
    return -(-needed // SECTION_ALIGN_MAX) * SECTION_ALIGN_MAX

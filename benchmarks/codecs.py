"""What codecs save and cost: ratio and GB/s of one core, on KV that is given or made up.

    make bench NAME=codecs
    make bench NAME=codecs ARGS='--kv FOLDER'
    make bench NAME=codecs ARGS=--made-up

Without --kv, the KV of the trained model that `make quality` has left under .cache/quality is taken.
FOLDER holds .npy or .safetensors files (or is one): tensors of (sections, ..., tokens, heads, dim), so
that each first index is one layer's keys and values of one chunk. numpy's uint16 stands for bfloat16.
With --made-up, or where there is no KV, sections have the shape of Llama-3-8B in bfloat16 and hold a bell
curve whose width differs from channel to channel (log-normal, sigma 0.5); that is noise, a trained model's
KV is what counts.

Each codec encodes and decodes every section in each round, one thread, codecs in turn; times are CPU
seconds, medians over the rounds. Every section must come back bit by bit. A section that a codec does
not shrink counts as it is, as the store keeps it. `naive` is what one would write first, and the
store's rival: strided byte planes, each one zstd frame of level 1.

JSON: machine, kv, sections, section_bytes; lossless_ratio, lossless_encode_gbps, lossless_decode_gbps
(of `planes+zstd`); `codecs` and `peers`: {name: {ratio, encode_gbps, decode_gbps, max_error}}, where
gbps are host bytes per CPU second, and null where nothing was encoded.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import zstandard

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.report import machine, print_result, say, timed
from benchmarks.trained_kv import CACHE, newest_kv
from kvstore.codecs.registry import decoder, parse_codec

LOSSLESS = "planes+zstd"
CODECS = ("lz4", "zstd:1", "zstd:3", LOSSLESS, "planes+zstd:1", "planes+zstd:3")
TOKENS, CHANNELS, ITEM_BYTES = 256, 8 * 128, 2
SAFETENSORS_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "U16": 2}


@dataclass(frozen=True)
class Sections:
    """Sections of one element size, and where they come from."""

    source: str
    item_bytes: int
    row_bytes: int
    hosts: Sequence[bytes]

    @property
    def host_bytes(self) -> int:
        return sum(map(len, self.hosts))


class Candidate(Protocol):
    """What is measured; as a ByteCodec."""

    def encode(self, host: memoryview, out: memoryview) -> int | None: ...
    def decode(self, stored: memoryview, out: memoryview) -> None: ...


class Naive:
    """Byte planes by strided copies, each one a zstd frame of level 1."""

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        planes = np.frombuffer(host, np.uint8).reshape(-1, self._item_bytes)
        frames = [self._compressor.compress(planes[:, k].tobytes()) for k in range(self._item_bytes)]
        stored = b"".join([len(frame).to_bytes(4, "little") + frame for frame in frames])
        if len(stored) > len(out):
            return None
        out[: len(stored)] = stored
        return len(stored)

    def decode(self, stored: memoryview, out: memoryview) -> None:
        planes = np.frombuffer(out, np.uint8).reshape(-1, self._item_bytes)
        for k in range(self._item_bytes):
            length = int.from_bytes(stored[:4], "little")
            planes[:, k] = np.frombuffer(self._decompressor.decompress(stored[4 : 4 + length]), np.uint8)
            stored = stored[4 + length :]


class Measured:
    """One codec's bytes and CPU seconds over the rounds."""

    def __init__(self, name: str, encoder: Candidate, decode: Candidate) -> None:
        self.name = name
        self._encoder, self._decoder = encoder, decode
        self._encode_s: list[float] = []
        self._decode_s: list[float] = []
        self._stored_bytes = self._encoded_bytes = 0

    def round(self, sections: Sections, out: memoryview, back: memoryview) -> None:
        """Encode, then decode, every section once."""
        stored: list[bytes | None] = []
        encode_s = 0.0
        for host in sections.hosts:
            with timed() as timing:
                length = self._encoder.encode(memoryview(host), out[: len(host) - 1])
            encode_s += timing().cpu_s
            stored.append(None if length is None else bytes(out[:length]))
        decode_s = 0.0
        for host, data in zip(sections.hosts, stored, strict=True):
            if data is None:
                continue
            with timed() as timing:
                self._decoder.decode(memoryview(data), back[: len(host)])
            decode_s += timing().cpu_s
            if back[: len(host)] != host:
                raise SystemExit(f"{self.name} is not lossless")
        pairs = list(zip(sections.hosts, stored, strict=True))
        self._stored_bytes = sum(len(host if data is None else data) for host, data in pairs)
        self._encoded_bytes = sum(len(host) for host, data in pairs if data is not None)
        self._encode_s.append(encode_s)
        self._decode_s.append(decode_s)

    def row(self, host_bytes: int) -> dict[str, float | None]:
        """What is printed of it. All codecs here are lossless, and each section was compared."""
        decode_s = statistics.median(self._decode_s)
        return {
            "ratio": round(host_bytes / self._stored_bytes, 4),
            "encode_gbps": round(host_bytes / statistics.median(self._encode_s) / 1e9, 3),
            "decode_gbps": round(self._encoded_bytes / decode_s / 1e9, 3) if decode_s else None,
            "max_error": 0.0,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=codecs", description=__doc__)
    parser.add_argument("--kv", type=Path, help="a .npy or .safetensors file, or a folder of them")
    parser.add_argument("--made-up", action="store_true", help="noise, whatever KV there is")
    add_number(parser, "--sections", 16, "sections to make up; without --kv")
    add_rounds(parser, 5)
    parser.add_argument(
        "--codecs", nargs="+", default=CODECS, help="what to measure, as KVSTORE_CODEC takes it"
    )
    options = parser.parse_args(arguments)
    kv = None if options.made_up else options.kv or newest_kv()
    if kv is None and not options.made_up:
        say("there is no KV of a trained model: `make quality` makes it")
    sections = _make_up(options.sections) if kv is None else _read(kv)
    print_result(_measure(sections, dict.fromkeys([LOSSLESS, *options.codecs]), options.rounds))


def _measure(sections: Sections, names: Mapping[str, None], rounds: int) -> dict[str, object]:
    largest_bytes = max(map(len, sections.hosts))
    out, back = (memoryview(bytearray(largest_bytes)) for _ in range(2))
    codecs = [_codec(name, sections) for name in names]
    naive = Naive(sections.item_bytes)
    peers = [Measured("naive", naive, naive)]
    for _ in range(rounds):
        for measured in [*codecs, *peers]:
            measured.round(sections, out, back)
    say(f"{sections.host_bytes / 1e6:.1f} MB of KV, {sections.source}")
    say(f"{'codec':<16}{'ratio':>8}{'encode GB/s':>13}{'decode GB/s':>13}")
    rows = {measured.name: measured.row(sections.host_bytes) for measured in [*codecs, *peers]}
    for name, row in rows.items():
        say(f"{name:<16}{row['ratio']:>8.3f}{row['encode_gbps']:>13.2f}{row['decode_gbps'] or 0:>13.2f}")
    return {
        "machine": machine(),
        "kv": sections.source,
        "sections": len(sections.hosts),
        "section_bytes": largest_bytes,
        **{f"lossless_{field}": rows[LOSSLESS][field] for field in ("ratio", "encode_gbps", "decode_gbps")},
        "codecs": {measured.name: rows[measured.name] for measured in codecs},
        "peers": {measured.name: rows[measured.name] for measured in peers},
    }


def _codec(name: str, sections: Sections) -> Measured:
    encoder = parse_codec(name, sections.item_bytes, sections.row_bytes)
    if encoder is None:
        raise SystemExit(f"codec {name} encodes nothing")
    return Measured(name, encoder, decoder(encoder.name))


def _make_up(count: int) -> Sections:
    random = np.random.default_rng(7)
    hosts = []
    for _ in range(count):
        width = np.exp(0.5 * random.standard_normal((2, 1, CHANNELS), np.float32))
        values = width * random.standard_normal((2, TOKENS, CHANNELS), np.float32)
        hosts.append((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    source = "made up: a bell curve of another width in each channel, bfloat16"
    return Sections(source, ITEM_BYTES, CHANNELS * ITEM_BYTES, hosts)


def _read(path: Path) -> Sections:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    tensors = [tensor for file in files for tensor in _tensors(file)]
    forms = {(tensor.item_bytes, tensor.row_bytes) for tensor in tensors}
    if len(forms) != 1:
        raise SystemExit(f"{path}: needs .npy or .safetensors files of one element size and row, has {forms}")
    hosts = [host for tensor in tensors for host in tensor.hosts]
    trained = path.is_relative_to(CACHE)
    source = f"a trained model's, {path}, by make quality" if trained else f"read from {path.name}"
    return Sections(source, *forms.pop(), hosts)


def _tensors(file: Path) -> Iterator[Sections]:
    """The sections of every tensor in a file."""
    if file.suffix == ".npy":
        array = np.load(file)
        yield _cut(file.name, array.dtype.itemsize, array.shape, array.tobytes())
    elif file.suffix == ".safetensors":
        # Read by hand: numpy has no bfloat16, and torch is not needed for bytes.
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in sorted(json.loads(data[8:start]).items()):
            if name != "__metadata__":
                first, stop = (start + at for at in entry["data_offsets"])
                yield _cut(name, SAFETENSORS_BYTES[entry["dtype"]], entry["shape"], data[first:stop])


def _cut(name: str, item_bytes: int, shape: Sequence[int], data: bytes) -> Sections:
    length = len(data) // shape[0]
    row_bytes = shape[-2] * shape[-1] * item_bytes
    return Sections(
        name, item_bytes, row_bytes, [data[at : at + length] for at in range(0, len(data), length)]
    )


if __name__ == "__main__":
    main()

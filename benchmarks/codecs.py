"""What codecs save and cost: ratio, error and GB/s of one core, on KV that is given or made up.

    make bench NAME=codecs
    make bench NAME=codecs ARGS='--kv FOLDER'
    make bench NAME=codecs ARGS=--made-up

Without --kv, the KV of the trained model that `make quality` has left under .cache/quality is taken.
FOLDER holds .npy or .safetensors files (or is one): tensors of (sections, 2, tokens, heads, dim), so that
each first index is one layer's keys and values of one chunk. numpy's uint16 stands for bfloat16. Each
section counts as one of its prefix's first chunk, whose first tokens tensor codecs keep as they are; with
`prefix_chunks` in a .safetensors file's metadata only the first of each so many does.
With --made-up, or where there is no KV, sections have the shape of Llama-3-8B in bfloat16 and hold a bell
curve whose width differs from channel to channel (log-normal, sigma 0.5); that is noise, a trained model's
KV is what counts.

Each codec encodes and decodes every section in each round, one thread, codecs in turn; times are CPU
seconds of that thread, medians over the rounds. Of lossless codecs every section must come back bit by
bit. A section that a codec does not shrink counts as it is, as the store keeps it. `naive` is what one
would write first, and the store's rival: strided byte planes, each one zstd frame of level 1.

JSON: machine, kv, sections, section_bytes; lossless_ratio, lossless_encode_gbps, lossless_decode_gbps
(of `planes+zstd`); `codecs` and `peers`: {name: {

    ratio                                     host bytes over stored ones, without headers and padding
    encode_gbps, decode_gbps                  host bytes per CPU second; null where nothing was encoded
    encode_cpu_s_per_gb, decode_cpu_s_per_gb  the same the other way round, as other benchmarks say it
    max_error                                 the largest difference of two elements, in the KV's own unit;
                                              0 for lossless codecs
}}; and two_thread_scaling: {name: what two threads decode in a second over what one does}, by the clock,
for `planes+zstd` and `int8`; there `sha256` hashes the same sections and holds no lock of Python's, so it
shows what the machine gives two threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.report import machine, print_result, say
from benchmarks.section_speed import HostSection, SectionTrial, StoredSection
from benchmarks.thread_scaling import two_thread_scaling
from benchmarks.trained_kv import CACHE, PREFIX_CHUNKS, newest_kv
from kvstore.codecs.registry import split_codec
from kvstore.codecs.section_codecs import EncodedSection, SectionCodecs
from kvstore.errors import MisconfiguredError
from kvstore.layout import ChunkForm, DType, KVLayout

BEST = "planes+zstd"
CODECS = (
    *("lz4", "zstd:1", "zstd:3", BEST, "planes+zstd:1", "planes+zstd:3"),
    *("int8", "int8+zstd", "int4", "int4+zstd", "fp8", "fp8+zstd"),
)
SCALED = (BEST, "int8")
TOKENS, HEADS, DIM = 256, 8, 128
SAFETENSORS = {
    "F32": DType.FLOAT32,
    "F16": DType.FLOAT16,
    "BF16": DType.BFLOAT16,
    "F8_E4M3": DType.FLOAT8_E4M3,
    "F8_E5M2": DType.FLOAT8_E5M2,
    "U8": DType.UINT8,
    "U16": DType.BFLOAT16,
}
NUMPY = {
    "float32": DType.FLOAT32,
    "float16": DType.FLOAT16,
    "uint16": DType.BFLOAT16,
    "uint8": DType.UINT8,
}


@dataclass(frozen=True)
class Sections:
    """Sections of one form, and where they come from."""

    source: str
    form: ChunkForm
    sections: Sequence[HostSection]


class Naive:
    """Byte planes by strided copies, each one a zstd frame of level 1. For SectionTrial."""

    names = ("naive",)

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, host: memoryview, out: memoryview, *, layer: int, depth: int) -> EncodedSection:
        del layer, depth
        planes = np.frombuffer(host, np.uint8).reshape(-1, self._item_bytes)
        frames = [self._compressor.compress(planes[:, k].tobytes()) for k in range(self._item_bytes)]
        stored = b"".join([len(frame).to_bytes(4, "little") + frame for frame in frames])
        if len(stored) > len(out):
            return EncodedSection(None, 0)
        out[: len(stored)] = stored
        return EncodedSection(0, len(stored))

    def decoder(self, name: str) -> Naive:
        del name
        return self

    def decode(self, stored: memoryview, out: memoryview) -> None:
        planes = np.frombuffer(out, np.uint8).reshape(-1, self._item_bytes)
        for k in range(self._item_bytes):
            length = int.from_bytes(stored[:4], "little")
            planes[:, k] = np.frombuffer(self._decompressor.decompress(stored[4 : 4 + length]), np.uint8)
            stored = stored[4 + length :]


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
    print_result(_measure(sections, dict.fromkeys([*SCALED, *options.codecs]), options.rounds))


def _measure(sections: Sections, names: Iterable[str], rounds: int) -> dict[str, object]:
    codecs = {name: trial for name in names if (trial := _trial(name, sections))}
    naive = Naive(sections.form.layout.dtype.itemsize)
    peers = {"naive": SectionTrial(naive, sections.form, sections.sections)}
    lossy = {name for name in codecs if split_codec(name).tensor is not None}
    for _ in range(rounds):
        for trial in (*codecs.values(), *peers.values()):
            trial.round()
    for name, trial in (codecs | peers).items():
        if not trial.exact and name not in lossy:
            raise SystemExit(f"{name} is not lossless")
    rows = {name: trial.row() for name, trial in (codecs | peers).items()}
    scaling = {name: _decode_scaling(codecs[name].stored, sections.form) for name in SCALED if name in codecs}
    scaling["sha256"] = _hash_scaling(sections.sections)
    _say_table(sections, rows, scaling)
    return {
        "machine": machine(),
        "kv": sections.source,
        "sections": len(sections.sections),
        "section_bytes": sections.form.section_bytes,
        **{f"lossless_{field}": rows[BEST][field] for field in ("ratio", "encode_gbps", "decode_gbps")},
        "codecs": {name: rows[name] for name in codecs},
        "peers": {name: rows[name] for name in peers},
        "two_thread_scaling": scaling,
    }


def _trial(name: str, sections: Sections) -> SectionTrial | None:
    """None, after a word to people, for a codec that is not for this form."""
    try:
        codecs = SectionCodecs(name, sections.form)
    except MisconfiguredError as error:
        say(f"left out: {error}")
        return None
    return SectionTrial(codecs, sections.form, sections.sections)


def _decode_scaling(stored: Sequence[StoredSection], form: ChunkForm) -> float | None:
    encoded = [(one.reader, memoryview(one.data)) for one in stored if one.reader is not None]

    def make_work() -> Callable[[int], None]:
        back = memoryview(bytearray(form.section_bytes))

        def decode(number: int) -> None:
            reader, data = encoded[number]
            reader.decode(data, back)

        return decode

    return round(two_thread_scaling(make_work, len(encoded)), 2) if encoded else None


def _hash_scaling(sections: Sequence[HostSection]) -> float:
    def digest(number: int) -> None:
        hashlib.sha256(sections[number].host)

    return round(two_thread_scaling(lambda: digest, len(sections)), 2)


def _say_table(
    sections: Sections,
    rows: Mapping[str, Mapping[str, float | None]],
    scaling: Mapping[str, float | None],
) -> None:
    say(f"{len(sections.sections) * sections.form.section_bytes / 1e6:.1f} MB of KV, {sections.source}")
    say(f"{'codec':<16}{'ratio':>8}{'encode GB/s':>13}{'decode GB/s':>13}{'max error':>12}")
    for name, row in rows.items():
        figures = f"{row['encode_gbps'] or 0:>13.2f}{row['decode_gbps'] or 0:>13.2f}{row['max_error']:>12.3g}"
        say(f"{name:<16}{row['ratio']:>8.3f}{figures}")
    say(f"decoded by two threads, of what one does: {scaling}")


def _make_up(sections: int) -> Sections:
    random = np.random.default_rng(7)
    form = _form(HEADS, DIM, TOKENS, DType.BFLOAT16)
    made = []
    for _ in range(sections):
        width = np.exp(0.5 * random.standard_normal((2, 1, HEADS * DIM), np.float32))
        values = width * random.standard_normal((2, TOKENS, HEADS * DIM), np.float32)
        made.append(HostSection((values.view(np.uint32) >> 16).astype(np.uint16).tobytes(), 0, 0))
    return Sections("made up: a bell curve of another width in each channel, bfloat16", form, made)


def _read(path: Path) -> Sections:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    tensors = [tensor for file in files for tensor in _tensors(file)]
    forms = {tensor.form for tensor in tensors}
    if len(forms) != 1:
        layouts = ", ".join(str(form.layout) for form in forms) or "none"
        raise SystemExit(f"{path}: needs .npy or .safetensors files of one shape and dtype, has {layouts}")
    trained = path.is_relative_to(CACHE)
    source = f"a trained model's, {path}, by make quality" if trained else f"read from {path.name}"
    return Sections(source, forms.pop(), [one for tensor in tensors for one in tensor.sections])


def _tensors(file: Path) -> Iterator[Sections]:
    """The sections of every tensor in a file."""
    if file.suffix == ".npy":
        array = np.load(file)
        yield _cut(file, NUMPY.get(array.dtype.name), array.shape, array.tobytes())
    elif file.suffix == ".safetensors":
        # Read by hand: numpy has no bfloat16, and torch is not needed for bytes.
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        prefix_chunks = int(header.pop("__metadata__", {}).get(PREFIX_CHUNKS, 1))
        for _, entry in sorted(header.items()):
            first, stop = (start + at for at in entry["data_offsets"])
            dtype = SAFETENSORS.get(entry["dtype"])
            yield _cut(file, dtype, entry["shape"], data[first:stop], prefix_chunks)


def _cut(
    file: Path, dtype: DType | None, shape: Sequence[int], data: bytes, prefix_chunks: int = 1
) -> Sections:
    if dtype is None or len(shape) != 5 or shape[1] != 2:
        raise SystemExit(
            f"{file}: needs floats of the shape (sections, 2, tokens, heads, dim), has {tuple(shape)}"
        )
    _, _, tokens, heads, dim = shape
    form = _form(heads, dim, tokens, dtype)
    starts = range(0, len(data), form.section_bytes)
    sections = [
        HostSection(data[at : at + form.section_bytes], 0, index % prefix_chunks)
        for index, at in enumerate(starts)
    ]
    return Sections(file.name, form, sections)


def _form(heads: int, dim: int, tokens: int, dtype: DType) -> ChunkForm:
    layout = KVLayout(
        layers=1,
        kv_heads=heads,
        head_dim=dim,
        dtype=dtype,
        page_form="nhd",
        page_tokens=tokens,
        chunk_tokens=tokens,
    )
    return ChunkForm(layout, layout.whole)


if __name__ == "__main__":
    main()

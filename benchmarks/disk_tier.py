"""The disk tier beside plain loops of reads and writes on the same disk, interleaved round by round.

`raw` is what a loop of pwrite or pread gives: whole blocks from and to aligned memory that nobody
else touches. The tier copies through memory of its own threads, so that a disk that hangs keeps
nothing of a caller's. `direct` goes past the page cache; `buffered` goes through it and asks the
system to drop the pages again. JSON: machine, chunks, chunk_bytes, `cases`: a list of {case,
direction, gbps, cpu_s_per_gb, gbps_vs_raw, cpu_vs_raw, cached_share}, medians over the rounds, the
ratios to the raw loop of the same way; and index figures: leading_4096_us, touch_4096_us,
index_bytes, add_us, evict_us an entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.report import machine, print_result, say
from kvstore.disk.tier import DiskTier
from kvstore.eviction import PrefixEviction
from kvstore.keys import ChunkKey, PrefixChain, object_name
from kvstore.layout import ChunkForm, DType, KVLayout
from kvstore.namespace import Namespace

LAYOUT = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=16)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
RANGE_BYTES = 8 << 20
STEP_BYTES = 1 << 20
WRITERS = 4
READERS = 8
WAYS = ("direct", "buffered")
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    parser = parser_of(prog="make bench NAME=disk_tier", description=__doc__)
    add_number(parser, "--chunks", 24, "chunks of 32 MiB written and read in a round")
    add_rounds(parser, 5)
    parser.add_argument(
        "--folder",
        default=None,
        help="a folder on the disk to measure, for files of a while; without it, the system's own",
    )
    add_number(parser, "--entries", 1_000_000, "chunks in the index whose calls are timed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cases = asyncio.run(measure(Path(folder), arguments.chunks, arguments.rounds))
    rows = [row for case in cases for row in case.rows()]
    compare(rows)
    index = measure_index(arguments.entries)
    print_table(rows, index)
    print_result(
        {
            "machine": machine(),
            "chunks": arguments.chunks,
            "chunk_bytes": FORM.raw_bytes,
            "cases": rows,
            **index,
        }
    )


class Case:
    """One way to write and read chunks; what each round took."""

    def __init__(
        self, name: str, write: Callable[[], Awaitable[None]], read: Callable[[], Awaitable[None]], total: int
    ) -> None:
        self.name = name
        self.write = write
        self.read = read
        self._total_gb = total / 1e9
        self._took: dict[str, list[tuple[float, float, float]]] = {"write": [], "read": []}

    async def run(self, direction: str, paths: Callable[[], list[Path]]) -> None:
        wall_s, cpu_s = time.perf_counter(), _cpu_s()
        await (self.write() if direction == "write" else self.read())
        took_s, cpu_took_s = time.perf_counter() - wall_s, _cpu_s() - cpu_s
        self._took[direction].append((took_s, cpu_took_s, cached_share(paths())))

    def rows(self) -> Iterator[dict[str, str | float]]:
        for direction, took in self._took.items():
            wall_s, cpu_s, cached = (statistics.median(column) for column in zip(*took[1:], strict=True))
            yield {
                "case": self.name,
                "direction": direction,
                "gbps": round(self._total_gb / wall_s, 2),
                "cpu_s_per_gb": round(cpu_s / self._total_gb, 3),
                "cached_share": round(cached, 2),
            }


async def measure(folder: Path, chunks: int, rounds: int) -> list[Case]:
    """Write and read the same bytes in each way, in turn; the first round only warms up."""
    namespace = Namespace("disk-tier", "bench", LAYOUT, "none")
    keys = PrefixChain.of(namespace, range(chunks * LAYOUT.chunk_tokens)).keys
    data = _aligned(FORM.raw_bytes)
    data[:] = (os.urandom(STEP_BYTES) * (FORM.raw_bytes // STEP_BYTES + 1))[: FORM.raw_bytes]
    async with contextlib.AsyncExitStack() as stack:
        cases: list[tuple[Case, Path]] = []
        for way in WAYS:
            raw = Raw(folder / f"raw-{way}", chunks, data, direct=way == "direct")
            cases.append((Case(f"raw {way}", raw.write, raw.read, chunks * FORM.raw_bytes), raw.folder))
            tier = await stack.enter_async_context(Tier.opened(folder / f"tier-{way}", keys, data, way))
            cases.append((Case(f"tier {way}", tier.write, tier.read, chunks * FORM.raw_bytes), tier.folder))
        for round_ in range(rounds + 1):
            say(f"round {round_} of {rounds}" if round_ else "warming up")
            for direction in ("write", "read"):
                for case, root in cases:
                    await case.run(direction, lambda root=root: _files(root))  # type: ignore[misc]
            for _, root in cases:
                for path in _files(root):
                    path.unlink()
    return [case for case, _ in cases]


class Raw:
    """Plain loops in threads: as many, and with ranges as long, as the tier has them."""

    def __init__(self, folder: Path, chunks: int, data: memoryview, *, direct: bool) -> None:
        folder.mkdir()
        self.folder = folder
        self._chunks = chunks
        self._data = data
        self._direct = direct
        self._flags = os.O_DIRECT if direct else 0
        self._outs = [_aligned(RANGE_BYTES) for _ in range(READERS)]

    async def write(self) -> None:
        with ThreadPoolExecutor(WRITERS) as threads:
            list(threads.map(self._write_one, range(self._chunks)))

    async def read(self) -> None:
        ranges = [(i, start) for i in range(self._chunks) for start in range(0, FORM.raw_bytes, RANGE_BYTES)]
        with ThreadPoolExecutor(READERS) as threads:
            list(threads.map(self._read_range, ranges))

    def _write_one(self, number: int) -> None:
        file = os.open(self.folder / str(number), os.O_WRONLY | os.O_CREAT | self._flags)
        for start in range(0, FORM.raw_bytes, STEP_BYTES):
            os.pwrite(file, self._data[start : start + STEP_BYTES], start)
        if not self._direct:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

    def _read_range(self, what: tuple[int, int]) -> None:
        number, start = what
        out = self._outs.pop()
        file = os.open(self.folder / str(number), os.O_RDONLY | self._flags)
        for at in range(0, min(RANGE_BYTES, FORM.raw_bytes - start), STEP_BYTES):
            os.preadv(file, [out[at : at + STEP_BYTES]], start + at)
        if not self._direct:
            os.posix_fadvise(file, start, RANGE_BYTES, os.POSIX_FADV_DONTNEED)
        os.close(file)
        self._outs.append(out)


class Tier:
    """The disk tier, used as a store uses it."""

    def __init__(self, folder: Path, tier: DiskTier, keys: tuple[ChunkKey, ...], data: memoryview) -> None:
        self.folder = folder / "v1"
        self._tier = tier
        self._keys = keys
        self._data = data
        self._outs = [_aligned(RANGE_BYTES) for _ in range(READERS)]

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(
        cls, folder: Path, keys: tuple[ChunkKey, ...], data: memoryview, way: str
    ) -> AsyncIterator[Tier]:
        tier = DiskTier(folder, 1 << 40, LAYOUT.whole)
        await tier.open()
        await tier.wait_scanned()
        if way == "buffered":
            tier._folder._direct = False  # noqa: SLF001 as on a file system that has no O_DIRECT
        yield cls(folder, tier, keys, data)
        await tier.close()

    async def write(self) -> None:
        for key in self._keys:
            self._tier.discard(key)
        turns = asyncio.Semaphore(WRITERS)

        async def fill(key: ChunkKey) -> None:
            async with turns:
                fill = self._tier.begin(key, FORM.raw_bytes)
                while fill is None:
                    await asyncio.sleep(0.001)  # the file of the round before is being removed
                    fill = self._tier.begin(key, FORM.raw_bytes)
                for start in range(0, FORM.raw_bytes, RANGE_BYTES):
                    await fill.write(start, [self._data[start : start + RANGE_BYTES]])
                if not await fill.commit():
                    raise SystemExit("the disk tier did not take a chunk")

        await asyncio.gather(*(fill(key) for key in self._keys))

    async def read(self) -> None:
        turns = asyncio.Semaphore(READERS)

        async def read(key: ChunkKey, start: int) -> None:
            async with turns:
                out = self._outs.pop()
                name = object_name(DiskTier.prefix, key, LAYOUT.whole)
                await self._tier.read_into(name, start, out[: FORM.raw_bytes - start])
                self._outs.append(out)

        starts = range(0, FORM.raw_bytes, RANGE_BYTES)
        await asyncio.gather(*(read(key, start) for key in self._keys for start in starts))


def measure_index(entries: int) -> dict[str, float]:
    """What the policy takes for so many chunks, in prefixes of 64."""
    before = _resident_bytes()
    policy: PrefixEviction[None] = PrefixEviction(entries)
    names = [os.urandom(32) for _ in range(entries)]
    started_s = time.process_time()
    for number, name in enumerate(names):
        policy.add(name, names[number - 1] if number % 64 else b"", 1, None)
    add_s = time.process_time() - started_s
    index_bytes = _resident_bytes() - before
    keys = [ChunkKey(b"", name, b"", 0) for name in names[:4096]]
    looks, touches = [], []
    for _ in range(21):
        started_s = time.perf_counter()
        policy.leading(key.hash for key in keys)
        looks.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        policy.touch(key.hash for key in keys)
        touches.append(time.perf_counter() - started_s)
    started_s = time.process_time()
    for _ in range(entries // 2):
        policy.pop_victim()
    return {
        "leading_4096_us": round(statistics.median(looks) * 1e6),
        "touch_4096_us": round(statistics.median(touches) * 1e6),
        "index_bytes": round(index_bytes / entries),
        "add_us": round(add_s / entries * 1e6, 2),
        "evict_us": round((time.process_time() - started_s) / (entries // 2) * 1e6, 2),
    }


def compare(rows: list[dict[str, str | float]]) -> None:
    """Set each row beside the raw loop of its way and direction."""
    raw = {(row["case"], row["direction"]): row for row in rows}
    for row in rows:
        base = raw[str(row["case"]).replace("tier", "raw"), row["direction"]]
        row["gbps_vs_raw"] = round(float(row["gbps"]) / float(base["gbps"]), 2)
        row["cpu_vs_raw"] = round(float(row["cpu_s_per_gb"]) / float(base["cpu_s_per_gb"]), 2)


def cached_share(paths: list[Path]) -> float:
    """How much of the files the page cache holds. Looking changes nothing."""
    pages = held = 0
    for path in paths:
        length = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) as mapped:
            found = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            if _LIBC.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), found):
                raise OSError(ctypes.get_errno(), "mincore")
            del start
            pages += len(found)
            held += sum(bytes(found))
    return held / max(1, pages)


def print_table(rows: list[dict[str, str | float]], index: dict[str, float]) -> None:
    say(f"{'case':<16}{'direction':<11}{'GB/s':>6}{'vs raw':>8}{'CPU s/GB':>10}{'vs raw':>8}{'cached':>8}")
    for row in rows:
        say(
            f"{row['case']:<16}{row['direction']:<11}{row['gbps']:>6}{row['gbps_vs_raw']:>8}"
            f"{row['cpu_s_per_gb']:>10}{row['cpu_vs_raw']:>8}{row['cached_share']:>8}"
        )
    say(f"index: {index}")


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def _aligned(length: int) -> memoryview:
    """Memory as long, that is resident and begins at a page."""
    memory = memoryview(mmap.mmap(-1, length))
    memory[:] = bytes(length)
    return memory


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()

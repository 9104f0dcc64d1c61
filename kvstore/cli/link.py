"""How fast a store answers this node: latency, bandwidth, requests a second, names a second."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvstore.backends.contract import ABSENT
from kvstore.cli.examination import Site
from kvstore.errors import RetryableError
from kvstore.event_loop import to_its_end
from kvstore.keys import format_folder

SMALL_BYTES = 4096
WRITE_CONCURRENCY = (1, 4, 16)
READ_CONCURRENCY = (1, 4, 16, 64)
RANGE_BYTES = (1 << 20, 8 << 20)
OBJECT_BYTES = max(RANGE_BYTES)
# With fewer there is a step without a request for each of those at once.
WRITE_BYTES_MIN = OBJECT_BYTES * sum(WRITE_CONCURRENCY)
# Buffers of all reads at once.
_BUFFERS_BYTES_MAX = 256 << 20
_LATENCIES_MAX = 200


@dataclass(frozen=True)
class Bounds:
    """How far measuring may go. `seconds`: of each step; bytes: of all steps together."""

    seconds: float
    write_bytes: int
    read_bytes: int


@dataclass
class Latency:
    """Seconds of single requests, one after the other."""

    operation: str
    seconds: list[float] = field(default_factory=list)

    def quantile_s(self, share: float) -> float:
        """What so many of them were within."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Flow:
    """Requests of one size, so many at once.

    request_bytes  0 for requests without a body
    """

    operation: str
    request_bytes: int
    concurrency: int
    requests: int
    took_s: float

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth."""
        return self.requests * self.request_bytes / self.took_s

    @property
    def requests_per_s(self) -> float:
        """Pace."""
        return self.requests / self.took_s


class LinkProbe:
    """Measures, one step after the other, with objects in a site's folder, which the site removes."""

    def __init__(self, site: Site, bounds: Bounds) -> None:
        self._site = site
        self._bounds = bounds
        self._payload = secrets.token_bytes(OBJECT_BYTES)
        self._labels: list[str] = []
        self._numbers = itertools.count()

    async def latency(self, operation: str) -> Latency:
        """Of `head`, of a `get` of 4 KiB, or of a `put` of as much."""
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "head": lambda: self._site.backend.head(self._site.folder + "small"),
            "get": lambda: self._site.read("small", length=SMALL_BYTES),
            "put": lambda: self._put(f"small-{next(self._numbers)}", SMALL_BYTES),
        }
        request = requests[operation]
        if operation != "put":
            await self._put("small", SMALL_BYTES)
        # The first one sets up a connection.
        await request()
        found = Latency(operation)
        until_s = time.perf_counter() + self._bounds.seconds
        while not found.seconds or (time.perf_counter() < until_s and len(found.seconds) < _LATENCIES_MAX):
            began_s = time.perf_counter()
            await request()
            found.seconds.append(time.perf_counter() - began_s)
        return found

    async def writes(self, concurrency: int) -> Flow:
        """Whole objects, which reads use afterwards."""

        async def write() -> None:
            label = f"large-{next(self._numbers)}"
            await self._put(label, OBJECT_BYTES)
            self._labels.append(label)

        most = _share(self._bounds.write_bytes, WRITE_CONCURRENCY, concurrency) // OBJECT_BYTES
        return await self._flow("put", OBJECT_BYTES, concurrency, max(1, most), lambda _: write())

    def read_steps(self) -> list[tuple[int, int]]:
        """Bytes of a range and how many at once, of the steps that fit into memory."""
        pairs = itertools.product(RANGE_BYTES, READ_CONCURRENCY)
        return [(size, at_once) for size, at_once in pairs if size * at_once <= _BUFFERS_BYTES_MAX]

    async def reads(self, range_bytes: int, concurrency: int) -> Flow:
        """Ranges of the objects that were written."""
        weights = [size * at_once for size, at_once in self.read_steps()]
        share_bytes = _share(self._bounds.read_bytes, weights, range_bytes * concurrency)
        buffers = [memoryview(bytearray(range_bytes)) for _ in range(concurrency)]
        parts = OBJECT_BYTES // range_bytes
        numbers = itertools.count()

        async def read(worker: int) -> None:
            number = next(numbers)
            name = self._site.folder + self._labels[number // parts % len(self._labels)]
            answer = await self._site.backend.read_into(name, number % parts * range_bytes, buffers[worker])
            if answer is ABSENT or answer.length != range_bytes:
                raise RetryableError(f"{name} was written, and cannot be read whole; try again")

        return await self._flow("get", range_bytes, concurrency, max(1, share_bytes // range_bytes), read)

    async def pace(self, concurrency: int) -> Flow:
        """Requests a second, of the smallest kind."""
        name = self._site.folder + "small"
        return await self._flow("head", 0, concurrency, 1 << 20, lambda _: self._site.backend.head(name))

    async def listing(self, prefix: str) -> Flow:
        """Names a second, of what is stored."""
        began_s = time.perf_counter()
        names = 0
        async for _ in self._site.backend.list(format_folder(prefix)):
            names += 1
            if time.perf_counter() - began_s > self._bounds.seconds:
                break
        return Flow("list", 0, 1, names, time.perf_counter() - began_s)

    async def _put(self, label: str, size: int) -> None:
        put = asyncio.ensure_future(self._site.put(label, memoryview(self._payload)[:size]))
        # One that is cancelled may still take effect, after what it stored was removed.
        if await to_its_end(put):
            raise asyncio.CancelledError
        put.result()

    async def _flow(
        self,
        operation: str,
        request_bytes: int,
        concurrency: int,
        requests_max: int,
        request: Callable[[int], Awaitable[object]],
    ) -> Flow:
        """Make requests, so many at once, until the time or their number is over."""
        began_s = time.perf_counter()
        left = iter(range(requests_max))
        done = 0

        async def work(worker: int) -> None:
            nonlocal done
            for _ in left:
                await request(worker)
                done += 1
                if time.perf_counter() - began_s > self._bounds.seconds:
                    return

        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in range(concurrency):
                    tasks.create_task(work(worker))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return Flow(operation, request_bytes, concurrency, done, time.perf_counter() - began_s)


def _share(bytes_: int, weights: Sequence[int], weight: int) -> int:
    """What a step may move of what all may: more at once, more in all."""
    return bytes_ * weight // sum(weights)

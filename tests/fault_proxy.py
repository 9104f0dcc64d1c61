"""A proxy in front of a real S3 server that breaks what passes through it, as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from fault_exchange import Answer, Exchange, RequestHead, receive_answer, receive_request_head, reset

Condition = Callable[[], bool]
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Fault:
    """Something that may befall a request. `strike` handles the exchange in place of `Exchange.pass_on`."""

    name: str
    strike: Callable[[Exchange], Awaitable[None]]

    def __str__(self) -> str:
        return self.name


@dataclass
class _Rule:
    fault: Fault
    methods: tuple[str, ...]
    path: str
    probability: float
    times: int

    def applies(self, head: RequestHead) -> bool:
        wanted = not self.methods or head.method in self.methods
        return self.times > 0 and wanted and self.path in head.target


class FaultProxy:
    """Serves in a thread of its own between `__enter__` and `__exit__`; any thread may use it.

    seed       decides, with the order of requests, which of them a fault with a probability strikes
    url        what clients talk to; the same for as long as it lives
    skew_s     added to the Date of every answer
    latency_s  how long every request is held before it is handled

    Every request has a connection to the server of its own, whatever the client does with its own.
    """

    def __init__(self, server_url: str, seed: int = 0) -> None:
        parts = urlsplit(server_url)
        self.skew_s = 0.0
        self.latency_s = 0.0
        self.requests: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.open_connections = 0
        self.open_connections_max = 0
        self._server = (parts.hostname or "", parts.port or 80)
        self._random = random.Random(seed)
        self._rules: tuple[_Rule, ...] = ()
        self._changed = threading.Condition()
        self._serving: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        # Holds the port while nobody listens there.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self.url = "http://{}:{}".format(*self._holder.getsockname())

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._holder.close()

    def inject(
        self,
        fault: Fault,
        *methods: str,
        path: str = "",
        probability: float = 1.0,
        times: int = 1 << 30,
    ) -> None:
        """Have a fault strike requests from now on, beside those injected before; the first one counts.

        methods  it strikes these, by default all
        path     it strikes those whose URL holds this
        times    how often it strikes at most
        """
        self._rules += (_Rule(fault, methods, path, probability, times),)

    def heal(self) -> None:
        """Let everything that comes from now on pass. What is stalled stays so until its client leaves."""
        self._rules = ()
        self.skew_s = self.latency_s = 0.0

    def refuse(self) -> None:
        """Refuse connections, and reset those that there are."""
        self._call(self._refuse())

    def listen(self) -> None:
        """Accept connections again."""
        self._call(self._listen())

    def reset_all(self) -> None:
        """Reset all connections."""
        self._call(self._reset_all())

    def wait_until(self, condition: Condition) -> None:
        """Wait, as a test, for what the counters will say."""
        with self._changed:
            counted = self.requests, self.struck, self.open_connections
            assert self._changed.wait_for(condition, _PATIENCE_S), counted

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_S)

    async def _listen(self) -> None:
        assert self._listener is None
        # No server of asyncio: that loses connections which it accepted just before it is closed.
        self._listener = socket.create_server(self._holder.getsockname(), backlog=1024)
        self._listener.settimeout(0)
        self._loop.add_reader(self._listener, self._accept)

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await self._reset_all()

    async def _reset_all(self) -> None:
        # One that has not begun would not close what it was given.
        await asyncio.sleep(0)
        serving = set(self._serving)
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = self._listener.accept()
            self._count(opened=1)
            task = asyncio.create_task(self._serve(sock))
            self._serving.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._count(opened=-1)

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._serve_one(reader, writer):
                    pass
        except asyncio.CancelledError:
            reset(writer)
            raise
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Handle one request; False when the connection is of no use any more."""
        head = await receive_request_head(reader)
        fault = self._draw(head)
        self._count(head=head, fault=fault)
        await asyncio.sleep(self.latency_s)
        exchange = Exchange(head, reader, writer, self._ask)
        await (fault.strike(exchange) if fault is not None else exchange.pass_on())
        return exchange.answered

    def _draw(self, head: RequestHead) -> Fault | None:
        for rule in self._rules:
            if rule.applies(head) and (rule.probability >= 1 or self._random.random() < rule.probability):
                rule.times -= 1
                return rule.fault
        return None

    async def _ask(self, head: RequestHead, body: bytes) -> Answer:
        """What the server answers."""
        reader, writer = await asyncio.open_connection(*self._server)
        try:
            writer.write(head.encoded() + body)
            answer = await receive_answer(reader, head.method)
        finally:
            writer.close()
        return answer if not self.skew_s else _skewed(answer, self.skew_s)

    def _count(self, *, opened: int = 0, head: RequestHead | None = None, fault: Fault | None = None) -> None:
        with self._changed:
            self.open_connections += opened
            self.open_connections_max = max(self.open_connections_max, self.open_connections)
            if head is not None:
                self.requests[head.method] += 1
            if fault is not None:
                self.struck[fault.name] += 1
            self._changed.notify_all()


def _skewed(answer: Answer, skew_s: float) -> Answer:
    def moved(name: str, value: str) -> str:
        if name.lower() != "date":
            return value
        return format_datetime(parsedate_to_datetime(value) + timedelta(seconds=skew_s), usegmt=True)

    return replace(answer, headers=[(name, moved(name, value)) for name, value in answer.headers])

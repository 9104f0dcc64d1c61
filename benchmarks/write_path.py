"""Saving until the bucket has it, beside what else puts objects to S3, on one server on loopback.

Objects of 4, 16 and 32 MiB of KV, 8 at once (benchmarks/writers.py says what each client
does), all in turn, round by round, so compare within one run. The server is
localstack/memory_s3.py: it receives into memory it has used before. It is another process on the
same machine; CPU seconds are this process's, over all its threads. Names are fresh each round, and
the server is emptied after each client's turn, untimed.

kvstore  one KVStore.save of all chunks until REMOTE: gathers each chunk from pages (one memcpy,
         which is the product's work and counted), checksums it section by section, puts it if
         absent. Raw codec, no disk, KVSTORE_UPLOAD_CONCURRENCY as the others
put      the same S3 plane without all that: Backend.put of bytes that lie ready
raw      a plain socket and sendall: the ceiling in Python
gather, checksum
         the memcpy of every section and the checksum of every section alone, one after the other.
         With `raw` they are the floor: what no way of saving with a checksum can do without

JSON: machine; `sizes`: a list of {object_bytes, gbps, gbps_vs_raw, cpu_vs_raw,
cpu_vs_aiobotocore, cpu_vs_floor, put_gbps_vs_raw, put_cpu_vs_raw, clients}. gbps is a median over the rounds;
what is `_vs_` another client is a median of the rounds' ratios, ours over theirs. The `put_` ones
are of `put`, the others of `kvstore`. `clients` has GB/s and CPU seconds per GB of each.

copies_per_byte is counted in one more save: bytes that gather wrote, and bytes given to sockets
from anywhere but where gather wrote them, per byte given to sockets.

save_call_p99_s: the endpoint accepts connections and never answers. How long KVStore.save takes,
less what its gathers take, one chunk a call, while the queue takes them all; at p99, in a store that
has loaded its S3 client.
`save_call_full_p99_s` is the same once the queue is full and every chunk is dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import socket
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.report import Timing, machine, print_result, say, timed
from benchmarks.server import Server, use_test_credentials
from benchmarks.writers import IN_FLIGHT, WRITERS, Item, Writer
from kvstore import DType, Durability, KVLayout, KVStore, Namespace, load_settings
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.backends.stream import Stream
from kvstore.chunk import checksum
from kvstore.layout import ChunkForm
from localstack.memory_s3 import memory_s3

MIB = 1 << 20
SIZES_MIB = (4, 16, 32)
DEADLINE_S = 120.0
CONNECT_S = 3.0
CALLS = 2000
PROMPT_CHUNKS = 50
FLOOR = ("raw", "gather", "checksum")


def layout_of(layers: int, chunk_tokens: int = 256) -> KVLayout:
    """Llama-3-8B's, with fewer layers: 1 MiB each in a chunk of 256 tokens."""
    return KVLayout(
        layers=layers,
        kv_heads=8,
        head_dim=128,
        dtype=DType.BFLOAT16,
        page_form="nhd",
        page_tokens=16,
        chunk_tokens=chunk_tokens,
    )


class MemcpyPages:
    """A source of chunks that copies a section at once, and lets go of the interpreter as torch does.

    All chunks have the same random bytes, from memory of their own. `gather_s`: what it took so far.
    """

    def __init__(self, form: ChunkForm, chunks: int) -> None:
        self._section_bytes = form.section_bytes
        random = os.urandom(form.section_bytes)
        self._layers = [bytearray(random * chunks) for _ in range(form.layers)]
        self._starts = [ctypes.addressof(ctypes.c_char.from_buffer(layer)) for layer in self._layers]
        self.gather_s = 0.0

    def gather(self, index: int, sections: Sequence[memoryview]) -> None:
        start_s = perf_counter()
        offset, length = index * self._section_bytes, self._section_bytes
        for start, section in zip(self._starts, sections, strict=True):
            ctypes.memmove(_addresses(section).start, start + offset, length)
        self.gather_s += perf_counter() - start_s


class Saves:
    """KVStore.save of `chunks` chunks, until REMOTE. A round's chunks are gone from memory in the next."""

    def __init__(self, server: Server, layout: KVLayout, chunks: int) -> None:
        self.form = ChunkForm(layout, layout.whole)
        self.pages = MemcpyPages(self.form, chunks)
        self._chunks = chunks
        self._layout = layout
        # Of memory, the queue takes three quarters.
        room_bytes = (2 * chunks + 2) * (self.form.raw_bytes + 4096)
        settings = load_settings(
            prefix="kv",
            codec="none",
            memory_bytes=room_bytes,
            upload_queue_bytes=room_bytes,
            upload_concurrency=IN_FLIGHT,
        )
        self._store = KVStore.open(layout, settings=settings, backend=S3SocketBackend(server.options))
        if not self._store.wait_connected(DEADLINE_S):
            raise SystemExit("kvstore could not connect")

    def save(self, round_: int) -> None:
        namespace = Namespace("write_path", f"r{round_}", self._layout, "none")
        chain = self._store.chain(namespace, range(self._chunks * self._layout.chunk_tokens))
        handle = self._store.save(chain, range(self._chunks), self.pages, until=Durability.REMOTE)
        outcomes = handle.wait(DEADLINE_S)
        if set(outcomes.values()) != {"stored"}:
            raise SystemExit(f"kvstore could not store: {outcomes}")

    def close(self) -> None:
        self._store.close()


class Floor:
    """What saving does besides putting, without any of what leads there."""

    def __init__(self, saves: Saves, objects: Sequence[bytes]) -> None:
        self._saves = saves
        self._objects = objects
        form = saves.form
        memory = memoryview(bytearray(b"\1") * (len(objects) * form.section_bytes * form.layers))
        self._sections = [
            [
                memory[(i * form.layers + layer) * form.section_bytes :][: form.section_bytes]
                for layer in range(form.layers)
            ]
            for i in range(len(objects))
        ]

    def gather(self) -> None:
        for index, sections in enumerate(self._sections):
            self._saves.pages.gather(index, sections)

    def checksum(self) -> None:
        form = self._saves.form
        for data in self._objects:
            view = memoryview(data)
            for layer in range(form.layers):
                checksum(view[form.header_bytes + layer * form.stride :][: form.stride])


@dataclass
class Case:
    """One size: what is put in a round, and how long it took each client."""

    objects: Sequence[bytes]
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    @property
    def object_bytes(self) -> int:
        return len(self.objects[0])

    def run(self, name: str, work: Callable[[], None]) -> None:
        with timed() as timing:
            work()
        self.timings.setdefault(name, []).append(timing())

    def run_writer(self, writer: Writer, round_: int) -> None:
        items = [Item(f"{writer.name}/{round_}/{i}", data) for i, data in enumerate(self.objects)]
        self.run(writer.name, lambda: writer.write(items))

    def row(self) -> dict[str, Any]:
        total_gb = len(self.objects) * self.object_bytes / 1e9
        gbps = {name: [total_gb / each.wall_s for each in times] for name, times in self.timings.items()}
        cpu = {name: [each.cpu_s / total_gb for each in times] for name, times in self.timings.items()}
        floor = [sum(parts) for parts in zip(*(cpu[name] for name in FLOOR), strict=True)]
        return {
            "object_bytes": self.object_bytes,
            "gbps": round(statistics.median(gbps["kvstore"]), 3),
            "gbps_vs_raw": _ratio(gbps, "kvstore", "raw"),
            "cpu_vs_raw": _ratio(cpu, "kvstore", "raw"),
            "cpu_vs_aiobotocore": _ratio(cpu, "kvstore", "aiobotocore"),
            "cpu_vs_floor": _ratio({**cpu, "floor": floor}, "kvstore", "floor"),
            "put_gbps_vs_raw": _ratio(gbps, "put", "raw"),
            "put_cpu_vs_raw": _ratio(cpu, "put", "raw"),
            "clients": {
                name: {
                    "gbps": round(statistics.median(gbps[name]), 3),
                    "cpu_s_per_gb": round(statistics.median(cpu[name]), 3),
                }
                for name in self.timings
            },
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=write_path", description=__doc__)
    add_rounds(parser, 7)
    add_number(parser, "--mib", 256, "MiB of objects that a client puts in a round; at least 8 objects")
    add_number(parser, "--calls", CALLS, "saves to a dead endpoint that its queue takes", least=PROMPT_CHUNKS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="for trying it out: one round, 32 MiB in objects of 4 MiB, few calls; overrides what is above",
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=["obstore", "boto3"], help="clients to leave out"
    )
    options = parser.parse_args(arguments)
    rounds, mib, calls, sizes = options.rounds, options.mib, options.calls, SIZES_MIB
    if options.quick:
        rounds, mib, calls, sizes = 1, 32, 2 * PROMPT_CHUNKS, SIZES_MIB[:1]
    use_test_credentials()
    with ExitStack() as stack:
        server = Server(stack.enter_context(memory_s3()))
        makes = [make for make in WRITERS if make.name not in options.without]
        rows = [_measure(server, makes, size, max(IN_FLIGHT, mib // size), rounds) for size in sizes]
        copies = _copies_per_byte(server)
    _print_table(rows)
    say(f"copies per byte: {copies:.4f}")
    queued_s, full_s = _save_calls(calls)
    say(f"a save of one chunk to a dead endpoint, less its gather, at p99: {queued_s * 1e6:.0f} us;")
    say(f"where the queue is full: {full_s * 1e6:.0f} us")
    print_result(
        {
            "machine": machine(),
            "in_flight": IN_FLIGHT,
            "sizes": rows,
            "copies_per_byte": round(copies, 4),
            "save_call_p99_s": round(queued_s, 6),
            "save_call_full_p99_s": round(full_s, 6),
        }
    )


def _measure(
    server: Server, makes: Sequence[Callable[[Server], Writer]], size_mib: int, count: int, rounds: int
) -> dict[str, Any]:
    """All clients at one size; only one size is in memory at a time."""
    with ExitStack() as stack:
        saves = stack.enter_context(closing(Saves(server, layout_of(size_mib), count)))
        writers = [stack.enter_context(closing(make(server))) for make in makes]
        objects = [os.urandom(saves.form.raw_bytes) for _ in range(count)]
        case, floor = Case(objects), Floor(saves, objects)
        turns: list[Callable[[int], None]] = [partial(case.run_writer, writer) for writer in writers]
        turns += [
            lambda round_: case.run("kvstore", lambda: saves.save(round_)),
            lambda _: case.run("gather", floor.gather),
            lambda _: case.run("checksum", floor.checksum),
        ]
        for round_ in range(rounds + 1):
            say(f"{size_mib} MiB: " + (f"round {round_} of {rounds}" if round_ else "warming up"))
            for place in range(len(turns)):
                # Another one begins each time, so that none always comes after the same one.
                turns[(place + round_) % len(turns)](round_)
                _empty(server)
            if not round_:
                case.timings.clear()
        return case.row()


def _empty(server: Server) -> None:
    connection = http.client.HTTPConnection(server.authority)
    with closing(connection):
        connection.request("DELETE", "/")
        connection.getresponse().read()


def _copies_per_byte(server: Server) -> float:
    """Count, in one save, what is copied between the engine's pages and the sockets."""
    chunks = IN_FLIGHT
    gathered: list[range] = []
    sent_bytes = copied_bytes = 0
    lock = threading.Lock()
    with closing(Saves(server, layout_of(4), chunks)) as saves:
        gather, send = saves.pages.gather, Stream.send

        def gather_counted(index: int, sections: Sequence[memoryview]) -> None:
            gather(index, sections)
            gathered.extend(_addresses(section) for section in sections)

        def send_counted(stream: Stream, parts: Sequence[memoryview]) -> int:
            nonlocal sent_bytes, copied_bytes
            taken = left = send(stream, parts)
            with lock:
                sent_bytes += taken
                for part in parts:
                    piece = part[:left]
                    left -= len(piece)
                    copied_bytes += len(piece) - _bytes_within(piece, gathered)
            return taken

        with _patched(saves.pages, "gather", gather_counted), _patched(Stream, "send", send_counted):
            saves.save(0)
        gathered_bytes = sum(map(len, gathered))
        _empty(server)
    return (gathered_bytes + copied_bytes) / sent_bytes


def _bytes_within(piece: memoryview, places: Sequence[range]) -> int:
    """How many of its bytes lie in one of the places."""
    if piece.readonly or not len(piece):
        # Arenas are writable: it lies elsewhere.
        return 0
    lies = _addresses(piece)
    return sum(max(0, min(lies.stop, place.stop) - max(lies.start, place.start)) for place in places)


def _addresses(view: memoryview) -> range:
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return range(start, start + len(view))


@contextlib.contextmanager
def _patched(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _save_calls(calls: int) -> tuple[float, float]:
    """What a save of one chunk takes beyond its gather, at p99: while there is room, and after."""
    layout = layout_of(4, chunk_tokens=16)
    form = ChunkForm(layout, layout.whole)
    room_bytes = calls * (form.raw_bytes + 4096)
    with _black_hole() as url:
        settings = load_settings(
            prefix="kv",
            codec="none",
            memory_bytes=room_bytes * 4 // 3 + MIB,
            upload_queue_bytes=calls * form.raw_bytes,
            close_timeout_s=0.01,
        )
        options = Server(url).options
        pages = MemcpyPages(form, PROMPT_CHUNKS)
        with KVStore.open(layout, settings=settings, backend=S3SocketBackend(options)) as store:
            # Loading an S3 client holds the interpreter for a second; a server does that while it starts.
            store.wait_connected(CONNECT_S)
            taken: dict[str, list[float]] = {"queued": [], "dropped_queue_full": []}
            for prompt in range(2 * calls // PROMPT_CHUNKS):
                namespace = Namespace("dead", f"r{prompt}", layout, "none")
                chain = store.chain(namespace, range(PROMPT_CHUNKS * layout.chunk_tokens))
                for index in range(PROMPT_CHUNKS):
                    pages.gather_s = 0.0
                    start_s = perf_counter()
                    handle = store.save(chain, range(index, index + 1), pages)
                    call_s = perf_counter() - start_s - pages.gather_s
                    taken[handle.outcomes()[index].value].append(call_s)
        say(f"{len(taken['queued'])} saves queued, {len(taken['dropped_queue_full'])} dropped")
        return _p99(taken["queued"]), _p99(taken["dropped_queue_full"])


@contextlib.contextmanager
def _black_hole() -> Iterator[str]:
    """An endpoint that accepts connections, and never reads or answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


def _ratio(values: dict[str, list[float]], ours: str, theirs: str) -> float:
    return round(statistics.median(a / b for a, b in zip(values[ours], values[theirs], strict=True)), 3)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    names = sorted(rows[0]["clients"], key=lambda name: name != "kvstore")
    say("GB/s | client CPU s/GB".ljust(24) + "".join(f"{name:>16}" for name in names))
    for row in rows:
        figures = (row["clients"][name] for name in names)
        say(
            f"{row['object_bytes'] // MIB} MiB".ljust(24)
            + "".join(f"{each['gbps']:>8.2f} |{each['cpu_s_per_gb']:>6.2f}" for each in figures)
        )


if __name__ == "__main__":
    main()

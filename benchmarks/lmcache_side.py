"""LMCache's side of peer_lmcache, run by the Python of LMCache's own environment.

Reads commands from standard input, one JSON object a line, and answers each with one line: what it
measured, in seconds by the clock and of this process's CPU. Objects, keys and waiting are those of
LMCache's own benchmark (`lmcache bench l2`). Imports nothing of kvstore.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from lmcache.cli.commands.bench.l2_adapter_bench import data
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.s3_l2_adapter import S3L2AdapterConfig

TIMEOUT_S = 120.0
LOOKUP_BYTES = 4096


class Side:
    """One adapter on one server, and host memory for what it stores and loads."""

    def __init__(self, authority: str, object_bytes: int, count: int) -> None:
        self._authority = authority
        self._count = count
        self._adapter = self._new_adapter()
        memory = data.make_aligned_tensor(2 * count * object_bytes)
        # Both fill it, so it has been touched.
        self._stored = data.make_memory_objects(memory, count, object_bytes, 0)
        self._loaded = data.make_memory_objects(
            memory, count, object_bytes, count * object_bytes, fill_offset=1
        )

    def store(self, round_: int) -> dict[str, float]:
        """Store every object under keys of this round."""
        began = _now()
        task = self._adapter.submit_store_task(self._keys(round_), self._stored)
        done: dict[int, Any] = {}
        while task not in done:
            _wait(self._adapter.get_store_event_fd())
            done.update(self._adapter.pop_completed_store_tasks())
        if not done[task].is_successful():
            raise SystemExit("LMCache could not store")
        return _since(began)

    def load(self, round_: int) -> dict[str, float]:
        """Load what the round stored into other memory."""
        began = _now()
        task = self._adapter.submit_load_task(self._keys(round_), self._loaded)
        found = _result(self._adapter.get_load_event_fd(), lambda: self._adapter.query_load_result(task))
        took = _since(began)
        if found.popcount() != self._count:
            raise SystemExit("LMCache could not load what it stored")
        return took

    def verify(self, round_: int) -> dict[str, bool]:
        """Compare what was loaded with what was stored."""
        same = data.verify_round_trip(self._keys(round_), self._stored, self._loaded, _complain)
        return {"same": bool(same)}

    def lookup(self, round_: int) -> dict[str, float]:
        """Look up what the round stored, through an adapter that knows nothing."""
        adapter, keys = self._new_adapter(), self._keys(round_)
        layout = {0: MemoryLayoutDesc(shapes=[], dtypes=[])}
        began = _now()
        task = adapter.submit_lookup_and_lock_task(keys, layout)
        found = _result(
            adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(task)
        )
        took = _since(began)
        if found.popcount() != self._count:
            raise SystemExit(f"LMCache found {found.popcount()} of {self._count} objects")
        return took

    def _keys(self, round_: int) -> list[Any]:
        return data.make_object_keys(self._count, key_offset=round_ * self._count)

    def _new_adapter(self) -> Any:
        return create_l2_adapter(
            S3L2AdapterConfig.from_dict(
                {
                    "s3_endpoint": self._authority,
                    "s3_region": "us-east-1",
                    "disable_tls": True,
                    # It is negotiated through TLS; without that, it cannot be.
                    "s3_prefer_http2": False,
                    "aws_access_key_id": "bench",
                    "aws_secret_access_key": "bench",
                }
            )
        )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # LMCache logs to standard output.
    os.dup2(2, 1)
    side: Side | None = None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "open":
            side = Side(**command)
            answer: dict[str, Any] = {}
        else:
            answer = getattr(side, do)(**command)
        print(json.dumps(answer), file=answers, flush=True)
    # Its native threads outlive what uses them, and would keep the process.
    os._exit(0)


def _result(event: int, query: Callable[[], Any]) -> Any:
    while (found := query()) is None:
        _wait(event)
    return found


def _wait(event: int) -> None:
    if not data.wait_eventfd(event, timeout=TIMEOUT_S):
        raise SystemExit(f"LMCache has not answered within {TIMEOUT_S:g} s")


def _complain(message: str) -> None:
    print(message, file=sys.stderr)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> dict[str, float]:
    wall_s, cpu_s = _now()
    return {"wall_s": wall_s - began[0], "cpu_s": cpu_s - began[1]}


if __name__ == "__main__":
    main()

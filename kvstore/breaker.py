"""Breaker: switches off what keeps failing, and tries by itself until it can be switched on again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from kvstore.circuit import Circuit
from kvstore.errors import KVStoreError

_log = logging.getLogger("kvstore.breaker")
# Processes that were switched off together should not all come back at once.
_PAUSE_SHARE_MIN = 0.5

ProbeError = OSError | KVStoreError


class Switched(Protocol):
    """Called when something was switched off, or on again."""

    def __call__(self, *, off: bool) -> None:
        """Take note."""
        ...


class Breaker:
    """The switch of one thing that may fail: a backend, a half of the disk tier.

    what             is switched, for the log
    circuit          decides when
    probe            tries the thing without doing harm; whatever it raises, it is tried again
    probe_timeout_s  a probe that takes longer has failed
    switched         told of every switch
    probe_failed     told what a probe raised

    Belongs to one event loop, on which everything is called; `off` is for any thread. Callbacks
    must neither block nor raise.
    """

    def __init__(
        self,
        what: str,
        circuit: Circuit,
        probe: Callable[[], Awaitable[object]],
        *,
        probe_timeout_s: float,
        switched: Switched,
        probe_failed: Callable[[ProbeError], None],
    ) -> None:
        self._what = what
        self._circuit = circuit
        self._probe = probe
        self._probe_timeout_s = probe_timeout_s
        self._switched = switched
        self._probe_failed = probe_failed
        self._probing: asyncio.Task[None] | None = None
        self._next_probe_s = 0.0
        self._on = asyncio.Event()
        self._on.set()
        self._defect_said = False
        self._closed = False

    @property
    def off(self) -> bool:
        """Whether nothing should be tried now. Any thread may ask."""
        return self._circuit.off

    def next_probe_in_s(self) -> float:
        """How long until it is tried again; 0 while it is being tried."""
        return max(0.0, self._next_probe_s - asyncio.get_running_loop().time())

    async def wait_on(self) -> None:
        """Return as soon as it is on. However many may wait, and be cancelled; after `close`, without end."""
        while self.off:
            await self._on.wait()

    def succeeded(self) -> None:
        """Real work was done. That alone switches nothing on: it may have been begun long ago."""
        self._circuit.succeeded(asyncio.get_running_loop().time())

    def failed(self, *, for_sure: bool = False, began_s: float | None = None) -> None:
        """Real work failed; that may be one failure too many.

        for_sure  trying on is of no use before something was mended
        began_s   when the work was begun, by the loop's clock; None: just now
        """
        now_s = asyncio.get_running_loop().time()
        began_s = now_s if began_s is None else began_s
        if self._circuit.failed(for_sure=for_sure, began_s=began_s, now_s=now_s):
            self._on.clear()
            self._begin_probing()

    async def try_first(self) -> None:
        """Probe before anything else is tried; returns after the first answer, whatever it is."""
        self._circuit.off = True
        self._on.clear()
        if await self._probed():
            self._on.set()
        else:
            self._begin_probing()

    async def close(self, timeout_s: float) -> None:
        """Probe no more. Waits, for at most `timeout_s`, for a probe that is under way to end."""
        self._closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing], timeout=timeout_s)

    def _begin_probing(self) -> None:
        if not self._closed:
            self._probing = asyncio.ensure_future(self._probe_until_on())
        self._switched(off=True)

    async def _probe_until_on(self) -> None:
        self._defect_said = False
        while True:
            pause_s = self._circuit.next_pause_s() * random.uniform(_PAUSE_SHARE_MIN, 1.0)  # noqa: S311
            self._next_probe_s = asyncio.get_running_loop().time() + pause_s
            await asyncio.sleep(pause_s)
            if await self._probed():
                self._on.set()
                self._switched(off=False)
                return

    async def _probed(self) -> bool:
        """Whether the probe succeeded. Cancelling the task that probes is all that this lets out."""
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await self._probe()
        except (OSError, KVStoreError) as error:
            self._probe_failed(error)
            return False
        except asyncio.CancelledError as error:
            # What the probe waited for was cancelled, or this task was.
            if task.cancelling() > cancelling:
                raise
            self._note_defect(error)
            return False
        except Exception as error:
            self._note_defect(error)
            return False
        self._circuit.probed(asyncio.get_running_loop().time())
        return True

    def _note_defect(self, error: BaseException) -> None:
        if not self._defect_said:
            self._defect_said = True
            _log.error(
                "a defect: %s cannot be tried as it should; it is tried again", self._what, exc_info=error
            )

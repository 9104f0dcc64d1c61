"""Copies that go on after the call that began them: on a stream, until a CUDA event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class QueuedCopy:
    """See `contract.QueuedCopy`. Without an event, as on a CPU, the copy is done already."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]  # torch's

    def wait(self) -> None:
        """Return when the copy is done. Blocks this thread, not the interpreter."""
        if self._event is not None:
            self._event.synchronize()

    def stream_wait(self, stream: torch.cuda.Stream) -> None:
        """Let what `stream` is given from now on come after the copy; this thread does not wait."""
        if self._event is not None:
            stream.wait_event(self._event)


@contextmanager
def copying_on(stream: torch.cuda.Stream | None) -> Iterator[Callable[[], QueuedCopy]]:
    """Make `stream` current for a block, behind what the stream that is current before has been given.

    Yields what tells, at the end of the block, the copy that it has queued. If the block raises, what
    it has queued is waited for: the memory may go at once. None: a CPU, where nothing is queued.
    """
    if stream is None:
        yield QueuedCopy
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        try:
            yield lambda: QueuedCopy(stream.record_event())
        except BaseException:
            stream.synchronize()
            raise


def sent_to(device: torch.device, table: torch.Tensor) -> torch.Tensor:
    """`table`, of a CPU, on `device`, by a copy queued on the current stream."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table

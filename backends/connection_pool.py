"""Connections of one lane to one server, kept open between requests."""

from __future__ import annotations

from kvstore.backends.connecting import Connector, HostAddresses
from kvstore.backends.http_connection import Connection
from kvstore.backends.lane import Lane
from kvstore.backends.route import Route

# Below the 20 s after which S3 and common proxies close an idle connection.
IDLE_S_MAX = 15.0


class ConnectionPool:
    """Open connections of `lane` along `route`. For what runs in that lane, but for the count.

    A connection that was idle for IDLE_S_MAX is not used again. One that ends, or says something,
    while it is idle is closed: what it says would be taken for the answer to the next request.
    """

    def __init__(self, lane: Lane, route: Route, addresses: HostAddresses) -> None:
        self._lane = lane
        self._connector = Connector(lane, route, addresses)
        # By descriptor, the latest one last.
        self._idle: dict[int, Connection] = {}
        self._in_use = 0
        self._closed = False

    @property
    def open_connections(self) -> int:
        """How many connections there are, idle ones and ones in use."""
        return len(self._idle) + self._in_use

    def take_idle(self) -> Connection | None:
        """A connection that has served a request before; to be given back."""
        # The latest one first: its congestion window is open, and the others may age out.
        while self._idle:
            _, connection = self._idle.popitem()
            if self._lane.now_s - connection.idle_since_s < IDLE_S_MAX and connection.is_quiet():
                self._in_use += 1
                return connection
            connection.close()
        return None

    async def connect(self) -> Connection:
        """A fresh connection; to be given back. Raises what Connector.connect does."""
        self._in_use += 1
        try:
            return await self._connector.connect(self._drop_idle)
        except BaseException:
            self._in_use -= 1
            raise

    def give_back(self, connection: Connection) -> None:
        """Keep a connection if it is `reusable` and quiet, else close it."""
        self._in_use -= 1
        # What came together with the answer brings no event any more.
        if self._closed or not (connection.reusable and connection.is_quiet()):
            connection.close()
            return
        connection.idle_since_s = self._lane.now_s
        self._idle[connection.descriptor] = connection
        oldest = next(iter(self._idle.values()))
        if self._lane.now_s - oldest.idle_since_s > IDLE_S_MAX:
            self._drop_idle(oldest.descriptor)

    def close(self) -> None:
        """Close idle connections, and others when they are given back."""
        self._closed = True
        for descriptor in list(self._idle):
            self._drop_idle(descriptor)

    def _drop_idle(self, descriptor: int) -> None:
        connection = self._idle.pop(descriptor, None)
        if connection is not None:
            connection.close()

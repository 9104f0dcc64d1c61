"""Where Prometheus gets a process's metrics: an HTTP server for one registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from typing import Any

from prometheus_client import CollectorRegistry

from kvstore.metrics_place import PORT_MAX, MetricsPlace

_log = logging.getLogger("kvstore.metrics")


class MetricsEndpoint:
    """Serves a registry from `open` to `close`. Trouble with it is a warning, never an error."""

    def __init__(self, place: MetricsPlace | None, registry: CollectorRegistry) -> None:
        self._place = place
        self._registry = registry
        self._lock = threading.Lock()
        self._server: Any = None
        self._closed = False

    async def open(self) -> None:
        """Begin to serve, at the first port that is free."""
        if self._place is not None:
            # In a thread: it looks up this machine's name.
            await asyncio.to_thread(self._open, self._place)

    async def close(self) -> None:
        """Stop. What is being answered is answered; the port is free."""
        if self._place is not None:
            await asyncio.to_thread(self._close)

    def _open(self, place: MetricsPlace) -> None:
        with self._lock:
            if not self._closed:
                self._server = self._serving(place)

    def _serving(self, place: MetricsPlace) -> Any:
        """A server at the first port that is free; None, and a warning, where there is none."""
        from prometheus_client import start_http_server

        failure: Exception | None = None
        for port in place.ports:
            try:
                server, _ = start_http_server(port, place.host, self._registry)
            except Exception as error:
                failure = error
            else:
                _log.info("metrics are served at %s, port %d", place.host, port)
                return server
        _warn(place, failure)
        return None

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        # A child that was forked has the socket too, and would keep the port.
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)
        server.server_close()


def _warn(place: MetricsPlace, failure: Exception | None) -> None:
    first, last = place.ports[0], place.ports[-1]
    _log.warning(
        "metrics are not served: KVSTORE_METRICS_PORT leaves %s at %s, and %s; set it to a range with a "
        "port for each store on this machine, such as %d-%d",
        f"port {first}" if first == last else f"ports {first}-{last}",
        place.host,
        getattr(failure, "strerror", None) or failure,
        first,
        min(first + max(8, 2 * len(place.ports)) - 1, PORT_MAX),
    )

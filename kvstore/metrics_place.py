"""Where a process's metrics are served: what KVSTORE_METRICS_PORT says."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLACE = re.compile(r"(?:(?P<host>[^\s/]+):)?(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?")
PORT_MAX = 65_535
_PORTS_MAX = 64
_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 Prometheus asks from another machine
_THIS_MACHINE = "127.0.0.1"
_OFF = ("", "0")


@dataclass(frozen=True, slots=True)
class MetricsPlace:
    """Where metrics are served: at the first free one of some ports.

    host  the address to listen on
    """

    host: str
    ports: range

    @classmethod
    def parse(cls, text: str) -> MetricsPlace | None:
        """Read KVSTORE_METRICS_PORT; None where nothing is to be served. Raises ValueError."""
        if text in _OFF:
            return None
        match = _PLACE.fullmatch(text)
        if match is None:
            raise ValueError("is neither a port nor a range of ports")
        first = int(match["first"])
        ports = range(first, int(match["last"] or first) + 1)
        if not (first and ports and ports[-1] <= PORT_MAX):
            raise ValueError(f"has no port from 1 to {PORT_MAX}, or a range that ends before it begins")
        if len(ports) > _PORTS_MAX:
            raise ValueError(f"has {len(ports)} ports, more than {_PORTS_MAX}")
        return cls((match["host"] or _EVERY_ADDRESS).strip("[]"), ports)

    @property
    def targets(self) -> list[str]:
        """Where a process of this machine asks for them."""
        host = _THIS_MACHINE if self.host == _EVERY_ADDRESS else self.host
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for port in self.ports]

"""Ceph's RADOS gateway on one machine: real signatures, real contention, a real disk, TLS.

One monitor, one OSD on a file (bluestore) and one or more gateways, all on 127.0.0.1, without the
manager, which gateways do not need, and without authentication inside the cluster. What was stored
is there again after a restart in the same folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from localstack import tls
from localstack.buckets import make_bucket
from localstack.contract import ServerError, Store
from localstack.keeper import kept_store
from localstack.packages import ensure_programs
from localstack.processes import Process, answers, free_ports, running

PACKAGES = {
    "ceph": "ceph-common",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    **tls.PACKAGES,
}
DOMAIN = "s3.localhost"
_USER = "kvstore"
_ACCESS_KEY, _SECRET_KEY = "kvstoreaccess", "kvstoresecret"
_TIMEOUT_S = 90.0
# A gateway takes long to end, and has nothing to lose; the others end at once.
_STOP_TIMEOUT_S = 2.0
_DISK_BYTES = 32 << 30
# Ceph's defaults are for racks: three copies, seconds between decisions, sockets and logs in /var.
_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{ports[0]},v1:127.0.0.1:{ports[1]}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms mon client mode = crc secure
auth cluster required = none
auth service required = none
auth client required = none
log to file = false
mon cluster log to file = false
admin socket =
run dir = {folder}
crash dir = {folder}
keyring = {folder}/keyring
paxos propose interval = 0.05
paxos min wait = 0.01
mon data = {folder}/mon
mon data avail warn = 1
mon data avail crit = 1
mon max pg per osd = 2000
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd data = {folder}/osd
osd objectstore = bluestore
osd memory target = 1073741824
rgw data = {folder}
rgw dns name = {domain}
rgw enable usage log = false
rgw lc debug interval = 10
rgw lifecycle work time = 00:00-24:00
"""


@contextlib.contextmanager
def rgw_store(folder: Path | None = None, *, gateways: int = 1) -> Iterator[Store]:
    """A cluster that lives as long as the context; ready in about 10 s.

    folder    keeps its objects for a later call; without one they are gone at the end
    gateways  how many serve it over http; the first one also serves TLS

    Installs Ceph if it is missing and this is root. Raises ServerError if it does not start.
    """
    with kept_store("rgw", folder, gateways=gateways) as store:
        yield store


@contextlib.contextmanager
def serve(folder: Path, gateways: int = 1) -> Iterator[dict[str, Any]]:
    """See contract. A day of lifecycle rules is 10 seconds long."""
    install()
    cluster = Cluster(folder)
    with ExitStack() as stack:
        cluster.start(stack)
        store = cluster.start_gateways(stack, gateways)
        make_bucket(store, signed=True)
        cluster.is_made.touch()
        yield asdict(store)


def install() -> None:
    """Have Ceph. Raises ServerError that names the packages if this is not root."""
    ensure_programs(PACKAGES)


class Cluster:
    """A cluster in a folder. `is_made`: a file that is there once all of it exists on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}
        self.is_made = folder / "made"

    def start(self, stack: ExitStack) -> None:
        """Start the monitor and the OSD, which are made first if they were not."""
        if not self.is_made.exists():
            self._make_monitor()
        self._start(stack, "mon", "ceph-mon", "-i", "a")
        if not self.is_made.exists():
            self._make_osd()
        self._start(stack, "osd", "ceph-osd", "-i", "0")

    def start_gateways(self, stack: ExitStack, count: int) -> Store:
        """Start gateways, and wait until they answer."""
        certificate = tls.make_certificate(self._folder, ("localhost", DOMAIN, f"*.{DOMAIN}"))
        tls_port, *ports = free_ports(count + 1)
        gateways = []
        for index, port in enumerate(ports):
            frontend = f"beast endpoint=127.0.0.1:{port}"
            if index == 0:
                frontend += f" ssl_endpoint=127.0.0.1:{tls_port} ssl_certificate={certificate.server}"
            name = f"rgw.{index}"
            gateways.append(
                self._start(stack, name, "radosgw", "-n", f"client.{name}", "--rgw-frontends", frontend)
            )
        if not self.is_made.exists():
            self._make_user()
        for gateway, port in zip(gateways, ports, strict=True):
            gateway.wait_until(partial(answers, port), _TIMEOUT_S)
        return Store(
            endpoint_urls=tuple(f"http://127.0.0.1:{port}" for port in ports),
            tls_url=f"https://127.0.0.1:{tls_port}",
            ca_bundle=str(certificate.authority),
            virtual_domain=DOMAIN,
            access_key=_ACCESS_KEY,
            secret_key=_SECRET_KEY,
        )

    def _make_monitor(self) -> None:
        for part in ("mon", "osd"):
            shutil.rmtree(self._folder / part, ignore_errors=True)
            (self._folder / part).mkdir()
        ports, fsid = free_ports(2), str(uuid.uuid4())
        conf = _CONF.format(folder=self._folder, fsid=fsid, ports=ports, domain=DOMAIN)
        (self._folder / "ceph.conf").write_text(conf)
        monmap = self._folder / "monmap"
        addresses = f"[v2:127.0.0.1:{ports[0]},v1:127.0.0.1:{ports[1]}]"
        self._call("monmaptool", "--create", "--clobber", "--addv", "a", addresses, "--fsid", fsid, monmap)
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)

    def _make_osd(self) -> None:
        identity = str(uuid.uuid4())
        self._call("ceph", "osd", "new", identity, "0")
        # Sparse: it takes what is written.
        with (self._folder / "osd" / "block").open("wb") as disk:
            disk.truncate(_DISK_BYTES)
        self._call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", identity)

    def _make_user(self) -> None:
        keys = (f"--access-key={_ACCESS_KEY}", f"--secret-key={_SECRET_KEY}")
        self._call("radosgw-admin", "user", "create", f"--uid={_USER}", f"--display-name={_USER}", *keys)

    def _start(self, stack: ExitStack, name: str, *command: str) -> Process:
        log = self._folder / f"{name}.log"
        return stack.enter_context(
            running(
                f"Ceph's {name}",
                [*command, "-f"],
                log,
                environment=self._environment,
                stop_timeout_s=_STOP_TIMEOUT_S,
            )
        )

    def _call(self, *command: str | Path) -> None:
        """Run a program that ends by itself."""
        what = " ".join(map(str, command[:3]))
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServerError(f"{what} did not end in {_TIMEOUT_S:.0f} s") from None
        if done.returncode:
            raise ServerError(f"{what} failed: {done.stdout[-2000:].strip()}")

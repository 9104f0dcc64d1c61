"""nginx serving a folder: as fast as a client can hope for, so the ceiling in client benchmarks.

Answers GET, HEAD, ranges and If-Match with ETags of its own, by sendfile; PUT and DELETE without
conditions. It looks at no signature: any credentials will do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from localstack.keeper import kept
from localstack.packages import ensure_programs, find_program
from localstack.processes import answers, free_ports, running

PACKAGES = {"nginx": "nginx-light"}
_START_TIMEOUT_S = 30.0
_CONF = """
daemon off;
{user}
worker_processes {workers};
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  default_type application/octet-stream;
  sendfile on;
  sendfile_max_chunk 2m;
  tcp_nopush on;
  keepalive_requests 1000000000;
  keepalive_timeout 3600s;
  client_max_body_size 0;
  client_body_temp_path {bodies};
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    root {files};
    dav_methods PUT DELETE;
    create_full_put_path on;
  }}
}}
"""


@contextlib.contextmanager
def nginx_files(folder: Path, *, workers: int = 2) -> Iterator[str]:
    """The URL below which the files of `folder` are served as long as the context lives.

    A file in `folder/bucket/name` is the object `name` of the bucket `bucket`, path-style. Put the
    folder on a tmpfs (/dev/shm) to keep disks out of a benchmark. Paths must have no spaces.
    Installs nginx-light if it is missing and this is root. Raises ServerError if it does not start.
    """
    with kept("nginx", files=str(folder.absolute()), workers=workers) as server:
        yield server["url"]


@contextlib.contextmanager
def serve(folder: Path, files: str, workers: int) -> Iterator[dict[str, str]]:
    """See contract."""
    install()
    (port,) = free_ports(1)
    conf = folder / "nginx.conf"
    # Workers would otherwise be another user, who may not read a folder of root's.
    user = "user root;" if os.geteuid() == 0 else ""
    # On the file system of the files, so that a PUT ends in a rename.
    bodies = Path(files, f".nginx-{os.getpid()}")
    conf.write_text(
        _CONF.format(user=user, workers=workers, folder=folder, files=files, bodies=bodies, port=port)
    )
    command: list[str | Path] = [find_program("nginx") or "nginx", "-p", folder, "-e", "stderr", "-c", conf]
    try:
        with running("nginx", command, folder / "log") as server:
            server.wait_until(lambda: answers(port), _START_TIMEOUT_S)
            yield {"url": f"http://127.0.0.1:{port}"}
    finally:
        shutil.rmtree(bodies, ignore_errors=True)


def install() -> None:
    """Have nginx. Raises ServerError that names the package if this is not root."""
    ensure_programs(PACKAGES)

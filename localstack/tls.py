"""A certificate of one's own for a server on this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localstack.contract import ServerError

PACKAGES = {"openssl": "openssl"}
_DAYS = 3650
_CONF = """
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
commonName = kvstore test server
[extensions]
subjectKeyIdentifier = hash
basicConstraints = critical,CA:TRUE
keyUsage = critical,digitalSignature,keyCertSign
subjectAltName = {names}
"""


@dataclass(frozen=True)
class Certificate:
    """Files: `authority` is what clients must trust, `server` the certificate and its key in one."""

    authority: Path
    server: Path


def make_certificate(folder: Path, names: Sequence[str]) -> Certificate:
    """A certificate for 127.0.0.1 and the host names `names`, which is its own authority.

    Kept in `folder` and taken from there the next time.
    """
    certificate = Certificate(folder / "tls.crt", folder / "tls.pem")
    if certificate.server.exists():
        return certificate
    conf, key = folder / "tls.conf", folder / "tls.key"
    conf.write_text(_CONF.format(names=",".join(["IP:127.0.0.1", *(f"DNS:{name}" for name in names)])))
    command: list[str | Path] = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(_DAYS)),
        *("-config", conf, "-keyout", key, "-out", certificate.authority),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"openssl made no certificate: {done.stderr}")
    certificate.server.write_text(certificate.authority.read_text() + key.read_text())
    return certificate

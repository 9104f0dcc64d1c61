"""Prefixes in a file: a plain tar of their objects, named as in a bucket, each after the one it continues.

    v1/<namespace>/namespace.json      before the chunks of that namespace
    v1/<namespace>/<hh>/<hash>.<shard>

Blocking. Nothing is ever unpacked to a disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from kvstore.backends.contract import Buffer
from kvstore.errors import KVStoreError, MisconfiguredError
from kvstore.keys import ObjectName, chunk_name, namespace_document_name, parse_object_name
from kvstore.listing import DOCUMENT_BYTES_MAX
from kvstore.namespace import Namespace
from kvstore.upkeep.inspection import READ_BYTES, WHOLE_BYTES_MAX


class DamagedArchiveError(KVStoreError):
    """A file is no archive of chunks, or not whole."""


class ArchivedChunk(NamedTuple):
    """A chunk of an archive, not verified. `pieces`: its bytes; the first piece holds all of the header."""

    namespace: Namespace
    parts: ObjectName
    pieces: list[bytes]


class PassedOver(NamedTuple):
    """What else an archive has, and why it is no chunk to take."""

    name: str
    why: str


class ArchiveWriter:
    """Adds objects to an archive that is being written."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def describe(self, namespace: Namespace) -> None:
        """Add the document of a namespace, before its chunks."""
        self._add(namespace_document_name("", namespace.name), [namespace.document()])

    def add(self, parts: ObjectName, pieces: Sequence[Buffer]) -> None:
        """Add a chunk's object."""
        self._add(chunk_name("", parts), pieces)

    def _add(self, name: str, pieces: Sequence[Buffer]) -> None:
        # Nothing of who wrote it, and when: the same prefix makes the same archive.
        member = tarfile.TarInfo(name)
        member.size = sum(len(piece) for piece in pieces)
        self._tar.addfile(member, io.BytesIO(b"".join(pieces)))


@contextlib.contextmanager
def written_archive(path: Path) -> Iterator[ArchiveWriter]:
    """Write an archive, which is at `path` when it is whole, and not before.

    Raises MisconfiguredError where there is something already, or the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if path.exists():
            raise MisconfiguredError(f"{path} exists; remove it, or name another file")
        with unfinished.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                yield ArchiveWriter(tar)
            file.flush()
            os.fsync(file.fileno())
        _name(unfinished, path)
    except OSError as error:
        raise MisconfiguredError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _name(unfinished: Path, path: Path) -> None:
    """Give a finished file its name. Raises FileExistsError where there is something by now."""
    try:
        # A rename would replace what somebody else has written meanwhile.
        path.hardlink_to(unfinished)
    except FileExistsError:
        raise
    except OSError:
        # Sticks and network shares have no links: there the name is taken first.
        path.touch(exist_ok=False)
        unfinished.replace(path)


def read_archive(path: Path) -> Iterator[ArchivedChunk | PassedOver]:
    """The chunks of an archive, and what else it has, in their order.

    Raises DamagedArchiveError, behind the last whole object; MisconfiguredError where there is no such file.
    """
    namespaces: dict[str, Namespace] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = parse_object_name("", member.name)
                file = tar.extractfile(member) if member.isreg() else None
                if file is None:
                    yield PassedOver(member.name, "is no file")
                elif parts is None:
                    yield from _note_document(namespaces, member, file)
                elif parts.namespace_name not in namespaces:
                    yield PassedOver(member.name, "no document of its namespace comes before it")
                elif member.size > WHOLE_BYTES_MAX:
                    yield PassedOver(member.name, f"{member.size} bytes are too many")
                else:
                    pieces = list(iter(partial(file.read, READ_BYTES), b""))
                    yield ArchivedChunk(namespaces[parts.namespace_name], parts, pieces)
            _check_end(tar)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        # Of numbers in headers that no file has tarfile raises what arithmetic does.
        raise DamagedArchiveError(f"{path} is no archive of kvstore's, or not whole: {error}") from None
    except OSError as error:
        raise MisconfiguredError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """Demand that members end where an archive does: tarfile takes a damaged header for the end, too."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise tarfile.ReadError(f"what follows byte {tar.offset} is damaged, or missing")


def _note_document(
    namespaces: dict[str, Namespace], member: tarfile.TarInfo, file: IO[bytes]
) -> Iterator[PassedOver]:
    data = file.read(DOCUMENT_BYTES_MAX + 1)
    namespace = Namespace.from_document(data)
    if namespace is None or member.name != namespace_document_name("", namespace.name):
        yield PassedOver(member.name, "neither a chunk nor a namespace's document")
    else:
        namespaces[namespace.name] = namespace

"""Real text found on this machine: what the quality harness trains on, and other files that it holds out."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LICENCES = Path("/usr/share/common-licenses")
PACKAGES = ("torch", "numpy", "botocore", "moto", "pydantic")
SUFFIXES = frozenset({".py", ".rst", ".md", ".txt"})
# Tests are tables as often as they are text, and generated files repeat themselves.
LEFT_OUT = frozenset(
    {
        "site-packages",
        "__pycache__",
        "test",
        "tests",
        "testing",
        "idle_test",
        "encodings",
        "serialized_patterns",
    }
)
FILE_BYTES = range(4 << 10, 400 << 10)
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class TextFile:
    """One file. `name` begins with its owner, and does not say where on this machine it lies."""

    name: str
    text: str
    digest: str

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Corpus:
    """Files to train on and files held out: no file, and no copy of one, is among both."""

    training: Sequence[TextFile]
    held_out: Sequence[TextFile]

    def listing(self) -> dict[str, dict[str, str]]:
        """Names and digests, which say exactly what the text was."""
        parts = {"training": self.training, "held_out": self.held_out}
        return {part: {file.name: file.digest for file in files} for part, files in parts.items()}


def find_text(text_bytes: int) -> Corpus:
    """About `text_bytes` of text: Python's library, licences, sources of installed packages, documents.

    The same files on a machine that has the same installed. Raises SystemExit where there are too few.
    """
    taken: dict[str, TextFile] = {}
    left = text_bytes
    for file in _read_all():
        if left <= 0:
            break
        if file.digest not in taken:
            taken[file.digest] = file
            left -= len(file.text)
    # Licences quote one another: one that is held out would be half known.
    sources = [file for file in taken.values() if file.owner != LICENCES.name]
    held_out = sources[::HELD_OUT_ONE_IN]
    training = [file for file in taken.values() if file not in held_out]
    if not training:
        raise SystemExit("quality: found no text to train on: neither Python's sources nor licences")
    return Corpus(training, held_out)


def _read_all() -> Iterator[TextFile]:
    """Python's own files and licences, then packages; each in the order of a digest: a part is a sample."""
    ours = [("stdlib", Path(sysconfig.get_paths()["stdlib"])), (LICENCES.name, LICENCES)]
    for folders in (ours, _packages()):
        named = [
            (f"{owner}/{path.relative_to(folder)}", path)
            for owner, folder in folders
            for path in _list(folder)
        ]
        for name, path in sorted(named, key=lambda item: _order(item[0])):
            data = path.read_bytes()
            yield TextFile(name, data.decode(errors="replace"), hashlib.sha256(data).hexdigest())


def _packages() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            yield package, Path(found.origin).parent


def _list(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for path in (Path(folder, name) for name in names):
            wanted = root == LICENCES or path.suffix in SUFFIXES
            # Tables fill large files, and small ones say too little.
            if wanted and path.is_file() and path.stat().st_size in FILE_BYTES:
                yield path


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()

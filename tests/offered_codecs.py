"""Codecs of another package, as an installed distribution offers them: a folder with its entry points."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.codecs import registry

MODULE = "kvstore_test_plugin"
DISTRIBUTION = "kvstore-test-plugin"

# A tensor codec that keeps the upper bytes of floats: two of float32's four are a bfloat16, cut off.
UPPER_BYTES = """
import numpy as np
from kvstore.codecs.contract import TensorFamily
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.layout import DType

class UpperBytes:
    def __init__(self, kept, form):
        layout = form.layout
        if layout.dtype is not DType.FLOAT32 or layout.page_form != "nhd":
            raise MisconfiguredError("upper is for float32 in pages of the form nhd")
        self.name = f"upper:{kept}"
        self._kept, self._tokens = kept, layout.chunk_tokens
        row = layout.kv_heads * layout.head_dim
        self._shape = (2, self._tokens, row, 4)

    def stored_bytes(self, lossless_tokens):
        if lossless_tokens > self._tokens:
            raise MissError(MissReason.BAD_ENCODING, "upper: more tokens than a chunk has")
        planes, tokens, row, _ = self._shape
        return 4 + planes * row * (4 * lossless_tokens + self._kept * (tokens - lossless_tokens))

    def encode(self, host, out, lossless_tokens):
        floats = np.frombuffer(host, np.uint8).reshape(self._shape)
        numbers = floats.view("<f4")[:, lossless_tokens:]
        if not np.isfinite(numbers).all():
            return None
        exact, cut = floats[:, :lossless_tokens], floats[:, lossless_tokens:, :, 4 - self._kept:]
        stored = lossless_tokens.to_bytes(4, "little") + exact.tobytes() + cut.tobytes()
        out[:len(stored)] = stored
        return len(stored)

    def check(self, quantized):
        if len(quantized) < 4 or len(quantized) != self.stored_bytes(int.from_bytes(quantized[:4], "little")):
            raise MissError(MissReason.BAD_ENCODING, "upper: another length")

    def decode(self, stored, out):
        self.check(stored)
        lossless_tokens = int.from_bytes(stored[:4], "little")
        floats = np.frombuffer(out, np.uint8).reshape(self._shape)
        exact, cut = floats[:, :lossless_tokens], floats[:, lossless_tokens:]
        stop = 4 + exact.size
        exact[:] = np.frombuffer(stored[4:stop], np.uint8).reshape(exact.shape)
        cut[..., :4 - self._kept] = 0
        kept = cut[..., 4 - self._kept:]
        kept[:] = np.frombuffer(stored[stop:], np.uint8).reshape(kept.shape)

UPPER = TensorFamily("upper", UpperBytes, "floats cut short: off by 1/128 at most", groups=(2, 3))
"""


@contextmanager
def offered(folder: Path, source: str, names: Mapping[str, str]) -> Iterator[None]:
    """A package of the module text `source` is installed in `folder`; names: of its entry points, and what of
    the module they load, with the module in front where it is another.
    """
    info = folder / f"{MODULE}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 1.0\n")
    points = [f"{name} = {value if ':' in value else f'{MODULE}:{value}'}" for name, value in names.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *points, ""]))
    (folder / f"{MODULE}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(registry, "_DECODERS", dict(registry._DECODERS))
        _forget()
        yield
    sys.modules.pop(MODULE, None)
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    for cached in (registry._offered, registry._load, registry.tensor_codec):
        cached.cache_clear()

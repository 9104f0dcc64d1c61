"""One codec's figures: its KV goes through a store by the transformers adapter, and is compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from benchmarks.quality_task import Answer, States, Task
from benchmarks.report import timed
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.chunk import decode_header
from kvstore.codecs.registry import decoder, parse_codec
from kvstore.engine_adapters.transformers import Attachment, attach
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.keys import parse_object_name
from kvstore.layout import ChunkForm, KVLayout
from kvstore.settings import load_settings
from kvstore.store import KVStore

# What is measured has one model, in one process; reading its weights again for each codec is of no use.
_REVISION = "quality"
_PATIENCE_S = 600.0
_TIMED_SECTIONS = 64
_TIMED_ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """How much smaller objects are than those that `none` writes; and sections, by layer."""

    whole: float
    by_layer: Sequence[float]


class CodecTrial:
    """Measures codecs on one task, against what the unmodified model answers."""

    def __init__(self, task: Task, reference: Answer) -> None:
        self._task = task
        self._reference = reference
        geometry = observe_geometry(task.model)
        self._layout: KVLayout = geometry.layout(task.size.chunk_tokens)
        self._form = ChunkForm(self._layout, self._layout.whole)

    def row(self, codec: str) -> dict[str, object]:
        """What is printed of a codec, by the names that docs/quality.md explains."""
        objects: dict[str, StoredObject] = {}
        self._save(codec, objects)
        ratio = self._ratio(objects)
        restored = self._restore(codec, objects)
        return {
            "ratio": round(ratio.whole, 4),
            "ratio_by_layer": [round(one, 3) for one in ratio.by_layer],
            **compare(self._reference, restored),
            **self._speed(codec),
        }

    def describe(self) -> dict[str, str | int]:
        """What sections hold."""
        return {**self._layout.describe(), "section_bytes": self._form.section_bytes}

    def sections(self) -> Iterator[bytes]:
        """Sections of the reference's KV in host form, the layers of one chunk after the other."""
        for window in range(self._task.size.windows):
            for chunk in range(self._task.size.chunks):
                for layer in self._reference.states:
                    yield b"".join(self._plane(states[window], chunk) for states in layer)

    def _plane(self, states: torch.Tensor, chunk: int) -> bytes:
        tokens = self._task.size.chunk_tokens
        part = states[:, chunk * tokens : (chunk + 1) * tokens].cpu().contiguous()
        return part.view(torch.uint8).numpy().tobytes()

    def _save(self, codec: str, objects: dict[str, StoredObject]) -> None:
        with self._attached(codec, objects) as attachment:
            self._task.generate(1)
            left = attachment.store.flush(_PATIENCE_S).chunks_left
            report = attachment.last
        if report is None or report.bypass or report.dropped_chunks or left:
            raise SystemExit(f"quality: {codec}: the prefixes were not stored: {report}, {left} left")

    def _restore(self, codec: str, objects: dict[str, StoredObject]) -> Answer:
        task = self._task
        with self._attached(codec, objects) as attachment:
            output = task.generate(task.size.new_tokens)
            report = attachment.last
        due = task.size.windows * task.size.prefix_tokens
        if report is None or report.reused_tokens != due:
            raise SystemExit(f"quality: {codec}: {due} tokens should have been restored: {report}")
        # Scored by the model itself: what is stored has nothing more to give.
        return task.answer(task.prefix_states(output.past_key_values), output.sequences)

    @contextmanager
    def _attached(self, codec: str, objects: dict[str, StoredObject]) -> Iterator[Attachment]:
        """The model on a store that has nothing in memory, over `objects`."""
        size = self._task.size
        room = self._form.raw_bytes * (size.windows * (size.chunks + 1) + 8)
        settings = load_settings(
            bucket="memory://",
            prefix="",
            codec=codec,
            chunk_tokens=size.chunk_tokens,
            disk_dir="",
            durability="queued",
            memory_bytes=room,
            upload_queue_bytes=room,
            when_full="block",
            save_timeout_s=_PATIENCE_S,
            lookup_timeout_s=_PATIENCE_S,
            load_timeout_s=_PATIENCE_S,
            upload_timeout_s=_PATIENCE_S,
            close_timeout_s=_PATIENCE_S,
        )
        with (
            KVStore.open(self._layout, settings=settings, backend=MemoryBackend(objects)) as store,
            attach(self._task.model, store, weights_revision=_REVISION) as attachment,
        ):
            store.wait_connected(_PATIENCE_S)
            yield attachment

    def _ratio(self, objects: dict[str, StoredObject]) -> Ratio:
        chunks = [stored.data for name, stored in objects.items() if parse_object_name("", name)]
        headers = [decode_header(data) for data in chunks]
        layers = range(self._form.layers)
        by_layer = [sum(header.sections[layer].stored_bytes for header in headers) for layer in layers]
        return Ratio(
            len(chunks) * self._form.raw_bytes / sum(map(len, chunks)),
            [len(chunks) * self._form.section_bytes / stored_bytes for stored_bytes in by_layer],
        )

    def _speed(self, name: str) -> dict[str, float | None]:
        """Host bytes per CPU second, in GB: medians over rounds. None where nothing is encoded."""
        codec = parse_codec(name, self._layout.dtype.itemsize, self._form.row_bytes)
        if codec is None:
            return {"encode_gbps": None, "decode_gbps": None}
        hosts = self._sample()
        reader = decoder(codec.name)
        out, back = (memoryview(bytearray(self._form.section_bytes)) for _ in range(2))
        encode_s, decode_s = [], []
        for _ in range(_TIMED_ROUNDS):
            stored: list[bytes] = []
            spent_s = 0.0
            for host in hosts:
                with timed() as timing:
                    length = codec.encode(host, out[:-1])
                spent_s += timing().cpu_s
                stored += [] if length is None else [bytes(out[:length])]
            encode_s.append(spent_s)
            spent_s = 0.0
            for data in stored:
                with timed() as timing:
                    reader.decode(memoryview(data), back)
                spent_s += timing().cpu_s
            decode_s.append(spent_s)
        return {
            "encode_gbps": self._gbps(len(hosts), encode_s),
            "decode_gbps": self._gbps(len(stored), decode_s) if stored else None,
        }

    def _gbps(self, sections: int, rounds_s: Sequence[float]) -> float:
        return round(sections * self._form.section_bytes / statistics.median(rounds_s) / 1e9, 3)

    def _sample(self) -> list[memoryview]:
        """Sections to time codecs on."""
        size, layers = self._task.size, self._form.layers
        step = max(1, size.windows * size.chunks * layers // _TIMED_SECTIONS)
        # With no factor in common with the number of layers, so that each layer has its share.
        while math.gcd(step, layers) > 1:
            step += 1
        return [memoryview(host) for host in islice(self.sections(), 0, None, step)]


def compare(reference: Answer, restored: Answer) -> dict[str, float]:
    """How far what was restored leads the model away. Everything is exactly 0 or 1 for equal KV."""
    differences = (restored.losses - reference.losses).mean(1)
    change = math.expm1(float(differences.mean()))
    spread = float(differences.std()) if len(differences) > 1 else 0.0
    equal = (restored.generated == reference.generated).double()
    max_error, relative_error = errors(reference.states, restored.states)
    return {
        "perplexity_change": change,
        "perplexity_change_stderr": spread / math.sqrt(len(differences)),
        "token_agreement": float(equal.mean()),
        "tokens_until_divergence": float(equal.cumprod(1).sum(1).mean()),
        "forced_agreement": float((restored.greedy == reference.greedy).double().mean()),
        "max_error": max_error,
        "relative_error": relative_error,
    }


def errors(reference: States, restored: States) -> tuple[float, float]:
    """The largest difference of two elements; and the root of squared differences over that of squares."""
    largest, squares, differences = 0.0, 0.0, 0.0
    for ours, theirs in zip(reference, restored, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            exact = one.double()
            difference = other.double() - exact
            largest = max(largest, float(difference.abs().max()))
            squares += float(exact.square().sum())
            differences += float(difference.square().sum())
    return largest, math.sqrt(differences / squares)

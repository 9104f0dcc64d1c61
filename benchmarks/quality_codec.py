"""One codec's figures: its KV goes through a store by the transformers adapter, and is compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from benchmarks.quality_task import Answer, States, Task
from benchmarks.section_speed import HostSection, section_speed
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.chunk import decode_header
from kvstore.engine_adapters.transformers import Attachment, attach
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.keys import parse_object_name
from kvstore.layout import ChunkForm, KVLayout
from kvstore.settings import load_settings
from kvstore.store import KVStore

# What is measured has one model, in one process; reading its weights again for each codec is of no use.
_REVISION = "quality"
_PATIENCE_S = 240.0
_TIMED_SECTIONS = 64


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
        self._timed = self._sample()

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
            **section_speed(codec, self._form, self._timed),
        }

    def describe(self) -> dict[str, str | int]:
        """What sections hold."""
        return {**self._layout.describe(), "section_bytes": self._form.section_bytes}

    def _sections(self) -> Iterator[HostSection]:
        """The reference's KV in host form, the layers of one chunk after the other."""
        size = self._task.size
        for window, chunk in itertools.product(range(size.windows), range(size.chunks)):
            tokens = slice(chunk * size.chunk_tokens, (chunk + 1) * size.chunk_tokens)
            for number, planes in enumerate(self._reference.states):
                parts = [_bytes(states[window, :, tokens]) for states in planes]
                yield HostSection(b"".join(parts), number, chunk)

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
            lossless_layers="",
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

    def _sample(self) -> list[HostSection]:
        """Sections to time codecs on."""
        size, layers = self._task.size, self._form.layers
        step = max(1, size.windows * size.chunks * layers // _TIMED_SECTIONS)
        # With no factor in common with the number of layers, so that each layer has its share.
        while math.gcd(step, layers) > 1:
            step += 1
        return list(islice(self._sections(), 0, None, step))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


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

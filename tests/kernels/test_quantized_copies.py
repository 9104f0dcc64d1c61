"""Quantized sections: every PageCopier puts into pages what the codec decodes, and makes what it encodes.

The codec itself is tested in tests/unit/test_tensor_codecs.py; here it is the oracle.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, Kind, after_scatter, each_kind, guarded, oracle, section_views
from quantized_cases import DTYPES, NAMES, SPOILT, QuantizedCase, case_of, cases
from tensor_sections import words_of

from kvstore.codecs.elements import ELEMENTS
from kvstore.errors import MisconfiguredError


def quantize(kind: Kind, case: QuantizedCase, guard: bytes) -> None:
    """Quantize all pages; all that the sections must hold, and no more, is what the codec writes."""
    form, pages = case.form, case.pages(kind.device, filled=True)
    before = [own.storage.clone() for own in pages]
    count = len(case.layers) * len(case.page_ids)
    empty = guarded([b"\x5a" * form.section_bytes] * count, guard)
    with kind.host_memory(empty) as memory:
        views = section_views(memory, form, guard)
        chunks = len(case.page_ids)
        by_layer = [views[at : at + chunks] for at in range(0, count, chunks)]
        copier = kind.make(form, case.codec)
        written = copier.quantize_layers([own.planes for own in pages], case.page_ids, by_layer, case.firsts)
        due = [[case.encoded(chunk) for chunk in chunks] for chunks in case.layers]
        assert written == [[len(own) for own in of_layer] for of_layer in due]
        for views_, of_layer in zip(by_layer, due, strict=True):
            for view, own in zip(views_, of_layer, strict=True):
                assert view[: len(own)] == own
                view[:] = b"\x5a" * len(view)
        assert memory == empty
    for own, was in zip(pages, before, strict=True):
        assert torch.equal(own.storage, was)


def scatter(kind: Kind, case: QuantizedCase, sections: list[bytes], guard: bytes) -> None:
    """Scatter sections of the first layer: pages hold what the codec decodes, and nothing else changes."""
    (pages, *_) = case.pages(kind.device, filled=False)
    due = after_scatter(pages, [case.decoded(own) for own in sections])
    content = guard + guard.join(sections) + guard
    with kind.host_memory(content) as memory:
        views, start = [], len(guard)
        for own in sections:
            views.append(memory[start : start + len(own)])
            start += len(own) + len(guard)
        kind.make(case.form, case.codec).scatter(views, pages.planes, case.page_ids)
        assert memory == content
    assert torch.equal(pages.storage.cpu(), due)


@each_kind
@given(case=cases(), guard=st.sampled_from([7, 16]))
@hypothesis_settings(max_examples=12, deadline=None)
def test_p5_pages_are_quantized_to_what_the_codec_makes_of_their_host_form(kind, case, guard):
    quantize(kind, case, b"\xa5" * guard)


@each_kind
@given(case=cases(), guard=st.sampled_from([7, 16]), raw=st.integers(0, 7), seed=st.integers(0, 2**32 - 1))
@hypothesis_settings(max_examples=12, deadline=None)
def test_p5_quantized_and_whole_sections_of_one_scatter_fill_pages_as_the_codec_decodes(
    kind, case, guard, raw, seed
):
    sections = [
        chunk.host(case.form) if raw >> at & 1 else case.encoded(chunk)
        for at, chunk in enumerate(case.layers[0])
    ]
    scatter(kind, case, sections, b"\xa5" * guard)


def any_numbers(case: QuantizedCase, first: int, seed: int) -> bytes:
    """A quantized section of random codes, scales and lowest elements, of which a reader takes each."""
    random, codec, elements = np.random.default_rng(seed), case.codec, ELEMENTS[case.form.layout.dtype]
    stored = bytearray(random.bytes(codec.stored_bytes(first)))
    stored[:4] = struct.pack("<I", first)
    for plane, part in zip(codec.planes(first), codec.parts(first), strict=True):
        bits = random.integers(0x80, plane._scale_bits_max, plane.groups, "<u2", endpoint=True)
        stored[part.scales : part.lowest] = bits.tobytes()
        if plane.grid.affine:
            lowest = random.uniform(-elements.largest, elements.largest, plane.groups)
            stored[part.lowest : part.codes] = words_of(lowest, case.form.layout.dtype)
        codes = np.frombuffer(stored, np.uint8)[part.codes : part.end]
        if case.name == "fp8":
            codes[codes & 0x7F == 0x7F] = 0x80
    return bytes(stored)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_p5_every_code_at_every_scale_fills_pages_as_the_codec_decodes(kind, name, dtype):
    case = case_of(name, dtype, "hnd")
    scatter(kind, case, [any_numbers(case, first, 5 + first) for first in (0, 4)], b"")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: elsewhere it takes long, and nothing is fused")
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_p5_sections_as_large_as_a_models_are_the_same_both_ways(kind, name, dtype):
    # Some of so many products lie so close to halfway between two codes that rounding once instead of twice,
    # as fused operations do, gives another code.
    case = case_of(
        name, dtype, head_dim=128, value_dim=128, page_tokens=16, kv_heads=8, chunk_tokens=256, first=0
    )
    quantize(kind, case, b"")
    scatter(kind, case, [case.encoded(chunk) for chunk in case.layers[0]], b"")


@each_kind
@pytest.mark.parametrize("name", ["int8", "int4:32", "fp8"])
def test_p5_sections_that_the_codec_declines_come_in_host_form_and_others_quantized(kind, name):
    case = case_of(name, kinds=[*SPOILT, "tiny", "largest"], first=0)
    whole = [len(case.encoded(chunk)) == case.form.section_bytes for chunk in case.layers[0]]
    assert whole == [True] * len(SPOILT) + [False] * 2
    quantize(kind, case, b"")


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_p5_lossless_tokens_keep_payloads_of_nan_both_ways(kind, dtype):
    case = case_of("fp8", dtype, kinds=["signaling nan in front", "inf in front"], first=1)
    sections = [case.encoded(chunk) for chunk in case.layers[0]]
    assert all(len(own) < case.form.section_bytes for own in sections)
    quantize(kind, case, b"")
    scatter(kind, case, sections, b"")


@each_kind
def test_chunks_that_would_not_be_shorter_come_in_host_form(kind):
    case = case_of("int4:32")
    for chunk, first in zip(case.layers[0], [40, 39], strict=True):
        chunk.first = first
    quantize(kind, case, b"")


class Refusals:
    """Scatters that are refused, and change no page."""

    def __init__(self, kind: Kind, case: QuantizedCase) -> None:
        self.kind, self.case = kind, case
        (self.pages, *_) = case.pages(kind.device, filled=False)
        self.before = self.pages.storage.clone()
        self.copier = kind.make(case.form, case.codec)

    def misconfigured(self, sections, match, **changes):
        with pytest.raises(MisconfiguredError, match=match):
            self.scatter(sections, **changes)
        assert torch.equal(self.pages.storage, self.before)

    def scatter(self, sections, *, page_ids=None, copier=None):
        views = [memoryview(bytearray(own)) for own in sections]
        (copier or self.copier).scatter(views, self.pages.planes, page_ids or self.case.page_ids)


@each_kind
@pytest.mark.parametrize("name", NAMES)
def test_p11_a_section_of_another_length_than_it_says_is_refused_and_no_page_changes(kind, name):
    case = case_of(name)
    refusals, good = Refusals(kind, case), case.encoded(case.layers[0][0])
    stored = case.encoded(case.layers[0][1])
    for length in (0, 3, 4, len(stored) - 1, len(stored) + 1):
        refusals.misconfigured([good, (stored + b"\0")[:length]], "section 1 has .* another length")
    for first in (0, 3, 41, 1 << 31, (1 << 32) - 1):
        refusals.misconfigured([good, struct.pack("<I", first) + stored[4:]], "another length")


@each_kind
def test_bad_arguments_are_refused_before_any_page_changes(kind):
    case = case_of()
    refusals, sections = Refusals(kind, case), [case.encoded(chunk) for chunk in case.layers[0]]
    num_pages, (first, second) = 2 + max(map(max, case.page_ids)), case.page_ids
    wrong = [first, [*second[:-1], num_pages]]
    refusals.misconfigured(sections, f"page id {num_pages} of chunk 1", page_ids=wrong)
    wrong = [first, [*second[:-1], first[0]]]
    refusals.misconfigured(sections, "is the target of two pages", page_ids=wrong)
    longer = bytes(case.form.section_bytes + 1)
    refusals.misconfigured([sections[0], longer], "a section of this layout has")
    refusals.misconfigured(sections, "a section of this layout has", copier=kind.make(case.form))


@each_kind
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lossless_tokens": [4]}, "1 lossless_tokens for 2 chunks"),
        ({"lossless_tokens": [4, 41]}, "lossless_tokens 41 of chunk 1: takes 0 to 40"),
        ({"lossless_tokens": [-1, 4]}, "lossless_tokens -1 of chunk 0"),
        ({"page_ids": [[0, 10, 20, 30, 40], [1, 11, 21, 31, 999]]}, "page id 999 of chunk 1"),
        ({"codec": None}, "made without a codec"),
    ],
)
def test_bad_arguments_are_refused_before_any_section_changes(kind, changes, says):
    case = case_of()
    (pages,) = case.pages(kind.device, filled=True)
    arguments = {"codec": case.codec, "page_ids": case.page_ids, "lossless_tokens": [4, 4], **changes}
    sections = [memoryview(bytearray(b"\x5a" * case.form.section_bytes)) for _ in case.page_ids]
    copier = kind.make(case.form, arguments.pop("codec"))
    with pytest.raises(MisconfiguredError, match=says):
        copier.quantize_layers([pages.planes], sections=[sections], **arguments)
    assert all(bytes(own) == b"\x5a" * len(own) for own in sections)


@each_kind
def test_no_chunk_and_no_layer_are_nothing_to_copy(kind):
    case = case_of()
    (pages,) = case.pages(kind.device, filled=True)
    copier = kind.make(case.form, case.codec)
    assert copier.quantize_layers([pages.planes], [], [[]], []) == [[]]
    assert copier.quantize_layers([], case.page_ids, [], case.firsts) == []
    copier.scatter([], pages.planes, [])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: elsewhere nothing is queued")
@each_kind
def test_a_quantized_copy_comes_after_the_current_stream_and_before_a_stream_that_waits(kind):
    if kind.device == "cpu":
        return
    case = case_of(kinds=["normal"])
    stored = case.encoded(case.layers[0][0])
    (full,), (pages,) = case.pages(kind.device, filled=True), case.pages(kind.device, filled=False)
    copier = kind.make(case.form, case.codec)
    with kind.host_memory(bytes(case.form.section_bytes)) as memory:
        torch.cuda._sleep(50_000_000)
        pages.storage.copy_(full.storage)
        ((length,),) = copier.quantize_layers([pages.planes], case.page_ids, [[memory]], case.firsts)
        assert memory[:length] == stored
        torch.cuda._sleep(50_000_000)
        pages.storage.zero_()
        copy, waits = (
            copier.begin_scatter([memory[:length]], pages.planes, case.page_ids),
            torch.cuda.Stream(),
        )
        copy.stream_wait(waits)
        with torch.cuda.stream(waits):
            seen = [plane.clone() for plane in pages.planes]
        waits.synchronize()
        copy.wait()
        assert oracle(seen, case.page_ids[0]) == case.decoded(stored)

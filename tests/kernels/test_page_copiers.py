"""Every PageCopier moves exact bytes, touches nothing else, and refuses before it touches anything.

Without a GPU the Triton one runs under Triton's interpreter; with one, both run on it as well.
"""

from __future__ import annotations

import struct
import threading
from functools import partial
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DIMS,
    Case,
    Kind,
    after_scatter,
    each_kind,
    guarded,
    layout_of,
    make_planes,
    oracle,
    page_shapes,
    plane_dtype,
    section_views,
    whole,
)

from kvstore.errors import MisconfiguredError
from kvstore.layout import ChunkForm, DType, KVLayout, Shard


@st.composite
def forms(draw) -> ChunkForm:
    page_form = draw(st.sampled_from(["nhd", "hnd", "mla", "opaque:test"]))
    page_tokens = draw(st.integers(1, 4))
    kv_heads = 1 if page_form == "mla" else draw(st.integers(1, 4))
    start = draw(st.integers(0, kv_heads - 1))
    layout = KVLayout(
        layers=2,
        kv_heads=kv_heads,
        head_dim=draw(DIMS),
        value_dim=draw(st.none() | DIMS) if page_form in ("nhd", "hnd") else None,
        dtype=draw(st.sampled_from(list(DType))),
        page_form=page_form,
        page_tokens=page_tokens,
        chunk_tokens=page_tokens * draw(st.integers(1, 4)),
        page_bytes=draw(st.integers(1, 40) | st.just(10_256)) if page_form == "opaque:test" else None,
    )
    return ChunkForm(layout, Shard(start, draw(st.integers(start + 1, kv_heads))))


@st.composite
def cases(draw) -> Case:
    form = draw(forms())
    chunks, pages = draw(st.integers(1, 3)), form.layout.pages
    num_pages = chunks * pages + draw(st.integers(0, 4))
    axes = draw(st.permutations(range(1 + len(page_shapes(form)[0]))))
    apart, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    unused = draw(st.integers(0, 1))
    storage, planes = make_planes(form, num_pages, axes, apart=apart, seed=seed, unused=unused)
    table = draw(st.permutations(range(num_pages)) | st.just(range(num_pages)))
    ids = [list(table[i * pages : (i + 1) * pages]) for i in range(chunks)]
    return Case(form, storage, planes, ids, b"\xa5" * draw(st.sampled_from([7, 16])))


@each_kind
@given(case=cases())
@hypothesis_settings(max_examples=100, deadline=None)
def test_p5_a_gather_fills_sections_with_the_exact_host_form_and_nothing_else(kind, case):
    case = case.on(kind.device)
    before = case.storage.clone()
    empty = guarded([bytes(case.form.section_bytes)] * len(case.page_ids), case.guard)
    with kind.host_memory(empty) as memory:
        sections = section_views(memory, case.form, case.guard)
        kind.make(case.form).gather(case.planes, case.page_ids, sections)
        assert bytes(memory) == guarded([oracle(case.planes, ids) for ids in case.page_ids], case.guard)
    assert torch.equal(case.storage, before)


@each_kind
@given(case=cases(), readonly=st.booleans(), seed=st.integers(0, 2**32))
@hypothesis_settings(max_examples=100, deadline=None)
def test_p5_a_scatter_writes_the_exact_pages_and_no_byte_beside_them(kind, case, readonly, seed):
    generator = torch.Generator().manual_seed(seed)
    length = case.form.section_bytes
    contents = [bytes(torch.randint(0, 256, (length,), generator=generator).tolist()) for _ in case.page_ids]
    expected = after_scatter(case, contents)
    case = case.on(kind.device)
    with kind.host_memory(guarded(contents, case.guard)) as memory:
        sections = section_views(memory, case.form, case.guard)
        views = [section.toreadonly() if readonly else section for section in sections]
        kind.make(case.form).scatter(views, case.planes, case.page_ids)
        assert bytes(memory) == guarded(contents, case.guard)
    assert torch.equal(case.storage.cpu(), expected)
    assert [oracle(case.planes, ids) for ids in case.page_ids] == contents


@each_kind
@pytest.mark.parametrize("page_form", ["nhd", "hnd", "mla", "opaque:test"])
def test_a_gather_of_several_layers_fills_the_sections_of_each(kind, page_form):
    form = whole(layout_of(page_form))
    axes = list(range(1 + len(page_shapes(form)[0])))
    ids = [[4, 0], [1, 3]]
    cases_ = [
        Case(form, *make_planes(form, 5, axes, apart=seed > 0, seed=seed), ids).on(kind.device)
        for seed in range(3)
    ]
    guard = cases_[0].guard
    with kind.host_memory(guarded([bytes(form.section_bytes)] * 6, guard)) as memory:
        views = section_views(memory, form, guard)
        by_layer = [views[at : at + 2] for at in (0, 2, 4)]
        kind.make(form).gather_layers([case.planes for case in cases_], ids, by_layer)
        expected = [oracle(case.planes, chunk) for case in cases_ for chunk in ids]
        assert bytes(memory) == guarded(expected, guard)


@each_kind
def test_a_changed_table_is_checked_again(kind):
    form = whole(layout_of("mla"))
    planes = Case(form, *make_planes(form, 5, [0, 1, 2], apart=True), []).on(kind.device).planes
    sections = [memoryview(bytearray(form.section_bytes))]
    ids, copier = [[0, 1]], kind.make(form)
    copier.gather(planes, ids, sections)
    ids[0][1] = 3
    copier.gather(planes, ids, sections)
    assert bytes(sections[0]) == oracle(planes, [0, 3])
    ids[0][1] = 5
    with pytest.raises(MisconfiguredError, match="page id 5 of chunk 0"):
        copier.gather(planes, ids, sections)
    with pytest.raises(MisconfiguredError, match="page id 3 of chunk 0: the planes hold pages 0 to 2"):
        copier.gather([plane[:3] for plane in planes], [[0, 3]], sections)


@each_kind
@pytest.mark.parametrize("page_form", ["nhd", "hnd"])
def test_the_host_form_has_keys_then_values_and_within_them_the_order_its_name_says(kind, page_form):
    layout = layout_of(page_form, DType.FLOAT32, value_dim=2)
    shapes = page_shapes(whole(layout))
    planes = [
        (torch.arange(3 * prod(shape)).view(3, *shape).to(torch.float32) + 1000 * at).to(kind.device)
        for at, shape in enumerate(shapes)
    ]
    section = memoryview(bytearray(whole(layout).section_bytes))
    kind.make(whole(layout)).gather(planes, [[2, 0]], [section])
    values = struct.unpack(f"<{len(section) // 4}f", section)
    position = 0
    for plane in planes:
        for page in (2, 0):
            for outer in range(plane.shape[1]):
                for inner in range(plane.shape[2]):
                    for element in range(plane.shape[3]):
                        assert values[position] == plane[page, outer, inner, element].item()
                        position += 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: elsewhere nothing is queued")
@each_kind
def test_a_copy_comes_after_the_current_stream_and_before_a_stream_that_waits(kind):
    if kind.device == "cpu":
        return
    form = whole(layout_of("mla"))
    copier, page_ids = kind.make(form), [[2, 0]]
    planes = [torch.zeros(3, *shape, dtype=torch.float16, device="cuda") for shape in page_shapes(form)]
    with kind.host_memory(bytes(form.section_bytes)) as section:
        torch.cuda._sleep(50_000_000)
        planes[0].fill_(1.5)
        copier.begin_gather(planes, page_ids, [section]).wait()
        assert bytes(section) == struct.pack("<e", 1.5) * (form.section_bytes // 2)
        section[:] = struct.pack("<e", 2.5) * (form.section_bytes // 2)
        torch.cuda._sleep(50_000_000)
        copy, waits = copier.begin_scatter([section], planes, page_ids), torch.cuda.Stream()
        copy.stream_wait(waits)
        with torch.cuda.stream(waits):
            seen = planes[0].clone()
        waits.synchronize()
        assert seen.unique().tolist() == [1.5, 2.5]
        copy.wait()


SPECIALS = {
    DType.FLOAT32: [0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000],
    DType.FLOAT16: [0x7E01, 0x7C01, 0xFFFF, 0x8000, 0x0001, 0x83FF, 0x7C00],
    DType.BFLOAT16: [0x7FC1, 0x7F81, 0xFFFF, 0x8000, 0x0001, 0x807F, 0x7F80],
    DType.FLOAT8_E4M3: [0x7F, 0xFF, 0x80, 0x01, 0x87, 0x7E, 0x00],
    DType.FLOAT8_E5M2: [0x7D, 0x7F, 0xFE, 0x80, 0x01, 0x83, 0x7C],
}


@each_kind
@pytest.mark.parametrize("table", [[0, 1], [2, 0]], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("dtype", list(SPECIALS))
def test_p5_nan_payloads_negative_zero_and_subnormals_survive_both_ways(kind, dtype, table):
    form = whole(layout_of("hnd", dtype))
    patterns = b"".join(value.to_bytes(dtype.itemsize, "little") for value in SPECIALS[dtype])
    content = (patterns * form.section_bytes)[: form.section_bytes]
    case = Case(form, *make_planes(form, 3, [0, 1, 2, 3], apart=True), [table])
    planes = case.on(kind.device).planes
    copier = kind.make(form)
    copier.scatter([memoryview(bytearray(content))], planes, [table])
    back = bytearray(form.section_bytes)
    copier.gather(planes, [table], [memoryview(back)])
    assert bytes(back) == content == oracle(planes, table)


@each_kind
@pytest.mark.parametrize("page_form", ["nhd", "opaque:test"])
def test_pages_made_in_inference_mode_are_written_from_a_thread_outside_of_it(kind, page_form):
    form = whole(layout_of(page_form))
    with torch.inference_mode():
        dtype = plane_dtype(form.layout)
        planes = [torch.zeros(3, *shape, dtype=dtype, device=kind.device) for shape in page_shapes(form)]
    section = memoryview(bytearray(b"\x01" * form.section_bytes))
    failures = []

    def scatter() -> None:
        try:
            kind.make(form).scatter([section], planes, [[2, 0]])
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=scatter)
    thread.start()
    thread.join()
    assert not failures
    assert oracle(planes, [2, 0]) == bytes(section)


def refuse(
    kind: Kind,
    form: ChunkForm,
    message: str,
    *,
    planes=None,
    ids=None,
    sections=None,
    ways=("gather", "scatter"),
):
    """Both directions refuse with `message` and change neither a page nor a section."""
    storage, good_planes = make_planes(form, 5, list(range(1 + len(page_shapes(form)[0]))), apart=True)
    case = Case(form, storage, good_planes, []).on(kind.device)
    planes = case.planes if planes is None else planes(case.planes)
    ids = [[0, 1], [3, 4]] if ids is None else ids
    before = storage.clone()
    content = guarded([b"\x5a" * form.section_bytes] * 2, case.guard)
    memory = memoryview(bytearray(content))
    good_sections = section_views(memory, form, case.guard)
    sections = good_sections if sections is None else sections(good_sections)
    copier = kind.make(form)
    for way in ways:
        call = partial(copier.gather, planes, ids, sections)
        if way == "scatter":
            call = partial(copier.scatter, sections, planes, ids)
        with pytest.raises(MisconfiguredError, match=message):
            call()
        assert torch.equal(case.storage.cpu(), before)
        assert bytes(memory) == content


@each_kind
@pytest.mark.parametrize("page_form", ["nhd", "hnd", "mla", "opaque:test"])
def test_a_page_id_out_of_range_in_the_last_chunk_is_refused_before_any_write(kind, page_form):
    form = whole(layout_of(page_form))
    refuse(kind, form, "page id 5 of chunk 1: the planes hold pages 0 to 4", ids=[[0, 1], [3, 5]])
    refuse(kind, form, "page id -1 of chunk 1", ids=[[0, 1], [-1, 3]])


@each_kind
def test_a_wrong_table_is_refused(kind):
    form = whole(layout_of("nhd"))
    refuse(kind, form, "1 lists of page ids for 2 sections", ids=[[0, 1]])
    refuse(kind, form, "chunk 1 comes with 1 page ids, a chunk of this layout has 2 pages", ids=[[0, 1], [2]])
    refuse(kind, form, "among these is something else", ids=[[0, 1], [2, 3.0]])
    refuse(kind, form, "among these is something else", ids=[[0, 1], [2, 1 << 63]])
    refuse(kind, form, "page id 1 is the target of two pages", ids=[[0, 1], [1, 2]], ways=["scatter"])


@each_kind
def test_wrong_planes_are_refused_with_both_shapes(kind):
    form = whole(layout_of("nhd"))
    refuse(
        kind,
        form,
        r"plane 1 \(V\) has shape \(5, 2, 2, 2\), nhd pages of this layout need \(pages, 2, 2, 3\)",
        planes=lambda good: [good[0], good[1][..., :2]],
    )
    refuse(kind, form, "1 planes: nhd pages have two planes, K and V", planes=lambda good: good[:1])
    refuse(
        kind,
        form,
        "holds torch.bfloat16, the layout needs torch.float16",
        planes=lambda good: [plane.view(torch.bfloat16) for plane in good],
    )
    refuse(kind, form, "is on meta and plane 0 on c", planes=lambda good: [good[0], good[1].to("meta")])
    refuse(kind, form, "has 4 pages and plane 0 has 5", planes=lambda good: [good[0], good[1][:4]])
    refuse(
        kind,
        form,
        "elements share memory",
        planes=lambda good: [good[0], good[1][:1].expand(5, -1, -1, -1)],
        ways=["scatter"],
    )


@each_kind
def test_wrong_sections_are_refused(kind):
    form = whole(layout_of("hnd"))
    refuse(kind, form, r"section 1 has 95 bytes, .* has 96", sections=lambda good: [good[0], good[1][:-1]])
    refuse(kind, form, "section 1 has format 'b'", sections=lambda good: [good[0], good[1].cast("b")])
    refuse(kind, form, "strides", sections=lambda good: [good[0], memoryview(bytearray(192))[::2]])
    refuse(
        kind,
        form,
        "section 1 is read-only memory",
        sections=lambda good: [good[0], good[1].toreadonly()],
        ways=["gather"],
    )

import asyncio
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvstore.backends.blocking import AbandonedError, Caller
from kvstore.disk import io as disk_io
from kvstore.disk.fill import Ranges
from kvstore.errors import RetryableError

BLOCK = disk_io.BLOCK_BYTES


@pytest.fixture
def caller() -> Iterator[Caller]:
    loop = asyncio.new_event_loop()
    yield Caller(loop)
    loop.close()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 5 * BLOCK),
    cuts=st.lists(st.integers(0, 5 * BLOCK), max_size=8),
    order=st.randoms(use_true_random=False),
    direct=st.booleans(),
)
def test_pieces_in_any_order_make_the_whole(tmp_path_factory, length, cuts, order, direct):
    path = tmp_path_factory.getbasetemp() / "file"
    data = os.urandom(length)
    stops = sorted({0, length, *(cut for cut in cuts if cut < length)})
    pieces = list(itertools.pairwise(stops))
    order.shuffle(pieces)
    caller = Caller(asyncio.new_event_loop())
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    direct_file = os.open(path, os.O_RDWR | os.O_DIRECT) if direct else None
    covered = Ranges()
    try:
        for start, stop in pieces:
            assert not covered.cover(length)
            middle = (start + stop) // 2
            parts = [memoryview(data)[start:middle], memoryview(data)[middle:stop]]
            disk_io.drain(file, direct_file, start, parts, caller)
            covered.add(start, stop)
        assert covered.cover(length)
        assert os.fstat(file).st_size == length
        out = bytearray(length)
        disk_io.fill(direct_file or file, 0, memoryview(out), caller, direct=direct)
        assert out == data
        start = order.randrange(length)
        out = bytearray(order.randint(1, length - start))
        disk_io.fill(direct_file or file, start, memoryview(out), caller, direct=direct)
        assert out == data[start : start + len(out)]
    finally:
        os.close(file)
        if direct_file is not None:
            os.close(direct_file)
        caller._loop.close()


def test_a_write_cut_short_is_carried_on(tmp_path: Path, caller: Caller, monkeypatch: pytest.MonkeyPatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:700], offset))
    data = os.urandom(3 * BLOCK + 5)
    path = tmp_path / "file"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    disk_io.drain(file, file, 0, [memoryview(data)], caller)
    os.close(file)
    assert path.read_bytes() == data


def test_a_file_that_is_shorter_than_it_was_is_read_again(tmp_path: Path, caller: Caller):
    (tmp_path / "file").write_bytes(b"short")
    file = os.open(tmp_path / "file", os.O_RDONLY)
    out = bytearray(10)
    with pytest.raises(RetryableError):
        disk_io.fill(file, 0, memoryview(out), caller, direct=False)
    os.close(file)


def test_work_for_a_caller_that_is_gone_ends_and_touches_nothing(tmp_path: Path, caller: Caller):
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(file, bytes(100))
    caller.leave()
    out = bytearray(b"x" * 10)
    with pytest.raises(AbandonedError):
        disk_io.fill(file, 0, memoryview(out), caller, direct=False)
    with pytest.raises(AbandonedError):
        disk_io.drain(file, None, 0, [memoryview(out)], caller)
    with pytest.raises(AbandonedError):
        disk_io._Source([memoryview(out)], caller).take(5)
    assert out == b"x" * 10
    assert os.pread(file, 100, 0) == bytes(100)
    os.close(file)


@given(st.permutations(range(8)), st.sets(st.integers(0, 7), max_size=3))
def test_ranges_cover_an_object_when_none_of_it_is_missing(order, missing):
    covered = Ranges()
    for number in order:
        if number not in missing:
            covered.add(10 * number, 10 * number + 10)
    covered.add(5, 5)
    assert covered.cover(80) == (not missing)
    assert not covered.cover(81)

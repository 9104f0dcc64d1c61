import contextlib
import subprocess
import sys
import threading

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs.registry import decoder, parse_codec
from kvstore.codecs.zstd import ZstdCodec
from kvstore.errors import MisconfiguredError, MissError, MissReason

CODECS = ["zstd", "zstd:1", "zstd:22"]
GUARD = b"\xa5" * 16
DATA = st.binary(min_size=1, max_size=300) | st.builds(
    lambda piece, n: piece * n, st.binary(min_size=1, max_size=9), st.integers(1, 99)
)


def guarded(length):
    """A buffer between canaries, and its middle."""
    memory = bytearray(GUARD + b"\xa5" * length + GUARD)
    return memory, memoryview(memory)[16 : 16 + length]


def assert_guards(memory):
    assert memory[:16] == memory[-16:] == GUARD


def encoded(codec, data):
    out = bytearray(len(data) + 1000)
    length = codec.encode(memoryview(data), memoryview(out))
    return bytes(out[:length])


@pytest.mark.parametrize("name", CODECS)
@given(data=DATA)
def test_decoding_undoes_encoding_bit_by_bit(name, data):
    codec = parse_codec(name)
    stored = encoded(codec, data)
    memory, out = guarded(len(data))
    decoder(codec.name).decode(memoryview(stored), out)
    assert out == data
    assert_guards(memory)


@given(data=DATA, short=st.integers(0, 400))
def test_encoding_says_so_when_the_result_does_not_fit_and_never_writes_past_the_end(data, short):
    codec = ZstdCodec()
    whole = encoded(codec, data)
    memory, out = guarded(max(0, len(whole) - short))
    length = codec.encode(memoryview(data), out)
    assert (length is None) == (short > 0 and len(whole) > 0)
    assert length is None or out[:length] == whole
    assert_guards(memory)
    # A codec that just gave up is as good as ever.
    assert encoded(codec, data) == whole


@given(data=DATA, off=st.integers(-300, 300).filter(bool))
def test_data_of_another_length_is_a_miss_and_never_written_past_the_end(data, off):
    stored = encoded(ZstdCodec(), data)
    memory, out = guarded(max(0, len(data) + off))
    if len(out) == len(data):
        return
    with pytest.raises(MissError) as error:
        ZstdCodec().decode(memoryview(stored), out)
    assert error.value.reason is MissReason.BAD_ENCODING
    assert_guards(memory)


@given(stored=st.binary(max_size=60), length=st.integers(0, 60))
def test_random_data_raises_nothing_but_a_miss_and_is_never_written_past_the_end(stored, length):
    memory, out = guarded(length)
    with contextlib.suppress(MissError):
        ZstdCodec().decode(memoryview(stored), out)
    assert_guards(memory)


def test_damaged_frames_harm_no_later_one():
    data = bytes(range(200)) * 2
    codec = ZstdCodec()
    stored = encoded(codec, data)
    damaged = [stored[:length] for length in range(len(stored))]
    damaged += [stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :] for at in range(len(stored))]
    for piece in damaged:
        memory, out = guarded(len(data))
        # Some decode to other bytes: finding those is the task of the section's checksum.
        with contextlib.suppress(MissError):
            codec.decode(memoryview(piece), out)
        assert_guards(memory)
        codec.decode(memoryview(stored), out)
        assert out == data


def test_a_frame_cut_off_anywhere_is_a_miss():
    data = bytes(range(200)) * 2
    stored = encoded(ZstdCodec(), data)
    for length in range(len(stored)):
        with pytest.raises(MissError):
            ZstdCodec().decode(memoryview(stored[:length]), memoryview(bytearray(len(data))))


def test_bytes_behind_the_frame_are_a_miss():
    data = b"a" * 100
    stored = encoded(ZstdCodec(), data)
    for rest in (b"\0", b"garbage", stored):
        with pytest.raises(MissError):
            ZstdCodec().decode(memoryview(stored + rest), memoryview(bytearray(100)))


def test_a_bomb_is_a_miss_before_it_goes_off():
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))
    memory, out = guarded(1000)
    with pytest.raises(MissError) as error:
        ZstdCodec().decode(memoryview(bomb), out)
    assert error.value.reason is MissReason.BAD_ENCODING
    assert_guards(memory)


CLAIM_A_LARGE_WINDOW = """
import zstandard
from kvstore.codecs.zstd import ZstdCodec
from kvstore.errors import MissError

def mapped_bytes_max():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmPeak"))

# Magic, no content size, a window of 2**27 bytes, one last block: the letter a, 1,000 times.
frame = bytes.fromhex("28b52ffd" "00" "88") + (1000 << 3 | 3).to_bytes(3, "little") + b"a"
codec = ZstdCodec()
codec.decode(memoryview(zstandard.compress(b"b" * 1000)), memoryview(bytearray(1000)))
before = mapped_bytes_max()
try:
    codec.decode(memoryview(frame), memoryview(bytearray(1000)))
except MissError:
    pass
print(mapped_bytes_max() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_frame_that_claims_a_large_window_gets_no_memory_for_it():
    script = [sys.executable, "-c", CLAIM_A_LARGE_WINDOW]
    grown_bytes = int(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert grown_bytes < 16 << 20


def test_encoding_nothing_ends():
    # In a process of its own: a call that hangs in C cannot be interrupted.
    encode = "ZstdCodec().encode(memoryview(b''), memoryview(bytearray(9)))"
    script = f"from kvstore.codecs.zstd import ZstdCodec; {encode}"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=20)


def test_one_codec_serves_many_threads_at_once():
    codec = ZstdCodec()
    wrong = []
    together = threading.Barrier(4)

    def work(seed):
        data = bytes([seed]) * 5000 + bytes(range(100))
        together.wait()
        for _ in range(200):
            out = bytearray(len(data))
            codec.decode(memoryview(encoded(codec, data)), memoryview(out))
            if out != data:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_none_means_no_codec():
    assert parse_codec("none") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gzip",
        "ZSTD",
        "none:1",
        "zstd:",
        "zstd:x",
        "zstd:1.5",
        "zstd:-",
        "zstd:--1",
        "zstd: 1",
        "zstd:1:2",
        "lz4:1",
        "planes:1",
        "planes+",
        "planes+none",
        "planes+gzip",
        "planes+planes",
        "planes+planes+zstd",
        "planes+zstd:",
        "planes+lz4:1",
        "zstd+planes",
        "zstd+lz4",
        "planes2+zstd",
        "+zstd",
    ],
)
def test_an_unknown_codec_is_refused_with_those_that_are_known(text):
    with pytest.raises(MisconfiguredError, match=r"none, lz4, zstd\[:LEVEL\], planes\[\+CODEC\]"):
        parse_codec(text)


@pytest.mark.parametrize("level", [0, -1, 23, 10**9])
def test_a_level_out_of_range_is_refused_with_the_range(level):
    with pytest.raises(MisconfiguredError, match="from 1 to 22"):
        parse_codec(f"zstd:{level}")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "none",
        "zstd:1",
        "planes",
        "planes+zstd",
        "planes3+zstd",
        "planes2+none",
        "planes2+zstd:1",
        "x" * 64,
    ],
)
def test_a_header_that_names_an_unknown_codec_is_a_miss(name):
    with pytest.raises(MissError) as error:
        decoder(name)
    assert error.value.reason is MissReason.UNKNOWN_CODEC

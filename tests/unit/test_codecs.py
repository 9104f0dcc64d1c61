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
from kvstore.errors import MissError, MissReason

CODECS = ["lz4", "zstd", "zstd:1", "zstd:22"]
BARE = ["lz4", "zstd"]
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


@pytest.mark.parametrize("name", BARE)
@given(data=DATA, short=st.integers(0, 400))
def test_encoding_says_so_when_the_result_does_not_fit_and_never_writes_past_the_end(name, data, short):
    codec = parse_codec(name)
    whole = encoded(codec, data)
    memory, out = guarded(max(0, len(whole) - short))
    length = codec.encode(memoryview(data), out)
    assert (length is None) == (short > 0 and len(whole) > 0)
    assert length is None or out[:length] == whole
    assert_guards(memory)
    # A codec that just gave up is as good as ever.
    assert encoded(codec, data) == whole


@pytest.mark.parametrize("name", BARE)
@given(data=DATA, off=st.integers(-300, 300).filter(bool))
def test_data_of_another_length_is_a_miss_and_never_written_past_the_end(name, data, off):
    codec = parse_codec(name)
    stored = encoded(codec, data)
    memory, out = guarded(max(0, len(data) + off))
    if len(out) == len(data):
        return
    with pytest.raises(MissError) as error:
        codec.decode(memoryview(stored), out)
    assert error.value.reason is MissReason.BAD_ENCODING
    assert_guards(memory)


@pytest.mark.parametrize("name", BARE)
@given(stored=st.binary(max_size=60), length=st.integers(0, 60))
def test_random_data_raises_nothing_but_a_miss_and_is_never_written_past_the_end(name, stored, length):
    memory, out = guarded(length)
    with contextlib.suppress(MissError):
        parse_codec(name).decode(memoryview(stored), out)
    assert_guards(memory)


@pytest.mark.parametrize("name", BARE)
def test_damaged_data_harms_no_later_one(name):
    data = bytes(range(200)) * 2
    codec = parse_codec(name)
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


@pytest.mark.parametrize("name", BARE)
def test_data_cut_off_anywhere_is_a_miss(name):
    data = bytes(range(200)) * 2
    stored = encoded(parse_codec(name), data)
    for length in range(len(stored)):
        with pytest.raises(MissError):
            parse_codec(name).decode(memoryview(stored[:length]), memoryview(bytearray(len(data))))


@pytest.mark.parametrize("name", BARE)
def test_bytes_behind_the_data_are_a_miss(name):
    data = b"a" * 100
    stored = encoded(parse_codec(name), data)
    for rest in (b"\0", b"garbage", stored):
        with pytest.raises(MissError):
            parse_codec(name).decode(memoryview(stored + rest), memoryview(bytearray(100)))


def test_a_bomb_is_a_miss_before_it_goes_off():
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))
    memory, out = guarded(1000)
    with pytest.raises(MissError) as error:
        ZstdCodec().decode(memoryview(bomb), out)
    assert error.value.reason is MissReason.BAD_ENCODING
    assert_guards(memory)


def test_a_block_of_lz4_that_claims_much_is_a_miss():
    # One letter, then a match of about 2**24 bytes.
    bomb = b"\x1fa\x01\0" + b"\xff" * (1 << 16) + b"\0\x50bbbbb"
    memory, out = guarded(1000)
    with pytest.raises(MissError) as error:
        parse_codec("lz4").decode(memoryview(bomb), out)
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


@pytest.mark.parametrize("name", BARE)
def test_one_codec_serves_many_threads_at_once(name):
    codec = parse_codec(name)
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

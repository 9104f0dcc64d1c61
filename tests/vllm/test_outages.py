"""S3 goes and comes back, and clients leave, within one server's life: all others are answered right."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_kinds import late
from fault_proxy import FaultProxy
from vllm_buckets import EngineBucket
from vllm_engines import CHUNK_TOKENS, engine, some_prompt

from benchmarks.vllm_server import vllm_server

STORED, NEW = 60, 2
# Each is asked once: what is loaded can only come from the bucket.
PROMPTS = [some_prompt(CHUNK_TOKENS + 20, 300 + number) for number in range(STORED + NEW)]
# Each loads 8 blocks, of 19 that there are besides the one vLLM keeps; and one that takes 15.
LEAVING = [some_prompt(1100, 400 + number) for number in range(2)]
LARGE = some_prompt(1850, 500)
SERVER = ("--enforce-eager", "--dtype=float32", "--max-model-len=2048", "--num-gpu-blocks-override=20")
# A backend that is off is tried again every half a minute, at the latest.
BACK_WITHIN_S = 90.0


class Asking:
    """Asks a server one prompt after the other, and checks each answer."""

    def __init__(self, server, right):
        self._server = server
        self._left = list(zip(PROMPTS, right, strict=True))

    def ask(self, which=0):
        """`which`: 0 for one that the bucket holds, -1 for a new one."""
        prompt, answer = self._left.pop(which)
        assert self._server.complete(prompt) == answer

    def loaded_tokens(self):
        return self._server.counter("vllm:kvstore_tokens_from_backend")

    def ask_until_one_is_loaded(self):
        loaded, until_s = self.loaded_tokens(), time.monotonic() + BACK_WITHIN_S
        while self.loaded_tokens() == loaded:
            assert time.monotonic() < until_s
            self.ask()
            time.sleep(4)


@pytest.fixture(scope="module")
def right(model):
    """What the engine says without the connector."""
    with engine(model) as plain:
        return plain.generate([*PROMPTS, LARGE], tokens=8)


@pytest.fixture(scope="module")
def bucket(rgw, model):
    """A bucket that holds all prompts but the new ones and the large one."""
    bucket = EngineBucket(rgw, "outages")
    with pytest.MonkeyPatch.context() as patch:
        bucket.use_credentials(patch)
        with engine(model, bucket.config()) as filler:
            filler.generate([*PROMPTS[:STORED], *LEAVING], tokens=1)
            filler.settle()
        assert bucket.chunks() == STORED + 4 * len(LEAVING)
        yield bucket


@pytest.fixture(scope="module")
def s3(rgw):
    """What the server takes for S3: down at first."""
    with FaultProxy(rgw.endpoint_urls[0]) as s3:
        s3.refuse()
        yield s3


@pytest.fixture(scope="module")
def server(model, bucket, s3, right, tmp_path_factory):
    config = bucket.config(s3.url, KVSTORE_LOAD_TIMEOUT_S="3", KVSTORE_UPLOAD_TIMEOUT_S="5")
    with vllm_server(model, config, tmp_path_factory.mktemp("server") / "log", *SERVER) as server:
        yield server


@pytest.fixture(scope="module")
def asking(server, right):
    return Asking(server, right[:-1])


def test_p3_s3_goes_and_comes_back_within_a_servers_life(asking, s3, bucket):
    asking.ask()
    asking.ask(-1)
    assert asking.loaded_tokens() == 0

    s3.listen()
    asking.ask_until_one_is_loaded()

    # It goes while loads are under way.
    s3.latency_s = 1.0
    read = s3.requests["GET"]
    with ThreadPoolExecutor(3) as clients:
        under_way = [clients.submit(asking.ask) for _ in range(3)]
        s3.wait_until(lambda: s3.requests["GET"] > read)
        s3.refuse()
    for answer in under_way:
        answer.result()
    loaded = asking.loaded_tokens()
    for _ in range(3):
        asking.ask()
    assert asking.loaded_tokens() == loaded

    s3.heal()
    s3.listen()
    asking.ask_until_one_is_loaded()
    held = bucket.chunks()
    asking.ask(-1)
    bucket.wait_until_holds(held + 1)


def test_clients_that_leave_while_their_kv_is_loaded_leave_no_blocks_taken(asking, server, s3, right):
    # It may be down yet, if no test came before.
    s3.refuse()
    s3.listen()
    asking.ask_until_one_is_loaded()
    s3.inject(late(2.5), "GET")
    for prompt in LEAVING:
        read = s3.requests["GET"]
        client = server.begin(prompt)
        s3.wait_until(lambda read=read: s3.requests["GET"] > read)
        client.close()
    # There is no room for it beside what one of them had.
    assert server.complete(LARGE) == right[-1]
    s3.heal()
    asking.ask_until_one_is_loaded()

"""S3 goes and comes back within a server's life: requests are answered right all the while."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_proxy import FaultProxy
from vllm_buckets import EngineBucket
from vllm_engines import CHUNK_TOKENS, engine, some_prompt

from benchmarks.vllm_server import vllm_server

STORED, NEW = 30, 2
# Each is asked once: what is loaded can only come from the bucket.
PROMPTS = [some_prompt(CHUNK_TOKENS + 20, 300 + number) for number in range(STORED + NEW)]
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
        return plain.generate(PROMPTS, tokens=8)


@pytest.fixture
def bucket(rgw, model, monkeypatch):
    """A bucket that holds all prompts but the new ones."""
    bucket = EngineBucket(rgw, "outages")
    bucket.use_credentials(monkeypatch)
    with engine(model, bucket.config()) as filler:
        filler.generate(PROMPTS[:STORED], tokens=1)
        filler.settle()
    assert bucket.chunks() == STORED
    return bucket


def test_p3_s3_goes_and_comes_back_within_a_servers_life(model, rgw, bucket, right, tmp_path):
    with FaultProxy(rgw.endpoint_urls[0]) as s3, ThreadPoolExecutor(3) as clients:
        s3.refuse()
        config = bucket.config(s3.url, KVSTORE_LOAD_TIMEOUT_S="3", KVSTORE_UPLOAD_TIMEOUT_S="5")
        arguments = ("--enforce-eager", "--dtype", "float32")
        with vllm_server(model, config, tmp_path / "log", *arguments) as server:
            asking = Asking(server, right)
            asking.ask()
            asking.ask(-1)
            assert asking.loaded_tokens() == 0

            s3.listen()
            asking.ask_until_one_is_loaded()

            # It goes while loads are under way.
            s3.latency_s = 1.0
            read = s3.requests["GET"]
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

"""Two servers over HTTP that share one bucket on Ceph RGW, each at its own gateway."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from vllm_buckets import EngineBucket
from vllm_engines import CHUNK_TOKENS, engine, some_prompt

from benchmarks.vllm_server import vllm_server

REQUESTS = 20
SHARED = some_prompt(800, 77)
ANSWER_TOKENS = 8
# Of lengths that differ, and so does what is behind the shared part.
SHARING = [SHARED + some_prompt(40 + 30 * number, number) for number in range(REQUESTS)]
APART = [some_prompt(530, 200 + number) for number in range(6)]


def distinct_chunks(prompts, shared_tokens, answer_tokens=0):
    """Of prompts that begin with so many shared tokens, and of answers to them."""
    shared = shared_tokens // CHUNK_TOKENS
    return shared + sum((len(prompt) + answer_tokens) // CHUNK_TOKENS - shared for prompt in prompts)


@pytest.fixture(scope="module")
def right(model):
    """What the engine says without the connector."""
    with engine(model) as plain:
        return {
            name: plain.generate(prompts, ANSWER_TOKENS)
            for name, prompts in (("sharing", SHARING), ("apart", APART))
        }


@pytest.fixture(scope="module")
def bucket(rgw):
    return EngineBucket(rgw, "two-servers")


@pytest.fixture(scope="module")
def servers(model, rgw, bucket, right, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack, ThreadPoolExecutor(2) as starters, pytest.MonkeyPatch.context() as patch:
        bucket.use_credentials(patch)
        begun = [
            starters.submit(
                stack.enter_context,
                vllm_server(
                    model,
                    bucket.config(url),
                    folder / f"{core}.log",
                    *("--enforce-eager", "--dtype", "float32"),
                    cores=core,
                ),
            )
            for core, url in zip("01", rgw.endpoint_urls, strict=True)
        ]
        yield [server.result() for server in begun]


@pytest.fixture
def clients():
    with ThreadPoolExecutor(REQUESTS) as clients:
        yield clients


def from_backend(server):
    return server.counter("vllm:kvstore_tokens_from_backend")


def test_the_second_server_is_warm_from_the_first(servers, clients, bucket, right):
    first, second = servers
    before = bucket.chunks()
    assert list(clients.map(first.complete, SHARING)) == right["sharing"]
    # The last token of an answer has no KV.
    bucket.wait_until_holds(before + distinct_chunks(SHARING, len(SHARED), ANSWER_TOKENS - 1))
    loaded = from_backend(second)
    assert list(clients.map(second.complete, SHARING)) == right["sharing"]
    assert from_backend(second) - loaded >= distinct_chunks(SHARING, len(SHARED)) * CHUNK_TOKENS
    assert second.counter("vllm:kvstore_loads_failed") == 0
    # Both have their own prefix caches now; nothing of this is told apart.
    assert list(clients.map(first.complete, SHARING)) == right["sharing"]


def test_both_may_save_the_same_at_once(*, servers, clients, bucket, right, model, monkeypatch):
    before = bucket.chunks()
    answers = [clients.submit(server.complete, prompt) for prompt in APART for server in servers]
    assert [answer.result() for answer in answers[::2]] == right["apart"]
    assert [answer.result() for answer in answers[1::2]] == right["apart"]
    bucket.wait_until_holds(before + distinct_chunks(APART, 0))
    bucket.use_credentials(monkeypatch)
    with engine(model, bucket.config()) as third:
        assert third.generate(APART, ANSWER_TOKENS) == right["apart"]
        assert third.loaded_chunks == distinct_chunks(APART, 0)
        assert third.missed_chunks == 0

"""Two servers over HTTP that share one S3 bucket, under many requests at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import boto3
from moto_buckets import moto_bucket, moto_url  # noqa: F401 fixtures
from vllm_engines import some_prompt, transfer_config

from benchmarks.vllm_server import vllm_server

REQUESTS = 20
SHARED = some_prompt(800, 77)


def test_the_second_of_two_servers_is_warm_from_the_first(model, moto_url, moto_bucket, tmp_path):  # noqa: F811
    prompts = [SHARED + some_prompt(40 + 30 * number, number) for number in range(REQUESTS)]
    config = transfer_config(moto_bucket, KVSTORE_ENDPOINT_URL=moto_url, KVSTORE_REGION="us-east-1")
    with ExitStack() as stack, ThreadPoolExecutor(REQUESTS) as clients:
        arguments = ("--enforce-eager", "--dtype", "float32")
        begin = [
            clients.submit(
                stack.enter_context,
                vllm_server(model, config, tmp_path / f"{core}.log", *arguments, cores=core),
            )
            for core in ("0", "1")
        ]
        first, second = (server.result() for server in begin)
        answers = list(clients.map(first.complete, prompts))
        assert first.counter("vllm:kvstore_tokens_from_backend") == 0
        wait_until_uploaded(moto_bucket, moto_url, prompts)
        assert list(clients.map(second.complete, prompts)) == answers
        assert second.counter("vllm:kvstore_tokens_from_backend") >= len(SHARED) // 256 * 256
        assert second.counter("vllm:kvstore_loads_failed") == 0
        # Both have their own prefix caches now; nothing of this is told apart.
        assert list(clients.map(first.complete, prompts)) == answers


def wait_until_uploaded(bucket, url, prompts):
    """Return when the bucket holds the chunks of all prompts, and the document that names their namespace."""
    shared = len(SHARED) // 256
    distinct = 1 + shared + sum(len(prompt) // 256 - shared for prompt in prompts)
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    until_s = time.monotonic() + 60
    while client.list_objects_v2(Bucket=bucket)["KeyCount"] < distinct:
        assert time.monotonic() < until_s
        time.sleep(0.2)

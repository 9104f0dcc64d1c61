"""Two ranks, each with a shard of every chunk: both load it, or neither is used."""

from __future__ import annotations

import shutil

import pytest
from bucket_folders import chunk_files, flip_sections
from vllm_engines import CHUNK_TOKENS, transfer_config
from vllm_offline import run_offline

RANKS = 2
# Of the prompts.
CHUNKS = (2, 4, 1)


ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def run(model, prompts):
    """Has a fresh process of two ranks answer the prompts, with a bucket."""

    def run(bucket):
        return run_offline(
            model,
            prompts,
            environment=ENVIRONMENT,
            tokens=12,
            kv_transfer_config=transfer_config(bucket.as_uri()),
            enforce_eager=True,
            dtype="float32",
            tensor_parallel_size=RANKS,
        )

    return run


@pytest.fixture(scope="module")
def stored(run, answers, tmp_path_factory):
    """A bucket that a process filled, to be copied."""
    folder = tmp_path_factory.mktemp("stored") / "bucket"
    first = run(folder)
    assert tokens_of(first) == answers
    assert counted(first, "tokens_from_backend") == 0
    assert counted(first, "chunks_saved") == sum(CHUNKS)
    return folder


def test_a_fresh_process_loads_what_another_saved(run, stored, answers):
    second = run(stored)
    assert tokens_of(second) == answers
    assert counted(second, "tokens_from_backend") == sum(CHUNKS) * RANKS * CHUNK_TOKENS
    assert counted(second, "loads_failed") == 0


def test_both_ranks_recompute_what_one_cannot_load(run, stored, answers, tmp_path):
    folder = shutil.copytree(stored, tmp_path / "bucket")
    long, short = chains_of_the_second_rank(folder)
    long[1].unlink()
    # As if it had never been stored: an index that tells of it would have it offered, and missed.
    for log in list(folder.rglob("_log")):
        shutil.rmtree(log)
    flip_sections(short[1])
    damaged = run(folder)
    assert tokens_of(damaged) == answers
    # What one rank has not got is not offered to the other: one chunk is left of four.
    assert counted(damaged, "tokens_offered") == (2 + 1 + 1) * CHUNK_TOKENS
    # The damage is seen by one rank alone, and ends one load.
    assert counted(damaged, "loads_begun") == len(CHUNKS)
    assert counted(damaged, "loads_failed") == 1
    assert counted(damaged, "tokens_from_backend") == ((2 + 1 + 1) * RANKS - 1) * CHUNK_TOKENS
    # Both ranks save again what both have computed.
    assert counted(damaged, "chunks_saved") == 3 + 1
    assert long[1].exists()


def tokens_of(run):
    return [tuple(tokens) for tokens in run["tokens"]]


def counted(run, name):
    return run["counters"][f"vllm:kvstore_{name}"]


def chains_of_the_second_rank(folder):
    """Its files of the prompt of four chunks, and of that of two, in order."""
    seconds = {
        header.hash: (path, header) for path, header in chunk_files(folder).items() if header.shard.start
    }
    parents = {header.parent for _, header in seconds.values()}
    chains = {}
    for own, (_, header) in seconds.items():
        if own not in parents:
            chains[header.depth + 1] = chain_to(own, seconds)
    return chains[4], chains[2]


def chain_to(own, chunks):
    path, header = chunks[own]
    return [*(chain_to(header.parent, chunks) if header.depth else ()), path]

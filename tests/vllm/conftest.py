"""Fixtures of tests that run a real vLLM engine, in its own virtual environment: `make test-vllm`."""

from __future__ import annotations

import os

# Before vLLM is imported: it reads some of them then.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
from moody_backend import Mood, MoodyBackend
from real_servers import clean_environment, rgw
from tiny_llama import make_tiny_llama
from vllm_engines import engine, some_prompt

from kvstore.plan import FetchLimits

__all__ = ["clean_environment", "rgw"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def bucket(tmp_path):
    return (tmp_path / "bucket").as_uri()


PROMPTS = [some_prompt(700, 1), some_prompt(1100, 2), some_prompt(300, 3)]


@pytest.fixture(scope="session")
def prompts():
    return PROMPTS


@pytest.fixture(scope="session")
def answers(model):
    """What the engine says to PROMPTS without the connector."""
    with engine(model) as plain:
        return plain.generate(PROMPTS)


@pytest.fixture
def mood(monkeypatch):
    """How the backend behaves that all stores of this process share for a test, whatever their settings."""
    mood = Mood()
    for opener in ("kvstore.store.open_backend", "kvstore.finder.open_backend"):
        monkeypatch.setattr(opener, lambda settings: MoodyBackend(mood))
    return mood


@pytest.fixture
def layers_apart(monkeypatch):
    """Loads read each layer by itself, which at a real model's size they do."""
    monkeypatch.setattr("kvstore.assembly.FetchLimits", lambda: FetchLimits(first_bytes=1, worth_bytes=1))

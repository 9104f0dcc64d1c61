"""What an engine says of itself when it starts."""

from __future__ import annotations

import logging
import time

from vllm_engines import PATIENCE_S, engine, transfer_config

from kvstore.engine_adapters.vllm import connector
from kvstore.namespace import Namespace


def test_an_engine_says_which_namespace_is_its_own_and_writes_it_down(model, mood, caplog, monkeypatch):
    assert connector._start_log.name.startswith("vllm.")
    # The engine takes handlers from its own loggers when it starts.
    said = logging.getLogger("test.start")
    monkeypatch.setattr(connector, "_start_log", said)
    caplog.set_level(logging.INFO, logger=said.name)
    with engine(model, transfer_config("memory://")) as one:
        own = one.scheduler._namespaces.base
        until_s = time.monotonic() + PATIENCE_S
        while not (documents := [name for name in mood.objects if name.endswith("namespace.json")]):
            assert time.monotonic() < until_s
            time.sleep(0.01)
    assert documents == [f"kvstore/v1/{own.name}/namespace.json"]
    (stored,) = mood.objects.values()
    assert Namespace.from_document(bytes(stored.data)).document() == own.document()
    (line,) = [record.getMessage() for record in caplog.records if record.name == said.name]
    assert own.name in line
    assert own.summary in line
    assert f"kvstore doctor --namespace {own.name}" in line

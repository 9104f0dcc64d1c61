import pytest
from samples import PATIENCE_S, Gate, ScriptedBackend

from kvstore.errors import MisconfiguredError, RetryableError


def test_a_store_is_open_before_its_backend_has_answered(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("list", gate)
    store = opened(backend)
    gate.wait_arrivals()
    assert store.wait_connected(0) is False
    gate.open()
    assert store.wait_connected(PATIENCE_S) is True


@pytest.mark.parametrize("error", [MisconfiguredError("denied"), RetryableError("503"), OSError("a defect")])
def test_a_backend_out_of_reach_is_said_once_when_the_store_opens(opened, caplog, error):
    backend = ScriptedBackend()
    backend.when("list", error)
    backend.when("head", RetryableError("503"))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S) is False
    assert len(caplog.records) == 1
    assert "scripted://" in caplog.text


def test_waiting_for_a_store_that_closes_ends(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("list", gate)
    store = opened(backend)
    gate.wait_arrivals()
    store.close()
    assert store.wait_connected(PATIENCE_S) is False

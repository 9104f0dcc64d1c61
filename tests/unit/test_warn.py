import logging

import pytest

from kvstore.warn import INTERVAL_S, WarnRarely

LOG = logging.getLogger("kvstore.test_warn")


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_one_topic_is_said_once_an_interval_and_the_rest_is_counted(caplog, clock):
    warn = WarnRarely(LOG, clock=clock)
    for i in range(4):
        warn("topic", f"message {i}")
    clock.now += INTERVAL_S - 0.1
    warn("topic", "still quiet")
    clock.now += 0.1
    warn("topic", "again")
    clock.now += INTERVAL_S
    warn("topic", "once more")
    assert caplog.messages == ["message 0", "again (4 more like it since the last warning)", "once more"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_topics_do_not_silence_each_other(caplog, clock):
    warn = WarnRarely(LOG, clock=clock)
    warn("a", "first")
    warn("b", "second")
    assert caplog.messages == ["first", "second"]


def test_a_message_is_no_format_string(caplog, clock):
    WarnRarely(LOG, clock=clock)("topic", "100% of %s {0}")
    assert caplog.messages == ["100% of %s {0}"]

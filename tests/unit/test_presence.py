import pytest
from samples import chain_of

from kvstore import presence as presence_module
from kvstore.errors import MissReason
from kvstore.presence import ABSENT_TTL_S, DAMAGE, Presence

KEYS = chain_of(5).keys


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def presence(clock):
    return Presence(60.0, clock=clock)


def test_nothing_is_known_of_what_was_never_seen(presence):
    assert presence.get(KEYS[0]) is None
    assert not presence.is_damaged(KEYS[0])


def test_a_sighting_is_trusted_for_its_time(presence, clock):
    presence.note(KEYS[:2], present=True)
    clock.now += 59.9
    assert [presence.get(key) for key in KEYS[:3]] == [True, True, None]
    clock.now += 0.2
    assert presence.get(KEYS[0]) is None


def test_an_absence_is_trusted_for_a_moment_only(presence, clock):
    presence.note(KEYS[:1], present=False)
    clock.now += ABSENT_TTL_S - 0.1
    assert presence.get(KEYS[0]) is False
    clock.now += 0.2
    assert presence.get(KEYS[0]) is None


def test_what_was_seen_last_counts(presence):
    presence.note(KEYS[:1], present=True)
    presence.note_miss(KEYS[0], MissReason.ABSENT)
    assert presence.get(KEYS[0]) is False
    presence.note_stored(KEYS[0])
    assert presence.get(KEYS[0]) is True


@pytest.mark.parametrize("reason", sorted(set(MissReason) - DAMAGE - {MissReason.ABSENT}))
def test_a_miss_that_proves_nothing_changes_nothing(presence, reason):
    presence.note_stored(KEYS[0])
    presence.note_miss(KEYS[0], reason)
    assert presence.get(KEYS[0]) is True
    assert not presence.is_damaged(KEYS[0])


def test_an_object_this_version_cannot_read_is_no_damage():
    assert DAMAGE.isdisjoint({MissReason.BAD_VERSION, MissReason.UNKNOWN_CODEC, MissReason.CHANGED})


@pytest.mark.parametrize("reason", sorted(DAMAGE))
def test_damage_is_remembered_until_a_whole_object_is_stored(presence, clock, reason):
    presence.note_stored(KEYS[0])
    presence.note_miss(KEYS[0], reason)
    assert presence.get(KEYS[0]) is False
    clock.now += 10_000
    assert presence.is_damaged(KEYS[0])
    presence.note_stored(KEYS[0])
    assert not presence.is_damaged(KEYS[0])
    assert presence.get(KEYS[0]) is True


def test_what_is_absent_is_not_damaged(presence):
    presence.note_miss(KEYS[0], MissReason.ABSENT)
    assert not presence.is_damaged(KEYS[0])


def test_memory_is_bounded_and_the_oldest_sighting_is_forgotten_first(presence, monkeypatch):
    monkeypatch.setattr(presence_module, "ENTRIES_MAX", 3)
    presence.note(KEYS[:3], present=True)
    presence.note(KEYS[:1], present=True)
    presence.note(KEYS[3:4], present=True)
    assert [presence.get(key) for key in KEYS[:4]] == [True, None, True, True]
    for key in KEYS:
        presence.note_miss(key, MissReason.BAD_CHECKSUM)
    assert [presence.is_damaged(key) for key in KEYS] == [False, False, True, True, True]

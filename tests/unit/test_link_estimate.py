"""What reads say of a link; times are given, never measured."""

import random

import pytest

from kvstore.link_estimate import LATE_FACTOR, SAMPLES_MIN, WINDOW, LinkEstimate


def fed(latency_s, bytes_per_s, lengths, jitter=0.0, seed=1):
    source, link = random.Random(seed), LinkEstimate()
    for length in lengths:
        link.note(length, (latency_s + length / bytes_per_s) * (1 + source.uniform(-jitter, jitter)))
    return link


def test_nothing_is_known_before_enough_reads():
    link = fed(0.03, 9e7, [1 << 20] * (SAMPLES_MIN - 1))
    assert link.link_bytes is None
    assert link.late_s(1 << 20) is None


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_latency_and_bandwidth_are_told_apart_by_reads_of_different_lengths(jitter):
    link = fed(0.03, 9e7, [1 << 20, 2 << 20, 4 << 20, 8 << 20] * 16, jitter)
    assert link.link_bytes == pytest.approx(2.7e6, rel=0.5 if jitter else 0.01)


def test_reads_of_one_length_do_not_tell_latency_from_bandwidth_and_keep_what_others_told():
    assert fed(0.03, 9e7, [1 << 20] * 64).link_bytes is None
    link = fed(0.03, 9e7, [1 << 20, 4 << 20] * 32)
    for _ in range(2 * WINDOW):
        link.note(2 << 20, 0.03 + (2 << 20) / 9e7)
    assert link.link_bytes == pytest.approx(2.7e6, rel=0.01)


def test_late_is_what_95_in_100_are_not():
    source, link = random.Random(3), LinkEstimate()
    for number in range(WINDOW):
        slow = 4 if number % 40 == 0 else 1
        link.note(1 << 20, slow * source.uniform(0.09, 0.11))
    assert 0.1 < link.late_s(1 << 20) < 0.2
    assert link.late_s(2 << 20) > link.late_s(1 << 20)


def test_old_reads_are_forgotten():
    link = fed(1.0, 1e6, [1 << 20] * WINDOW)
    for _ in range(2 * WINDOW):
        link.note(1 << 20, 0.1)
    assert link.late_s(1 << 20) == pytest.approx(0.1 * LATE_FACTOR, rel=0.2)


def test_times_that_fall_with_length_give_no_negative_latency_or_bandwidth():
    link = LinkEstimate()
    for length in range(1, 3 * SAMPLES_MIN):
        link.note(length << 16, 1.0 / length)
    assert link.link_bytes is None
    assert link.late_s(1) >= 0


def test_empty_reads_do_not_matter():
    link = LinkEstimate()
    for _ in range(2 * SAMPLES_MIN):
        link.note(0, 0.01)
    assert link.link_bytes is None
    assert link.late_s(1) is None

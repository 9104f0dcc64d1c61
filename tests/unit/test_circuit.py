from kvstore.circuit import Circuit


def circuit() -> Circuit:
    return Circuit(failures_max=3, pause_min_s=1.0, pause_max_s=60.0)


def test_only_failures_in_a_row_switch_off():
    tried = circuit()
    for _ in range(10):
        assert not tried.failed(for_sure=False)
        assert not tried.failed(for_sure=False)
        tried.succeeded()
    assert not tried.off
    assert [tried.failed(for_sure=False) for _ in range(5)] == [False, False, True, False, False]
    assert tried.off


def test_a_failure_that_is_for_sure_switches_off_at_once():
    tried = circuit()
    assert tried.failed(for_sure=True)
    assert tried.off


def test_what_was_begun_before_does_not_switch_on():
    tried = circuit()
    tried.failed(for_sure=True)
    tried.succeeded()
    assert tried.off


def test_pauses_grow_up_to_a_limit_and_until_real_work_succeeds():
    tried = circuit()
    tried.failed(for_sure=True)
    assert [tried.next_pause_s() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    tried.probed()
    assert not tried.off
    tried.failed(for_sure=True)
    assert tried.next_pause_s() == 60
    tried.probed()
    tried.succeeded()
    tried.failed(for_sure=True)
    assert tried.next_pause_s() == 1

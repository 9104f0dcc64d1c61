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


def test_failures_must_go_on_for_a_while_where_that_is_asked_for():
    tried = Circuit(3, 1.0, 60.0, lasting_s=5.0)
    tried.succeeded(100.0)
    # Begun before the last success: what counts is since when nothing has succeeded.
    assert not any(tried.failed(began_s=90.0, now_s=104.9) for _ in range(64))
    assert tried.failed(began_s=104.9, now_s=105.0)


def test_failures_that_go_on_for_long_must_be_several():
    tried = Circuit(3, 1.0, 60.0, lasting_s=5.0)
    assert [tried.failed(began_s=0.0, now_s=now_s) for now_s in (50.0, 60.0, 70.0)] == [False, False, True]


def test_a_success_begins_the_while_anew():
    tried = Circuit(3, 1.0, 60.0, lasting_s=5.0)
    for second in range(100):
        assert not tried.failed(began_s=second, now_s=second)
        if second % 5 == 4:
            tried.succeeded(second)
    assert not tried.off


def test_what_was_begun_before_a_probe_and_fails_after_it_does_not_switch_off_at_once():
    tried = Circuit(3, 1.0, 60.0, lasting_s=5.0)
    assert [tried.failed(began_s=now_s, now_s=now_s) for now_s in (100.0, 102.0, 105.0)][-1]
    tried.probed(110.0)
    assert not any(tried.failed(began_s=104.0, now_s=114.9) for _ in range(64))
    assert tried.failed(began_s=104.0, now_s=115.0)

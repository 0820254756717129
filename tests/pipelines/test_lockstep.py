"""Laws of runs in turn."""

import threading
import time

import pytest

from foveal.pipelines.lockstep import in_turn


def runner(name, steps, log):
    def run(hand_on, waited):
        start = time.perf_counter()
        for step in range(steps):
            log.append((name, step))
            time.sleep(0.01)
            hand_on()
        return name, time.perf_counter() - start - waited()

    return run


def test_steps_alternate_and_results_keep_their_order():
    log = []
    results = in_turn([runner("a", 3, log), runner("b", 3, log), runner("c", 3, log)])
    assert log == [(name, step) for step in range(3) for name in "abc"]
    assert [name for name, _ in results] == ["a", "b", "c"]


def test_a_run_that_ends_early_drops_out():
    log = []
    in_turn([runner("a", 1, log), runner("b", 3, log), runner("c", 2, log)])
    assert [name for name, _ in log] == ["a", "b", "c", "b", "c", "b"]


def test_waiting_for_the_others_is_not_counted():
    log = []
    results = in_turn([runner("a", 4, log), runner("b", 4, log), runner("c", 4, log)])
    assert all(0.03 < seconds < 0.11 for _, seconds in results), results


def test_one_run_is_just_run():
    assert in_turn([runner("a", 2, [])])[0][0] == "a"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_first_error_ends_all(error):
    log, before = [], threading.active_count()

    def broken(hand_on, waited):
        hand_on()
        raise error("no")

    with pytest.raises(error):
        in_turn([runner("a", 100, log), broken, runner("c", 100, log)])
    assert len(log) < 10
    deadline = time.perf_counter() + 5
    while threading.active_count() > before and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before

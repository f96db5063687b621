"""A pool whose threads keep no process from ending, and whose waiters are never left waiting."""

import threading
import time
from concurrent.futures import wait

from pipeline.data.loading.thread_pool import ThreadPool


def test_what_has_not_begun_by_the_close_is_canceled_and_so_is_what_comes_after() -> None:
    begun, go_on = threading.Event(), threading.Event()
    pool = ThreadPool(1, "close")

    def work() -> int:
        begun.set()
        assert go_on.wait(120)
        return 3

    first, second = pool.submit(work), pool.submit(lambda: 4)
    assert begun.wait(120)
    pool.close()
    third = pool.submit(lambda: 5)
    assert not wait([second, third], 120).not_done, "who waits is told"
    assert (second.cancelled(), third.cancelled()) == (True, True)
    went = time.monotonic()
    pool.join(until=went)  # a stuck thread holds nobody up
    assert pool._threads[0].is_alive()
    go_on.set()
    assert first.result() == 3
    pool.join(until=time.monotonic() + 120)
    assert not pool._threads[0].is_alive()


def test_an_error_reaches_who_waits_and_the_thread_goes_on() -> None:
    pool = ThreadPool(1, "error")
    failed, after = pool.submit(lambda: 1 // 0), pool.submit(lambda: 2)
    assert isinstance(failed.exception(120), ZeroDivisionError)
    assert after.result(120) == 2
    pool.close()

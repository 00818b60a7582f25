"""Threads of one process that compute: one at a time, in turns."""

from __future__ import annotations

import threading
import time

from pangu_sigma.runtime import Turn


def test_turns_go_round_and_a_thread_may_take_its_own_again():
    turn, taken, inside = Turn(), [], []

    @turn
    def compute(name: str) -> None:
        with turn:
            inside.append(name)
            time.sleep(0.002)
            taken.append(name)
            assert inside == [name]
            inside.clear()

    def work(name: str) -> None:
        for _ in range(40):
            compute(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(taken) == ["a"] * 40 + ["b"] * 40
    assert sum(before != after for before, after in zip(taken, taken[1:], strict=False)) > 60

"""Timing several things so that they can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import ceil
from statistics import median
from typing import Any

_PAUSE = 0.005
"""Seconds after which the threads of an OpenMP or TBB pool that had its turn have stopped spinning."""
_MOST_CALLS = 50


def take_turns(forwards: Mapping[str, Callable[[], Any]], rounds: int, turn: float = 0.0) -> dict[str, list[float]]:
    """Seconds per call, one figure per round and candidate.

    In every round each candidate has a turn: after a pause one call that is not timed, which wakes its threads and fills the caches, then
    as many as fit in `turn` seconds, at least one and at most 50, whose median counts. The order rotates from round to round, so that
    what else the machine does meets all of them alike: compare their times round by round.
    """
    calls = {}
    for name, forward in forwards.items():
        forward()  # what is made once is made now
        calls[name] = max(1, min(_MOST_CALLS, ceil(turn / _seconds(forward))))
    times: dict[str, list[float]] = {name: [] for name in forwards}
    order = list(forwards)
    for _ in range(rounds):
        for name in order:
            time.sleep(_PAUSE)
            forwards[name]()
            times[name].append(median(_seconds(forwards[name]) for _ in range(calls[name])))
        order = [*order[1:], *order[:1]]
    return times


def _seconds(forward: Callable[[], Any]) -> float:
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start

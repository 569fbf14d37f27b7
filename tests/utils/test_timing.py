"""Taking turns: who is called when, and what of it counts."""

from horizon_plugin_pytorch.utils import timing


class Clock:
    """Time passes only while something is called."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", lambda seconds: self.calls.append("pause"))

    def forward(self, name, *seconds):
        """Takes `seconds` in turn, the last again and again."""
        left = list(seconds)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_the_order_rotates_and_a_turn_begins_with_a_call_that_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    # two calls to find out how many fit in a turn, then per turn one that does not count and one that does
    a = clock.forward("a", 9, 1, 9, 2, 9, 3)
    times = timing.take_turns({"a": a, "b": clock.forward("b", 5)}, rounds=2)
    assert times == {"a": [2, 3], "b": [5, 5]}
    assert clock.calls == [*"aabb", "pause", *"aa", "pause", *"bb", "pause", *"bb", "pause", *"aa"]


def test_a_turn_has_as_many_calls_as_fit_and_their_median_counts(monkeypatch):
    clock = Clock(monkeypatch)
    times = timing.take_turns({"a": clock.forward("a", 9, 1, 9, 1, 7, 2)}, rounds=1, turn=3)
    assert times == {"a": [2]}
    assert len(clock.calls) == 2 + 1 + 1 + 3


def test_no_turn_has_more_than_fifty_calls(monkeypatch):
    clock = Clock(monkeypatch)
    timing.take_turns({"a": clock.forward("a", 0.001)}, rounds=1, turn=1e6)
    assert clock.calls.count("a") == 2 + 1 + 50

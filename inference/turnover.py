"""How often answers end, and so when there may be room for one more. Knows no engine and no clock."""

import collections
import math

RECENT = 60.0  # seconds
LONGEST = 60  # seconds that an asker is told to wait, at most


class Turnover:
    """Watches steps and ends."""

    def __init__(self):
        self._ends: collections.deque[float] = collections.deque(maxlen=64)
        self._step, self._last_step = 0.0, 0.0  # seconds that a step takes, smoothed; when the last one was

    def stepped(self, now: float) -> None:
        """The engine made a step. Pauses without work are none."""
        if now - self._last_step < RECENT:
            self._step += 0.1 * (now - self._last_step - self._step)
        self._last_step = now

    def ended(self, now: float) -> None:
        """An answer ended."""
        self._ends.append(now)

    def wait(self, places: int, *, left: int, now: float) -> int:
        """Whole seconds till so many places are free: by how often answers ended of late, or else by the fewest tokens
        that one of those that run has `left`, a step each."""
        recent = [end for end in self._ends if now - end < RECENT]
        seconds = places * (now - recent[0]) / len(recent) if recent else left * self._step
        return min(LONGEST, max(1, math.ceil(seconds)))

"""SIGTERM and SIGINT as a question the loop can ask: the first is noted, the second ends the process at once."""

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether to stop, and why."""

    name: str | None = None  # of the signal


@contextlib.contextmanager
def noted() -> Iterator[Interruption]:
    """While inside, a signal is noted instead of obeyed. Only the main thread of a process can do this."""
    interruption = Interruption()

    def note(number, frame):
        interruption.name = signal.Signals(number).name
        os.write(
            2, f"\n{interruption.name}: saving as soon as this step is done; a second one quits at once\n".encode()
        )
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

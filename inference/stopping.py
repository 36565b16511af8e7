"""Text that ends before the stop string that is first complete, wherever tokens cut it. Knows no tokens."""

from collections.abc import Sequence


class UntilStop:
    """Lets text through as it comes, except what may yet turn out to be the beginning of a stop string.

    until = UntilStop(["END"])
    until.feed("the E")  -> "the "      until.feed("nd")  -> "End"      until.feed(". END, and")  -> ". "
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.found = tuple(stops), False
        self._held = ""

    def feed(self, text: str) -> str:
        """More text; -> what of it, and of what was held back, can be shown."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if ends:
            self.found, self._held = True, ""
            _, cut = min(ends)
            return text[:cut]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)

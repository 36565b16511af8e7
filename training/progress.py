"""What a run says while it runs: a bar on a terminal, aligned lines in a log. Knows no arrays and no files."""

import datetime
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from training.metrics import Record

BAR_SECONDS, LINE_SECONDS = 0.5, 5.0  # between two words of a bar, and between two lines of a log


class Progress:
    """Speaks of one run, from the step it starts at to its last."""

    def __init__(self, *, start: int, steps: int):
        self.steps, self._spoke, self._unsaid = steps, -math.inf, []
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=steps, bar_format="{desc} {bar:12}", dynamic_ncols=True, leave=False)

    def step(self, record: Record, seconds: float) -> None:
        """A step is done; what is said once in a while is of all steps since the last word."""
        self._unsaid.append({**record, "seconds": seconds})
        pause = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if record["step"] != self.steps and time.monotonic() < self._spoke + pause:
            return
        text = line(self._unsaid, self.steps)
        self._spoke, self._unsaid = time.monotonic(), []
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = record["step"]
            self._bar.refresh()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def line(records: list[Record], steps: int) -> str:
    """The last of some consecutive steps, with the speed of all of them.

    step  1200/50000  loss 2.3146  grad 0.412  lr 3.0e-04  84,120 tok/s  MFU 41.3 %  data-wait  0.1 %  left 4:02:10
    """
    last = records[-1]
    seconds = sum(_number(record["seconds"]) for record in records)
    total = {name: sum(_number(record[name]) for record in records) for name in ("tokens", "data_wait")}
    mfu = sum(_number(record["mfu"]) * _number(record["seconds"]) for record in records) / seconds
    left = datetime.timedelta(seconds=round((steps - _number(last["step"])) * seconds / len(records)))
    return (
        f"step {last['step']:>{len(str(steps))}}/{steps}  loss {_number(last['loss']):.4f}  "
        f"grad {_number(last['grad_norm']):.3f}  lr {_number(last['learning_rate']):.1e}  "
        f"{total['tokens'] / seconds:>7,.0f} tok/s  MFU {100 * mfu:4.1f} %  "
        f"data-wait {100 * total['data_wait'] / seconds:4.1f} %  left {left}"
    )


def _number(value: float | None) -> float:
    """None stands for a number that is not finite."""
    return math.nan if value is None else value

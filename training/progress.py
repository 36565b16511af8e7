"""What a run says while it runs: a bar on a terminal, aligned lines in a log. Knows no arrays and no files."""

import datetime
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from training.metrics import Record

BAR_SECONDS, LINE_SECONDS = 0.5, 5.0  # between two words of a bar, and between two lines of a log
ON_A_BAR = ("step", "loss", "tokens_per_second", "mfu", "left")  # what fits in 80 columns


class Progress:
    """Speaks of one run, from the step it starts at to its last."""

    def __init__(self, *, start: int, steps: int):
        self.steps, self._spoke, self._unsaid = steps, -math.inf, []
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=steps, bar_format="{desc} {bar:9}", dynamic_ncols=True, leave=False)

    def step(self, record: Record, seconds: float) -> None:
        """A step is done; what is said once in a while is of all steps since the last word."""
        self._unsaid.append({**record, "seconds": seconds})
        pause = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if record["step"] != self.steps and time.monotonic() < self._spoke + pause:
            return
        said = words(self._unsaid, self.steps)
        self._spoke, self._unsaid = time.monotonic(), []
        if self._bar is None:
            print("  ".join(said.values()), flush=True)
        else:
            self._bar.set_description_str("  ".join(said[name] for name in ON_A_BAR), refresh=False)
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


def words(records: list[Record], steps: int) -> dict[str, str]:
    """What to say of some consecutive steps: the values of the last one, the speed of them all. Joined:

    step  1200/50000  loss 2.3146  grad 0.412  lr 3.0e-04   84,120 tok/s  MFU 41.3 %  data-wait  0.1 %  left 4:02:10
    """
    last = {name: _number(value) for name, value in records[-1].items()}
    tokens, seconds, waited = (
        sum(_number(record[name]) for record in records) for name in ("tokens", "seconds", "data_wait")
    )
    mfu = sum(_number(record["mfu"]) * _number(record["seconds"]) for record in records) / seconds
    left = datetime.timedelta(seconds=round((steps - last["step"]) * seconds / len(records)))
    return {
        "step": f"step {last['step']:>{len(str(steps))}}/{steps}",
        "loss": f"loss {last['loss']:.4f}",
        "grad_norm": f"grad {last['grad_norm']:.3f}",
        "learning_rate": f"lr {last['learning_rate']:.1e}",
        "tokens_per_second": f"{tokens / seconds:>7,.0f} tok/s",
        "mfu": f"MFU {100 * mfu:4.1f} %",
        "data_wait": f"data-wait {100 * waited / seconds:4.1f} %",
        "left": f"left {left}",
    }


def _number(value: int | float | None) -> int | float:
    """None stands for a number that is not finite."""
    return math.nan if value is None else value

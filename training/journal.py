"""What a run tells, in its files and on its terminal; of several processes the first one's. Knows no arrays."""

import pathlib

from training.metrics import MetricsLog, Record
from training.progress import Progress


class Journal:
    """The metrics, the samples and the words of one run, from the step it starts at to its last."""

    def __init__(self, folder: pathlib.Path, *, start: int, steps: int):
        self._folder, self._steps = folder, steps
        self._log = MetricsLog(folder)
        self._progress = Progress(start=start, steps=steps)

    def step(self, record: Record, seconds: float) -> None:
        """A step is done."""
        self._log.write(record)
        self._progress.step(record, seconds)

    def evaluated(self, step: int, loss: float) -> None:
        """The loss of the validation text."""
        self._log.write({"step": step, "eval_loss": loss})
        self._progress.say(f"step {step}/{self._steps}  eval loss {loss:.4f}")

    def scored(self, step: int, bleu: float) -> None:
        """The score of the validation pairs."""
        self._log.write({"step": step, "eval_bleu": bleu})
        self._progress.say(f"step {step}/{self._steps}  eval BLEU {bleu:.2f}")

    def wrote(self, step: int, text: str) -> None:
        """What the model wrote."""
        with open(self._folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== step {step}\n{text}\n\n")

    def close(self) -> None:
        """Push everything out."""
        self._progress.close()
        self._log.close()

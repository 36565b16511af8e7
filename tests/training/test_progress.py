import io
import sys

from training import progress
from training.progress import Progress, words


def record(step, **changes):
    known = {
        "step": step,
        "loss": 2.5,
        "grad_norm": 0.5,
        "learning_rate": 3e-4,
        "tokens_per_second": 1.0,
        "mfu": 0.4,
        "data_wait": 0.01,
        "tokens": 1000,
    }
    return {**known, **changes}


def test_a_line_is_of_all_steps_since_the_last():
    done = [record(8, seconds=0.1, mfu=0.2), record(9, seconds=0.3, mfu=0.4, loss=2.25)]
    assert "  ".join(words(done, 1009).values()) == (
        "step    9/1009  loss 2.2500  grad 0.500  lr 3.0e-04    5,000 tok/s  MFU 35.0 %  data-wait  5.0 %  left 0:03:20"
    )


def test_a_loss_that_is_not_finite_is_said():
    assert "loss nan  grad nan" in "  ".join(words([record(1, seconds=1.0, loss=None, grad_norm=None)], 2).values())


def test_a_log_has_the_first_and_the_last_step_and_few_between(capsys, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.1 * next(now))  # a step takes 0.1 or 0.2 s
    speaker = Progress(start=0, steps=100)
    for step in range(1, 101):
        speaker.step(record(step), 0.1)
    speaker.say("a line of its own")
    speaker.close()
    out, err = capsys.readouterr()
    steps = [int(row.split("/")[0].removeprefix("step")) for row in out.splitlines()[:-1]]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert 3 <= len(steps) <= 6
    assert out.splitlines()[-1] == "a line of its own"
    assert err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_with_the_same_words(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    speaker = Progress(start=40, steps=100)
    speaker.step(record(41), 0.5)
    speaker.say("a line of its own")
    speaker.close()
    assert "step  41/100  loss 2.5000" in terminal.getvalue()
    assert "left 0:00:30" in terminal.getvalue()
    assert capsys.readouterr().out == "a line of its own\n"

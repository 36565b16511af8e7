"""`python -m evals digits` and `… speech`: their options, and what they do with them. Heavy imports come last."""

import argparse
import pathlib

from evals.verb import Verb

RUN = "a run's folder, as runs/digits"


def _add_digits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help=RUN)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="a picture of real digits beside drawn ones")
    parser.add_argument("--each", type=int, default=10, metavar="N", help="drawings of each digit; default 10")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X", help="of the drawings; default 0.7")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings; default 0")


def _add_speech(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help=RUN)


def _digits(asked: argparse.Namespace) -> int:
    """Pictures never seen: told apart, and drawn beside real ones."""
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    from evals import modalities

    subject = modalities.opened(asked.run, "digits")
    seen = modalities.tell_digits(subject)
    print(f"told apart: {seen} of the digits that are kept apart")
    drawings = modalities.draw_digits(subject, each=asked.each, temperature=asked.temperature, seed=asked.seed)
    print(f"drawn: {drawings}")
    if asked.out:
        modalities.plot(drawings, asked.out)
        print(asked.out)
    return 0


def _speech(asked: argparse.Namespace) -> int:
    """Clips never heard: told apart."""
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    from evals import modalities

    subject = modalities.opened(asked.run, "speech")
    print(f"told apart: {modalities.tell_speech(subject)} of the clips that are kept apart")
    return 0


DIGITS = Verb("pictures of digits: told apart and drawn", _add_digits, _digits)
SPEECH = Verb("spoken words: told apart", _add_speech, _speech)

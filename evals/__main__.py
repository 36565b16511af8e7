"""Judge a model.

    python -m evals digits RUN [--out FILE.png]     pictures never seen: told apart; digits: drawn, beside real ones
    python -m evals speech RUN                      clips never heard: told apart

Nothing heavy is imported before the command line is read.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the command line; exit status 2 after an error that the user can mend."""
    asked = _parser().parse_args(arguments)
    try:
        return {"digits": _digits, "speech": _speech}[asked.command](asked)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev -m evals … shows where
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="pictures of digits: told apart and drawn")
    digits.add_argument("--out", type=pathlib.Path, metavar="FILE", help="a picture of real digits beside drawn ones")
    digits.add_argument("--each", type=int, default=10, metavar="N", help="drawings of each digit; default 10")
    digits.add_argument("--temperature", type=float, default=0.7, metavar="X", help="of the drawings; default 0.7")
    digits.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings; default 0")
    speech = commands.add_parser("speech", help="spoken words: told apart")
    for command in (digits, speech):
        command.add_argument("run", metavar="RUN", type=pathlib.Path, help="a run's folder, as runs/digits")
    return parser


def _digits(asked: argparse.Namespace) -> int:
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
    from evals import modalities

    subject = modalities.opened(asked.run, "speech")
    print(f"told apart: {modalities.tell_speech(subject)} of the clips that are kept apart")
    return 0


if __name__ == "__main__":
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    sys.exit(main(sys.argv[1:]))

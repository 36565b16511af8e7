"""Judge a model: look at what it does, and measure it.

    python -m evals attention MODEL "TEXT" --out page.html                    every head's map, as a page and pictures
    python -m evals attention MODEL "TEXT" --out page.html --from it --to animal   and which heads tie two words
    python -m evals translation RUN --source FILE --reference FILE [--by-length]   BLEU and chrF of a run's translations
    python -m evals digits RUN [--out FILE.png]     pictures never seen: told apart; digits: drawn, beside real ones
    python -m evals speech RUN                      clips never heard: told apart

Nothing heavy is imported before the command line is understood.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from evals.attention_command import ATTENTION
from evals.modalities_command import DIGITS, SPEECH
from evals.translation_command import TRANSLATION

VERBS = {"attention": ATTENTION, "translation": TRANSLATION, "digits": DIGITS, "speech": SPEECH}


class Parser(argparse.ArgumentParser):
    """argparse whose every refusal is a ValueError, so that all errors look alike."""

    def error(self, message: str) -> NoReturn:
        """Refuse."""
        raise ValueError(f"{message} (--help shows all options)")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit status is 0 when done, 2 after an error that the user can mend."""
    try:
        asked = _parser().parse_args(arguments)
        return VERBS[asked.verb].run(asked)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev -m evals … shows where
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> Parser:
    kept = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="python -m evals", description=__doc__, allow_abbrev=False, formatter_class=kept)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for name, verb in VERBS.items():
        verb.add(verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False))
    return top


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

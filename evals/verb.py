"""A verb of `python -m evals`: a value. Knows no model."""

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Verb(NamedTuple):
    """Something to be asked."""

    help: str
    add: Callable[[argparse.ArgumentParser], None]  # its arguments
    run: Callable[[argparse.Namespace], int]  # -> exit status

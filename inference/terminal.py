"""A conversation at a terminal or through a pipe: lines in, words out as they come, and a few commands."""

import sys
from collections.abc import Callable
from typing import TextIO

from inference.conversation import Conversation

COMMANDS = "/reset forgets the conversation, /exit ends it; ctrl-C stops an answer"


def converse(
    conversation: Conversation, *, ask: Callable[[], str], out: TextIO = sys.stdout, err: TextIO = sys.stderr
) -> int:
    """Take turns till the lines end; -> exit status 2 where a turn was refused, else 0."""
    status = 0
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return status
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}", file=err)
            continue
        if line == "/exit":
            return status
        if line == "/reset":
            conversation.reset()
        elif is_command(line):
            print(f"there is no {line}; {COMMANDS}", file=err)
        elif line:
            status = max(status, turn(conversation, line, out, err))


def is_command(line: str) -> bool:
    """Whether a line is one word after a slash: a path or a fraction in a sentence is not."""
    return line.startswith("/") and line[1:].isalpha()


def turn(conversation: Conversation, line: str, out: TextIO, err: TextIO) -> int:
    """One answer, written as it comes; an interruption or a refusal ends it, not the conversation."""
    try:
        for piece in conversation.say(line):
            out.write(piece)
            out.flush()
    except KeyboardInterrupt:
        print(" …", file=err)
    except ValueError as error:
        print(f"error: {error}; /reset begins a new conversation", file=err)
        return 2
    finally:
        out.write("\n")
        out.flush()
    return 0

"""A conversation at a terminal or through a pipe: lines in, words out as they come, and a few commands."""

import sys
from collections.abc import Callable

from inference.conversation import Conversation

COMMANDS = "/reset forgets the conversation, /exit ends it; ctrl-C stops an answer"


def converse(conversation: Conversation, *, ask: Callable[[], str]) -> int:
    """Take turns till the lines end; -> exit status 2 where a turn was refused, else 0."""
    status = 0
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return status
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}", file=sys.stderr)
            continue
        if line == "/exit":
            return status
        if line == "/reset":
            conversation.reset()
        elif is_command(line):
            print(f"there is no {line}; {COMMANDS}", file=sys.stderr)
        elif line:
            status = max(status, turn(conversation, line))


def is_command(line: str) -> bool:
    """Whether a line is one word after a slash: a path or a fraction in a sentence is not."""
    return line.startswith("/") and line[1:].isalpha()


def turn(conversation: Conversation, line: str) -> int:
    """One answer, written as it comes; an interruption or a refusal ends it, not the conversation."""
    try:
        for piece in conversation.say(line):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(" …", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}; /reset begins a new conversation", file=sys.stderr)
        return 2
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return 0

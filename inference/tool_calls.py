"""Calls of tools in what a model says. Knows no template and no HTTP.

Three ways of saying are told apart: <tool_call>{…}</tool_call>, as Hermes and Qwen do, JSON with a known name alone, as
Llama does, and a list of such, as Mistral does. What is no call is content.
"""

import json
import re
import secrets
from collections.abc import Collection
from typing import Any, NamedTuple

from data.chat import ToolCall
from inference import constraint
from inference.constraint import Grammar
from inference.stopping import UntilStop

BEGIN, END = "<tool_call>", "</tool_call>"
CALLS = re.compile(rf"{BEGIN}\s*(.*?)\s*(?:{END}|\Z)", re.DOTALL)


class Said(NamedTuple):
    """The end of a turn."""

    content: str  # that was not shown yet
    calls: list[ToolCall]


class ToolReader:
    """Lets content through as it comes, and keeps what may be a call till the turn ends."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._text, self._num_fed, self._num_shown = "", 0, 0
        self._until = UntilStop([BEGIN])

    def feed(self, text: str) -> str:
        """More of the turn; -> what of it is surely content."""
        self._text += text
        if self._text.lstrip()[:1] in ("", "{", "["):  # perhaps JSON
            return ""
        shown = self._until.feed(self._text[self._num_fed :])
        self._num_fed = len(self._text)
        self._num_shown += len(shown)
        return shown

    def finish(self) -> Said:
        """The turn has ended."""
        calls = said_calls(self._text, self._names)
        if not calls:
            return Said(self._text[self._num_shown :], [])
        begin = self._text.find(BEGIN)
        return Said(self._text[self._num_shown : max(begin, self._num_shown)].rstrip() if begin >= 0 else "", calls)


def said_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """The calls in a whole turn; none where any of them is not as it should be."""
    try:
        if BEGIN in text:
            return [call(json.loads(found)) for found in CALLS.findall(text)]
        said = json.loads(text.strip().removeprefix("[TOOL_CALLS]"))
        calls = [call(item) for item in (said if isinstance(said, list) else [said])]
    except (ValueError, RecursionError):
        return []
    return calls if all(found.name in names for found in calls) else []


def call(said: Any) -> ToolCall:
    """One call, with an id of its own; ValueError where it is none."""
    match said:
        case {"name": str(name), "arguments": dict(arguments)} | {"name": str(name), "parameters": dict(arguments)}:
            return ToolCall(name, arguments, f"call_{secrets.token_hex(12)}")
        case _:
            raise ValueError("no call of a tool")


def required_call(tools: dict[str, dict[str, Any]], *, is_tagged: bool) -> Grammar:
    """The form of a turn that calls one of the tools (name -> schema of its parameters)."""
    schema: dict[str, Any] = {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, parameters in tools.items()
        ]
    }
    if not is_tagged:
        return constraint.json_schema(schema)
    return constraint.lark(f'start: "{BEGIN}\\n" call "\\n{END}"\ncall: %json {json.dumps(schema)}\n')

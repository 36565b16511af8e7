"""A conversation as one text and as tokens, by a model's own Jinja template. Knows no model and no cache.

Templates come with downloaded weights, so they run in Jinja's sandbox. What people write stays text: a control token
spelled out in a message is broken by a mark before the template sees it, and encoded as the letters it is made of.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data.huggingface_tokenizer import HuggingFaceTokenizer

MARKS = [chr(point) for point in range(0xFDD0, 0xFDF0)]  # Unicode's noncharacters: no text means anything by them


class ToolCall(NamedTuple):
    """A function that the assistant wanted called."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


class Message(NamedTuple):
    """One turn."""

    role: str  # system, user, assistant, tool
    content: str
    calls: tuple[ToolCall, ...] = ()  # of an assistant's turn
    call_id: str = ""  # of a tool's turn: which call it answers
    name: str = ""  # who speaks, or which tool answers

    def told(self) -> dict[str, Any]:
        """What templates read of it."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
        ]
        more = {"tool_calls": calls, "tool_call_id": self.call_id, "name": self.name}
        return {"role": self.role, "content": self.content, **{key: value for key, value in more.items() if value}}


class ChatTemplate(NamedTuple):
    """How a model wants a conversation written."""

    source: str  # Jinja
    bos_token: str = ""
    eos_token: str = ""
    controls: dict[str, int] = {}  # control tokens and their ids


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    mark: str  # stands inside every control token that a message spelled out

    @property
    def is_plain(self) -> bool:
        """Whether every control token in the text is the template's."""
        return self.mark not in self.text

    def pieces(self, controls: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """The text cut into control tokens (True) and all between them (False), marks taken out.

        Rendered("<s>say <_/s></s>", "_").pieces(["<s>", "</s>"]) -> ("<s>", True), ("say </s>", False), ("</s>", True)
        """
        for position, piece in enumerate(re.split(f"({pattern(controls)})", self.text)):
            if piece:
                yield piece.replace(self.mark, ""), position % 2 == 1


def pattern(controls: Iterable[str]) -> str:
    """Regular expression of any control token, the longest first; of nothing where there is none."""
    return "|".join(re.escape(control) for control in sorted(controls, key=len, reverse=True)) or r"(?!)"


def template_of(tokenizer: HuggingFaceTokenizer) -> ChatTemplate | None:
    """The template that a tokenizer carries, or None."""
    if tokenizer.chat_template is None:
        return None
    bos, eos = (
        "" if id_ is None else tokenizer.tokenizer.id_to_token(id_) or ""
        for id_ in (tokenizer.bos_id, tokenizer.eos_id)
    )
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    return ChatTemplate(tokenizer.chat_template, bos, eos, {t.content: id_ for id_, t in added.items() if t.special})


def encode(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: HuggingFaceTokenizer,
    *,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Tokens of the conversation up to where the assistant answers; only the template can write control tokens."""
    rendered = render(template, messages, tools=tools)
    if rendered.is_plain:
        return tokenizer.encode(rendered.text)
    ids = []
    for piece, is_control in rendered.pieces(template.controls):
        ids += [template.controls[piece]] if is_control else encode_letters(piece, tokenizer)
    return ids


def encode_letters(text: str, tokenizer: HuggingFaceTokenizer) -> list[int]:
    """Tokens of a text in which control tokens mean nothing."""
    return tokenizer.letters.encode(text, add_special_tokens=False).ids


def takes_tools(template: ChatTemplate) -> bool:
    """Whether the template has a place for tools."""
    import jinja2.meta

    environment = compiled(template.source).environment
    return "tools" in jinja2.meta.find_undeclared_variables(environment.parse(template.source))


def render(template: ChatTemplate, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = ()) -> Rendered:
    """The conversation, with what begins the assistant's answer. Raises ValueError where the template refuses it."""
    import jinja2

    turns, described = [message.told() for message in messages], list(tools)
    written = json.dumps([turns, described], ensure_ascii=False)
    mark = next((mark for mark in MARKS if mark not in written), None)
    if mark is None:
        raise ValueError(f"the messages hold all {len(MARKS)} noncharacters U+FDD0…U+FDEF; leave one out")
    turns, described = broken_inside([turns, described], template.controls, mark)
    try:
        text = compiled(template.source).render(
            messages=turns, add_generation_prompt=True, bos_token=template.bos_token, eos_token=template.eos_token,
            tools=described or None, documents=None,
        )  # fmt: skip
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(f"the model's chat template does not take this conversation ({roles}): {error}") from error
    return Rendered(text, mark)


def broken(content: str, controls: Iterable[str], mark: str) -> str:
    """The content with the mark after the first character of every control token in it."""
    return re.sub(pattern(controls), lambda found: found[0][0] + mark + found[0][1:], content)


def broken_inside(value: Any, controls: Iterable[str], mark: str) -> Any:
    """The same for every text in lists and dictionaries, keys too."""
    match value:
        case str():
            return broken(value, controls, mark)
        case list():
            return [broken_inside(item, controls, mark) for item in value]
        case dict():
            return {broken(key, controls, mark): broken_inside(item, controls, mark) for key, item in value.items()}
        case _:
            return value


@functools.lru_cache(8)
def compiled(source: str) -> Any:
    """The template, ready to render, with what templates on Hugging Face rely on."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is its content."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the model's chat template is not valid Jinja: line {error.lineno}: {error}") from error

"""POST /v1/chat/completions: turns answered. From the wire to a plan, from pieces to the wire. Knows no HTTP server."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from data import chat
from data.chat import ChatTemplate, Message, ToolCall
from data.tokenizer import HuggingFaceTokenizer
from inference import asking, constraint
from inference.asking import Plan, Served
from inference.config import ServerConfig
from inference.constraint import Grammar
from inference.generate import Answer
from inference.openai_api import ApiError, AskedChat, ChatMessage, Tool, ToolChoice
from inference.pieces import Gathered, Told, pieces, usage
from inference.service import Stream
from inference.spelling import Spelling
from inference.tool_calls import BEGIN, ToolReader, required_call


def plan(asked: AskedChat, served: Served, config: ServerConfig, *, salt: str, capacity: int) -> Plan:
    """What the engine has to do."""
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    count = asked.n or 1
    asking.check_count(asked, 1, count, config=config, capacity=capacity)
    tokenizer, template = template_of(served)
    tools = offered(asked, template)
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    try:
        tokens = chat.encode(template, [message(turn) for turn in asked.messages], tokenizer, tools=described)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    prompt, given = tuple(tokens), asked.max_completion_tokens or asked.max_tokens
    max_tokens = asking.budget(given, prompt, served, param="max_completion_tokens", config=config)
    forms = (asking.form_of(asked), response_form(asked), call_form(asked, template))
    form = asking.only([form for form in forms if form is not None])
    requests = asking.requests(
        asked, prompt, served, count=count, max_tokens=max_tokens, salt=salt, form=form,
        num_top=(asked.top_logprobs or 0) if asked.logprobs else 0,
    )  # fmt: skip
    return Plan([prompt], requests, asking.stops(asked))


def template_of(served: Served) -> tuple[HuggingFaceTokenizer, ChatTemplate]:
    """How the model wants conversations."""
    if served.template is None or not isinstance(served.tokenizer, HuggingFaceTokenizer):
        raise ApiError(
            400, "this model has no chat template, so it was not taught to converse; ask /v1/completions",
            param="model", code="no_chat_template",
        )  # fmt: skip
    return served.tokenizer, served.template


def message(turn: ChatMessage) -> Message:
    """A turn as templates know it."""
    content = turn.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or [])
    calls = tuple(
        ToolCall(call.function.name, arguments(call.function.arguments), call.id or "")
        for call in turn.tool_calls or []
    )
    role = "system" if turn.role == "developer" else turn.role
    return Message(role, text, calls, turn.tool_call_id or "", turn.name or "")


def arguments(text: str) -> dict[str, Any]:
    """What a function was called with."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"arguments of a tool call are no JSON: {error}", param="messages") from None
    if not isinstance(found, dict):
        raise ApiError(400, "arguments of a tool call are no JSON object", param="messages")
    return found


def offered(asked: AskedChat, template: ChatTemplate) -> list[Tool]:
    """The tools that the model is shown."""
    wants_call = asked.tool_choice is not None and asked.tool_choice not in ("none", "auto")
    if wants_call and not asked.tools:
        raise ApiError(400, "tool_choice asks for a tool, but tools has none", param="tool_choice")
    if not asked.tools or asked.tool_choice == "none":
        return []
    if not chat.takes_tools(template):
        raise ApiError(400, "this model's chat template has no place for tools; leave tools out", param="tools")
    return asked.tools


def response_form(asked: AskedChat) -> Grammar | None:
    """The form that response_format asks for."""
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return constraint.json_object()
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(400, "response_format json_schema needs json_schema.schema", param="response_format")
    return constraint.json_schema(wanted.json_schema.schema_)


def call_form(asked: AskedChat, template: ChatTemplate) -> Grammar | None:
    """The form of a call, where tool_choice asks for one."""
    choice, functions = asked.tool_choice, [tool.function for tool in asked.tools or []]
    tools = {function.name: function.parameters or {} for function in functions}
    if isinstance(choice, ToolChoice):
        name = choice.function.name
        if name not in tools:
            raise ApiError(400, f"tool_choice names {name!r}, which is not among tools", param="tool_choice")
        tools = {name: tools[name]}
    elif choice != "required":
        return None
    return required_call(tools, is_tagged=BEGIN in template.source)


class Turns:
    """The wire form of one request's answers."""

    def __init__(self, asked: AskedChat, plan: Plan, served: Served, *, id: str):
        self._asked, self._plan, self._served = asked, plan, served
        self._told = {"id": id, "created": int(time.time()), "model": served.name}
        wants_tools = bool(asked.tools) and asked.tool_choice != "none"
        names = {tool.function.name for tool in asked.tools or []}
        self._readers = [ToolReader(names) if wants_tools else None for _ in plan.requests]

    async def whole(self, stream: Stream, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answers when all have ended."""
        gathered = await Gathered(answers).read(stream, self._plan)
        choices = [self._choice(index, gathered) for index in range(len(answers))]
        return {
            **self._told, "object": "chat.completion", "choices": choices, "usage": usage(self._plan, answers),
        }  # fmt: skip

    def _choice(self, index: int, gathered: Gathered) -> dict[str, Any]:
        text, finish, reader = gathered.answers[index].text, gathered.finish[index], self._readers[index]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reader is not None:
            shown = reader.feed(text)
            said = reader.finish()
            message["content"] = shown + said.content
            if said.calls:
                finish = "tool_calls"
                message["content"] = message["content"].strip() or None
                message["tool_calls"] = [wire_call(call) for call in said.calls]
        return {
            "index": index, "message": message, "logprobs": self._logprobs(gathered.told[index]),
            "finish_reason": finish,
        }  # fmt: skip

    async def chunks(self, stream: Stream, answers: Sequence[Answer]) -> AsyncIterator[dict[str, Any]]:
        """The answers as they come. Calls of tools come whole, at the end."""
        for index in range(len(answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for piece in pieces(stream, self._plan, answers):
            text, finish, calls, reader = piece.text, piece.finish, [], self._readers[piece.index]
            if reader is not None:
                text = reader.feed(text)
                if finish:
                    said = reader.finish()
                    text, calls = text + said.content, said.calls
                    finish = "tool_calls" if calls else finish
            logprobs = self._logprobs(piece.told)
            if text or logprobs:
                yield self._chunk(piece.index, {"content": text} if text else {}, logprobs)
            for place, call in enumerate(calls):
                yield self._chunk(piece.index, {"tool_calls": [{"index": place, **wire_call(call)}]})
            if finish:
                yield self._chunk(piece.index, {}, finish=finish)
        if self._asked.stream_options and self._asked.stream_options.include_usage:
            yield {**self._told, "object": "chat.completion.chunk", "choices": [], "usage": usage(self._plan, answers)}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, *, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._told, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        if not self._asked.logprobs or not told:
            return None
        return {"content": [listed(each, self._served.spelling) for each in told], "refusal": None}


def listed(told: Told, spelling: Spelling) -> dict[str, Any]:
    """A token with its log-probability and the likeliest ones at its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text(token), "logprob": logprob, "bytes": spelling.bytes(token)}

    return {**entry(told.token, told.logprob), "top_logprobs": [entry(*each) for each in told.top]}


def wire_call(call: ToolCall) -> dict[str, Any]:
    """A call as it travels: its arguments are JSON in a text."""
    told = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": told}}

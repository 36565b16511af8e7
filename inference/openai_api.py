"""The records of OpenAI's API as they travel: what may be asked, what is answered, and errors. Knows no model.

Requests are strict: a number is no text, and a field that nobody knows is refused rather than ignored. Beside OpenAI's
own fields stand those that vLLM added: top_k, min_p, repetition_penalty, structured_outputs, guided_*, cache_salt,
priority, ignore_eos.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]
Word = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Schema = dict[str, Any]


class ApiError(HTTPException):
    """A refusal, as OpenAI's API words it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        return error_body(self.status_code, self.detail, param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as the official clients read it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = " ".join(message.encode("utf-8", "replace").decode().split())
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Asked(BaseModel):
    """Something that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Asked):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Asked):
    """A form that the answer has to follow; exactly one of them."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: Word | None = None
    choice: Annotated[list[Word], Field(min_length=1, max_length=1000)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    json_object: bool | None = None


class AskedText(Asked):
    """What both kinds of completion have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=300),
        ]
        | None
    ) = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**24)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Word | None = None
    guided_choice: Annotated[list[Word], Field(min_length=1, max_length=1000)] | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=0, le=10**6)] | None = 0
    ignore_eos: bool | None = False


class AskedCompletion(AskedText):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None


class TextPart(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Asked):
    """A function and what it was called with."""

    name: Name
    arguments: str


class AskedToolCall(Asked):
    """A call that the assistant made in an earlier turn."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Asked):
    """A turn. Fields that only ever come back empty from an answer may be sent empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[AskedToolCall] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Function(Asked):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Asked):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class FunctionName(Asked):
    """Which function."""

    name: Name


class ToolChoice(Asked):
    """The function that has to be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Asked):
    """A JSON schema with a name."""

    name: Name
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Asked):
    """Free text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class AskedChat(AskedText):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class AskedEmbedding(Asked):
    """POST /v1/embeddings."""

    model: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None
    user: str | None = None


class Usage(BaseModel):
    """Tokens that an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnsweredMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One turn."""

    index: int
    message: AnsweredMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "meshlight"
    max_model_len: int  # tokens of a prompt and its answer


class Models(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Embedding(BaseModel):
    """A text's vector; as base64, of its little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Trouble(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: Trouble

"""A conversation with a model: the turns so far, and one more. Knows no terminal."""

from collections.abc import Iterator

from data import chat
from data.chat import ChatTemplate, Message
from data.tokenizer import HuggingFaceTokenizer, Tokenizer
from inference.config import GenerationConfig
from inference.engine import Engine
from inference.generate import Answer, check_room, generate


class Conversation:
    """Turns of a person and a model. Each turn reads only what is new: the engine's cache holds the rest."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: HuggingFaceTokenizer,
        template: ChatTemplate,
        config: GenerationConfig,
        *,
        system: str | None = None,
    ):
        self.engine, self.tokenizer, self.template, self.config = engine, tokenizer, template, config
        self._beginning = [] if system is None else [Message("system", system)]
        self.messages = list(self._beginning)

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.messages = list(self._beginning)

    def say(self, text: str) -> Iterator[str]:
        """Take the person's turn; -> the model's, as it comes. What was said before an interruption is kept.

        Raises ValueError, and forgets the turn, where the conversation no longer fits the context.
        """
        asked = [*self.messages, Message("user", text)]
        tokens = chat.encode(self.template, asked, self.tokenizer)
        answer = Answer(check_room(tokens, max_length=self.engine.max_length), self.tokenizer, self.config.stop)
        try:
            for (piece,) in generate(self.engine, self.tokenizer, [answer], self.config):
                yield piece
        finally:
            self.messages = [*asked, Message("assistant", answer.text)]


def required_template(tokenizer: Tokenizer) -> tuple[HuggingFaceTokenizer, ChatTemplate]:
    """The tokenizer, and the template it carries; ValueError where there is none."""
    template = chat.template_of(tokenizer) if isinstance(tokenizer, HuggingFaceTokenizer) else None
    if template is None or not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            "this model has no chat template, so it was not taught to converse; use `infer.py generate`, "
            "or put its chat_template.jinja beside its tokenizer"
        )
    return tokenizer, template

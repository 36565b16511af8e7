"""Turns follow the template, cost only what is new, and survive interruptions."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer import ByteTokenizer
from inference.config import GenerationConfig, SamplingConfig
from inference.conversation import Conversation, required_template
from inference.terminal import converse
from tests.inference.small import LLAMA, V, engine

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def letters() -> HuggingFaceTokenizer:
    """96 tokens: the first of the byte alphabet, which no merge joins."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:V])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(tokenizer=tokenizer, chat_template=TEMPLATE)


def conversation(system=None, max_tokens=8) -> Conversation:
    config = GenerationConfig(sampling=SamplingConfig(temperature=0.0), max_tokens=max_tokens)
    return Conversation(engine(LLAMA), *required_template(letters()), config, system=system)


def test_a_turn_reads_only_what_is_new():
    mine = conversation(system="be")
    first = "".join(mine.say("Hi"))
    assert len(first) == 8
    assert [message[:2] for message in mine.messages] == [("system", "be"), ("user", "Hi"), ("assistant", first)]
    assert mine.engine.stats().cached_tokens == 0
    second = "".join(mine.say("Ho"))
    assert mine.engine.stats().cached_tokens == 16  # of "[s]be[u]Hi[a]" and the answer: two whole blocks
    fresh = conversation(system="be")
    fresh.messages = mine.messages[:3]
    assert "".join(fresh.say("Ho")) == second


def test_a_reset_leaves_the_system_message():
    mine = conversation(system="be")
    first = "".join(mine.say("Hi"))
    mine.reset()
    assert "".join(mine.say("Hi")) == first


def test_a_conversation_that_outgrows_the_context_is_refused_and_kept():
    mine = conversation()
    "".join(mine.say("Hi"))
    before = list(mine.messages)
    with pytest.raises(ValueError, match="the prompt is 322 tokens long but the model's context is 256"):
        "".join(mine.say("x" * 300))
    assert mine.messages == before
    assert len("".join(mine.say("Ho"))) == 8


def test_a_model_without_a_template_cannot_converse():
    with pytest.raises(ValueError, match="no chat template"):
        required_template(ByteTokenizer())


def talk(mine: Conversation, capsys, *lines) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of a conversation through a pipe; an exception among the lines is raised."""
    rest = iter(lines)

    def ask() -> str:
        line = next(rest, EOFError())
        if not isinstance(line, str):
            raise line
        return line

    return converse(mine, ask=ask), *capsys.readouterr()


def test_lines_are_turns_and_commands(capsys):
    expected = conversation()
    turns = ["".join(expected.say(text)) for text in ("Hi", "a/b")]
    status, out, err = talk(conversation(), capsys, "Hi", "", "a/b", "/help", "/reset", "Hi", "/exit", "never")
    assert status == 0
    assert out == f"{turns[0]}\n{turns[1]}\n{turns[0]}\n"
    assert err.startswith("there is no /help; /reset forgets")


def test_a_refused_turn_does_not_end_the_conversation(capsys):
    status, out, err = talk(conversation(), capsys, "x" * 300, "Hi")
    assert status == 2
    assert err.startswith("error: the prompt is 306 tokens long")
    assert out == "\n" + "".join(conversation().say("Hi")) + "\n"


def test_an_interruption_ends_the_answer_and_keeps_what_was_said(monkeypatch, capsys):
    mine = conversation(max_tokens=60)
    whole = "".join(conversation(max_tokens=60).say("Hi"))
    say = mine.say

    def interrupted(text):
        for piece in say(text):
            yield piece
            if text == "Hi":
                raise KeyboardInterrupt

    monkeypatch.setattr(mine, "say", interrupted)
    status, out, err = talk(mine, capsys, "Hi", KeyboardInterrupt(), "Ho", "/exit")
    assert status == 0
    first, second, _ = out.split("\n")
    assert first == mine.messages[1].content
    assert whole.startswith(first)
    assert len(first) < 60
    assert second == mine.messages[3].content
    assert " …" in err
    assert "/exit ends it" in err

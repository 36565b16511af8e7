"""Text comes as it is certain, ends where it should, and does not depend on how many answers are made at once."""

import pytest

from data.tokenizer import ByteTokenizer, CharTokenizer
from inference.config import GenerationConfig, SamplingConfig
from inference.generate import Answer, check_room, generate, sample, seeded, text_tokens
from parallel.config import AxisRules
from tests.inference.small import LLAMA, ONE, V, engine, mesh_of, parameters

LETTERS = CharTokenizer(characters="".join(map(chr, range(32, 32 + V))))
GREEDY = SamplingConfig(temperature=0.0)


def answer(tokenizer=LETTERS, prompt="abc", stop=()) -> Answer:
    return Answer(tuple(tokenizer.encode(prompt)), tokenizer, stop)


def written(answers, tokenizer=LETTERS, **config) -> list[str]:
    """What is shown of each answer."""
    shown = [""] * len(answers)
    for pieces in generate(engine(LLAMA), tokenizer, answers, GenerationConfig(**{"sampling": GREEDY, **config})):
        shown = [old + new for old, new in zip(shown, pieces, strict=True)]
    return shown


def test_an_answer_has_its_tokens_text_and_log_probabilities():
    mine = answer()
    [shown] = written([mine], max_tokens=20)
    assert shown == mine.text == LETTERS.decode(mine.tokens)
    assert len(mine.tokens) == len(mine.logprobs) == 20
    assert mine.finish_reason == "length"
    assert all(logprob <= 0 for logprob in mine.logprobs)


def test_an_answer_ends_before_a_stop_string_that_spans_tokens():
    [whole] = written([answer()], max_tokens=20)
    stop = whole[7:10]
    mine = answer(stop=["never", stop])
    [shown] = written([mine], max_tokens=20)
    assert shown == mine.text == whole[: whole.index(stop)]
    assert mine.tokens == LETTERS.encode(whole[: whole.index(stop) + len(stop)])
    assert len(mine.logprobs) == len(mine.tokens)
    assert mine.finish_reason == "stop"


def test_an_answer_ends_at_an_end_token_which_has_no_text():
    [whole] = written([answer()], max_tokens=20)
    end = LETTERS.encode(whole)[6]
    ending = CharTokenizer(characters=LETTERS.characters, end_ids=(end,))
    mine = answer(ending)
    [shown] = written([mine], ending, max_tokens=20)
    assert shown == mine.text == whole[: whole.index(LETTERS.decode([end]))]
    assert mine.tokens == [*LETTERS.encode(shown), end]
    assert mine.finish_reason == "stop"


def test_samples_are_each_a_run_with_its_own_seed():
    config = SamplingConfig(temperature=1.5, seed=2**32 - 1)
    together = written([answer(), answer()], sampling=config, max_tokens=10)
    alone = [written([answer()], sampling=seeded(config, i), max_tokens=10)[0] for i in range(2)]
    assert together == alone
    assert together[0] != together[1]


def test_an_answer_fills_the_context_and_no_more():
    long = answer(prompt="x" * 250)
    written([long], max_tokens=100)
    assert (len(long.tokens), long.finish_reason) == (6, "length")


def test_text_waits_for_whole_characters_and_for_stop_strings():
    mine = Answer((), ByteTokenizer(), ["STOP"])
    pieces = [mine.take([byte], [-1.0]) for byte in "é ST€".encode()]
    assert pieces == ["", "é", " ", "", "", "", "", "ST€"]
    for byte in b"S":
        assert mine.take([byte], [-1.0]) == ""
    assert mine.finish() == "S"
    assert mine.text == "é ST€S"
    assert not mine.has_stopped


def test_tokens_after_a_stop_string_do_not_count():
    mine = Answer((), ByteTokenizer(), ["b"])
    mine.take(list(b"abc"), [-1.0, -2.0, -3.0])
    assert (mine.text, mine.tokens, mine.logprobs) == ("a", list(b"ab"), [-1.0, -2.0])
    assert mine.finish() == ""


def test_a_text_begins_where_its_model_begins():
    adding, plain = ByteTokenizer(), ByteTokenizer(adds_bos=False)
    assert text_tokens("a", adding) == [256, 97]
    assert text_tokens("a", plain) == [97]
    assert text_tokens("", adding) == text_tokens("", plain) == [256]
    assert text_tokens("", ByteTokenizer(adds_bos=False, bos_id=None)) == [257]
    with pytest.raises(ValueError, match="the text is empty and this model has no token that begins one"):
        text_tokens("", LETTERS)


def test_a_prompt_that_fills_the_context_is_refused():
    assert len(check_room([0] * 255, max_length=256)) == 255
    with pytest.raises(ValueError, match="the prompt is 300 tokens long but the model's context is 256"):
        check_room([0] * 300, max_length=256)


def test_training_can_look_at_text():
    text = sample(
        LLAMA, parameters(LLAMA), LETTERS, mesh_of(ONE), AxisRules(), prompt="abc", num_tokens=20, sampling=GREEDY
    )  # fmt: skip
    assert [text] == written([answer()], max_tokens=20)

"""Beam search over the engine is that over whole texts without a cache; beams share blocks and leave none behind."""

import dataclasses
import itertools

import numpy as np
import pytest

from inference.beam import Beam, Candidate, parted
from inference.config import BeamConfig
from inference.engine_search import search
from tests.inference.small import GEMMA, LLAMA, V, engine, full_logprobs, row

PROMPT = tuple(np.random.default_rng(3).integers(0, V, 13).tolist())
ENDS = (4, 17, 30, 41, 55, 60, 71, 88)
STACKED = dataclasses.replace(GEMMA, scan_layers=True)
CLOSE = {"atol": 5e-5, "rtol": 1e-5}


def next_logprobs(config, tokens) -> np.ndarray:
    """log p of what comes after the tokens: as of 64 tokens, so that one program serves all."""
    return full_logprobs(config, [*tokens, *[0] * (64 - len(tokens))])[len(tokens) - 1]


def slow_search(config, prompt, beam: BeamConfig, *, max_tokens, end_ids) -> list[tuple[tuple[int, ...], float]]:
    """The same search in the words of a textbook; -> answers and their scores, the best first."""
    K, going, ended = beam.beams, [((), 0.0)], []

    def score(tokens, total):
        return total / len(tokens) ** beam.length_penalty

    for length in range(1, max_tokens + 1):
        longer = []
        for tokens, total in going:
            logprobs = next_logprobs(config, (*prompt, *tokens))
            longer += [((*tokens, token), total + float(logprobs[token])) for token in range(V)]
        longer.sort(key=lambda pair: -pair[1])
        ended += [(score(*pair), pair[0]) for pair in longer[:K] if pair[0][-1] in end_ids]
        ended = sorted(ended, reverse=True)[:K]
        going = [pair for pair in longer[: 2 * K] if pair[0][-1] not in end_ids][:K]
        if length == max_tokens:
            ended += [(score(*pair), pair[0]) for pair in going]
        elif len(ended) == K:
            longest = max_tokens if beam.length_penalty > 0 else length
            if beam.early_stopping or going[0][1] / longest**beam.length_penalty <= ended[-1][0]:
                break
    return [(tokens, value) for value, tokens in sorted(ended, reverse=True)[:K]]


def check(found, expected, beam: BeamConfig):
    assert [one.tokens for one in found] == [tokens for tokens, _ in expected]
    scores = [one.total / len(one.tokens) ** beam.length_penalty for one in found]
    np.testing.assert_allclose(scores, [value for _, value in expected], **CLOSE)


@pytest.mark.parametrize("family", [LLAMA, GEMMA, STACKED], ids=["llama", "gemma", "stacked"])
def test_a_search_is_that_without_a_cache(family):
    kept = engine(family)
    for beam, ends in [
        (BeamConfig(beams=4), ()),
        (BeamConfig(beams=4), ENDS),
        (BeamConfig(beams=3, length_penalty=0.0), ENDS),
        (BeamConfig(beams=2, length_penalty=2.0, early_stopping=True), ENDS),
        (BeamConfig(beams=3, length_penalty=-1.0), ENDS),
    ]:
        found = search(kept, PROMPT, beam, max_tokens=21, end_ids=ends)
        check(found, slow_search(family, PROMPT, beam, max_tokens=21, end_ids=ends), beam)
        assert all((one.finish == "stop") == (one.tokens[-1] in ends) for one in found)
        while kept.has_work:
            kept.step()
        assert kept.stats().blocks_used == 0
        assert kept.stats().running == kept.stats().waiting == 0


def test_one_beam_is_greedy():
    kept = engine(LLAMA)
    [found] = search(kept, PROMPT, BeamConfig(beams=1), max_tokens=9, end_ids=())
    [output] = [output for outputs in kept.run([row(PROMPT, budget=9)]) for output in outputs if output.finish]
    assert found.tokens[-1] == output.tokens[-1]


def test_wide_beams_find_the_likeliest_of_all_answers():
    kept = engine(LLAMA, num_tokens=2)
    totals = {}
    for answer in itertools.product(range(2), repeat=3):
        after = [next_logprobs(LLAMA, (*PROMPT, *answer[:i]))[token] for i, token in enumerate(answer)]
        totals[answer] = float(sum(after))
    found = search(kept, PROMPT, BeamConfig(beams=4), max_tokens=3, end_ids=())
    assert [one.tokens for one in found] == sorted(totals, key=lambda answer: -totals[answer])[:4]


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"cache_tokens": 152}])
def test_beams_wait_for_rows_and_blocks_that_others_have(options):
    """Where a fork finds no row it is computed again later, and where blocks run out beams give theirs back."""
    beam, kept = BeamConfig(beams=3), engine(LLAMA, **options)
    for i in range(2):
        kept.add(row((7, 8, 9), budget=70, temperature=1.0, seed=i))
    found = search(kept, PROMPT, beam, max_tokens=21, end_ids=ENDS)
    check(found, slow_search(LLAMA, PROMPT, beam, max_tokens=21, end_ids=ENDS), beam)
    while kept.has_work:
        kept.step()
    assert kept.stats().blocks_used == 0
    assert "cache_tokens" not in options or kept.stats().preemptions > 0


def test_a_search_does_not_change_what_others_get():
    alone, beside = engine(LLAMA), engine(LLAMA)
    asked = row((7, 8, 9), budget=30, temperature=1.0, seed=5, num_top=2)
    expected = [token for outputs in alone.run([asked]) for output in outputs for token in output.tokens]
    id, got, step = beside.add(asked), [], beside.step

    def listened():
        outputs = step()
        got.extend(token for output in outputs if output.id == id for token in output.tokens)
        return outputs

    beside.step = listened
    search(beside, PROMPT, BeamConfig(beams=3), max_tokens=12, end_ids=())
    while beside.has_work:
        beside.step()
    assert got == expected


def test_ended_beams_count_only_among_the_best():
    logprobs = {7: -1.0, 1: -2.0, 2: -3.0, 8: -4.0, 3: -5.0}
    candidates = [Candidate(0, Beam((token,), (logprob,))) for token, logprob in logprobs.items()]
    ended, going = parted(candidates, (7, 8), 2)
    assert [beam.tokens for beam in ended] == [(7,)]
    assert [candidate.beam.tokens for candidate in going] == [(1,), (2,)]


def test_impossible_searches_are_refused():
    with pytest.raises(ValueError, match="beams=11 must be between 1 and 10"):
        BeamConfig(beams=11)
    with pytest.raises(ValueError, match="5 beams need as many rows and the engine has 4"):
        search(engine(LLAMA), PROMPT, BeamConfig(beams=5), max_tokens=3, end_ids=())
    with pytest.raises(ValueError, match="4 beams of 213 tokens need up to 112 blocks, the cache has 32"):
        search(engine(LLAMA, cache_tokens=256), PROMPT, BeamConfig(beams=4), max_tokens=200, end_ids=())

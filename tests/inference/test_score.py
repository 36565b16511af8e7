"""Every token of a text counts once, with enough before it."""

import math

import numpy as np
import pytest

from inference.score import score, windows
from tests.inference.small import LLAMA, V, engine, full_logprobs

TEXT = np.random.default_rng(0).integers(0, V, 150).tolist()


@pytest.mark.parametrize("length", [2, 7, 8, 9, 40])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 1), (8, 7), (40, 20)])
def test_windows_count_each_token_once_with_its_context(length, window, stride):
    cuts = windows(length, window=window, stride=stride)
    assert [token for cut in cuts for token in range(cut.counted, cut.end)] == list(range(1, length))
    for cut in cuts:
        assert cut.end - cut.start <= window
        assert cut.start == 0 or cut.counted - cut.start >= window - stride


def test_windows_as_in_the_docstring():
    assert windows(7, window=4, stride=2) == [(0, 4, 1), (2, 6, 4), (4, 7, 6)]


def test_a_text_in_one_window_scores_as_the_full_forward_pass():
    found = score(engine(LLAMA), TEXT, num_bytes=300)
    nll = -full_logprobs(LLAMA, TEXT)[np.arange(149), TEXT[1:]].astype(np.float64).sum()
    assert (found.tokens, found.bytes, found.window, found.stride) == (149, 300, 256, 128)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, math.exp(nll / 149), rtol=1e-5)
    np.testing.assert_allclose(found.bits_per_byte, nll / math.log(2) / 300, rtol=1e-6)


def test_a_text_in_many_windows_scores_as_each_window_does():
    found = score(engine(LLAMA), TEXT, num_bytes=150, window=64, stride=24)
    slow = 0.0
    for start, end, counted in windows(150, window=64, stride=24):
        part = full_logprobs(LLAMA, TEXT[start:end])[np.arange(end - start - 1), TEXT[start + 1 : end]]
        slow -= part[counted - start - 1 :].astype(np.float64).sum()
    np.testing.assert_allclose(found.nll, slow, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 300}, "window=300 must be between 2 and the model's context of 256 tokens"),
        ({"window": 1}, "window=1 must be between 2"),
        ({"window": 8, "stride": 8}, "stride=8 must be between 1 and 7"),
        ({"stride": 0}, "stride=0 must be between 1 and 255"),
    ],
)
def test_impossible_windows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        score(engine(LLAMA), TEXT, num_bytes=1, **changes)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ValueError, match="the text is 1 tokens long"):
        score(engine(LLAMA), [3], num_bytes=1)

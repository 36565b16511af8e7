"""Decoding with a cache is the full forward pass, row by row, however rows are batched, split, shared or sharded."""

import dataclasses

import jax
import numpy as np
import pytest

from inference import engine as engine_module
from inference.engine import piece_widths
from parallel.config import MeshConfig
from tests.inference.small import FAMILIES, GEMMA, LLAMA, ONE, V, engine, full_logprobs, row, run

CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # float32 sums in another order; logits are of size one
RANDOM = np.random.default_rng(0)
PROMPTS = [tuple(RANDOM.integers(0, V, length).tolist()) for length in (3, 40, 16)]


@pytest.fixture
def compiled():
    """Names of what has been compiled since."""
    names = []

    def note(event: str, duration: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_are_the_full_forward_pass_step_by_step(family):
    config, prompt = FAMILIES[family], PROMPTS[1]
    [(tokens, logprobs)] = run(engine(config), [row(prompt, budget=45)])
    assert len(tokens) == 45
    full = full_logprobs(config, [*prompt, *tokens])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(logprobs, full[np.arange(45), tokens], **CLOSE)
    np.testing.assert_allclose(logprobs, full.max(axis=-1), **CLOSE)  # greedy


def test_a_batch_of_prompts_of_different_lengths_is_each_alone():
    rows = [row(prompt, budget=5 + 9 * i, temperature=i / 2, seed=i) for i, prompt in enumerate(PROMPTS)]
    together, one = run(engine(GEMMA), rows), engine(GEMMA)
    for alone, answer in zip((run(one, [each])[0] for each in rows), together, strict=True):
        assert alone[0] == answer[0]
        np.testing.assert_allclose(alone[1], answer[1], **CLOSE)


def test_prompts_are_read_in_pieces(monkeypatch):
    whole = run(engine(LLAMA), [row(prompt) for prompt in PROMPTS])
    monkeypatch.setattr(engine_module, "PIECE", 16)
    for (tokens, logprobs), answer in zip(run(engine(LLAMA), [row(p) for p in PROMPTS]), whole, strict=True):
        assert tokens == answer[0]
        np.testing.assert_allclose(logprobs, answer[1], **CLOSE)


def test_pieces_are_powers_of_two():
    assert piece_widths(1100) == [512, 512, 128]
    assert piece_widths(1) == [32]
    assert piece_widths(512) == [512]


def test_log_probabilities_of_texts_are_the_full_forward_pass():
    texts = PROMPTS
    for text, found in zip(texts, engine(LLAMA).logprobs(texts), strict=True):
        full = full_logprobs(LLAMA, text)[:-1]
        np.testing.assert_allclose(found, full[np.arange(len(text) - 1), text[1:]], **CLOSE)


def test_what_the_cache_holds_is_not_read_again():
    kept, prompt = engine(LLAMA), PROMPTS[1]
    first, _ = run(kept, [row(prompt, budget=9)])[0]
    assert kept.num_read == 40
    longer = (*prompt, *first, 5, 6, 7)
    again = run(kept, [row(longer, budget=9)])[0]
    assert kept.num_read == 4  # the last token of the answer, which no step has read yet, and three new ones
    assert again[0] == run(engine(LLAMA), [row(longer, budget=9)])[0][0]
    changed = (*longer[:20], 1, 2)
    assert run(kept, [row(changed)])[0][0] == run(engine(LLAMA), [row(changed)])[0][0]
    assert kept.num_read == 2
    run(kept, [row(changed)])
    assert kept.num_read == 1  # the last token's logits are needed, whatever the cache holds


def test_the_cache_grows_under_a_conversation():
    kept, prompt = engine(LLAMA), PROMPTS[1]
    tokens = run(kept, [row(prompt, budget=20)])[0][0]
    assert kept.cache.slots == 128
    longer = (*prompt, *tokens)
    grown = run(kept, [row(longer, budget=90)])[0]
    assert (kept.cache.slots, kept.num_read) == (256, 1)
    assert grown[0] == run(engine(LLAMA), [row(longer, budget=90)])[0][0]


def test_rows_that_share_a_prompt_read_it_once():
    shared = engine(LLAMA)
    rows = [row(PROMPTS[1], temperature=1.0, seed=i) for i in range(2)] + [row(PROMPTS[0])]
    answers = run(shared, rows)
    assert shared.num_read == 40 + 3
    one = engine(LLAMA)
    for alone, answer in zip((run(one, [each])[0] for each in rows), answers, strict=True):
        assert alone[0] == answer[0]
        np.testing.assert_allclose(alone[1], answer[1], **CLOSE)
    assert len({tuple(tokens) for tokens, _ in answers}) == 3


def test_stacked_layers_decode_alike():
    stacked = dataclasses.replace(GEMMA, scan_layers=True)
    (expected, _), (found, _) = run(engine(GEMMA), [row(PROMPTS[1])])[0], run(engine(stacked), [row(PROMPTS[1])])[0]
    assert found == expected


def test_a_mesh_decodes_like_one_device():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    rows = [row(prompt, temperature=i / 2, seed=i) for i, prompt in enumerate(PROMPTS)]
    for (tokens, logprobs), answer in zip(run(engine(LLAMA, mesh), rows), run(engine(LLAMA), rows), strict=True):
        assert tokens == answer[0]
        np.testing.assert_allclose(logprobs, answer[1], **CLOSE)


@pytest.mark.parametrize("mesh", [ONE, MeshConfig(data=2, tensor=2)])
def test_a_step_is_compiled_once_for_its_shapes(compiled, mesh, monkeypatch):
    """However its arguments came about: an array's place has one written form."""
    monkeypatch.setattr(engine_module, "PIECE", 32)
    fresh = engine(dataclasses.replace(LLAMA, num_layers=1, ffn_dim=40), mesh)  # in no other test
    run(fresh, [row(PROMPTS[1], budget=9)])
    run(fresh, [row((*PROMPTS[1], 3, 4), budget=9)])
    steps = [name for name in compiled if name in ("jit(prefill)", "jit(first)", "jit(decode)")]
    assert sorted(steps) == ["jit(decode)", "jit(first)", "jit(prefill)", "jit(prefill)"]  # at the beginning or not


def test_an_answer_ends_at_any_of_the_end_tokens():
    tokens, _ = run(engine(LLAMA), [row(PROMPTS[1], budget=40)])[0]
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    cut = tokens[: tokens.index(end) + 1]
    rows = [row(PROMPTS[1], budget=40), row(PROMPTS[1], budget=2)]
    ended = run(engine(LLAMA), rows, end_ids=[95, end] if 95 not in cut[:-1] else [end])
    assert [answer for answer, _ in ended] == [cut, tokens[:2]]


def test_a_stream_may_be_left_and_a_row_stopped():
    kept = engine(LLAMA)
    stream = kept.stream([row(PROMPTS[1], budget=100)], ())
    begun = next(stream)[0].tokens + next(stream)[0].tokens
    stream.close()
    expected, _ = run(engine(LLAMA), [row(PROMPTS[1], budget=100)])[0]
    assert begun == expected[: len(begun)]
    got = []
    for news in kept.stream([row(PROMPTS[1], budget=100), row(PROMPTS[0], budget=50)], ()):
        got.append([len(new.tokens) for new in news])
        kept.stop(0)
    assert sum(first for first, _ in got) < 100
    assert sum(second for _, second in got) == 50


def test_ids_without_text_are_never_chosen():
    rows = [row(PROMPTS[0], budget=1, temperature=3.0, top_p=1.0, seed=seed) for seed in range(30)]
    chosen = {num: {tokens[0] for tokens, _ in run(engine(LLAMA, num_tokens=num), rows)} for num in (V, 20)}
    assert max(chosen[V]) >= 20
    assert max(chosen[20]) < 20


def test_damaged_weights_are_one_clear_error():
    damaged = engine(LLAMA)
    damaged.parameters = {**damaged.parameters, "head": damaged.parameters["head"].at[0, 0].set(np.nan)}
    with pytest.raises(ValueError, match="its weights are damaged"):
        run(damaged, [row(PROMPTS[0])])

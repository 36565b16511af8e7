"""Decoding with a cache is the full forward pass, row by row, however rows are batched, split, shared or sharded."""

import dataclasses

import jax
import numpy as np
import pytest

from inference.drafting import Draft
from model.parameters import initialize
from parallel.config import AxisRules, MeshConfig
from tests.inference.small import FAMILIES, GEMMA, LLAMA, ONE, V, engine, full_logprobs, mesh_of, row, run

CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # float32 sums in another order; logits are of size one
RANDOM = np.random.default_rng(0)
PROMPTS = [tuple(RANDOM.integers(0, V, length).tolist()) for length in (3, 40, 16)]
LONG = tuple(RANDOM.integers(0, V, 150).tolist())


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


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_prompts_are_read_in_chunks_whatever_else_runs(family):
    config, rows = FAMILIES[family], [row(prompt, budget=20) for prompt in (*PROMPTS, LONG)]
    whole = run(engine(config, chunk=256), rows)
    for (tokens, logprobs), answer in zip(run(engine(config, chunk=32), rows), whole, strict=True):
        assert tokens == answer[0]
        np.testing.assert_allclose(logprobs, answer[1], **CLOSE)


def test_log_probabilities_of_texts_are_the_full_forward_pass():
    texts = PROMPTS
    for text, found in zip(texts, engine(LLAMA).logprobs(texts), strict=True):
        full = full_logprobs(LLAMA, text)[:-1]
        np.testing.assert_allclose(found, full[np.arange(len(text) - 1), text[1:]], **CLOSE)


@pytest.mark.parametrize("family", ["gemma", "mixture"])
def test_in_one_shape_not_a_bit_depends_on_what_else_runs(family):
    """Alone, together, and from the cache."""
    prompts = (PROMPTS[0], PROMPTS[2], PROMPTS[1][:12], LONG[:130])
    config, rows = FAMILIES[family], [row(p, 60, temperature=i / 2, seed=i) for i, p in enumerate(prompts)]
    one = engine(config, one_shape=True)
    alone = [run(one, [each])[0] for each in rows]
    assert run(one, rows) == alone
    assert one.stats().cached_tokens > 100


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_what_the_cache_holds_is_not_read_again(family):
    config, prompt = FAMILIES[family], PROMPTS[1]
    kept = engine(config)
    first, _ = run(kept, [row(prompt, budget=9)])[0]
    assert num_read(kept) == 40
    longer = (*prompt, *first, 5, 6, 7)
    again = run(kept, [row(longer, budget=9)])[0]
    assert num_read(kept) == 40 + len(longer) - 48  # of the 48 tokens of the first answer all blocks are full
    assert again[0] == run(engine(config, prefix_cache=False), [row(longer, budget=9)])[0][0]
    changed = (*longer[:20], 1, 2)
    before = num_read(kept)
    assert run(kept, [row(changed)])[0][0] == run(engine(config), [row(changed)])[0][0]
    assert num_read(kept) == before + 22 - 16


def test_rows_that_share_a_prompt_read_it_once():
    shared = engine(LLAMA)
    rows = [row(PROMPTS[1], temperature=1.0, seed=i) for i in range(2)] + [row(PROMPTS[0])]
    answers = run(shared, rows)
    assert num_read(shared) == 40 + 8 + 3  # the last block, again: its last token's logits are asked for
    one = engine(LLAMA)
    for alone, answer in zip((run(one, [each])[0] for each in rows), answers, strict=True):
        assert alone[0] == answer[0]
        np.testing.assert_allclose(alone[1], answer[1], **CLOSE)
    assert len({tuple(tokens) for tokens, _ in answers}) == 3


def test_prompts_of_other_salts_share_nothing():
    kept = engine(LLAMA)
    for salt in ("one", "other"):
        run(kept, [row(PROMPTS[1], salt=salt)])
    assert kept.stats().cached_tokens == 0
    run(kept, [row(PROMPTS[1], salt="one")])
    assert kept.stats().cached_tokens == 32


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_who_gives_blocks_back_goes_on_later_as_if_nothing_had_been(family):
    """Blocks for about two of four sequences: some are preempted, and their answers are those of a large cache."""
    config = FAMILIES[family]
    rows = [row(RANDOM.integers(0, V, 12).tolist(), budget=50, temperature=i / 3, seed=i) for i in range(4)]
    small = engine(config, cache_tokens=128 if config.layers == ("global",) else 96, prefix_cache=False)
    expected, found = run(engine(config), rows), run(small, rows)
    if config.layers != ("window",):  # which holds no more than its windows
        assert small.stats().preemptions > 0
    assert small.stats().blocks_used == 0
    for (tokens, logprobs), answer in zip(found, expected, strict=True):
        assert tokens == answer[0]
        np.testing.assert_allclose(logprobs, answer[1], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_int8_keys_and_values_change_little(family):
    config = FAMILIES[family]
    (tokens, logprobs), exact = run(engine(config, kv_dtype="int8"), [row(LONG, 30)])[0], full_logprobs
    full = exact(config, [*LONG, *tokens])[len(LONG) - 1 : -1]
    error = np.abs(np.asarray(logprobs) - full[np.arange(30), tokens])
    assert 1e-6 < error.max() < 0.1


@pytest.mark.parametrize("family", ["llama", "gemma", "mixture"])
def test_guesses_change_the_number_of_steps_and_nothing_else(family):
    config = FAMILIES[family]
    few = {"logit_bias": ((5, 90.0), (9, 90.0), (60, 90.0))}  # so that the text repeats itself
    rows = [row(PROMPTS[2], 60, **few), row(PROMPTS[0], 60, temperature=0.5, seed=3, frequency_penalty=0.01, **few)]
    plain, quick = engine(config), engine(config, speculation="ngram")
    for (tokens, logprobs), answer in zip(run(quick, rows), run(plain, rows), strict=True):
        assert tokens == answer[0]
        np.testing.assert_allclose(logprobs, answer[1], **CLOSE)
    assert quick.stats().accepted > 0
    assert quick.stats().steps < plain.stats().steps


@pytest.mark.parametrize(("family", "seed", "is_right"), [("llama", 3, True), ("gemma", 4, False)])
def test_a_draft_model_changes_the_number_of_steps_and_nothing_else(family, seed, is_right):
    """The model itself is always right; another one nearly never, and its guesses leave no trace."""
    config, few = FAMILIES[family], {"logit_bias": ((5, 90.0), (9, 90.0), (60, 90.0))}
    draft = Draft(config, initialize(config, mesh_of(ONE), AxisRules(), key=jax.random.key(seed)))
    rows = [row(PROMPTS[1], 40, temperature=1.0, seed=3), row(LONG, 30, **({} if is_right else few))]
    plain, quick = engine(config), engine(config, speculation="draft", draft=draft)
    for (tokens, logprobs), answer in zip(run(quick, rows), run(plain, rows), strict=True):
        assert tokens == answer[0]
        np.testing.assert_allclose(logprobs, answer[1], **CLOSE)
    stats = quick.stats()
    assert (stats.accepted == stats.drafted) == is_right
    assert stats.accepted > 0
    if is_right:
        assert stats.steps <= 12


def test_a_draft_model_has_to_fit():
    draft = Draft(dataclasses.replace(LLAMA, vocab_size=V + 1), {})
    with pytest.raises(ValueError, match="the draft model has 97 tokens but the model has 96"):
        engine(LLAMA, speculation="draft", draft=draft)
    with pytest.raises(ValueError, match="has window layers"):
        engine(LLAMA, speculation="draft", draft=Draft(GEMMA, {}))
    with pytest.raises(ValueError, match=r"engine.speculation=draft and a draft model is missing"):
        engine(LLAMA, speculation="draft")


def test_blocks_go_from_one_engine_to_another():
    one, other = engine(LLAMA), engine(LLAMA)
    expected = run(one, [row(LONG)])
    exported = one.export_blocks(LONG)
    assert len(exported.names) == len(LONG) // 8
    assert other.import_blocks(exported) == len(LONG) // 8
    assert other.import_blocks(exported) == 0
    [(tokens, logprobs)] = run(other, [row(LONG)])
    assert other.stats().cached_tokens == (len(LONG) - 1) // 8 * 8
    assert tokens == expected[0][0]
    np.testing.assert_allclose(logprobs, expected[0][1], **CLOSE)


def test_a_text_is_the_mean_of_its_hidden_states():
    found = engine(LLAMA).embed(PROMPTS)
    assert found.shape == (3, LLAMA.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(engine(LLAMA).embed(PROMPTS[1:2])[0], found[1], **CLOSE)


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
def test_nothing_is_compiled_after_the_warm_up(compiled, mesh):
    """However its arguments came about: an array's place has one written form."""
    fresh = engine(dataclasses.replace(LLAMA, num_layers=1, ffn_dim=40), mesh, max_rows=2, chunk=32)
    fresh.warm_up()
    assert compiled.count("jit(step)") == len(fresh.shapes())
    compiled.clear()
    rows = [row(prompt, 9, temperature=i / 2, num_top=i, top_p=0.9) for i, prompt in enumerate((*PROMPTS, LONG))]
    run(fresh, rows)
    assert not compiled


def test_an_answer_ends_at_any_of_the_end_tokens():
    tokens, _ = run(engine(LLAMA), [row(PROMPTS[1], budget=40)])[0]
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    cut = tokens[: tokens.index(end) + 1]
    ends = [95, end] if 95 not in cut[:-1] else [end]
    rows = [row(PROMPTS[1], budget=40, end_ids=ends), row(PROMPTS[1], budget=2, end_ids=ends)]
    ended = run(engine(LLAMA), rows)
    assert [answer for answer, _ in ended] == [cut, tokens[:2]]


def test_the_likeliest_tokens_are_told_to_who_asks():
    outputs = {0: [], 1: []}
    for step in engine(LLAMA).run([row(PROMPTS[0], 3, num_top=4), row(PROMPTS[1], 3)]):
        for output in step:
            outputs[output.id] += output.top
    full = full_logprobs(LLAMA, PROMPTS[0])[-1]
    assert outputs[1] == []
    assert [len(top) for top in outputs[0]] == [4, 4, 4]
    assert [token for token, _ in outputs[0][0]] == np.argsort(-full)[:4].tolist()
    np.testing.assert_allclose([logprob for _, logprob in outputs[0][0]], np.sort(full)[::-1][:4], **CLOSE)


def test_a_cancelled_request_leaves_nothing_and_the_others_alone():
    kept, expected = engine(LLAMA), run(engine(LLAMA), [row(PROMPTS[0], budget=50)])[0][0]
    ids = [kept.add(row(prompt, budget)) for prompt, budget in ((PROMPTS[1], 100), (PROMPTS[0], 50), (LONG, 9))]
    got, finishes = {id: [] for id in ids}, {}
    for number in range(200):
        for output in kept.step():
            got[output.id] += output.tokens
            if output.finish:
                finishes[output.id] = output.finish
        if number in (0, 3):
            kept.cancel(ids[2] if number == 0 else ids[0])
    assert finishes == {ids[0]: "cancelled", ids[1]: "length", ids[2]: "cancelled"}
    assert got[ids[1]] == expected
    assert 0 < len(got[ids[0]]) < 10
    assert got[ids[2]] == []
    assert kept.stats().blocks_used == 0
    assert not kept.has_work
    kept.cancel(ids[0])
    assert kept.step() == []


def test_ids_without_text_are_never_chosen():
    rows = [row(PROMPTS[0], budget=1, temperature=3.0, top_p=1.0, seed=seed) for seed in range(30)]
    chosen = {num: {tokens[0] for tokens, _ in run(engine(LLAMA, num_tokens=num), rows)} for num in (V, 20)}
    assert max(chosen[V]) >= 20
    assert max(chosen[20]) < 20


def test_damaged_weights_are_one_clear_error():
    damaged = engine(LLAMA)
    damaged.parameters = {**damaged.parameters, "head": damaged.parameters["head"].at[0, 0].set(np.nan)}
    [output] = [output for step in damaged.run([row(PROMPTS[0])]) for output in step]
    assert output.finish == "error"
    assert "its weights are damaged" in output.error
    assert damaged.stats().blocks_used == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (row((), 3), "the prompt has 0 tokens and max_tokens=3; both must be at least 1"),
        (row((1,), 3, logit_bias=((96, 1.0),)), "logit_bias names token 96 but the model has 96; leave it out"),
        (row((1,) * 256, 3), "the prompt is 256 tokens long but a sequence has room for 256"),
    ],
)
def test_what_can_never_be_answered_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        engine(LLAMA).add(request_)


def test_a_sequence_is_as_long_as_the_cache():
    small = engine(LLAMA, cache_tokens=64)
    with pytest.raises(ValueError, match="room for 56, its answer included; shorten the prompt to at most 55"):
        small.add(row((1,) * 56, 1))
    [(tokens, _)] = run(small, [row((1,) * 50, 100)])
    assert len(tokens) == 6
    with pytest.raises(ValueError, match=r"engine.max_length=300 is more than the model's context of 256"):
        engine(LLAMA, max_length=300)


def num_read(engine) -> int:
    """Prompt tokens that were computed."""
    return engine.stats().prompt_tokens - engine.stats().cached_tokens

"""Tiny models for the tests of decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from inference.config import EngineConfig, SamplingConfig
from inference.drafting import Draft
from inference.engine import Engine
from inference.request import Request
from model.config import ModelConfig
from model.memory import Packed, Queries
from model.parameters import decoder, initialize
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh

V = 96
LLAMA = ModelConfig(
    vocab_size=V, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_length=256,
    rope_theta=10_000.0, norm_eps=1e-5, tied=False, init_scale=2.0, scan_layers=False,
)  # fmt: skip
MISTRAL = dataclasses.replace(LLAMA, layers=("window",), window=5)
GEMMA = dataclasses.replace(
    LLAMA, layers=("window", "global"), window=4, rope_local_theta=1_000.0, norm_zero_centered=True, post_norms=True,
    qk_norm=True, activation="gelu_tanh", query_scale=0.3, attention_softcap=2.0, final_softcap=3.0, embed_scale=True,
)  # fmt: skip
GPT2 = dataclasses.replace(
    LLAMA, num_kv_heads=4, positions="learned", norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, gated=False,
    activation="gelu",
)  # fmt: skip
MIXTURE = dataclasses.replace(
    LLAMA, num_kv_heads=4, kv_rank=20, q_rank=24, rope_dim=4, value_dim=6, num_experts=8, experts_per_token=3,
    expert_ffn_dim=24, shared_ffn_dim=16, num_dense_layers=1, router="sigmoid",
)  # fmt: skip
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "gpt2": GPT2, "mixture": MIXTURE}
ONE = MeshConfig(data=1)


def mesh_of(config: MeshConfig):
    sizes = config.axes
    return make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def parameters(config: ModelConfig, mesh: MeshConfig = ONE):
    return initialize(config, mesh_of(mesh), AxisRules(), key=jax.random.key(3))


def engine(
    config: ModelConfig, mesh: MeshConfig = ONE, *, num_tokens: int = V, draft: Draft | None = None, **options
) -> Engine:
    options = EngineConfig(**{"max_rows": 4, "cache_tokens": 1024, "block_size": 8, "chunk": 64, **options})
    return Engine(
        config,
        parameters(config, mesh),
        mesh_of(mesh),
        AxisRules(),
        num_tokens=num_tokens,
        options=options,
        draft=draft,
    )


def row(prompt, budget=12, *, end_ids=(), num_top=0, priority=0, salt="", constraint=None, **sampling) -> Request:
    return Request(
        prompt=tuple(prompt), sampling=SamplingConfig(**{"temperature": 0.0, **sampling}), max_tokens=budget,
        end_ids=tuple(end_ids), num_top=num_top, priority=priority, salt=salt, constraint=constraint,
    )  # fmt: skip


def run(engine: Engine, rows) -> list[tuple[list[int], list[float]]]:
    """Each row's tokens and log-probabilities."""
    answers = [([], []) for _ in rows]
    for outputs in engine.run(rows):
        for output in outputs:
            answers[output.id][0].extend(output.tokens)
            answers[output.id][1].extend(output.logprobs)
    return answers


@functools.cache
def forward(config: ModelConfig):
    """log p of every token of the vocabulary after every token of some texts: whole texts at once, no cache."""

    @jax.jit
    def run(parameters, tokens):
        queries = Queries(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], jnp.ones_like(tokens))
        model = decoder(config, parameters)
        hidden, _ = model(tokens, queries, Packed())
        return jax.nn.log_softmax(model.logits(hidden), axis=-1)

    return run


def full_logprobs(config: ModelConfig, tokens) -> np.ndarray:
    """The same of one text."""
    return np.asarray(forward(config)(parameters(config), jnp.asarray([tokens], jnp.int32)))[0]

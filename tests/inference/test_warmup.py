"""What is compiled from shapes is what runs."""

import dataclasses

import jax
import pytest

from inference.engine import Engine
from inference.steps import Program
from inference.warmup import compile_ahead
from inference.weights import serving_parameters, serving_shapes
from parallel.config import AxisRules, MeshConfig
from tests.inference.small import LLAMA, ONE, V, mesh_of, parameters, row, run

FRESH = dataclasses.replace(LLAMA, num_layers=1, ffn_dim=40)  # in no other test: nothing of it is compiled yet


@pytest.fixture
def compiled():
    """Names of what has been compiled since."""
    names = []

    def note(event: str, duration: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("mesh", [ONE, MeshConfig(data=2, tensor=2)])
def test_nothing_is_compiled_twice(compiled, mesh):
    grid, rules = mesh_of(mesh), AxisRules()
    config, served = serving_parameters(FRESH, parameters(FRESH, mesh), grid)
    shapes = serving_shapes(FRESH, grid, rules)
    compile_ahead(Program(config, grid, rules, V), shapes, length=5, budget=9, rows=2)
    assert {"jit(prefill)", "jit(first)", "jit(decode)"} <= set(compiled)
    compiled.clear()
    run(Engine(config, served, grid, rules, num_tokens=V), [row((1, 2, 3, 4, 5), budget=9)] * 2)
    assert not {"jit(prefill)", "jit(first)", "jit(decode)"} & set(compiled)

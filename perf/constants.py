"""Constants of the performance model: what each means, where it starts from, and what measurements made of it.

A name is a meaning and whom it is of, as in "matmul/H100/fp8". What no measurement has fitted is its prior. Fitted
values and their spread are in constants.json, which `python -m perf calibrate --from measurements.csv` writes.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

FILE = pathlib.Path(__file__).with_name("constants.json")


class Stack(NamedTuple):
    """How some software runs a model: known, not fitted."""

    fused_attention: bool = True  # scores stay on the chip, and a causal half is not computed
    last_logits_only: bool = True  # a prompt's logits are those of its last token
    splits_optimizer: bool = False  # each replica keeps and updates a part of the optimizer's state


STACKS = {
    "meshlight": Stack(splits_optimizer=False),
    "maxtext": Stack(),
    "fsdp": Stack(),  # PyTorch FSDP with flash attention (llm-foundry, TinyLlama)
    "zero3": Stack(fused_attention=False),  # DeepSpeed as in arXiv:2104.04473
    "megatron": Stack(splits_optimizer=True),  # Megatron-Core: NeMo, Megatron-Bridge
    "megatron-2021": Stack(fused_attention=False),  # arXiv:2104.04473, arXiv:2201.11990
    "eager": Stack(fused_attention=False, last_logits_only=False),  # PyTorch, an operation at a time
    "compiled": Stack(fused_attention=False, last_logits_only=False),  # PyTorch, element-wise operations fused
    "fastertransformer": Stack(),
    "megatron-inference": Stack(fused_attention=False),
    "tensorrt": Stack(),  # TensorRT-LLM
    "vllm": Stack(),
    "jax-llm": Stack(),  # jax-llm-examples
}

LIKE = {"meshlight": "maxtext"}  # unmeasured at scale: taken to be as another compiled by XLA

CLASSES = {"fp32": "fp32", "bf16": "16", "fp16": "16", "fp8": "8", "int8": "8", "fp4": "4", "int4": "4"}
FAMILIES = ("A100", "H100", "H200", "GH200", "GB200", "B200", "GB300", "B300")
SAME = {"H200": "H100", "GH200": "H100", "GB200": "B200", "GB300": "B300"}  # one die in two packages


class Prior(NamedTuple):
    """Where a constant starts, and by what factor it may differ: one standard deviation of its logarithm."""

    value: float
    spread: float
    meaning: str


PRIORS = {
    "matmul": Prior(0.7, 0.2, "of the peak that a large product reaches"),
    "attention": Prior(0.6, 0.4, "of a product's share that attention's products reach"),
    "memory": Prior(0.8, 0.15, "of the memory's bandwidth that is reached"),
    "ramp": Prior(40.0, 0.7, "M, N or K at which a product is at half its speed: tiles, pipelines, waves"),
    "vectors": Prior(1.5, 0.5, "passes over memory for each that element-wise work needs at least"),
    "launch": Prior(4e-6, 0.8, "seconds to start an operation"),
    "overlap": Prior(1.6, 0.5, "sharpness of hiding parameter traffic behind compute; 0 hides nothing"),
    "tensor": Prior(0.7, 0.3, "of tensor and context traffic that is not hidden in training"),
    "expert": Prior(0.7, 0.4, "of the experts' traffic that is not hidden in training"),
    "experts": Prior(0.8, 0.3, "of a product's speed that products of experts reach: uneven loads, small rows"),
    "link": Prior(0.7, 0.25, "of the links' bandwidth that is reached"),
    "network": Prior(0.7, 0.3, "of the network's bandwidth that is reached"),
    "hop": Prior(3e-6, 0.8, "seconds from a device to the next in a collective"),
    "host": Prior(1e-3, 1.0, "seconds of a step (training) or a token in which nothing runs"),
    "whole": Prior(1.0, 0.15, "what a stack takes for what is counted here, all in all"),
}
BOUND = {"matmul": 1.0, "memory": 1.0, "link": 1.2, "network": 1.2, "tensor": 1.0, "expert": 1.0}  # nothing is quicker


def family(chip: str) -> str:
    """Chips that share a die share what was fitted: A100-SXM-80GB -> A100."""
    for name in FAMILIES:
        if chip.startswith(name):
            return SAME.get(name, name)
    return chip


def prior(name: str) -> Prior:
    """Of the constant of that name."""
    return PRIORS[name.partition("/")[0]]


class Constants(NamedTuple):
    """Values by name."""

    fitted: dict[str, float]
    spread: dict[str, float]  # standard deviation of the logarithm

    def value(self, name: str) -> float:
        """The fitted value, else that of the stack it is like, else the prior's."""
        kind, _, of = name.partition("/")
        like = f"{kind}/{LIKE[of]}" if of in LIKE else name
        return self.fitted.get(name, self.fitted.get(like, prior(name).value))

    def log(self, name: str) -> float:
        """Natural logarithm of the value."""
        return math.log(self.value(name))


@functools.cache
def load(path: pathlib.Path = FILE) -> Constants:
    """The constants that the project ships."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Constants(
        {name: row["value"] for name, row in found.items()}, {name: row["spread"] for name, row in found.items()}
    )

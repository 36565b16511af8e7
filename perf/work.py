"""What is predicted: a step of a model, split over devices. Knows no chip and no time."""

import dataclasses
import math
from typing import Literal

from model.config import ModelConfig, RematKind

Kind = Literal["train", "prefill", "decode", "generate"]

# Bytes of a number in memory; blocks of mx and nv formats carry a scale.
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5625, "int4": 0.5625}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways each thing is split. Devices next to each other share `tensor`, then `context`, then the rest."""

    data: int = 1  # replicas of the parameters
    fsdp: int = 1  # parts of the parameters, each with its own sequences
    tensor: int = 1
    pipe: int = 1
    context: int = 1
    expert: int = 1  # parts of the experts; they lie among data × fsdp (× tensor, as Megatron has it), not beside them
    virtual: int = 1  # stages that a device of `pipe` has, in turn
    slices: int = 1  # of data, that only the data centre's network joins
    shards_gradients_only: bool = False  # fsdp keeps gathered weights from forward to backward (ZeRO-2)

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.replicas * self.tensor * self.pipe * self.context

    @property
    def replicas(self) -> int:
        """Devices that compute different sequences."""
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One step, or one request for all its tokens, of a model on some devices."""

    kind: Kind
    model: ModelConfig
    layout: Layout = Layout()
    batch: int  # B, sequences over all devices
    length: int  # tokens of a sequence (train, prefill), in the cache (decode), of the prompt (generate)
    output: int = 0  # tokens generated (generate)
    microbatch: int = 0  # sequences that a replica computes at once (train); 0: one where there is a pipeline, else all
    weights: str = "bf16"  # numbers that parameters are kept in
    compute: str = "bf16"  # numbers that matmuls take
    cache: str = "bf16"  # numbers of keys and values
    remat: RematKind = "none"
    is_causal: bool = True  # a query sees no later key
    trains_all: bool = True  # gradients of all parameters, rather than of adapters beside them
    stack: str = "meshlight"  # whose software runs it: a key of perf.constants.STACKS

    def __post_init__(self):
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"batch={self.batch} and length={self.length} must be at least 1")
        for name in ("weights", "compute", "cache"):
            if getattr(self, name) not in BYTES:
                raise ValueError(f"{name}={getattr(self, name)} is no number format; known are {', '.join(BYTES)}")

    @property
    def sequences(self) -> float:
        """Of one replica in a step; less than 1 where there are more replicas than sequences."""
        return self.batch / self.layout.replicas

    @property
    def at_once(self) -> float:
        """Sequences that a replica computes at once."""
        at_most = self.microbatch or (1 if self.layout.pipe > 1 and self.kind == "train" else self.sequences)
        return min(at_most, self.sequences)

    @property
    def microbatches(self) -> int:
        """Passes of a step."""
        return max(1, math.ceil(self.sequences / self.at_once))

    @property
    def tokens(self) -> int:
        """That a step computes (train, prefill, decode), or a request makes (generate), over all devices."""
        return (
            self.batch * {"train": self.length, "prefill": self.length, "decode": 1, "generate": self.output}[self.kind]
        )

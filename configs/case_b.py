"""Llama 2 7B on 64 v5p, four sequences of 4,096 tokens a chip, weights split over all of them.

    uv run python -m perf compile configs/case_b.py    what a chip needs and sends, from the TPU compiler
    uv run train.py configs/case_b.py                  on such a slice

The peer (MaxText, the same work by the same compiler; bytes of a chip): peak 45.90 GiB, arguments 1.177 and temporaries
47.94 GiB; 50,116 MiB on the wire: all-gathers of 25,204 and all-reduces of 12,854; 208 CPU seconds. It keeps
what its matmuls return.
"""

import dataclasses

from configs.base import RunConfig
from model.families import llama2_7b
from parallel.config import MeshConfig
from training.config import TrainConfig

run = RunConfig(
    name="case_b",
    model=dataclasses.replace(
        llama2_7b(), compute_dtype="bfloat16", remat="attention", remat_save=("key", "ffn_gate", "ffn_up")
    ),
    mesh=MeshConfig(data=1, fsdp=64),
    train=TrainConfig(steps=1000, batch_size=256, seq_len=4096),
    topologies=("v5p:4x4x4",),
)

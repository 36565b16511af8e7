"""Llama 3.1 8B on 256 v5e, one sequence of 2,048 tokens a chip, weights split over all of them.

    uv run python -m perf compile configs/case_a1.py    what a chip needs and sends, from the TPU compiler
    uv run train.py configs/case_a1.py                  on such a slice

The peer (MaxText, the same work by the same compiler; bytes of a chip): peak 3.365 GiB, arguments 0.354 and temporaries
3.563 GiB; 61,580 MiB on the wire: all-gathers of 28,628 and all-reduces of 16,597; 160 CPU seconds.
"""

import dataclasses

from configs.base import RunConfig
from model.families import llama3_1_8b
from parallel.config import MeshConfig
from training.config import TrainConfig

run = RunConfig(
    name="case_a1",
    model=dataclasses.replace(llama3_1_8b(), compute_dtype="bfloat16", remat="attention"),
    mesh=MeshConfig(data=1, fsdp=256),
    train=TrainConfig(steps=1000, batch_size=256, seq_len=2048, loss="vocabulary", loss_chunk=32768),
    topologies=("v5e:16x16",),
)

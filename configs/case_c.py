"""Llama 3.1 70B on 128 v5p, two sequences of 4,096 tokens a chip, weights split over all of them.

    uv run python -m perf compile configs/case_c.py    what a chip needs and sends, from the TPU compiler
    uv run train.py configs/case_c.py                  on such a slice

The peer (MaxText, the same work by the same compiler; bytes of a chip): peak 47.07 GiB, arguments 6.175 and temporaries
46.96 GiB; 530,096 MiB on the wire: all-gathers of 265,128 and all-reduces of 134,571; 224 CPU seconds. It keeps
what its matmuls return but for the FFN's inner ones.
"""

import dataclasses

from configs.base import RunConfig
from model.families import llama3_1_70b
from parallel.config import MeshConfig
from training.config import TrainConfig

run = RunConfig(
    name="case_c",
    model=dataclasses.replace(
        llama3_1_70b(),
        compute_dtype="bfloat16",
        remat="attention",
        remat_save=("key", "value"),
    ),
    mesh=MeshConfig(data=1, fsdp=128),
    train=TrainConfig(steps=1000, batch_size=256, seq_len=4096),
    topologies=("v5p:4x4x8",),
)

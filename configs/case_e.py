"""A 1B model (that of Llama 3.2) on 16 v5e, one sequence of 2,048 tokens a chip, weights split over all of them.

    uv run python -m perf compile configs/case_e.py    what a chip needs and sends, from the TPU compiler
    uv run train.py configs/case_e.py                  on such a slice

The peer (MaxText, the same work by the same compiler; bytes of a chip): peak 2.708 GiB, arguments 0.864 and temporaries
2.039 GiB; 7,176 MiB on the wire: all-gathers of 2,101 and permutes of 5,553; 125 CPU seconds.
"""

import dataclasses

from configs.base import RunConfig
from model.families import llama3_2_1b
from parallel.config import MeshConfig
from training.config import TrainConfig

run = RunConfig(
    name="case_e",
    model=dataclasses.replace(llama3_2_1b(), compute_dtype="bfloat16", remat="attention"),
    mesh=MeshConfig(data=1, fsdp=16),
    train=TrainConfig(steps=1000, batch_size=16, seq_len=2048, loss="vocabulary", loss_chunk=32768),
    topologies=("v5e:4x4",),
)

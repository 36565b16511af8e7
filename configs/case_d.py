"""Mixtral 8x7B on 64 v5p, four sequences of 4,096 tokens a chip, no token dropped: eight chips share the experts.

    uv run python -m perf compile configs/case_d.py                               what a chip needs and sends
    uv run python -m perf compile configs/case_d.py mesh.expert=1 mesh.fsdp=64    the peer's mesh: experts gathered
    uv run train.py configs/case_d.py                                             on such a slice

The peer (MaxText, the same work by the same compiler; all weights split over 64 chips; bytes of one): peak 23.46 GiB,
arguments 8.159 and temporaries 23.37 GiB; 352,776 MiB on the wire: all-gathers of 180,218 and all-reduces of 89,079;
419 CPU seconds.
"""

import dataclasses

from configs.base import RunConfig
from model.families import mixtral_8x7b
from parallel.config import MeshConfig
from training.config import TrainConfig

run = RunConfig(
    name="case_d",
    model=dataclasses.replace(mixtral_8x7b(), compute_dtype="bfloat16", remat="full"),
    mesh=MeshConfig(data=1, fsdp=8, expert=8),
    train=TrainConfig(steps=1000, batch_size=256, seq_len=4096, loss="vocabulary", loss_chunk=6400),
    topologies=("v5p:4x4x4",),
)

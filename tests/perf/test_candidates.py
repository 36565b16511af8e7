"""Every way that divides is tried, none that does not, and each can be written as settings."""

import dataclasses
import itertools
import math

import pytest

from configs import case_d, tiny
from configs.base import applied
from configs.overrides import override
from model import families
from parallel.config import MeshConfig
from perf import candidates
from perf.candidates import Candidate, Precision

BF16 = Precision("fp32", "bf16")
BASE = Candidate(mesh=MeshConfig(data=1), batch=64, precision=BF16)


def anything(candidate: Candidate) -> None:
    """Refuses nothing."""


def test_every_mesh_of_the_devices_is_found_once():
    model = dataclasses.replace(families.llama3_2_1b(), num_layers=4)
    found = [one.mesh for one in candidates.training_meshes(model, BASE, 8, anything).allowed]
    axes = ("pipe", "data", "fsdp", "context", "tensor")
    powers = (1, 2, 4, 8)
    wanted = {
        sizes
        for sizes in itertools.product((1, 2, 4), powers, powers, powers, powers)  # of four layers
        if math.prod(sizes) == 8
    }
    assert {tuple(mesh.axes[axis] for axis in axes) for mesh in found} == wanted
    assert len(found) == len(wanted)
    assert {mesh.expert for mesh in found} == {1}, "a dense model has no experts to split"


def test_experts_are_split_where_there_are_some():
    found = candidates.training_meshes(families.mixtral_8x7b(), BASE, 16, anything).allowed
    assert {one.mesh.expert for one in found} == {1, 2, 4, 8}
    assert all(one.devices == 16 for one in found)


def test_data_spans_the_slices():
    found = candidates.training_meshes(families.llama3_2_1b(), dataclasses.replace(BASE, slices=2), 8, anything).allowed
    assert found
    assert all(one.mesh.data % 2 == 0 for one in found)


def test_what_is_refused_is_left_out_with_its_reason():
    def check(candidate: Candidate) -> None:
        if candidate.mesh.tensor > 2:
            raise ValueError(f"tensor={candidate.mesh.tensor} is too much")

    found = candidates.training_meshes(families.llama3_2_1b(), BASE, 8, check)
    assert {one.mesh.tensor for one in found.allowed} == {1, 2}
    with pytest.raises(ValueError, match="never"):
        candidates.training_meshes(families.llama3_2_1b(), BASE, 8, never)


def never(candidate: Candidate) -> None:
    raise ValueError("never")


def test_parts_divide_a_devices_batch():
    one = dataclasses.replace(BASE, mesh=MeshConfig(data=2, fsdp=4), batch=64)
    assert [part.accumulate for part in candidates.in_parts(one, repeats=[1])] == [1, 2, 4, 8]
    assert [part.microbatch for part in candidates.in_parts(one, repeats=[1])] == [8, 4, 2, 1]
    piped = dataclasses.replace(one, mesh=MeshConfig(data=2, fsdp=2, pipe=2), microbatches=2)
    ways = list(candidates.in_parts(piped, repeats=[1, 2]))
    assert [(way.microbatches, way.repeats) for way in ways] == [
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
        (8, 1),
        (8, 2),
        (16, 1),
        (16, 2),
    ]
    assert all(way.microbatch * way.microbatches * 4 == 64 for way in ways)


@pytest.mark.parametrize("config", [tiny.run, case_d.run], ids=lambda run: run.name)
def test_settings_are_what_train_takes(config):
    """The written settings make the same run as the candidate does."""
    batch = config.train.batch_size
    one = Candidate(
        mesh=MeshConfig(data=2, fsdp=2), batch=batch, accumulate=2, remat="minimal", precision=Precision("fp32", "int8")
    )
    assert override(config, ["mesh.expert=1", "mesh.tensor=1", *candidates.settings(one, "train").split()]) == applied(
        config, one
    )


def test_settings_of_a_pipe_and_of_a_server():
    mesh = MeshConfig(data=1, fsdp=2, pipe=2)
    one = Candidate(mesh=mesh, batch=32, microbatches=4, repeats=2, remat="full", precision=BF16)
    assert candidates.settings(one, "train") == (
        "mesh.pipe=2 mesh.data=1 mesh.fsdp=2 train.batch_size=32 train.accumulate=1 execution.microbatches=4 "
        "execution.repeats=2 model.remat=full model.compute_dtype=bfloat16"
    )
    served = Candidate(mesh=MeshConfig(data=4, tensor=2), batch=64, precision=Precision("int4", "bf16", "int8"))
    assert candidates.settings(served, "decode") == (
        "--mesh tensor=2 --dtype bfloat16 --weights int4 --kv-dtype int8 --max-rows 16"
    )
    assert candidates.number_words(served.precision, "decode") == "int4/int8"


def test_a_job_has_the_devices_of_its_mesh():
    for one in candidates.training_meshes(families.mixtral_8x7b(), BASE, 16, anything).allowed:
        job = candidates.job(one, families.mixtral_8x7b(), "train", 2048)
        assert job.layout.num_devices == 16
        assert math.isclose(job.sequences * job.layout.replicas, 64)
        assert job.layout.expert == one.mesh.expert

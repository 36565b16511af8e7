import dataclasses
import json

import pytest

from configs import case_a1, case_c, case_d, case_e, quickstart, shakespeare
from configs.base import RunConfig, planned_candidate, planned_question, simplest_mesh, split_dims
from configs.overrides import override
from configs.tiny import run
from data.config import SourceConfig
from parallel.chips import CHIPS
from parallel.records import from_dict, to_dict
from perf.plan import quickest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.seq_len=65", "train.seq_len=65 is longer than model.max_length=64; "),
        ("train.accumulate=3", "train.batch_size=8 is not a multiple of train.accumulate=3; "),
        ("train.steps=1", "optim.warmup_steps=2 is more than train.steps=1; lower it to at most 1"),
        (
            "mesh.tensor=4",
            "model.num_heads=2 does not divide over mesh.tensor=4 (rules.act_heads): 2 is not a multiple",
        ),
        ("mesh.tensor=2 model.num_kv_heads=1", "model.num_kv_heads=1 does not divide over mesh.tensor=2"),
        ("mesh.tensor=2 model.ffn_dim=63", "model.ffn_dim=63 does not divide over mesh.tensor=2 (rules.act_ffn)"),
        ("mesh.fsdp=3", "train.batch_size / train.accumulate=8 does not divide over mesh.fsdp=3 "),
        ("mesh.data=4 train.accumulate=4", "train.batch_size / train.accumulate=2 does not divide over mesh.data=4"),
        ("mesh.fsdp=8 model.embed_dim=36", "model.embed_dim=36 does not divide over mesh.fsdp=8 (rules.embed)"),
        (
            "mesh.tensor=3 model.vocab_size=64 rules.residual_seq=none rules.act_heads=none rules.act_ffn=none",
            "model.vocab_size=64 does not",
        ),
        ("mesh.data=0", "mesh.data=0 must be at least 1"),
        ("mesh.tensor=-1", "only one mesh axis can be -1"),
        (
            "rules.seq=tensr",
            "rules.seq=tensr is no mesh axis; they are pipe, data, fsdp, expert, context, tensor; did you mean tensor?",
        ),
        ("rules.batch=data,data", "rules.batch=data,data names a mesh axis twice"),
        ("name=a/b", "name='a/b' must be one folder's name"),
        ("name=..", "name='..' must be one folder's name"),
        ("name=", "name='' must be one folder's name"),
        ("seed=-1", "seed=-1 must be between 0 and 4294967295"),
        ("seed=4294967296", "seed=4294967296 must be between 0 and 4294967295"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.eval_every=0", "train.eval_every=0 must be at least 1"),
        ("optim.peak_lr=-1", "optim.peak_lr=-1.0 must be at least 0"),
        ("optim.b2=1", "optim.b2=1.0 must be between 0 and 0.999999"),
        ("optim.decay_fraction=2", "optim.decay_fraction=2.0 must be between 0 and 1"),
        ("data.valid_fraction=1.5", "data.valid_fraction=1.5 must be between 0 and 1"),
        ("data.min_chars=-1", "data.min_chars=-1 must be at least 0"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        override(run, settings.split())
    assert str(error.value).startswith(message)


def test_a_mesh_that_divides_is_taken():
    assert override(run, ["mesh.tensor=2", "mesh.fsdp=4"]).mesh.tensor == 2


def test_the_rest_of_the_mesh_is_checked_when_devices_are_known():
    run.check_devices(8)
    with pytest.raises(ValueError, match=r"does not divide over mesh\.data=3 \(rules"):
        run.check_devices(3)
    with pytest.raises(ValueError, match="asks for 2 devices but 3 are here"):
        override(run, ["mesh.tensor=2"]).check_devices(3)


def test_every_rule_has_dimensions_to_check():
    rules = {field.name.removeprefix("act_") for field in dataclasses.fields(run.rules)}
    assert rules == set(split_dims(run.model, run.train))


def test_a_run_survives_json():
    mixture = (SourceConfig(path="a.txt", weight=0.1), SourceConfig())
    changed = dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(changed)))) == changed


EXPERTS = "model.num_experts=4 model.experts_per_token=2 model.expert_ffn_dim=32"
PIPE = "mesh.pipe=2 mesh.data=1"


@pytest.mark.parametrize(
    ("settings", "num_devices", "message"),
    [
        ("mesh.tensor=2 mesh.data=1", 8, "mesh tensor=2 asks for 2 devices but 8 are here; "),
        ("mesh.expert=2 mesh.data=1", 2, "mesh.expert=2 but model.num_experts=0: nobody uses rules.experts; "),
        (f"mesh.expert=8 mesh.data=1 {EXPERTS}", 8, "model.num_experts=4 does not divide over mesh.expert=8 "),
        (
            "mesh.tensor=2 model.num_experts=4 model.experts_per_token=2 model.expert_ffn_dim=33",
            2,
            "model.expert_ffn_dim=33 does not divide over mesh.tensor=2 (rules.expert_ffn)",
        ),
        (
            "mesh.pipe=2 mesh.data=1 rules.layers=none",
            2,
            "mesh.pipe=2 but no rule names pipe; bind one of rules.* to it",
        ),
        ("mesh.context=2 mesh.data=1 train.seq_len=30", 2, "train.seq_len=30 is not a multiple of 2 x 2 (rules.seq): "),
        (
            "mesh.context=4 mesh.data=1 train.seq_len=30",
            4,
            "train.seq_len=30 does not divide over mesh.context=4 (rules.seq)",
        ),
        (
            "execution.repeats=2",
            1,
            "execution.pipeline=circular, microbatches=0, repeats=2 are set but mesh.pipe=1 has ",
        ),
        (
            "execution.microbatches=2",
            1,
            "execution.pipeline=circular, microbatches=2, repeats=1 are set but mesh.pipe=1",
        ),
        (
            "execution.pipeline=1f1b",
            1,
            "execution.pipeline=1f1b, microbatches=0, repeats=1 are set but mesh.pipe=1 has ",
        ),
        (
            f"{PIPE} {EXPERTS} model.num_layers=4 model.num_dense_layers=1",
            2,
            "mesh.pipe=2 needs layers that are alike, but model.num_dense_layers=1; ",
        ),
        (f"{PIPE} model.scan_layers=false", 2, "mesh.pipe=2 needs stacked layers, but model.scan_layers=false; "),
        ("mesh.pipe=3 mesh.data=1", 3, "model.num_layers=2 does not divide over mesh.pipe=3 (rules.layers)"),
        (
            f"{PIPE} execution.repeats=2",
            2,
            "model.num_layers=2 is not a multiple of mesh.pipe=2 x execution.repeats=2: ",
        ),
        (
            f"{PIPE} execution.microbatches=3",
            2,
            "3 microbatches (execution.microbatches) must be a multiple of mesh.pipe=2",
        ),
        (
            f"{PIPE} execution.microbatches=6",
            2,
            "6 microbatches (execution.microbatches) must be a multiple of mesh.pipe=2 and divide the 8 sequences ",
        ),
        (
            "mesh.pipe=2 mesh.data=8",
            16,
            "2 microbatches (execution.microbatches) must be a multiple of mesh.pipe=2 and divide the 1 sequences ",
        ),
        (
            f"{PIPE} execution.pipeline=1f1b train.seq_len=31",
            2,
            "the 31 tokens of a sequence on one device are not a multiple of mesh.pipe=2, whose stages share the loss ",
        ),
        (
            "mesh.tensor=2 rules.heads=none",
            2,
            "rules.heads splits over () but rules.act_heads over ('tensor',): a device ",
        ),
        (
            "mesh.tensor=2 rules.act_ffn=none",
            2,
            "rules.ffn splits over ('tensor',) but rules.act_ffn over (): a device ",
        ),
        ("mesh.tensor=2 rules.vocab=none", 2, "rules.vocab splits over () but rules.act_vocab over ('tensor',): a "),
        (
            "mesh.tensor=2 mesh.context=2 rules.residual_seq=tensor,context",
            4,
            "rules.residual_seq splits over ('tensor', 'context'), which does not begin with the ('context',) of ",
        ),
    ],
)
def test_a_mesh_that_a_step_cannot_use_is_refused(settings, num_devices, message):
    with pytest.raises(ValueError) as error:
        override(run, settings.split()).on(num_devices)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_interleaved_pipe_in_turns_is_refused():
    with pytest.raises(ValueError, match=r"execution\.repeats=2 does not go with execution\.pipeline=1f1b"):
        override(run, ["execution.pipeline=1f1b", "execution.repeats=2"])


@pytest.mark.parametrize(
    ("config", "num_devices", "axes"),
    [
        (run, 1, {}),
        (run, 8, {"fsdp": 8}),
        (run, 16, {"fsdp": 8, "context": 2}),  # no more than 8 sequences to split
        (shakespeare.run, 8, {"fsdp": 8}),
        (quickstart.run, 4, {"fsdp": 4}),
        (case_a1.run, 256, {"fsdp": 256}),
        (case_c.run, 128, {"fsdp": 128}),
        (case_d.run, 64, {"fsdp": 8, "expert": 8}),
        (case_d.run, 4, {"expert": 4}),
        (case_e.run, 16, {"fsdp": 16}),
        (case_e.run, 32, {"fsdp": 16, "context": 2}),  # 16 sequences
    ],
    ids=lambda value: value.name if isinstance(value, RunConfig) else str(value),
)
def test_auto_picks_a_mesh(config, num_devices, axes):
    picked = override(config, ["mesh=auto"]).on(num_devices).mesh
    assert {axis: size for axis, size in picked.sizes(num_devices).items() if size > 1} == axes


def test_auto_keeps_all_that_is_asked_of_it():
    with pytest.raises(
        ValueError, match=r"mesh=auto finds no mesh of 7 devices that divides this run; of the simplest: "
    ):
        override(run, ["mesh=auto"]).on(7)
    ring = override(run, ["mesh=auto", "train.batch_size=2"]).on(8)
    assert ring.train.seq_len % (2 * ring.mesh.context) == 0
    assert override(run, ["mesh=auto"]).mesh.auto
    assert not override(run, ["mesh=auto"]).on(8).mesh.auto


@pytest.mark.parametrize(
    ("config", "num_devices", "kind"),
    [
        (case_a1.run, 256, "TPU v5 lite"),
        (case_c.run, 128, "TPU v5p"),
        (case_d.run, 64, "TPU v5p"),
        (run, 8, "TPU v6 lite"),
    ],
    ids=lambda value: value.name if isinstance(value, RunConfig) else str(value),
)
def test_auto_asks_the_planner_on_chips_that_it_knows(config, num_devices, kind):
    """Its mesh divides the run, is the same every time, and no slower than the simplest one by the planner's word."""
    free = override(config, ["mesh=auto"])
    picked = free.on(num_devices, kind)
    picked.check_devices(num_devices)
    assert free.on(num_devices, kind) == picked
    base = planned_candidate(free, picked.mesh)
    simple = planned_candidate(free, simplest_mesh(free, num_devices))
    question = planned_question(free, num_devices, next(chip for chip in CHIPS if kind in chip.kinds))
    assert quickest(question, [base, simple]).mesh == picked.mesh


def test_auto_is_the_simplest_mesh_where_no_chip_is_known():
    free = override(case_d.run, ["mesh=auto"])
    assert free.on(64, "cpu") == free.on(64) == free.on(64, "Unheard of")


def test_auto_puts_replicas_on_slices():
    free = override(case_d.run, ["mesh=auto"])
    assert free.on(64, "TPU v5p", 2).mesh.data % 2 == 0
